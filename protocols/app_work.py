"""What an app's strategy asks of a site, and the site's reply to it as one vector: without the app's framework.

A site's vector is [w, w (returned - sent) of every entry, w m of every metric] in fixed point (`secagg.fixed_point`):
a difference of models is small, so that few bits hold it well. Whoever opens the sum gets the total weight, and by
`AppVectors.opened` what a weighted average over all replies would have given.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, get_args

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta, Struct

from protocols.agreement import Agreement, Kind
from protocols.errors import DataError
from secagg.errors import LocalProtocolError, RemoteProtocolError
from secagg.fixed_point import FixedPoint
from secagg.wire import Message, encode

NDArray = npt.NDArray[Any]
Name = Annotated[str, Meta(max_length=1 << 12)]
Scalar = bool | int | float | str
Value = Scalar | bytes | tuple[Scalar | bytes, ...]
_FLOATS = ("float16", "float32", "float64")
# Those whose sums with an averaged difference have a type of their own to be computed in, int64.
_INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32")
_FIXED = ("bool",)


class ArraySpec(Message, frozen=True):
    """An array without its content.

    Attributes:
        name: Its key.
        dtype: NumPy's name, as `float32`.
        shape: Its shape.
    """

    name: Name
    dtype: Annotated[str, Meta(max_length=16)]
    shape: Annotated[tuple[Annotated[int, Meta(ge=0, lt=1 << 40)], ...], Meta(max_length=32)]

    @property
    def size(self) -> int:
        """Entries."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of its content."""
        return self.size * np.dtype(self.dtype).itemsize


class Setting(Message, frozen=True):
    """A name and its value, as in a strategy's configuration.

    Attributes:
        name: Its key.
        values: The value, or the entries of a list.
        raw: Those that are bytes.
        listed: Whether it is a list.
    """

    name: Name
    values: tuple[Scalar, ...]
    raw: tuple[bytes, ...]
    listed: bool

    @classmethod
    def of(cls, name: str, value: Value) -> Setting:
        """A setting of a value; a tuple stands for a list."""
        given = value if isinstance(value, tuple) else (value,)
        values = tuple(entry for entry in given if not isinstance(entry, bytes))
        return cls(name, values, tuple(entry for entry in given if isinstance(entry, bytes)), isinstance(value, tuple))

    @property
    def value(self) -> Value:
        """The value.

        Raises:
            LocalProtocolError: There is none, or bytes beside others.
        """
        entries: tuple[Scalar | bytes, ...] = (*self.values, *self.raw)
        if (self.values and self.raw) or (not self.listed and len(entries) != 1):
            raise LocalProtocolError(f"setting {self.name!r}: expected one value or a list of one type")
        return entries if self.listed else entries[0]


class AppWork(Message, frozen=True):
    """What a strategy asks, the same of all sites; its encoding's digest is in the masks and signatures of the sum.

    Attributes:
        message_type: Of the app's function that is asked: "train" or "evaluate", or with an action as "train.first".
        key: Name of the record with the arrays.
        arrays: The arrays in that record, in order.
        configs: Name and entries of each record of settings.
        data: The arrays' contents one after the other, little-endian and in C order.
    """

    message_type: Annotated[str, Meta(max_length=128)]
    key: Name
    arrays: tuple[ArraySpec, ...]
    configs: tuple[tuple[Name, tuple[Setting, ...]], ...]
    data: memoryview

    @classmethod
    def of(
        cls, message_type: str, key: str, arrays: Mapping[str, NDArray], configs: Mapping[str, Mapping[str, Value]]
    ) -> AppWork:
        """The work in a strategy's message.

        Raises:
            LocalProtocolError: A type of message or of array that cannot be summed.
        """
        specs, contents = [], []
        for name, array in arrays.items():
            specs.append(ArraySpec(name, array.dtype.name, array.shape))
            _check_dtype(specs[-1])
            little = array.astype(array.dtype.newbyteorder("<"), order="C", copy=False)
            contents.append(little.tobytes())
        settings = tuple(
            (record, tuple(Setting.of(entry, value) for entry, value in entries.items()))
            for record, entries in configs.items()
        )
        work = cls(message_type, key, tuple(specs), settings, memoryview(b"".join(contents)))
        _ = work.kind
        return work

    @property
    def kind(self) -> Kind:
        """Which function of the app is asked.

        Raises:
            LocalProtocolError: None whose replies can be summed.
        """
        for kind in get_args(Kind):
            if self.message_type == kind or self.message_type.startswith(f"{kind}."):
                return kind  # type: ignore[no-any-return]
        raise LocalProtocolError(
            f'expected a message of type "train" or "evaluate", got {self.message_type!r}: no other can be summed'
        )

    def sent(self) -> dict[str, NDArray]:
        """The arrays, as views of `data` that cannot be written.

        Raises:
            LocalProtocolError: A type that cannot be summed, a name that comes twice, or contents of another length.
        """
        for spec in self.arrays:
            _check_dtype(spec)
        if len({spec.name for spec in self.arrays}) < len(self.arrays):
            raise LocalProtocolError("the name of an array comes twice")
        if len(self.data) != (expected := sum(spec.bytes for spec in self.arrays)):
            raise LocalProtocolError(f"the arrays take {expected} bytes, and {len(self.data)} came")
        arrays, at = dict[str, NDArray](), 0
        for spec in self.arrays:
            dtype = np.dtype(spec.dtype).newbyteorder("<")
            arrays[spec.name] = np.frombuffer(self.data, dtype, spec.size, at).reshape(spec.shape)
            at += spec.bytes
        return arrays

    @property
    def compared(self) -> bytes:
        """What stands for the arrays and for which function they go to, whatever the settings.

        Sums that have it in common are of the same model; a server that changes a number of a round has not changed
        the model.
        """
        bare = msgspec.structs.replace(self, message_type=self.kind, key="", configs=(), data=memoryview(b""))
        digest = hashlib.sha256(encode(bare))
        digest.update(self.data)
        return digest.digest()


class Returned(Struct, frozen=True):
    """What the app's function gave.

    Attributes:
        arrays: Of training, by the names that were sent; of evaluation, none.
        metrics: By name, the weight among them.
    """

    arrays: Mapping[str, NDArray]
    metrics: Mapping[str, object]


class AppVectors:
    """How replies to one work become vectors, and their sum a reply.

    Args:
        agreement: The copy of whoever asks.
        work: What was sent.

    Attributes:
        fixed: Fixed point of the sum.
        dimension: Entries of a vector, the weight among them.

    Raises:
        LocalProtocolError: Work that cannot be summed; see `AppWork.sent`.
    """

    def __init__(self, agreement: Agreement, work: AppWork) -> None:
        self._agreement, self._kind, self._sent = agreement, work.kind, work.sent()
        self._metrics = agreement.metrics(self._kind)
        self.fixed: FixedPoint = agreement.fixed_point(self._kind)
        self.dimension = 1 + sum(array.size for _, array, _ in self._summed()) + len(self._metrics)

    def _summed(self) -> Iterator[tuple[str, NDArray, float]]:
        """The arrays that are summed, and what their differences are multiplied by to fit the bound of all entries."""
        if self._kind == "evaluate":
            return
        largest = self._agreement.max_integer_update
        for name, array in self._sent.items():
            if array.dtype.name in _FLOATS:
                yield name, array, 1.0
            elif array.dtype.name in _INTEGERS and largest is not None:
                yield name, array, self.fixed.max_value / largest

    def values(self, returned: Returned) -> tuple[npt.NDArray[np.float64], int]:
        """A site's values of weight 1, float64 of shape [dimension - 1], and its weight.

        Raises:
            DataError: The reply is not of the arrays that were sent or the metrics that were agreed, a metric is no
                number or too large, or the weight is no whole number in its bounds. The message names which.
        """
        self._check_arrays(returned.arrays)
        values, at = np.empty(self.dimension - 1), 0
        # Overflow and NaN are for the fixed point to refuse.
        with np.errstate(invalid="ignore", over="ignore"):
            for name, sent, scale in self._summed():
                # Integers are subtracted as integers: beyond 2^53 float64 does not hold them.
                exact = np.float64 if sent.dtype.name in _FLOATS else np.int64
                change = np.subtract(returned.arrays[name], sent, dtype=exact)
                np.multiply(change.reshape(-1), scale, out=values[at : at + sent.size])
                at += sent.size
        metrics, weight = self._check_metrics(returned.metrics)
        limit = self.fixed.max_value
        for name, largest in self._metrics.items():
            values[at] = min(limit, max(-limit, metrics[name] * (limit / largest)))  # for the last bit of a product
            at += 1
        return values, weight

    def _check_arrays(self, arrays: Mapping[str, NDArray]) -> None:
        expected = self._sent if self._kind == "train" else {}
        if arrays.keys() != expected.keys():
            told = [f"without {name!r}" for name in expected if name not in arrays]
            told += [f"with {name!r}" for name in arrays if name not in expected]
            raise DataError(f"the arrays came back {', '.join(told[:5])}: expected exactly those that were sent")
        summed = {name for name, _, _ in self._summed()}
        for name, sent in expected.items():
            came = arrays[name]
            if (came.dtype.name, came.shape) != (sent.dtype.name, sent.shape):
                raise DataError(
                    f"array {name!r}: expected {sent.dtype.name} of shape {sent.shape} as it was sent, got "
                    f"{came.dtype.name} of shape {came.shape}"
                )
            if name not in summed and not np.array_equal(came, sent):
                raise DataError(
                    f"array {name!r}: {sent.dtype.name}, and not as it was sent; "
                    + (
                        "set max_integer_update in the agreement to have arrays of integers averaged and rounded"
                        if sent.dtype.name in _INTEGERS
                        else "such arrays are not averaged"
                    )
                )

    def _check_metrics(self, metrics: Mapping[str, object]) -> tuple[dict[str, float], int]:
        key, found = self._agreement.weight, dict[str, float]()
        expected = {*self._metrics, key}
        if metrics.keys() != expected:
            raise DataError(
                f"the metrics of {self._kind} are {_names(metrics)}: the agreement has {_names(expected)}, and a site "
                "gives exactly those"
            )
        for name, value in metrics.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise DataError(f"metric {name!r}: expected a number, got {type(value).__name__}")
            if name == key:
                continue
            if not abs(value) <= (largest := self._metrics[name]):
                raise DataError(f"metric {name!r}: {value} is beyond {largest:g}, the largest that the agreement has")
            found[name] = float(value)
        weight, most = metrics[key], self._agreement.protocol.max_weight
        if not isinstance(weight, int) or not 0 <= weight <= most:
            raise DataError(f"metric {key!r}: expected a whole number from 0 to {most}, got {weight!r}")
        return found, weight

    def opened(self, mean: npt.NDArray[np.float64]) -> tuple[dict[str, NDArray], dict[str, float]]:
        """What the average reply is, from a sum's weighted mean of shape [dimension - 1].

        Returns:
            The arrays in the types that were sent, empty of evaluation; and the metrics without the weight.

        Raises:
            RemoteProtocolError: A mean of another length.
        """
        if mean.shape != (self.dimension - 1,):
            raise RemoteProtocolError(f"expected {self.dimension - 1} entries of a mean, got shape {mean.shape}")
        arrays, at = (dict(self._sent) if self._kind == "train" else {}), 0
        for name, sent, scale in self._summed():
            change = mean[at : at + sent.size].reshape(sent.shape) / scale
            arrays[name] = _moved(sent, change)
            at += sent.size
        metrics = {
            name: float(value) * (largest / self.fixed.max_value)
            for (name, largest), value in zip(self._metrics.items(), mean[at:], strict=True)
        }
        return arrays, metrics


def in_type(array: NDArray, dtype: np.dtype[Any]) -> NDArray:
    """An array in another type; to integers it is rounded, within their bounds."""
    if dtype.name not in _INTEGERS or array.dtype.name not in _FLOATS:
        return array.astype(dtype)
    bounds = np.iinfo(dtype)
    return np.asarray(np.clip(np.rint(array), bounds.min, bounds.max), dtype)


def _moved(sent: NDArray, change: npt.NDArray[np.float64]) -> NDArray:
    """An array moved by a mean change, in its own type; integers are rounded, to even where it is a tie."""
    if sent.dtype.name in _FLOATS:
        return np.asarray(sent + change, sent.dtype)  # arithmetic makes a number of an array without axes
    bounds = np.iinfo(sent.dtype)
    moved = sent.astype(np.int64) + np.rint(change).astype(np.int64)
    return np.asarray(np.clip(moved, bounds.min, bounds.max), sent.dtype)


def _check_dtype(spec: ArraySpec) -> None:
    if spec.dtype not in (*_FLOATS, *_INTEGERS, *_FIXED):
        raise LocalProtocolError(
            f"array {spec.name!r}: expected one of {', '.join((*_FLOATS, *_INTEGERS, *_FIXED))}, got {spec.dtype!r}"
        )


def _names(names: Mapping[str, object] | set[str]) -> str:
    return ", ".join(map(repr, sorted(names))) or "none"
