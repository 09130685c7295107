"""Federated learning in PyTorch: what a site computes in a round, and how the server steps along the mean.

FedAvg (McMahan et al. 2017, algorithm 1): a site takes local steps from the current model and contributes the
difference; FedSGD: it contributes the negative gradient over all its rows. Either way the server gets the weighted
mean update and hands its negative to a `torch.optim` optimiser as the gradient (Reddi et al. 2021, "Adaptive federated
optimization", algorithm 1).
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from msgspec import Struct
from safetensors import SafetensorError
from torch import Tensor, nn

from dp import DpError, Entropy, Unit, calibrate, calibrate_noise_multiplier
from dp.distributed import DistributedSgdPlan, ParticipantPlan, sgd_contribution, solve_participant_plan
from dp.sgd import DpSgdPlan
from dp.sgd import train as train_privately
from protocols.datasets import SiteData
from protocols.errors import DataError, StudyError
from protocols.metrics import Metrics, evaluate_scores
from protocols.study import Server, Study, Training
from secagg.errors import DecodeError, LocalProtocolError

Vector = npt.NDArray[np.float32]

# Room for the sum of participants' noisy vectors, where a study does not say how much.
PARTICIPANT_RING_BITS = 20

# What a model's own code may raise, torch's complaints about shapes and dtypes included.
_MODEL_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError)


class Update(Struct, frozen=True):
    """A site's contribution to a round of training.

    Attributes:
        values: Differences of parameters, then of averaged buffers, float32, shape [d].
        weight: Training rows, or 1 under uniform weighting.
        steps: Local steps taken, to be added to the site's count.
    """

    values: Vector
    weight: int
    steps: int


def training_device(name: str) -> torch.device:
    """The device of a study's `device`.

    Raises:
        StudyError: cuda is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise StudyError('device: expected "cpu" or "auto", as torch finds no CUDA device here, got "cuda"')
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def build_model(study: Study, features: int) -> nn.Module:
    """The study's network with its initial parameters, the same for the same seed, on the CPU.

    Args:
        study: Gives the kind of the network and the seed.
        features: Columns of a row.

    Raises:
        StudyError: A factory that cannot be imported or gives no module, or a model with buffers where the study
            refuses them.
    """
    with torch.random.fork_rng(devices=[]):
        # Not torch.manual_seed, which keeps a stack trace for devices that are not up, and more with every call.
        torch.default_generator.manual_seed(study.seed)
        model = _network(study, features)
    if study.model.buffers == "refuse" and (buffers := [name for name, _ in model.named_buffers()]):
        raise StudyError(
            f"model.buffers: the model keeps {', '.join(buffers[:3])}{', ...' if len(buffers) > 3 else ''} beside its "
            'parameters (BatchNorm statistics?), which is refused; use GroupNorm, or set model.buffers = "average" '
            "where training is not differentially private"
        )
    return model


def _network(study: Study, features: int) -> nn.Module:
    spec = study.model
    if spec.kind == "logistic":
        return nn.Linear(features, 1)
    if spec.kind == "mlp":
        widths = [features, *spec.hidden]
        layers = [layer for a, b in itertools.pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
        return nn.Sequential(*layers, nn.Linear(widths[-1], 1))
    module, _, function = (spec.factory or "").partition(":")
    try:
        factory = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise StudyError(f"model.factory: {spec.factory!r} cannot be imported: {error}") from error
    try:
        model = factory(features)
    except _MODEL_ERRORS as error:
        raise StudyError(f"model.factory: {spec.factory}({features}) raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise StudyError(f"model.factory: expected a torch.nn.Module from {spec.factory}, got {type(model).__name__}")
    return model


def model_bytes(model: nn.Module) -> bytes:
    """The model's parameters and buffers as safetensors: no pickle, the same bytes for the same values."""
    return safetensors.torch.save(
        {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    )


def load_model_bytes(model: nn.Module, data: bytes) -> None:
    """Set a model's parameters and buffers from `model_bytes`.

    Raises:
        DecodeError: Not safetensors, or tensors of other names, shapes or dtypes than the model's.
    """
    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, *_MODEL_ERRORS, OverflowError) as error:  # torch lacks number formats, and some shapes
        raise DecodeError(f"no safetensors model: {error}") from error
    own = model.state_dict()
    for name in sorted(own.keys() | tensors.keys()):
        came, want = tensors.get(name), own.get(name)
        if came is None or want is None or came.shape != want.shape or came.dtype != want.dtype:
            raise DecodeError(f"tensor {name} of the model: expected {_describe(want)}, got {_describe(came)}")
    model.load_state_dict(tensors)


def model_digest(data: bytes) -> bytes:
    """32 bytes of SHA-256 that stand for a model or other work in a session id."""
    return hashlib.sha256(data).digest()


def flatten(model: nn.Module) -> Vector:
    """All trainable parameters, then all floating-point buffers, as one float32 vector of shape [d]."""
    with torch.no_grad():
        parts = [value.detach().reshape(-1).to("cpu", torch.float32) for value in _entries(model)]
    return torch.cat(parts).numpy() if parts else np.zeros(0, np.float32)


def entry_count(model: nn.Module) -> int:
    """How many entries `flatten` has."""
    return sum(entry.numel() for entry in _entries(model))


def parameter_count(model: nn.Module) -> int:
    """How many of `flatten`'s entries are parameters; the rest are buffers."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def gradient_update(model: nn.Module, data: SiteData, device: torch.device) -> Update:
    """FedSGD: the negative gradient of the mean loss over all training rows; buffers take no part."""
    x, y = _tensors(data, device)
    model.to(device).train()
    with _model_faults(model):
        return _gradient_update(model, x, y)


def _gradient_update(model: nn.Module, x: Tensor, y: Tensor) -> Update:
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(_loss(model(x), y), parameters)
    flat = torch.cat([g.reshape(-1) for g in gradients]).cpu().numpy()
    buffers = np.zeros(flatten(model).size - flat.size, np.float32)
    return Update(np.concatenate([-flat, buffers]), len(y), 1)


def local_update(
    model: nn.Module,
    data: SiteData,
    training: Training,
    device: torch.device,
    *,
    seed: tuple[int, ...],
    steps_done: int,
) -> Update:
    """FedAvg: mini-batch SGD from the given model; the update is the model's difference.

    Args:
        model: The current global model; trained in place.
        data: The site's rows, standardised.
        training: Local steps or epochs, batch size, learning rate, momentum.
        device: Where to train.
        seed: Numbers that fix the order of the mini-batches: the study's seed and the site's number.
        steps_done: Steps that the site has taken in earlier rounds; the order goes on from there.
    """
    before = flatten(model)
    x, y = _tensors(data, device)
    model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=training.learning_rate, momentum=training.momentum)
    steps = training.local_steps
    if steps is None:
        steps = (training.local_epochs or 1) * math.ceil(data.train_rows / training.batch_size)
    with _model_faults(model):
        for rows in _batches(data.train_rows, training.batch_size, seed, steps_done, steps):
            optimizer.zero_grad()
            _loss(model(x[rows]), y[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return Update(flatten(model) - before, data.train_rows, steps)


def private_update(model: nn.Module, data: SiteData, study: Study, plan: DpSgdPlan, entropy: Entropy) -> Update:
    """FedAvg or FedSGD with DP-SGD at the site: the same differences, from clipped and noisy gradients.

    The caller has charged `plan.mechanism()` before.
    """
    before = flatten(model)
    x, y = _tensors(data, training_device(study.device))
    model.to(x.device)
    with _model_faults(model):
        train_privately(model, x, y, _loss_per_row, plan, entropy)
    return Update(flatten(model) - before, data.train_rows, plan.steps)


def local_plan(study: Study) -> DpSgdPlan | None:
    """One round's DP-SGD at a site, with the least noise that keeps the study's epsilon; None where there is none.

    FedSGD is one step of rate 1, which makes the difference the negative gradient.
    """
    privacy, fedsgd = study.privacy, study.training.algorithm == "fedsgd"
    if not study.private or study.distributed:
        return None
    noise, steps = privacy.noise_multiplier, study.local_steps or 1
    if noise is None:
        noise = calibrate_noise_multiplier(
            privacy.epsilon or 0.0,
            privacy.delta or 0.0,
            privacy.sampling_rate or 0.0,
            study.rounds * steps,
            privacy.relation,
        )
    return DpSgdPlan(
        sampling_rate=privacy.sampling_rate or 1.0,
        steps=steps,
        noise_multiplier=noise,
        l2_clip_norm=study.privacy.l2_clip_norm,
        learning_rate=1.0 if fedsgd else study.training.learning_rate,
        momentum=study.training.momentum,
    )


def distributed_plan(study: Study, dimension: int) -> DistributedSgdPlan | ParticipantPlan | None:
    """One round's sum with shared noise, with the least that keeps the study's epsilon; None where none is shared.

    Shares are for the threshold of survivors less the colluders, so that no drop-out weakens the guarantee.

    Raises:
        StudyError: A grid too coarse for so many parameters, or an epsilon that no noise reaches.
    """
    if not study.distributed:
        return None
    privacy = study.privacy
    if study.unit is Unit.PARTICIPANT:
        try:
            return solve_participant_plan(
                ring_bits=study.protocol.ring_bits or PARTICIPANT_RING_BITS,
                shares=len(study.sites),
                dimension=dimension,
                l2_clip_norm=privacy.l2_clip_norm,
                epsilon=privacy.epsilon or 0.0,
                delta=privacy.delta or 0.0,
                steps=study.rounds,
                threshold=study.threshold,
                colluders=privacy.colluders,
                relation=privacy.relation,
            )
        except DpError as error:
            raise StudyError(f"privacy: {error}") from error

    def plan(noise_multiplier: float) -> DistributedSgdPlan:
        return DistributedSgdPlan(
            sampling_rate=privacy.sampling_rate or 1.0,
            noise_multiplier=noise_multiplier,
            l2_clip_norm=privacy.l2_clip_norm,
            grid=privacy.grid,
            dimension=dimension,
            shares=len(study.sites),
            threshold=study.threshold,
            colluders=privacy.colluders,
        )

    try:
        if privacy.noise_multiplier is not None:
            return plan(privacy.noise_multiplier)
        return plan(
            calibrate(
                lambda noise: plan(noise).mechanism(study.rounds),
                privacy.epsilon or 0.0,
                privacy.delta or 0.0,
                privacy.relation,
            )
        )
    except DpError as error:
        raise StudyError(f"privacy: {error}") from error


def rotation_seed(work_digest: bytes) -> bytes:
    """32 public bytes for the signs by which all participants of a round turn their vectors before rounding."""
    return hashlib.sha256(b"secagg rotation\0" + work_digest).digest()


def distributed_contribution(
    model: nn.Module, data: SiteData, study: Study, plan: DistributedSgdPlan, entropy: Entropy
) -> npt.NDArray[np.int64]:
    """The site's whole numbers for one step: its drawn records' clipped gradients, rounded, and its share of the noise.

    The caller has charged `plan.mechanism()` before.

    Returns:
        Shape [d], as `flatten` lays parameters out; signed, and not reduced to any ring.
    """
    x, y = _tensors(data, training_device(study.device))
    model.to(x.device)
    with _model_faults(model):
        return sgd_contribution(model, x, y, _loss_per_row, plan, entropy)


def evaluate(model: nn.Module, data: SiteData, device: torch.device) -> Metrics:
    """The model on a site's test rows."""
    model.to(device).eval()
    with torch.no_grad(), _model_faults(model):
        x = torch.from_numpy(np.array(data.test_x)).to(device)
        return evaluate_scores(data.test_y, torch.sigmoid(model(x).reshape(-1)).double().cpu().numpy())


class ServerOptimizer:
    """Steps the global model along the mean update with any `torch.optim` optimiser.

    Raises:
        StudyError: No optimiser of that name, or one that does not take the options.
    """

    def __init__(self, model: nn.Module, server: Server) -> None:
        kind: Any = getattr(torch.optim, server.optimizer, None)
        known = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
        if not known or server.optimizer in ("Optimizer", "LBFGS"):
            raise StudyError(
                f"server.optimizer: expected a first-order optimiser of torch.optim, got {server.optimizer!r}"
            )
        self._model = model
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        make: Callable[..., torch.optim.Optimizer] = kind
        try:
            self._optimizer: torch.optim.Optimizer = make(self._parameters, lr=server.learning_rate, **server.options)
        except (TypeError, ValueError) as error:
            raise StudyError(f"server.options: {server.optimizer} does not take {server.options}: {error}") from error
        trial = [nn.Parameter(p.detach().clone()) for p in self._parameters]
        for parameter in trial:
            parameter.grad = torch.zeros_like(parameter)
        try:
            make(trial, lr=server.learning_rate, **server.options).step()
        except _MODEL_ERRORS as error:
            raise StudyError(f"server.optimizer: {server.optimizer} cannot step this model: {error}") from error

    def step(self, mean_update: npt.NDArray[np.float64]) -> None:
        """Apply a mean update of shape [d], laid out as by `flatten`; buffers move by it directly.

        Raises:
            LocalProtocolError: Another length, or an entry that is not finite; the model stays as it was.
        """
        entries = _entries(self._model)
        size = sum(entry.numel() for entry in entries)
        if mean_update.shape != (size,) or not np.isfinite(mean_update).all():
            raise LocalProtocolError(f"expected a finite mean update of shape ({size},), got {mean_update.shape}")
        before = [entry.detach().clone() for entry in entries], copy.deepcopy(self._optimizer.state_dict())
        with torch.no_grad():
            start = 0
            for entry in entries:
                part = torch.from_numpy(mean_update[start : start + entry.numel()]).reshape(entry.shape).to(entry.dtype)
                if isinstance(entry, nn.Parameter):
                    entry.grad = -part
                else:
                    entry.add_(part)
                start += entry.numel()
        self._optimizer.step()
        self._optimizer.zero_grad()
        if not all(bool(torch.isfinite(entry).all()) for entry in entries):
            with torch.no_grad():
                for entry, old in zip(entries, before[0], strict=True):
                    entry.copy_(old)
            self._optimizer.load_state_dict(before[1])
            raise LocalProtocolError(
                "the step would make the model infinite; it was not taken: lower the learning rate"
            )

    @property
    def state(self) -> bytes:
        """What the optimiser remembers of its steps, as safetensors."""
        tensors = {
            f"{number}.{name}": value.detach().contiguous()
            for number, remembered in self._optimizer.state_dict()["state"].items()
            for name, value in remembered.items()
            if isinstance(value, Tensor)
        }
        return safetensors.torch.save(tensors)

    def resume(self, state: bytes) -> None:
        """Go on from the `state` of an optimiser of the same study.

        Raises:
            DecodeError: Not such a state.
        """
        remembered: dict[int, dict[str, Tensor]] = {}
        try:
            for path, value in safetensors.torch.load(state).items():
                number, _, name = path.partition(".")
                remembered.setdefault(int(number), {})[name] = value
            groups = self._optimizer.state_dict()["param_groups"]
            self._optimizer.load_state_dict({"state": remembered, "param_groups": groups})
        except (SafetensorError, *_MODEL_ERRORS) as error:
            raise DecodeError(f"no state of a {type(self._optimizer).__name__} over this model: {error}") from error


@contextmanager
def _model_faults(model: nn.Module) -> Iterator[None]:
    """What a model's code raises, as an error of ours."""
    try:
        yield
    except _MODEL_ERRORS as error:
        raise DataError(f"the model {type(model).__name__} raised {type(error).__name__}: {error}") from error


def _entries(model: nn.Module) -> list[Tensor]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [*parameters, *(b for b in model.buffers() if b.is_floating_point())]


def _tensors(data: SiteData, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(np.array(data.train_x)).to(device), torch.from_numpy(np.array(data.train_y)).to(device)


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(output.reshape(-1), target)


def _loss_per_row(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(output.reshape(-1), target, reduction="none")


def _batches(rows: int, size: int, seed: tuple[int, ...], start: int, count: int) -> Iterator[npt.NDArray[np.int64]]:
    """Mini-batches number `start` to `start + count` of an endless walk over shuffled epochs."""
    per_epoch = math.ceil(rows / size)
    order, drawn = np.zeros(0, np.int64), -1
    for step in range(start, start + count):
        epoch, place = divmod(step, per_epoch)
        if epoch != drawn:
            order, drawn = np.random.default_rng([*seed, epoch]).permutation(rows), epoch
        yield order[place * size : (place + 1) * size]


def _describe(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
