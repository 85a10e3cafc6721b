# Every target sets up what it needs. Set PYTHON to any Python 3.10 to 3.13.
#
# torch is installed first and by itself, by the pin in constraints.txt. Where the package index has
# only the CUDA build (gigabytes), point pip at the CPU one:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu make test
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BITSANDBYTES := $(VENV)/bitsandbytes
PIP := $(BIN)/python -m pip install --constraint constraints.txt

# An editable install copies these two: a change of them asks for a new one.
STARTUP := mergekit_dam/mergekit_dam_autoload.pth mergekit_dam/mergekit_dam_autoload.start

.PHONY: setup demo test test-fast test-bitsandbytes architectures test-mergekit lint build

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt $(STARTUP)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable ".[dev]"
	touch $@

# A whole merge on models made on the spot: nothing is downloaded but packages.
demo: $(STAMP)
	$(BIN)/mergekit-dam demo demo

# Everything, the slow tests included, as many files at a time as there are cores.
# Arguments for pytest: make test ARGS="-x -k autoload"
test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile -m "slow or not slow" $(ARGS)

# The fast tests alone.
test-fast: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadfile $(ARGS)

# What needs bitsandbytes. It has a folder of its own: where it can be imported, peft imports it, and
# with it torch's compiler, so that every process of mergekit starts seconds later.
test-bitsandbytes: $(BITSANDBYTES)
	PYTHONPATH=$(BITSANDBYTES) $(BIN)/python -c "import bitsandbytes"
	PYTHONPATH=$(BITSANDBYTES) $(BIN)/python -m pytest -m bitsandbytes $(ARGS)

$(BITSANDBYTES): $(STAMP)
	$(PIP) --no-deps --target $@ bitsandbytes
	touch $@

# mergekit's own tests, with this package and without it: what goes otherwise is an error.
test-mergekit: $(STAMP)
	$(BIN)/python -m tests.mergekit_suite.suite

# Merges a tiny model of every architecture, and writes the table in examples/architectures.md.
architectures: $(STAMP)
	$(BIN)/python -m tests.architectures.table

# The wheel and the sdist in dist/, each built in an environment of its own.
build: $(STAMP)
	$(BIN)/python -m build

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
