"""A study as a file: `study.toml`, decoded strictly into frozen values.

Whatever is wrong with the file comes out as one `StudyError` line: the path in the file, what was expected and what
came. The study without its data paths is what all sites must agree on; its digest is in every mask.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Literal

import msgspec

from dp import Relation, Unit
from protocols.errors import StudyError
from protocols.toml_file import Section, parse, read_text
from secagg.ckks.params import STATISTICAL_SECURITY, Keys
from secagg.errors import HeadroomError, LocalProtocolError
from secagg.fixed_point import FixedPoint, plan
from secagg.masking.params import Mode, least_threshold

FORMAT = 1
DEMO_TEXT = files("protocols").joinpath("data/demo.toml").read_text(encoding="utf-8")
"""The study file of `secagg demo`."""


class SiteEntry(Section, frozen=True):
    """A participating site.

    Attributes:
        name: Unique; letters, digits, `_`, `-` and `.`.
        data: Path of its CSV or Parquet file, relative to the study file. Only for `task.data = "csv"`, and only where
            the whole study runs on one machine; it is no part of what the sites agree on.
    """

    name: str
    data: str | None = None


class Task(Section, frozen=True):
    """What is learned from what: binary classification of table rows.

    Attributes:
        data: "heart-disease" (shipped; sites cleveland, hungarian, switzerland, va) or "csv".
        preprocessing: Of heart disease: "full" (920 rows, missing flags) or "flamby" (740 rows, 13 features).
        standardize: "public" (published constants, heart disease only), "global" (mean and deviation over all sites,
            by a secure sum before the first round), "site" (each its own) or "none". Under differential privacy
            only "public" and "none": the others depend on the records outside the account.
        features: Of csv: the columns to learn from, in this order.
        target: Of csv: the column with the class, 0 or 1.
        test_fraction: Share of each site's rows that is held out.
        split_seed: Seed of that split.
    """

    data: Literal["heart-disease", "csv"] = "heart-disease"
    preprocessing: Literal["full", "flamby"] = "full"
    standardize: Literal["public", "global", "site", "none"] = "none"
    features: tuple[str, ...] = ()
    target: str | None = None
    test_fraction: float = 0.34
    split_seed: int = 43


class Model(Section, frozen=True):
    """The network. Its output is one logit for each row.

    Attributes:
        kind: "logistic", "mlp" (ReLU layers as wide as `hidden`) or "factory".
        hidden: Widths of the hidden layers of an mlp.
        factory: Of kind "factory": "package.module:function", called with the number of features, gives a
            `torch.nn.Module`. The module must be installed at every site.
        buffers: Buffers that are no parameters, such as BatchNorm statistics: "refuse" a model that has any, or
            "average" them with the same weights as the parameters. Under differential privacy always refused.
    """

    kind: Literal["logistic", "mlp", "factory"] = "logistic"
    hidden: tuple[int, ...] = (16,)
    factory: str | None = None
    buffers: Literal["refuse", "average"] = "refuse"


class Training(Section, frozen=True):
    """What a site does in one round.

    Attributes:
        algorithm: "fedavg" (local steps, then the difference of the models) or "fedsgd" (one gradient over all of a
            site's training rows).
        local_epochs: Passes over the training rows a round; or
        local_steps: mini-batch steps a round. Exactly one of the two for fedavg, none for fedsgd. Under differential
            privacy an epoch is 1 / sampling_rate steps.
        batch_size: Rows in a mini-batch; the last of an epoch may be smaller. Not used under differential privacy.
        learning_rate: Of local SGD.
        momentum: Of local SGD, from rest every round.
        weighting: "records" (a site weighs as many as it has training rows) or "uniform".
    """

    algorithm: Literal["fedavg", "fedsgd"] = "fedavg"
    local_epochs: int | None = None
    local_steps: int | None = None
    batch_size: int = 32
    learning_rate: float = 0.1
    momentum: float = 0.0
    weighting: Literal["records", "uniform"] = "records"


class Server(Section, frozen=True):
    """How the server steps along the mean update.

    Attributes:
        optimizer: Name of a `torch.optim` optimiser; it sees the negative mean update as the gradient.
        learning_rate: Its learning rate; 1.0 with SGD is plain federated averaging.
        options: Its further arguments, such as `momentum` or `betas`.
    """

    optimizer: str = "SGD"
    learning_rate: float = 1.0
    options: dict[str, float | bool | tuple[float, ...]] = msgspec.field(default_factory=dict)


class Protocol(Section, frozen=True):
    """How updates are summed.

    Attributes:
        aggregation: "masked" or "ckks" (nobody sees a single update), or "plain" (the server sees all of them: protects
            nothing).
        keys: Of CKKS sums, who can decrypt: "threshold" (nobody; all sites together, and `threshold` of them for those
            who left), "holder" (one party that is neither a site nor the server), or "shared" (every site: for
            comparison only, as each can read any upload that it gets hold of).
        holder: Name of that party on the roster, with keys = "holder".
        statistical_security: Of CKKS sums, bits by which the noise of a decryption hides the key.
        sum_error: Of CKKS sums, the largest error of an entry of a sum of updates, in units of 2^-fraction_bits; 0 for
            exact sums. The sum of weights is exact in any case.
        mode: "active" (a server that lies is caught) or "semi-honest" (it is trusted to follow the protocol).
        threshold: How many sites must stay to the end of a round; by default the least that the mode allows.
        max_update: Largest absolute value of an entry of an update; larger ones are clipped.
        max_weight: Most training rows of a site.
        fraction_bits: f: weighted updates are rounded, without bias, to multiples of 2^-f.
        ring_bits: Ring of the sum; by default the smallest that cannot wrap.
        max_failed_rounds: Give up after so many lost rounds in a row.
    """

    aggregation: Literal["masked", "ckks", "plain"] = "masked"
    keys: Keys = "threshold"
    holder: str | None = None
    statistical_security: int = STATISTICAL_SECURITY
    sum_error: float = 0.0
    mode: Mode = "active"
    threshold: int | None = None
    max_update: float = 4.0
    max_weight: int = 10_000
    fraction_bits: int = 16
    ring_bits: int | None = None
    max_failed_rounds: int = 3


class Privacy(Section, frozen=True):
    """What is promised to a record.

    Attributes:
        mechanism: "none"; "local-sgd": every site runs DP-SGD on its own records, so that the guarantee holds against
            everyone outside the site, the other sites and the server included; "distributed-sgd": each round is one
            step of DP-SGD over all sites' records, every site adds a share of the noise, and the sum that the server
            opens has as much as one trusted party would add. It holds as long as the secure sum does.
            "distributed-participant": every site is one participant, whose whole update is what is protected; its noise
            is shared likewise.
        unit: Whose privacy: "record", or "participant" with distributed-participant.
        relation: "add-or-remove-one" or "replace-one".
        epsilon: The budget for the whole study. Training stops before a round that would exceed it.
        delta: Chance with which the bound may fail; below one over the number of records.
        noise_multiplier: Deviation of the noise over the clip norm. By default the least that reaches `epsilon` in
            the study's rounds.
        l2_clip_norm: Longest gradient of one record; with distributed-participant, longest update.
        sampling_rate: Chance of a record to be in a step, the same at every site.
        records: Training rows of all sites together, or about; public. Only for distributed-sgd, whose mean gradient
            is the sum over the expected draw, this times the sampling rate.
        grid: Steps from 0 to the clip norm to which every record's gradient is rounded, for distributed-sgd.
        colluders: Sites whose shares of the noise are taken to be known to whoever looks, where it is shared.
    """

    mechanism: Literal["none", "local-sgd", "distributed-sgd", "distributed-participant"] = "none"
    unit: Unit | None = None
    relation: Relation = Relation.ADD_OR_REMOVE_ONE
    epsilon: float | None = None
    delta: float | None = None
    noise_multiplier: float | None = None
    l2_clip_norm: float = 1.0
    sampling_rate: float | None = None
    records: int | None = None
    grid: int = 1 << 18
    colluders: int = 0


class Study(Section, frozen=True):
    """A whole study; see the attributes of each table.

    Attributes:
        name: For people, and for the run's folder.
        rounds: Rounds of training.
        seed: Of the initial model and the order of mini-batches. Never of anything that must stay secret.
        device: Where training runs: "cpu", "cuda", or "auto" (cuda where there is one). Cryptography is on the CPU.
        sites: At least three.
    """

    name: str
    rounds: int
    sites: tuple[SiteEntry, ...]
    seed: int = 0
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    task: Task = Task()
    model: Model = Model()
    training: Training = Training(local_epochs=1)
    server: Server = Server()
    protocol: Protocol = Protocol()
    privacy: Privacy = Privacy()

    def __post_init__(self) -> None:
        _check(self)

    @property
    def site_names(self) -> tuple[str, ...]:
        """All sites in the order of the roster."""
        return tuple(sorted(site.name for site in self.sites))

    @property
    def threshold(self) -> int:
        """How many sites must stay in a round."""
        if self.protocol.aggregation == "plain":
            return self.protocol.threshold or 1
        return self.protocol.threshold or least_threshold(len(self.sites), self.protocol.mode)

    @property
    def colluders(self) -> int:
        """How many sites may help the server without its learning another's update; meaningless for a plain sum.

        Where every site has the key, none. Where a holder has it, who must not help the server, as otherwise.

        Active: a server that shows different survivors to different sites needs 2 t sites to answer, of which those
        who help it count twice, so c < 2 t - n. Semi-honest: c < t. Two sites must stay that do not help.
        """
        n, t = len(self.sites), self.threshold
        if self.protocol.keys == "shared":
            return 0
        return min(n - 2, 2 * t - n - 1 if self.protocol.mode == "active" else t - 1)

    @property
    def private(self) -> bool:
        """Whether training is differentially private."""
        return self.privacy.mechanism != "none"

    @property
    def distributed(self) -> bool:
        """Whether the noise is added inside the secure sum."""
        return self.privacy.mechanism in ("distributed-sgd", "distributed-participant")

    @property
    def unit(self) -> Unit:
        """Whose privacy the study's epsilon is about."""
        return Unit.PARTICIPANT if self.privacy.mechanism == "distributed-participant" else Unit.RECORD

    @property
    def fixed_point(self) -> FixedPoint:
        """How updates become ring elements."""
        p = self.protocol
        weight = p.max_weight if self.training.weighting == "records" else 1
        return plan(len(self.sites), p.max_update, weight, fraction_bits=p.fraction_bits, ring_bits=p.ring_bits)

    @property
    def local_steps(self) -> int | None:
        """Steps a round that do not depend on a site's number of rows, or None (epochs without sampling rate)."""
        if self.training.algorithm == "fedsgd":
            return 1
        if self.training.local_steps is not None:
            return self.training.local_steps
        if self.private and self.privacy.sampling_rate and self.training.local_epochs:
            return max(1, round(self.training.local_epochs / self.privacy.sampling_rate))
        return None

    @property
    def digest(self) -> bytes:
        """32 bytes of SHA-256 over all that the sites must agree on (not where each keeps its data)."""
        # As values and not as a `Study`, which would be checked once more.
        agreed = msgspec.to_builtins(self) | {"sites": [{"name": name, "data": None} for name in self.site_names]}
        return hashlib.sha256(b"secagg study %d\0" % FORMAT + msgspec.msgpack.encode(agreed, order="sorted")).digest()


def load_study(path: str | Path) -> Study:
    """Read a study file.

    Raises:
        StudyError: The file is missing, is no TOML, or asks for what cannot be.
    """
    return parse_study(read_text(path, StudyError), name=str(path))


def parse_study(text: str, *, name: str = "study.toml") -> Study:
    """A study from the text of its file; `name` is the file's, for messages.

    Raises:
        StudyError: As `load_study`.
    """
    return parse(text, Study, name=name, error_type=StudyError)


def demo_study() -> Study:
    """The study of `secagg demo`, which ships with the package: four hospitals, heart disease, DP-SGD."""
    return parse_study(DEMO_TEXT, name="demo.toml")


def _refuse(path: str, expected: str, came: object) -> None:
    raise StudyError(f"{path}: expected {expected}, got {came!r}")


def _check(study: Study) -> None:
    """Everything that one field's type cannot say."""
    _check_size("", msgspec.to_builtins(study))
    check_names(study.name, [site.name for site in study.sites], "sites[{}].name")
    if study.rounds < 1:
        _refuse("rounds", "at least 1", study.rounds)
    if study.seed < 0:
        _refuse("seed", "a number from 0", study.seed)
    _check_task(study)
    _check_model(study)
    _check_training(study)
    _check_protocol(study)
    _check_privacy(study)


def check_names(name: str, sites: Sequence[str], path: str) -> None:
    """Refuse names of a study and of its sites that no file, message or command line takes.

    Args:
        name: The study's.
        sites: The sites'.
        path: Where a site's name stands in the file, with `{}` for its place.

    Raises:
        StudyError: The message names the path.
    """
    for i, site in enumerate(sites):
        if not re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", site):
            _refuse(path.format(i), "1 to 64 letters, digits, '_', '-' or '.'", site)
        if site in sites[:i]:
            _refuse(path.format(i), "a name of its own", site)
    if not re.fullmatch(r"[A-Za-z0-9_. -]{1,64}", name):
        _refuse("name", "1 to 64 letters, digits, spaces, '_', '-' or '.'", name)


def _check_size(path: str, value: object) -> None:
    """Refuse integers that no digest, wire format or library takes."""
    if isinstance(value, dict):
        for key, entry in value.items():
            _check_size(f"{path}.{key}".lstrip("."), entry)
    elif isinstance(value, list | tuple):
        for i, entry in enumerate(value):
            _check_size(f"{path}[{i}]", entry)
    elif isinstance(value, int) and abs(value) >= 2**63:
        _refuse(path, "a number below 2^63", value)


def _check_task(study: Study) -> None:
    task = study.task
    if task.data == "heart-disease":
        known = ("cleveland", "hungarian", "switzerland", "va")
        for i, site in enumerate(study.sites):
            if site.name not in known:
                _refuse(f"sites[{i}].name", f"one of the heart disease data's {', '.join(known)}", site.name)
            if site.data is not None:
                _refuse(f"sites[{i}].data", 'no path, as task.data is "heart-disease"', site.data)
        if task.features or task.target is not None:
            _refuse("task.features", 'no features or target, as task.data is "heart-disease"', list(task.features))
    else:
        columns = [*task.features, task.target]
        if not task.features or len(set(columns)) != len(columns):
            _refuse("task.features", "the columns to learn from, each once and none the target", list(task.features))
        if task.target is None:
            _refuse("task.target", "the column with the class", None)
        if task.standardize == "public":
            _refuse(
                "task.standardize", '"global", "site" or "none", as only heart disease has public constants', "public"
            )
    if not 0 < task.test_fraction < 1:
        _refuse("task.test_fraction", "a number between 0 and 1", task.test_fraction)
    if not 0 <= task.split_seed < 2**32:
        _refuse("task.split_seed", "a number from 0 to 2^32 - 1", task.split_seed)


def _check_model(study: Study) -> None:
    model = study.model
    if model.kind == "factory" and not re.fullmatch(r"[\w.]+:\w+", model.factory or ""):
        _refuse("model.factory", '"package.module:function"', model.factory)
    if model.kind != "factory" and model.factory is not None:
        _refuse("model.factory", f'none, as model.kind is "{model.kind}"', model.factory)
    if model.kind == "mlp" and (not model.hidden or min(model.hidden) < 1):
        _refuse("model.hidden", "widths of at least 1", list(model.hidden))


def _check_training(study: Study) -> None:
    training = study.training
    given = [key for key in ("local_epochs", "local_steps") if getattr(training, key) is not None]
    if training.algorithm == "fedsgd" and given:
        _refuse(f"training.{given[0]}", "none: fedsgd takes one gradient a round", getattr(training, given[0]))
    if training.algorithm == "fedavg" and len(given) != 1:
        _refuse(
            "training.local_epochs", "exactly one of local_epochs and local_steps", " and ".join(given) or "neither"
        )
    for key in (*given, "batch_size"):
        if getattr(training, key) < 1:
            _refuse(f"training.{key}", "at least 1", getattr(training, key))
    _positive("training.learning_rate", training.learning_rate)
    _positive("server.learning_rate", study.server.learning_rate)
    if training.algorithm == "fedsgd" and training.momentum:
        _refuse("training.momentum", "0 with fedsgd; the server's optimiser may have one", training.momentum)
    if not 0 <= training.momentum < 1:
        _refuse("training.momentum", "at least 0 and below 1", training.momentum)


def _check_protocol(study: Study) -> None:
    check_protocol(study.protocol, study.site_names)
    if study.distributed:
        return  # its sums are of whole numbers, in a ring of their own
    try:
        _ = study.fixed_point
    except (HeadroomError, LocalProtocolError) as error:
        raise StudyError(f"protocol: {error}") from error


def check_protocol(protocol: Protocol, names: Sequence[str]) -> None:
    """Refuse a table that asks for what cannot be, or too few sites.

    Args:
        protocol: The table.
        names: The sites'.

    Raises:
        StudyError: The message names the key.
    """
    n = len(names)
    secure = protocol.aggregation != "plain"
    if n < 3:
        why = "at least 3: of two, each could read the other's update off the sum" if secure else "at least 3"
        _refuse("sites", why, n)
    least = least_threshold(n, protocol.mode) if secure else 1
    if protocol.threshold is not None and not least <= protocol.threshold <= n:
        _refuse(
            "protocol.threshold",
            f"{least} to {n} for {n} sites in {protocol.mode} mode"
            if least < n
            else f"{n}, as many as there are sites",
            protocol.threshold,
        )
    for key, lowest in (("max_failed_rounds", 1), ("max_weight", 1), ("fraction_bits", 0)):
        if getattr(protocol, key) < lowest:
            _refuse(f"protocol.{key}", f"at least {lowest}", getattr(protocol, key))
    _positive("protocol.max_update", protocol.max_update)
    _check_ckks(protocol, names)


def _check_ckks(protocol: Protocol, names: Sequence[str]) -> None:
    if protocol.aggregation != "ckks":
        for key in ("keys", "holder", "statistical_security", "sum_error"):
            if (came := getattr(protocol, key)) != getattr(Protocol(), key):
                _refuse(f"protocol.{key}", f'nothing, as protocol.aggregation is "{protocol.aggregation}"', came)
        return
    named = protocol.holder not in names and re.fullmatch(r"[A-Za-z0-9_.-]{1,64}", protocol.holder or "")
    if protocol.keys == "holder" and not named:
        _refuse("protocol.holder", "the name of a party that is none of the sites", protocol.holder)
    if protocol.keys != "holder" and protocol.holder is not None:
        _refuse("protocol.holder", f'none, as protocol.keys is "{protocol.keys}"', protocol.holder)
    if not 20 <= protocol.statistical_security <= 64:
        _refuse("protocol.statistical_security", "20 to 64 bits", protocol.statistical_security)
    if not (math.isfinite(protocol.sum_error) and protocol.sum_error >= 0):
        _refuse("protocol.sum_error", "a finite number from 0", protocol.sum_error)


def _check_privacy(study: Study) -> None:
    privacy = study.privacy
    choices = "epsilon", "delta", "noise_multiplier", "sampling_rate"
    set_without = [key for key in choices if getattr(privacy, key) is not None]
    if not study.private:
        if set_without:
            _refuse(
                "privacy.mechanism",
                f'"local-sgd" or "distributed-sgd", as privacy.{set_without[0]} is set (or leave that out)',
                privacy.mechanism,
            )
        return
    if privacy.delta is None:
        _refuse("privacy.delta", "a delta: an epsilon means nothing without one", None)
    elif not 0 < privacy.delta < 1:
        _refuse("privacy.delta", "a number between 0 and 1", privacy.delta)
    if privacy.unit not in (None, study.unit):
        _refuse("privacy.unit", f'"{study.unit}" with {privacy.mechanism}', str(privacy.unit))
    if privacy.epsilon is None and privacy.noise_multiplier is None:
        _refuse("privacy.epsilon", "an epsilon, a noise_multiplier or both", None)
    for key in ("epsilon", "noise_multiplier", "l2_clip_norm"):
        if getattr(privacy, key) is not None:
            _positive(f"privacy.{key}", getattr(privacy, key))
    if privacy.mechanism == "distributed-participant":
        if privacy.sampling_rate is not None:
            _refuse("privacy.sampling_rate", "none: every participant is in every round", privacy.sampling_rate)
    elif privacy.sampling_rate is None or not 0 < privacy.sampling_rate <= 1:
        _refuse("privacy.sampling_rate", "above 0 and at most 1", privacy.sampling_rate)
    if study.task.standardize in ("global", "site"):
        _refuse(
            "task.standardize",
            '"public" or "none" under differential privacy: what is taken from the records is outside the account',
            study.task.standardize,
        )
    if study.model.buffers != "refuse":
        _refuse("model.buffers", '"refuse" under differential privacy', study.model.buffers)
    _check_distributed(study)


def _check_distributed(study: Study) -> None:
    privacy = study.privacy
    if not study.distributed:
        _refuse_given(study, ("records", "grid", "colluders"))
        return
    if study.protocol.aggregation == "plain":
        _refuse(
            "protocol.aggregation",
            '"masked" or "ckks" where noise is shared: by itself, a site\'s share of it hides too little',
            study.protocol.aggregation,
        )
    if study.protocol.keys == "shared":
        _refuse("protocol.keys", '"threshold" or "holder" where noise is shared, likewise', study.protocol.keys)
    if not 0 <= privacy.colluders < study.threshold:
        _refuse("privacy.colluders", f"0 to {study.threshold - 1}, below the threshold", privacy.colluders)
    if privacy.mechanism == "distributed-participant":
        _refuse_given(study, ("records", "grid", "noise_multiplier"))
        if study.training.weighting != "uniform":
            _refuse("training.weighting", '"uniform": a participant is one vector', study.training.weighting)
        return
    if study.training.algorithm != "fedsgd":
        _refuse("training.algorithm", '"fedsgd" with distributed-sgd: a round is one step', study.training.algorithm)
    if privacy.records is None or privacy.records < 1:
        _refuse("privacy.records", "the training rows of all sites together, a public number", privacy.records)
    if not 2 <= privacy.grid <= 1 << 30:
        _refuse("privacy.grid", "2 to 2^30", privacy.grid)


def _refuse_given(study: Study, keys: tuple[str, ...]) -> None:
    for key in keys:
        value = getattr(study.privacy, key)
        if value != getattr(Privacy(), key):
            _refuse(f"privacy.{key}", f"nothing, as {study.privacy.mechanism} has no use for it", value)


def _positive(path: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        _refuse(path, "a finite number above 0", value)
