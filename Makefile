# Two commands are all that a newcomer needs: `make demo` and `make test`. Both set everything up by themselves.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: help setup demo test test-slow test-flower check lint types contracts bench guards clean

help:
	@echo "make demo       four hospitals train one model (sets up .venv first)"
	@echo "make test       the everyday test suite"
	@echo "make check      what CI runs: test, lint, types, import contracts"
	@echo "make test-slow  the long tests"
	@echo "make test-flower  hospitals over Flower, with TLS on loopback, and all that goes wrong; BOUNDED=1 leaves out the longest"
	@echo "make bench      all benchmarks, with their targets checked; JSON to benchmarks/results"
	@echo "make guards     every check in secagg/ and of the ledger removed once: does a test notice? SAMPLE=40 for some of them"
	@echo "make setup      .venv with everything; quick when nothing changed"

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "Python 3.11 or newer is needed, this is %d.%d; say which with make PYTHON=..." % v[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --editable '.[dev,flower]'
	@touch $@

demo: setup
	$(BIN)/secagg demo

test: setup
	$(BIN)/python -m pytest

test-slow: setup
	$(BIN)/python -m pytest -m 'slow and not flower'

test-flower: setup
	$(BIN)/python -m pytest -m 'flower$(if $(BOUNDED), and not slow)' tests/flower

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

contracts: setup
	$(BIN)/lint-imports

check: test lint types contracts

bench: setup
	mkdir -p benchmarks/results
	$(BIN)/python benchmarks/masking.py --check --json benchmarks/results/masking.json
	$(BIN)/python benchmarks/ckks.py --check --json benchmarks/results/ckks.json
	$(BIN)/python benchmarks/flower.py --check --json benchmarks/results/flower.json
	$(BIN)/python benchmarks/flamby_heart.py --check --json benchmarks/results/flamby_heart.json
	$(BIN)/python benchmarks/dp_samplers.py --check --json benchmarks/results/dp_samplers.json
	$(BIN)/python benchmarks/dp_mean.py --check --json benchmarks/results/dp_mean.json
	$(BIN)/python benchmarks/dp_heart.py --check --json benchmarks/results/dp_heart.json --plot docs/dp_heart.svg

# In copies of the tree. SAMPLE=n tries n guards only, drawn by the commit or by SEED=..., which the output tells.
guards: setup
	$(BIN)/python -m tests.guards.run $(if $(SAMPLE),--sample $(SAMPLE)) $(if $(SEED),--seed $(SEED))

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
