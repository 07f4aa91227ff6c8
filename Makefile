# Two commands on a fresh machine: `make demo` and `make test`. Both set everything up first.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Data sets that some tests and examples want; they skip, with a reason, where there are none.
export SECATEUR_DATA ?= $(abspath ../shared/data)

.PHONY: setup demo test test-all lint bench clean
setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install -qq --editable '.[dev]'  # -qq: setuptools' advice is for us
	touch $@

demo: setup
	$(BIN)/secateur demo --out out/demo

# A file of tests to a core; one thread each, so that the cores do not fight.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses logical --dist loadfile

test: setup
	$(PYTEST) -m 'not slow or emulated'

test-all: setup
	$(PYTEST) -m 'slow or not slow'

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The quick suites, about three quarters of an hour; from nyuv2 on they need SECATEUR_DATA.
bench: setup
	$(BIN)/python benchmarks/scenes/run.py
	$(BIN)/python benchmarks/latency/run.py
	$(BIN)/python benchmarks/nyuv2/run.py
	$(BIN)/python benchmarks/peers/run.py --quick
	$(BIN)/python benchmarks/fusion/run.py --quick
	$(BIN)/python benchmarks/vote/product.py --quick

clean:
	rm -rf $(VENV) out build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
