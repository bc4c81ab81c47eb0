# Everything a fresh machine with Python 3.11+ and git needs: `make quickstart` and `make test`.
# On a GPU machine name the torch you want once:  make quickstart TORCH=torch
TORCH  ?= torch==2.13.0
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: help install quickstart test lint format types imports pytest clean

help:
	@echo "make quickstart   install and run the main job; prints where the report is"
	@echo "make test         install and run lint, types, import contract and tests"
	@echo "make format       rewrite the sources in house style"
	@echo "make clean        remove the virtual environment and run outputs"

install: $(STAMP)

# torch first and alone, so that nothing later replaces it
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "alula needs Python 3.11 or newer; $(PYTHON) is older. Name another one: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)" --editable ".[dev]"
	@touch $(STAMP)

quickstart: $(STAMP)
	$(BIN)/alula quickstart

test: lint types imports pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)
	$(BIN)/mypy

imports: $(STAMP)
	$(BIN)/lint-imports

pytest: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadgroup

clean:
	rm -rf $(VENV) runs
