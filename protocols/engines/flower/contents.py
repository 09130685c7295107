"""What stands in the messages of a Flower app, without Flower's types, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from protocols.agreement import Kind
from protocols.app_work import AppWork, NDArray, Returned, Setting, Value, in_type
from protocols.errors import DataError
from secagg.errors import LocalProtocolError

METRICS = "metrics"
_NUMPY = "numpy.ndarray"


def work_of(message: Message, types: dict[str, np.dtype[Any]] | None = None) -> AppWork:
    """What a strategy asks with a message.

    Args:
        message: The strategy's.
        types: In which type each array was sent first; arrays are sent in that again, and new ones are added. An
            average is of floats: strategies turn integers into floats, and some float32 into float64, which no app
            gives back.

    Raises:
        LocalProtocolError: It has other records than one of arrays and some of settings, or its type or an array's is
            none that can be summed.
    """
    kind = message.metadata.message_type
    records = message.content.array_records
    if len(records) != 1 or len(message.content.metric_records) > 0:
        raise LocalProtocolError(
            f"expected one ArrayRecord and ConfigRecords in a message of type {kind!r}, got "
            f"{', '.join(f'{key!r} ({type(record).__name__})' for key, record in message.content.items()) or 'none'}"
        )
    ((key, arrays),) = records.items()
    configs: dict[str, Mapping[str, Value]] = {
        name: {entry: tuple(value) if isinstance(value, list) else value for entry, value in record.items()}
        for name, record in message.content.config_records.items()
    }
    sent = _numpy(arrays, LocalProtocolError)
    if types is not None:
        sent = {name: in_type(array, types.setdefault(name, array.dtype)) for name, array in sent.items()}
    return AppWork.of(kind, key, sent, configs)


def content_of(work: AppWork) -> RecordDict:
    """The content of the message that the strategy made, as the app's function expects it.

    Raises:
        LocalProtocolError: As `AppWork.sent` and `Setting.value`, or settings that Flower does not take.
    """
    content = RecordDict({work.key: ArrayRecord({name: Array(array) for name, array in work.sent().items()})})
    try:
        for name, entries in work.configs:
            content[name] = _settings(entries)
    except (TypeError, ValueError) as error:
        raise LocalProtocolError(f"settings that Flower does not take: {error}") from error
    return content


def _settings(entries: tuple[Setting, ...]) -> ConfigRecord:
    values = {setting.name: setting.value for setting in entries}
    # A record checks what it is given.
    return ConfigRecord({name: list(value) if isinstance(value, tuple) else value for name, value in values.items()})  # type: ignore[misc]


def returned_of(reply: Message, kind: Kind) -> Returned:
    """What the app's function gave.

    Raises:
        DataError: An error, or other records than one of metrics and, of training, one of arrays.
    """
    if not reply.has_content():
        raise DataError(f"the app's function for {kind} gave an error: {reply.error.reason}")
    content = reply.content
    expected = {"ArrayRecord": int(kind == "train"), "MetricRecord": 1, "ConfigRecord": 0}
    came = {
        "ArrayRecord": len(content.array_records),
        "MetricRecord": len(content.metric_records),
        "ConfigRecord": len(content.config_records),
    }
    if came != expected:
        raise DataError(
            f"expected {_counted(expected)} in what the app's function for {kind} gives, got {_counted(came)}"
        )
    arrays = dict[str, NDArray]()
    for record in content.array_records.values():
        arrays = _numpy(record, DataError)
    (metrics,) = content.metric_records.values()
    return Returned(arrays, dict(metrics))


def average_content(key: str, arrays: Mapping[str, NDArray], metrics: Mapping[str, int | float]) -> RecordDict:
    """The content of a reply, as the app's function would give it: without arrays where there are none."""
    content = RecordDict({METRICS: MetricRecord(dict(metrics))})
    if arrays:
        content[key] = ArrayRecord({name: Array(array) for name, array in arrays.items()})
    return content


def _numpy(record: ArrayRecord, error: type[LocalProtocolError] | type[DataError]) -> dict[str, NDArray]:
    for name, array in record.items():
        if array.stype != _NUMPY:
            raise error(f"array {name!r}: expected NumPy's serialisation, got {array.stype!r}")
    return {name: array.numpy() for name, array in record.items()}


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())
