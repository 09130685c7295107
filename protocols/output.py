"""A run as a folder: `model.safetensors` and `run.json`, written whole or not at all."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from dp import Unit
from protocols.errors import OutputError
from protocols.fedavg import build_model, load_model_bytes, model_bytes
from protocols.rosters import load_roster, roster_text
from protocols.rounds import RoundRecord
from protocols.run import Run, SiteResult
from protocols.study import Study
from secagg.errors import DecodeError
from secagg.keys import fingerprint

_PACKAGES = ("secagg", "torch", "numpy", "opacus", "dp-accounting", "cryptography", "msgspec", "scikit-learn")


def statement(run: Run) -> str:
    """In plain words, what the run guarantees to whom."""
    study, sums = run.study, [record for record in run.rounds if record.purpose == "train"]
    weight = max((record.weight for record in sums), default=0)
    first = _secrecy(study)
    if any(record.purpose == "standardize" and record.outcome == "opened" for record in run.rounds):
        first += " It also learned the mean and the deviation of each feature over all training rows."
    spent = [result.spent for result in run.sites.values() if result.spent is not None]
    if not spent:
        return f"{first} There is no differential privacy: the model itself may tell about single records."
    worst = max(spent, key=lambda s: s.epsilon)
    promise = (
        f"({worst.epsilon:.3f}, {worst.delta:g})-differential privacy ({worst.relation}, one {worst.unit}, "
        f"{worst.accountant.upper()} accountant)"
    )
    if study.distributed:
        colluders, unit = study.privacy.colluders, "record" if study.unit is Unit.RECORD else "participant"
        return (
            f"{first} Every {unit} is protected by {promise} against the server and whoever reads the model: "
            "the noise is added inside the sum, by all hospitals together, so that this holds as long as the sum stays "
            "closed, and as long as "
            + (f"at most {colluders} of them tell their share of it." if colluders else "none of them tells its share.")
            + " A hospital that looks itself knows its own share, and is one of those."
        )
    told = (
        f" Not covered: that {weight} training rows took part in all, which the sum of the weights tells."
        if study.training.weighting == "records"
        else ""
    )
    return (
        f"{first} Every training record is protected by {promise} against everyone outside its hospital: the server, "
        f"the other hospitals, and whoever reads the model.{told}"
    )


def _secrecy(study: Study) -> str:
    """Who could see a single update, and who not."""
    if study.protocol.aggregation == "plain":
        return "The server saw every hospital's update: aggregation was plain and protects nothing."
    seen = "The server saw the sum of the hospitals' updates and never one of them, as long as "
    if study.protocol.keys == "shared":
        return f"{seen}no hospital helps it: every one has the key to all updates."
    holder = study.protocol.holder
    trusted = f"{holder}, who has the key, does not help it, and as long as " if holder else ""
    honest = " and it follows the protocol itself" if study.protocol.mode != "active" else ""
    return f"{seen}{trusted}at most {study.colluders} of the {len(study.sites)} hospitals help it{honest}."


def summary(run: Run) -> str:
    """In plain words, what federation gained and what privacy cost, by AUC; empty without baselines."""
    gained = {
        name: site.federated.auc - site.local.auc
        for name, site in run.sites.items()
        if site.federated is not None and site.local is not None
        if site.federated.auc is not None and site.local.auc is not None
    }
    if not gained:
        return ""
    text = f"Federation changed the mean AUC by {sum(gained.values()) / len(gained):+.3f} over a site's own rows only"
    noise = [
        site.federated.auc - site.without_privacy.auc
        for site in run.sites.values()
        if site.federated is not None and site.without_privacy is not None
        if site.federated.auc is not None and site.without_privacy.auc is not None
    ]
    if noise:
        quiet = sum(gained.values()) / len(gained) - sum(noise) / len(noise)
        text += f"; without the noise of differential privacy it would have been {quiet:+.3f}"
    no_gain = [f"{name} ({change:+.3f})" for name, change in gained.items() if change <= 0]
    return f"{text}." + (f" No gain for {', '.join(no_gain)}." if no_gain else "")


def as_json(run: Run) -> dict[str, Any]:
    """Everything about a run but the model, as plain values for JSON."""
    rounds: list[dict[str, Any]] = []
    for record in run.rounds:
        entry = msgspec.to_builtins(record)
        if record.number in run.per_round:
            entry["test_metrics_before"] = msgspec.to_builtins(run.per_round[record.number])
        rounds.append(entry)
    return {
        "format": 1,
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {name: version(name) for name in _PACKAGES} | {"python": platform.python_version()},
        "machine": {"system": platform.system(), "processor": platform.machine(), "cores": os.cpu_count()},
        "study": msgspec.to_builtins(run.study),
        "study_digest": run.study.digest.hex(),
        "roster": {member.name: fingerprint(member.identity) for member in run.roster.members},
        "features": list(run.features),
        "statement": statement(run),
        "summary": summary(run),
        "stopped": run.stopped,
        "seconds": run.seconds,
        "cpu_seconds": run.cpu_seconds,
        "sites": msgspec.to_builtins(run.sites),
        "stages": stage_totals(run),
        "rounds": rounds,
    }


def stage_totals(run: Run) -> dict[str, dict[str, float]]:
    """Seconds and bytes of each stage, summed over the study."""
    totals: dict[str, dict[str, float]] = {}
    for record in run.rounds:
        for stage in record.stages:
            entry = totals.setdefault(stage.stage, {"seconds": 0.0, "bytes_up": 0, "bytes_down": 0})
            entry["seconds"] += stage.seconds
            entry["bytes_up"] += stage.bytes_up
            entry["bytes_down"] += stage.bytes_down
    return totals


def load_run(folder: Path, study: Study) -> Run:
    """A run from its folder, as another process wrote it.

    Args:
        folder: As `write_run` made it.
        study: Whose run it is.

    Raises:
        OutputError: It cannot be read, or is the run of another study.
    """
    try:
        told = msgspec.json.decode((folder / "run.json").read_bytes())
        if told["study_digest"] != study.digest.hex():
            raise OutputError(f"{folder}: holds the run of another study (digest {told['study_digest'][:16]})")
        model = build_model(study, len(told["features"]))
        load_model_bytes(model, (folder / "model.safetensors").read_bytes())
        transcript = folder / "transcript.bin"
        return Run(
            study=study,
            roster=load_roster(folder / "roster.toml"),
            model=model,
            features=tuple(told["features"]),
            rounds=msgspec.convert(
                [{k: v for k, v in entry.items() if k != "test_metrics_before"} for entry in told["rounds"]],
                list[RoundRecord],
            ),
            transcript=transcript.read_bytes() if transcript.exists() else b"",
            per_round={},
            sites=msgspec.convert(told["sites"], dict[str, SiteResult]),
            stopped=told["stopped"],
            seconds=told["seconds"],
            cpu_seconds=told["cpu_seconds"],
        )
    except OSError as error:
        raise OutputError(f"{folder}: the run cannot be read: {error.strerror or error}") from error
    except (KeyError, TypeError, msgspec.MsgspecError, DecodeError) as error:
        raise OutputError(f"{folder}: expected a run's folder: {error}") from error


def check_target(folder: Path) -> None:
    """Refuse, before anything is trained, a folder that a run could not be written to.

    Raises:
        OutputError: It exists already, or nothing can be written beside it.
    """
    if os.path.lexists(folder):
        raise OutputError(f"{folder} exists already; name another folder with --out, or remove it")
    try:
        # Nothing is made yet: a run that fails on its input leaves nothing behind.
        with tempfile.TemporaryFile(dir=next(parent for parent in folder.absolute().parents if parent.exists())):
            pass
    except OSError as error:
        raise OutputError(f"{folder}: nothing can be written there: {error.strerror or error}") from error


def write_run(run: Run, folder: Path) -> list[str]:
    """Write a run's folder in one move, so that a folder of that name is always whole.

    Returns:
        The names of the files in it.

    Raises:
        OutputError: It could not be written, for example because the disk is full. The run is then kept under the
            system's temporary folder, if that can be written; the message says where, or that it is lost.
    """
    files = {
        "model.safetensors": model_bytes(run.model),
        "run.json": msgspec.json.format(msgspec.json.encode(as_json(run)), indent=2) + b"\n",
        "roster.toml": roster_text(run.roster).encode(),
    }
    if run.transcript:
        files["transcript.bin"] = run.transcript
    try:
        _write_whole(files, folder)
    except OSError as error:
        what = f"{folder}: could not be written: {error.strerror or error}"
        try:
            spare = Path(tempfile.gettempdir()) / f"secagg-{folder.name}-{os.urandom(4).hex()}"
            _write_whole(files, spare)
        except OSError as second:
            raise OutputError(
                f"{what}; nor could the system's temporary folder be written: {second.strerror or second}; "
                "the run is lost: free some space and run again"
            ) from error
        raise OutputError(f"{what}; the run is kept in {spare} instead: move it where you want it") from error
    return list(files)


def _write_whole(files: dict[str, bytes], folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for name, content in files.items():
            with (partial / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        partial.chmod(0o755)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
