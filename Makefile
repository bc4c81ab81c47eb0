# Everything a fresh machine with Python 3.11+ and git needs: `make quickstart` and `make test`.
# On a GPU machine name the torch you want once:  make quickstart TORCH=torch
TORCH  ?= torch==2.13.0
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help install quickstart test lint format types imports pytest test-versions clean

help:
	@echo "make quickstart     install and run the main job; prints where the report is"
	@echo "make test           install and run lint, types, import contract and tests"
	@echo "make test-versions  the tests that outside releases can break, on the oldest and newest of them (writes docs/results/versions.md)"
	@echo "make format         rewrite the sources in house style"
	@echo "make clean          remove the virtual environments and run outputs"

install: $(VENV)/.installed

# torch first and alone, and named again beside everything else, so that nothing later replaces it
$(VENV)/.installed: pyproject.toml fledgling/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "alula needs Python 3.11 or newer; $(PYTHON) is older. Name another: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	$(PIP) "$(TORCH)" --editable . --editable fledgling
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) "$(TORCH)" --editable ".[dev]" --editable fledgling
	@touch $@

quickstart: $(VENV)/.installed
	$(BIN)/alula quickstart

test: lint types imports pytest

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

imports: $(VENV)/.installed-dev
	$(BIN)/lint-imports

pytest: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n 2 --dist loadfile

# not part of `make test`: half an hour, some gigabytes of packages. ONLY=lowest, newest or lowest-torch runs one of them
test-versions: $(VENV)/.installed
	$(BIN)/python tools/versions.py --torch "$(TORCH)" $(if $(ONLY),--only $(ONLY))

clean:
	rm -rf $(VENV) .versions runs
