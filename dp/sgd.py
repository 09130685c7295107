"""DP-SGD on one site's records (Abadi et al. 2016, Algorithm 1), with Opacus for the gradients of single records.

Opacus' own engine is not used. It forgets the account when it is made anew each round, draws noise from torch's
generator, which two sites may have seeded alike, counts steps from a rounded rate, and leaves hooks and renamed
parameters behind. Its per-record gradients are good; sampling, clipping, noise and counting are done here.

Terms of a loss that hang on the parameters and not on a record (FedProx, SCAFFOLD) do not belong in `loss`: per-record
gradients do not see them. Apply them after `train`, as post-processing.
"""

from __future__ import annotations

import copy
import inspect
import logging
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dp.csprng import Csprng, Entropy
from dp.errors import DpError, ParameterError, UnsupportedModel
from dp.mechanisms import PoissonSampledGaussian, check_count, check_positive

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from opacus.grad_sample import GradSampleHooks

Loss = Callable[[Tensor, Tensor], Tensor]

_GRADIENT_FLOATS = 1 << 22  # per-record gradients held at a time: larger is slower, as they leave the cache
_PROBED = 8  # records on which independence of each other is tried


class DpSgdPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How one site trains in one round; fixed and accounted before it begins.

    Attributes:
        sampling_rate: Chance of each record to be in each step, more than 0 and at most 1.
        steps: Number of steps, at least 0.
        noise_multiplier: Standard deviation of the noise on the sum of clipped gradients, over `l2_clip_norm`.
        l2_clip_norm: The longest gradient of one record, over all trainable parameters together; positive.
        learning_rate: Of plain SGD, positive.
        grad_sample_mode: `hooks` uses Opacus' formulas for known layers and functorch for others; `functorch` uses the
            latter throughout.
        momentum: Of SGD, at least 0 and less than 1; starts at rest in every call of `train`.

    Raises:
        ParameterError: A field is out of its range.
    """

    sampling_rate: float
    steps: int
    noise_multiplier: float
    l2_clip_norm: float
    learning_rate: float
    grad_sample_mode: Literal["hooks", "functorch"] = "hooks"
    momentum: float = 0.0

    def __post_init__(self) -> None:
        check_positive("learning_rate", self.learning_rate)
        if self.grad_sample_mode not in ("hooks", "functorch"):
            raise ParameterError(f"grad_sample_mode should be 'hooks' or 'functorch', is {self.grad_sample_mode!r}")
        if self.momentum != 0.0:
            check_positive("momentum", self.momentum)
            if self.momentum >= 1.0:
                raise ParameterError(f"momentum should be less than 1, is {self.momentum!r}")
        self.mechanism()

    def mechanism(self) -> PoissonSampledGaussian:
        """Gives what a run of this plan releases, for the account."""
        return PoissonSampledGaussian(
            sampling_rate=self.sampling_rate,
            noise_multiplier=self.noise_multiplier,
            steps=self.steps,
            l2_clip_norm=self.l2_clip_norm,
        )


class DpSgdReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a run did. It tells nothing about the records, and may leave the site.

    Attributes:
        steps: Steps taken; one whose draw was empty adds its noise and counts. How many those were is not said, because
            amplification by sampling needs the draw to stay secret.
        mechanism: What was released, for the account.
    """

    steps: int
    mechanism: PoissonSampledGaussian


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Loss,
    plan: DpSgdPlan,
    entropy: Entropy,
    *,
    public_size: int | None = None,
) -> DpSgdReport:
    """Trains a model in place, so that the parameters it ends with satisfy `plan.mechanism()`'s guarantee.

    Each step draws every record by its own coin (Poisson sampling), sums the clipped gradients in float64, adds
    N(0, (noise_multiplier l2_clip_norm)^2) to every coordinate of the sum, and divides by the expected size of a draw,
    a constant; the size drawn stays secret. The privacy unit is one record. The relation is the one that the mechanism
    is accounted under; under add-or-remove-one, pass `public_size` where the number of records is itself a secret.

    Only parameters that require gradients are trained. Whatever happens, the model comes back with the attributes and
    keys it had, and free of hooks; after an error, with its old parameters as well. An error says something about the
    records: it is for the site's own eyes. With equal entropy, and without dropout, the result is equal to the bit on
    the same machine.

    Args:
        model: Parameters in float32 on x's device; no buffers, no layer that mixes records.
        x: Records, (n, ...), on any device.
        y: Targets, (n, ...), on x's device.
        loss: A torch loss module or function (anything with `reduction`), or a callable that gives one loss per record,
            (b,). Only per-record losses are used; a record's own loss is the mean over its further axes.
        plan: What to do.
        entropy: Called once for 32 fresh secret bytes, from which all coins and noise come.
        public_size: The number of records that a draw's expected size is reckoned from. None takes n, and thereby makes
            n public.

    Returns:
        What was done.

    Raises:
        UnsupportedModel: The model has a part that clipping per record cannot bound.
        ParameterError: x, y, the loss or the sizes do not fit together.
        DpError: A loss or gradient is not finite. Nothing is clipped then: a NaN stays NaN under clipping.
    """
    size = len(x) if public_size is None else public_size
    check_count("public_size", size)
    if len(x) != len(y) or size == 0:
        raise ParameterError(f"x and y should have equally many records, at least one: {len(x)}, {len(y)}, size {size}")
    parameters = _trainable(model, x.device)
    per_record = _per_record(loss)
    generator = Csprng(entropy)
    before = [p.detach().clone() for p in parameters]
    deviation = plan.noise_multiplier * plan.l2_clip_norm
    velocity: Tensor | float = 0.0
    try:
        with _prepared(model, plan.grad_sample_mode):
            _refuse_mixing(model, per_record, x, y)
            for _ in range(plan.steps):
                drawn = np.flatnonzero(generator.bernoulli(len(x), plan.sampling_rate))
                total = _clipped_sum(model, parameters, per_record, x, y, drawn, plan.l2_clip_norm)
                noisy = total.cpu() + torch.from_numpy(_noise(generator, total.numel(), deviation))
                velocity = plan.momentum * velocity + noisy / (plan.sampling_rate * size)
                _descend(parameters, plan.learning_rate * velocity)
    except BaseException:
        # What a failed run has done so far was not released, and must not be by accident.
        with torch.no_grad():
            for p, old in zip(parameters, before, strict=True):
                p.copy_(old)
        raise
    return DpSgdReport(steps=plan.steps, mechanism=plan.mechanism())


def clipped_gradients(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Loss,
    drawn: NDArray[np.intp],
    clip: float,
    dimension: int,
    grad_sample_mode: Literal["hooks", "functorch"],
) -> Generator[NDArray[np.float64], None, None]:
    """Gives the drawn records' clipped gradients, for `dp.distributed`. They are secret; the model stays as it was.

    Args:
        model: As for `train`.
        x: As for `train`.
        y: As for `train`.
        loss: As for `train`.
        drawn: Which records, by their place in x.
        clip: The longest gradient of one record, up to rounding in float64.
        dimension: How many trainable numbers the model should have.
        grad_sample_mode: As in `DpSgdPlan`.

    Yields:
        Some records' gradients, (b, dimension), in the order of the model's parameters.

    Raises:
        UnsupportedModel: The model has a part that clipping per record cannot bound.
        ParameterError: x, y, the loss or the sizes do not fit together.
        DpError: A loss or gradient is not finite.
    """
    if len(x) != len(y):
        raise ParameterError(f"x and y should have equally many records: {len(x)}, {len(y)}")
    parameters = _trainable(model, x.device)
    if dimension != (d := sum(p.numel() for p in parameters)):
        raise ParameterError(f"the plan is for a model of {dimension} trainable numbers; this one has {d}")
    per_record = _per_record(loss)
    with _prepared(model, grad_sample_mode):
        _refuse_mixing(model, per_record, x, y)
        for gradients, factor in _clipping(model, parameters, per_record, x, y, drawn, clip):
            yield torch.cat([factor[:, None] * g.double() for g in gradients], dim=1).cpu().numpy()


def _clipped_sum(
    model: nn.Module,
    parameters: list[nn.Parameter],
    per_record: Loss,
    x: Tensor,
    y: Tensor,
    drawn: NDArray[np.intp],
    clip: float,
) -> Tensor:
    """Sums the drawn records' clipped gradients: (d,), float64, on x's device; one record moves it by at most `clip`.

    In float64, because rounding in a float32 sum depends on the record too, and its effect is not bounded by `clip`
    (Casacuberta et al. 2022, "Widespread underestimation of sensitivity").
    """
    d = sum(p.numel() for p in parameters)
    total = torch.zeros(d, dtype=torch.float64, device=x.device)
    for gradients, factor in _clipping(model, parameters, per_record, x, y, drawn, clip):
        total += torch.cat([factor @ g.double() for g in gradients])
    return total


def _clipping(
    model: nn.Module,
    parameters: list[nn.Parameter],
    per_record: Loss,
    x: Tensor,
    y: Tensor,
    drawn: NDArray[np.intp],
    clip: float,
) -> Iterator[tuple[list[Tensor], Tensor]]:
    """Gives the drawn records' gradients, some at a time: for every parameter (b, its size); and their clip factors."""
    d = sum(p.numel() for p in parameters)
    for start in range(0, len(drawn), max(1, _GRADIENT_FLOATS // d)):
        records = torch.from_numpy(drawn[start : start + max(1, _GRADIENT_FLOATS // d)]).to(x.device)
        gradients = _gradients(model, parameters, per_record, x[records], y[records])
        norms = torch.stack([torch.linalg.vector_norm(g, dim=1, dtype=torch.float64) for g in gradients])
        norm = torch.linalg.vector_norm(norms, dim=0)
        if not bool(torch.isfinite(norm).all()):
            raise DpError(
                "the gradient of a record is not finite; scale the features, or check them for extreme values"
            )
        yield gradients, (clip / norm).clamp(max=1.0)  # a gradient of zero has clip / 0 = inf, hence factor 1


def _gradients(
    model: nn.Module, parameters: list[nn.Parameter], per_record: Loss, x: Tensor, y: Tensor
) -> list[Tensor]:
    """Takes the gradient of each record's loss: for every parameter (b, its size)."""
    losses = per_record(model(x), y)
    if not bool(torch.isfinite(losses).all()):
        raise DpError("the loss of a record is not finite; check the features for NaN, and the learning rate")
    with warnings.catch_warnings():
        # Says that x itself has no gradient. It need not.
        warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
        losses.sum().backward()  # type: ignore[no-untyped-call]
    gradients = []
    for p in parameters:
        sample, p.grad_sample, autograd, p.grad = p.grad_sample, None, p.grad, None  # type: ignore[attr-defined]
        if sample is None and (autograd is None or not bool(autograd.any())):
            sample = torch.zeros((len(x), *p.shape), device=x.device)  # the loss does not hang on it
        if not isinstance(sample, Tensor) or sample.shape != (len(x), *p.shape):
            raise UnsupportedModel(
                f"a parameter of shape {tuple(p.shape)} has no gradient per record: use it only through its layer's "
                "call, and keep records along axis 0"
            )
        gradients.append(sample.detach().reshape(len(x), -1))
    return gradients


def _noise(generator: Csprng, n: int, deviation: float) -> NDArray[np.float64]:
    """Draws (n,) Gaussians, each from four: one draw's float64 grid gives the data away (Mironov 2012).

    Which values a sum of several can take is too rich to invert (Holohan and Braghin 2021, "Secure random sampling in
    differential privacy"; Opacus' `secure_mode` does the same).
    """
    total = np.zeros(n)
    for _ in range(4):
        total += generator.gaussian(n)
    return total * (deviation / 2.0)


@torch.no_grad()
def _descend(parameters: list[nn.Parameter], change: Tensor) -> None:
    start = 0
    for p in parameters:
        p.sub_(change[start : start + p.numel()].reshape(p.shape).to(device=p.device, dtype=p.dtype))
        start += p.numel()


def _per_record(loss: Loss) -> Loss:
    """Turns a loss into one that gives (b,), whatever reduction it was made with."""
    if hasattr(loss, "reduction"):
        unreduced = copy.copy(loss)
        unreduced.reduction = "none"
    elif "reduction" in _parameter_names(loss):

        def unreduced(output: Tensor, target: Tensor) -> Tensor:
            return loss(output, target, reduction="none")  # type: ignore[call-arg]

    else:
        unreduced = loss

    def per_record(output: Tensor, target: Tensor) -> Tensor:
        with warnings.catch_warnings():
            # A target that broadcasts against every record's output is refused below, with a way out.
            warnings.filterwarnings("ignore", message="Using a target size", category=UserWarning)
            losses = unreduced(output, target)
        if losses.shape not in ((len(output),), output.shape, target.shape) or losses.ndim == 0:
            raise ParameterError(
                f"the loss should give one value per record, ({len(output)},), and gave {tuple(losses.shape)} for "
                f"output {tuple(output.shape)} and target {tuple(target.shape)}; use a loss with a "
                "`reduction` or without any mean, and give both the same shape"
            )
        return losses.flatten(1).mean(1) if losses.ndim > 1 else losses

    return per_record


def _parameter_names(function: Loss) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(function).parameters)
    except ValueError:  # built in C, without a signature
        return frozenset()


def _trainable(model: nn.Module, device: torch.device) -> list[nn.Parameter]:
    """Checks the model's parts, and gives the parameters to train."""
    for name, module in model.named_modules():
        called = f"{name or 'the model'} ({type(module).__name__})"
        if hasattr(module, "autograd_grad_sample_hooks"):
            raise UnsupportedModel(f"{called} already carries Opacus hooks; pass the plain model")
        if isinstance(module, _BatchNorm):
            raise UnsupportedModel(f"{called} mixes the records of a batch; use torch.nn.GroupNorm instead")
        if buffers := [key for key, _ in module.named_buffers(recurse=False)]:
            raise UnsupportedModel(
                f"{called} has buffers {buffers}, which would leave the site without noise; remove them"
            )
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise UnsupportedModel("the model has no parameter that requires a gradient")
    for name, p in model.named_parameters():
        if p.requires_grad and (p.dtype != torch.float32 or p.device != device):
            raise UnsupportedModel(f"{name} should be float32 on x's device {device}, is {p.dtype} on {p.device}")
    return parameters


@contextmanager
def _prepared(model: nn.Module, mode: str) -> Iterator[None]:
    """Puts Opacus' hooks on a model in training mode, and takes every trace of them off again.

    Attributes that a forward has set on a module are taken off too: they may hold activations of records.
    """
    attributes = {module: dict(module.__dict__) for module in model.modules()}
    model.train()
    hooks = None
    try:
        hooks = _hook(model, mode)
        yield
    finally:
        if hooks is not None:
            hooks.cleanup()
        for module, had in attributes.items():
            module.__dict__.clear()
            module.__dict__.update(had)
        for p in model.parameters():
            p.grad = None


def _hook(model: nn.Module, mode: str) -> GradSampleHooks:
    had_handlers = list(logging.root.handlers)
    from opacus.grad_sample import GradSampleHooks  # slow to load: only those who train pay
    from opacus.validators import ModuleValidator

    # Opacus configures the root logger when it is imported, which is the application's to do.
    logging.root.handlers[:] = had_handlers
    for name, module in model.named_modules():
        check = ModuleValidator.VALIDATORS.get(type(module))
        if check is not None and (errors := check(module)):
            raise UnsupportedModel(f"{name or 'the model'} ({type(module).__name__}): {errors[0]}")
    try:
        return GradSampleHooks(model, loss_reduction="sum", force_functorch=mode == "functorch")
    except (NotImplementedError, ValueError) as error:
        raise UnsupportedModel(f"Opacus cannot take gradients per record of this model: {error}") from error


@torch.no_grad()
def _refuse_mixing(model: nn.Module, per_record: Loss, x: Tensor, y: Tensor) -> None:
    """Refuses a model or loss in which one record changes another's loss; clipping would not bound its influence.

    A probe on the first few records, with dropout off. It finds a mean over the batch, in a forward or in a loss; it
    proves nothing about a model that sets out to deceive.
    """
    model.eval()
    together = per_record(model(x[:_PROBED]), y[:_PROBED])
    alone = [per_record(model(x[i : i + 1]), y[i : i + 1]) for i in range(len(together))]
    model.train()
    if alone and not torch.allclose(together, torch.cat(alone), rtol=1e-3, atol=1e-5, equal_nan=True):
        raise UnsupportedModel("the loss of a record changes with the other records of its batch; keep records apart")
