"""What a hospital trains on: its rows, split into a training and a test part, read from a file or shipped here.

`read_csv` reads a hospital's own table. `heart_disease` gives the four hospitals of the UCI Heart Disease data, the
project's running example. Rows stay raw; who standardises them says with what (`SiteData.standardized`).
"""

from __future__ import annotations

import csv
import importlib.util
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split

from protocols.errors import DataError

HEART_SITES = ("cleveland", "hungarian", "switzerland", "va")
"""The four hospitals of the heart disease data, in the order of its rows."""

HEART_REFERENCE: Mapping[str, tuple[float, float]] = MappingProxyType(
    {"age": (54.0, 9.0), "trestbps": (130.0, 20.0), "chol": (240.0, 50.0), "thalach": (140.0, 25.0)}
    | {"oldpeak": (1.0, 1.0), "ca": (1.0, 1.0)}
    | dict.fromkeys(("sex", "fbs", "exang"), (0.0, 1.0))
    | dict.fromkeys(("cp_2", "cp_3", "cp_4", "restecg_1", "restecg_2"), (0.0, 1.0))
    | dict.fromkeys(("slope_2", "slope_3", "thal_6", "thal_7"), (0.0, 1.0))
    | {
        f"{column}_missing": (0.0, 1.0)
        for column in ("trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak", "slope", "ca", "thal")
    }
)
"""Mean and spread of every heart disease feature, in the feature's unit: years, mmHg, mg/dl, beats per minute, ST
depression, vessels. Round clinical figures written down once, **not** computed from the sites' rows when a study
runs: a mean taken from the rows is itself a release about them, which the guarantee of DP-SGD does not cover.
Features that are 0 or 1 keep their values (mean 0, spread 1)."""

_FLAMBY_NUMERIC = ("age", "sex", "trestbps", "chol", "fbs", "thalach", "exang", "oldpeak")
_FULL_NUMERIC = (*_FLAMBY_NUMERIC, "ca")
# The first code of each is the reference level and has no column.
_FLAMBY_CODES: Mapping[str, tuple[int, ...]] = {"cp": (2, 3, 4), "restecg": (1, 2)}
_FULL_CODES: Mapping[str, tuple[int, ...]] = {**_FLAMBY_CODES, "slope": (2, 3), "thal": (6, 7)}
_FULL_MISSING = tuple(name.removesuffix("_missing") for name in HEART_REFERENCE if name.endswith("_missing"))

_MISSING_WORDS = frozenset({"", "?", ".", "-", "na", "n/a", "nan", "null", "none", "nil"})
_FLOAT32_MAX = float(np.finfo(np.float32).max)
# One row for each class, which a stratified split needs in both parts.
_MIN_PART = 2


@dataclass(frozen=True, eq=False)
class SiteData:
    """One hospital's rows. Arrays are copied and read-only.

    Attributes:
        site: The hospital's name.
        features: Names of the columns, f of them.
        train_x: Training rows, float32, shape [train_rows, f].
        train_y: Their classes, 0 or 1, float32, shape [train_rows].
        test_x: Test rows, float32, shape [test_rows, f].
        test_y: Their classes, float32, shape [test_rows].

    Raises:
        DataError: The shapes do not fit each other, or a value is not finite.
    """

    site: str
    features: tuple[str, ...]
    train_x: NDArray[np.float32]
    train_y: NDArray[np.float32]
    test_x: NDArray[np.float32]
    test_y: NDArray[np.float32]

    def __post_init__(self) -> None:
        for name in ("train_x", "train_y", "test_x", "test_y"):
            values = _float32(getattr(self, name))
            if not np.isfinite(values).all():
                raise DataError(f"site {self.site}: {name} holds a value that is NaN or too large; impute or drop it")
            values.flags.writeable = False
            object.__setattr__(self, name, values)
        for part, x, y in (("train", self.train_x, self.train_y), ("test", self.test_x, self.test_y)):
            if x.ndim != 2 or x.shape[1] != len(self.features) or y.shape != x.shape[:1]:
                raise DataError(
                    f"site {self.site}: expected {part}_x of shape [n, {len(self.features)}] and {part}_y of shape "
                    f"[n], got {list(x.shape)} and {list(y.shape)}"
                )

    @property
    def train_rows(self) -> int:
        """Number of training rows."""
        return len(self.train_y)

    @property
    def test_rows(self) -> int:
        """Number of test rows."""
        return len(self.test_y)

    @property
    def labels(self) -> NDArray[np.float32]:
        """The classes of all the site's rows, training part first, shape [train_rows + test_rows]."""
        return np.concatenate([self.train_y, self.test_y])

    def standardized(self, mean: NDArray[np.floating], std: NDArray[np.floating]) -> SiteData:
        """Gives the same rows as `(x - mean) / std`, computed in float64.

        A column whose `std` is 0 is divided by 1 instead: constant and equal to its mean, it becomes 0.

        Args:
            mean: Mean of each feature, shape [f].
            std: Spread of each feature, at least 0, shape [f].

        Returns:
            A new `SiteData`, float32; classes unchanged.

        Raises:
            DataError: A shape is not [f], or a value is not finite or a spread is negative.
        """
        centre, spread = np.asarray(mean, dtype=np.float64), np.asarray(std, dtype=np.float64)
        shape = (len(self.features),)
        if centre.shape != shape or spread.shape != shape:
            raise DataError(
                f"site {self.site}: expected a mean and a std of shape {list(shape)}, one number per feature, "
                f"got {list(centre.shape)} and {list(spread.shape)}"
            )
        wrong = ~(np.isfinite(centre) & np.isfinite(spread) & (spread >= 0.0))
        if wrong.any():
            i = int(np.flatnonzero(wrong)[0])
            raise DataError(
                f"site {self.site}: feature {self.features[i]} needs a finite mean and a finite std >= 0, "
                f"got {centre[i]} and {spread[i]}"
            )
        divisor = np.where(spread == 0.0, 1.0, spread)
        train_x, test_x = _float32((self.train_x - centre) / divisor), _float32((self.test_x - centre) / divisor)
        return replace(self, train_x=train_x, test_x=test_x)


def pooled(sites: Iterable[SiteData]) -> SiteData:
    """Puts all sites' rows together, training and test parts each; only where one machine may see them all.

    Args:
        sites: At least one, all with the same features.
    """
    every = list(sites)
    joined = {
        part: np.concatenate([getattr(site, part) for site in every])
        for part in ("train_x", "train_y", "test_x", "test_y")
    }
    return SiteData(site="pooled", features=every[0].features, **joined)


def require_both_classes(site: str, labels: NDArray[np.floating]) -> None:
    """Refuses a site whose rows all have one class, from which no classifier can be learnt or judged.

    Give it all rows of the site (`SiteData.labels`), not the training part: where one class has a handful of rows
    they may all have fallen in the test part, and such a site still takes part.

    Args:
        site: The hospital's name, for the message.
        labels: Classes, 0 or 1, shape [n].

    Raises:
        DataError: There is no row, or only one class.
    """
    positives = int(np.count_nonzero(labels))
    if positives in (0, len(labels)):
        what = f"all {len(labels)} rows have class {int(positives > 0)}" if len(labels) else "there are no rows"
        raise DataError(f"site {site}: expected rows of both classes, 0 and 1, but {what}; check the target column")


def heart_reference(features: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Looks up `HEART_REFERENCE`, to standardise the heart disease data without looking at it.

    Args:
        features: Names of heart disease features, f of them.

    Returns:
        Mean and spread, float64, shape [f] each, for `SiteData.standardized`.

    Raises:
        DataError: A name is not a heart disease feature.

    Example:
        >>> heart_reference(["age", "sex"])
        (array([54.,  0.]), array([9., 1.]))
    """
    if unknown := [name for name in features if name not in HEART_REFERENCE]:
        raise DataError(f"no reference mean and spread for {unknown}; there are some for {list(HEART_REFERENCE)}")
    table = np.array([HEART_REFERENCE[name] for name in features], dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def heart_disease(
    preprocessing: Literal["flamby", "full"], *, test_fraction: float = 0.34, split_seed: int = 43
) -> dict[str, SiteData]:
    """Gives the UCI Heart Disease data as its four hospitals hold it. The class is `num > 0`.

    `flamby` is Fed-Heart-Disease (du Terrail et al. 2022, FLamby): without `slope`, `ca` and `thal`, then without
    the rows where a value is missing: 740 rows, train/test 199/104, 172/89, 30/16, 85/45. A cholesterol of 0 stays 0.
    13 features: age, sex, trestbps, chol, fbs, thalach, exang, oldpeak, cp_2, cp_3, cp_4, restecg_1, restecg_2.
    FLamby standardises each of them with torch's `std` (divisor n - 1) plus 1e-9.

    `full` is all 920 rows and all 13 columns. A `trestbps` or `chol` of 0 counts as missing. A missing number
    becomes the column's public mean of `HEART_REFERENCE`, a missing code has 0 in all its indicators, and
    `<column>_missing` is 1. 28 features: age, sex, trestbps, chol, fbs, thalach, exang, oldpeak, ca, cp_2, cp_3,
    cp_4, restecg_1, restecg_2, slope_2, slope_3, thal_6, thal_7, trestbps_missing, chol_missing, fbs_missing,
    restecg_missing, thalach_missing, exang_missing, oldpeak_missing, slope_missing, ca_missing, thal_missing.

    Args:
        preprocessing: `flamby` or `full`.
        test_fraction: Share of each site's rows that is held out, rounded up.
        split_seed: Seed of the split; 43 is FLamby's.

    Returns:
        The sites by name, in the order of `HEART_SITES`; rows in the order of their id.

    Raises:
        DataError: The preprocessing is unknown, or `test_fraction` leaves a part without rows.
    """
    if preprocessing not in ("flamby", "full"):
        raise DataError(f"expected preprocessing 'flamby' or 'full', got {preprocessing!r}")
    text = files("protocols").joinpath("data/heart_disease.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    column = {
        name: np.array([float(row[name]) if row[name] else math.nan for row in rows])
        for name in (*_FULL_NUMERIC, *_FULL_CODES, "num")
    }
    if preprocessing == "flamby":
        built = {name: column[name] for name in _FLAMBY_NUMERIC} | _indicators(column, _FLAMBY_CODES)
    else:
        built = _full(column)
    x = np.column_stack(list(built.values()))
    keep = ~np.isnan(x).any(axis=1)
    of_site, y = np.array([row["site"] for row in rows]), column["num"] > 0
    return {
        site: _split(site, tuple(built), x[mine], y[mine], test_fraction, split_seed)
        for site in HEART_SITES
        for mine in [keep & (of_site == site)]
    }


def read_csv(
    path: str | Path,
    *,
    site: str,
    features: Sequence[str],
    target: str,
    test_fraction: float = 0.34,
    split_seed: int,
) -> SiteData:
    """Reads a hospital's table for binary classification and splits it, stratified by class.

    Args:
        path: A CSV file (UTF-8, commas, one header line) or, with pyarrow installed, a `.parquet` file.
        site: The hospital's name.
        features: Names of the columns to learn from, all numeric and without gaps, in this order.
        target: Name of the column with the class, 0 or 1.
        test_fraction: Share of the rows that is held out, rounded up; between 0 and 1, both excluded.
        split_seed: Seed of the split. The same file and seed give the same split.

    Returns:
        The rows, raw, in the order of the file within each part.

    Raises:
        DataError: The file is missing or unreadable, a column is missing or double, a value is empty, not a number,
            not finite or too large for float32, a class is not 0 or 1, there are no rows, too few to split, or of
            one class. The message names the site, the file, the column, the line (1-based, header included; for
            Parquet the row) and the value.
    """
    path = Path(path)
    where = f"site {site}, {path}"
    wanted = (*features, target)
    if not features or _repeated(wanted):
        raise DataError(
            f"{where}: expected at least one feature, each named once and none of them the target {target!r}, "
            f"got {list(features)}"
        )
    if not path.is_file():
        raise DataError(f"{where}: no such file; check the path")
    table = _parquet_rows(path, where) if path.suffix.lower() == ".parquet" else _csv_rows(path)
    try:
        names = [str(name).strip() for name in next(table, (0, ()))[1]]
        _check_columns(where, names, wanted)
        values, lines = _numbers(table, names, wanted, where)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{where}: cannot be read; expected a table in UTF-8 with commas: {error}") from error
    if not len(lines):
        raise DataError(f"{where}: expected rows below the header, got none")
    x, y = values[:, :-1], values[:, -1]
    if len(wrong := np.flatnonzero((y != 0.0) & (y != 1.0))):
        raise DataError(
            f"{where}, line {lines[wrong[0]]}, column {target!r}: expected class 0 or 1, got {y[wrong[0]]:g} "
            f"({len(wrong)} of {len(y)} rows are so); only binary classification is supported"
        )
    require_both_classes(f"{site}, {path}, column {target!r}", y)
    return _split(site, tuple(features), x, y, test_fraction, split_seed)


def _float32(values: NDArray[np.floating]) -> NDArray[np.float32]:
    # What overflows becomes infinite, which `SiteData` refuses with a message of its own.
    with np.errstate(over="ignore"):
        return np.array(values, dtype=np.float32, order="C")


def _full(column: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
    measured = dict(column)
    for name in ("trestbps", "chol"):
        measured[name] = np.where(column[name] == 0.0, math.nan, column[name])
    numeric = {
        name: np.where(np.isnan(measured[name]), HEART_REFERENCE[name][0], measured[name]) for name in _FULL_NUMERIC
    }
    codes = {name: np.nan_to_num(values) for name, values in _indicators(measured, _FULL_CODES).items()}
    return numeric | codes | {f"{name}_missing": np.isnan(measured[name]).astype(np.float64) for name in _FULL_MISSING}


def _indicators(
    column: Mapping[str, NDArray[np.float64]], codes: Mapping[str, tuple[int, ...]]
) -> dict[str, NDArray[np.float64]]:
    return {
        f"{name}_{code}": np.where(np.isnan(column[name]), math.nan, column[name] == code)
        for name, levels in codes.items()
        for code in levels
    }


def _split(
    site: str, features: tuple[str, ...], x: NDArray[np.float64], y: NDArray[np.generic], fraction: float, seed: int
) -> SiteData:
    if not 0.0 < fraction < 1.0:
        raise DataError(f"site {site}: expected a test fraction between 0 and 1, both excluded, got {fraction}")
    # 0.07 * 100 comes out a hair above 7, and that hair must not cost a training row.
    test_rows = math.ceil(len(y) * fraction - 1e-9)
    if min(test_rows, len(y) - test_rows) < _MIN_PART:
        raise DataError(
            f"site {site}: {len(y)} rows split into {len(y) - test_rows} for training and {test_rows} for testing; "
            f"expected at least {_MIN_PART} in each: bring more rows or change the test fraction {fraction}"
        )
    # FLamby's rule: a class of one or two rows cannot be shared out, so chance decides where they go.
    scarcest = min(np.count_nonzero(y), len(y) - np.count_nonzero(y))
    train, test = train_test_split(
        np.arange(len(y)),
        test_size=test_rows,
        train_size=len(y) - test_rows,
        random_state=seed,
        shuffle=True,
        stratify=y if scarcest > 2 else None,
    )
    train.sort()
    test.sort()
    return SiteData(site, features, x[train], y[train], x[test], y[test])


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def _check_columns(where: str, names: Sequence[str], wanted: Sequence[str]) -> None:
    if not names:
        raise DataError(f"{where}: expected a header line with the columns' names, got an empty file")
    if missing := [name for name in wanted if name not in names]:
        one_column = len(names) == 1 and (";" in names[0] or "\t" in names[0])
        hint = "; it is not separated by commas: save it so" if one_column else ""
        raise DataError(f"{where}: columns {missing} are missing; the file has {list(names)}{hint}")
    if twice := [name for name in _repeated(names) if name in wanted]:
        raise DataError(f"{where}: columns {twice} are there more than once; rename or remove one of each")


def _csv_rows(path: Path) -> Iterator[tuple[int, Sequence[object]]]:
    # Spreadsheets put a byte-order mark first, which must not become part of the first column's name.
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        for cells in reader:
            if cells:
                yield reader.line_num, cells


def _parquet_rows(path: Path, where: str) -> Iterator[tuple[int, Sequence[object]]]:
    if importlib.util.find_spec("pyarrow") is None:
        raise DataError(f"{where}: reading Parquet needs pyarrow: `pip install pyarrow`, or save the table as CSV")
    try:
        frame = pd.read_parquet(path, engine="pyarrow")
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: cannot be read as Parquet: {error}") from error
    yield 0, list(frame.columns)
    yield from enumerate(zip(*(frame.iloc[:, i].tolist() for i in range(frame.shape[1])), strict=True), start=1)


def _numbers(
    rows: Iterator[tuple[int, Sequence[object]]], names: Sequence[str], wanted: Sequence[str], where: str
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    position = [names.index(name) for name in wanted]
    flat, lines = array("d"), array("q")
    for line, cells in rows:
        if len(cells) != len(names):
            raise DataError(
                f"{where}, line {line}: expected {len(names)} fields as in the header, got {len(cells)}; "
                "quote a field that holds a comma"
            )
        lines.append(line)
        for i in position:
            try:
                flat.append(_number(cells[i]))
            except ValueError as error:
                raise DataError(f"{where}, line {line}, column {names[i]!r}: {error}") from None
    return np.array(flat, dtype=np.float64).reshape(-1, len(wanted)), np.array(lines, dtype=np.int64)


def _number(cell: object) -> float:
    try:
        value = float(cell)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        if cell is not None and cell is not pd.NA and str(cell).strip().lower() not in _MISSING_WORDS:
            raise ValueError(f"expected a number, got {cell!r}; write a yes or no as 1 or 0, decimals as 1.5") from None
        value = math.nan
    if math.isnan(value):
        raise ValueError(f"expected a number, got the missing value {str(cell)!r}; impute it or drop the row")
    if abs(value) > _FLOAT32_MAX:
        raise ValueError(f"expected a finite number within float32, got {cell!r}; impute it or drop the row")
    return value
