"""A TOML file as a frozen struct, strictly; what is wrong with it comes out as one line.

The line names the file, the path in it, what was expected and what came. `study.toml`, `site.toml`, the roster and the
public keys are read this way.
"""

from __future__ import annotations

import difflib
import enum
import re
import tomllib
from pathlib import Path
from typing import Any, TypeVar, get_args

import msgspec
from msgspec import Struct

from secagg.errors import SecAggError

_PLAIN_TYPES = {
    "array": "a list",
    "object": "a table",
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "null": "nothing",
}
T = TypeVar("T", bound=Struct)


class Section(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Base of a table in a file: unknown keys are errors."""


def read_text(path: str | Path, error_type: type[SecAggError]) -> str:
    """The text of a file in UTF-8.

    Raises:
        SecAggError: Of the given type: the file is missing, cannot be read, or is no text.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise error_type(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise error_type(f"{path}: expected a text file in UTF-8: {error}") from error


def parse(text: str, kind: type[T], *, name: str, error_type: type[SecAggError]) -> T:
    """The struct of type `kind` in the text of a file.

    Args:
        text: What the file holds.
        kind: The struct; what it refuses itself, it raises as a `SecAggError` that starts with the path.
        name: The file's name, for messages.
        error_type: What to raise.

    Raises:
        SecAggError: Of the given type, in one line: no TOML, or not such a struct.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise error_type(one_line(f"{name}: no valid TOML: {error}")) from error
    except RecursionError as error:
        raise error_type(f"{name}: no valid TOML: lists or tables too deep in each other") from error
    try:
        return msgspec.convert(table, kind)
    except msgspec.ValidationError as error:
        raise error_type(one_line(f"{name}: {_readable(str(error), table, kind)}")) from None
    except SecAggError as error:
        raise error_type(one_line(f"{name}: {error}")) from None


def one_line(message: str) -> str:
    """A message about a key whose name holds line breaks is one line all the same."""
    return message.replace("\n", "\\n").replace("\r", "\\r")


def table_at(table: Any, path: str) -> object:  # noqa: ANN401 - whatever TOML holds
    """The value at a path such as `sites[0].name`, or None."""
    value = table
    for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        try:
            value = value[int(index)] if index else value[key]
        except (KeyError, IndexError, TypeError):
            return None
    return value if not isinstance(value, dict | list) else None


def _readable(message: str, table: dict[str, Any], kind: type[Struct]) -> str:
    """The message of msgspec with the path first, and the value that came."""
    what, _, path = message.partition(" - at `$")
    path = path.rstrip("`").lstrip(".")
    where = table_at(table, path)
    if unknown := re.match(r"Object contains unknown field `(.*)`", what, re.DOTALL):
        known = [field.name for field in msgspec.structs.fields(_type_at(kind, path))]
        near = difflib.get_close_matches(unknown[1], known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(known)}"
        return f"{'.'.join(filter(None, [path, unknown[1]]))}: unknown key; {hint}"
    if missing := re.match(r"Object missing required field `(.*)`", what):
        return f"{'.'.join(filter(None, [path, missing[1]]))}: expected a value, got none"
    if what.startswith("Invalid enum value") and (choices := _choices(kind, path)):
        return f"{path}: expected one of {', '.join(choices)}, got {where!r}"
    for theirs, plain in _PLAIN_TYPES.items():
        what = what.replace(f"`{theirs}`", plain)
    return f"{path or 'the file'}: {what[:1].lower()}{what[1:]}" + (f" ({where!r})" if where is not None else "")


def _type_at(kind: Any, path: str) -> Any:  # noqa: ANN401 - whatever a field is annotated with
    """The type of a key, such as `protocol.mode` or `sites[0]`."""
    for key, index in re.findall(r"([^.\[\]]+)|\[(\d+)\]", path):
        if index:
            kind = get_args(kind)[0]
        else:
            fields = msgspec.structs.fields(kind) if isinstance(kind, type) and issubclass(kind, Struct) else ()
            kind = next((field.type for field in fields if field.name == key), None)
    return kind


def _choices(kind: type[Struct], path: str) -> list[str]:
    """The words that a key takes, or none where it takes others."""
    found = _type_at(kind, path)
    if isinstance(found, type) and issubclass(found, enum.StrEnum):
        return [f'"{member.value}"' for member in found]
    return [f'"{word}"' for word in get_args(found)]
