# `make demo` and `make test` do all of their set-up themselves: nothing but python3 and make is needed.

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN := $(VENV)/bin

unexport PYTHONPATH PYTHONHOME
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.NOTPARALLEL:
.PHONY: help demo test test-slow test-lanes format lint types arrows unit clean

help:
	@echo "make demo        sample images with the checkpoint that ships, into out/demo.png"
	@echo "make test        format, lint, types, imports of the rooms, tests (8 CPU devices), docstring examples, wheel"
	@echo "make test-slow   the long tests"
	@echo "make test-lanes  the tests on every Python 3.11-3.13 of this machine"
	@echo "make clean       remove everything that these made"

demo: $(VENV)/.ready-run
	@mkdir -p out
	@$(BIN)/difax sample --out out/demo.png

test: format lint types arrows unit

format: $(VENV)/.ready-dev
	$(BIN)/ruff format --check

lint: $(VENV)/.ready-dev
	$(BIN)/ruff check

types: $(VENV)/.ready-dev
	$(BIN)/pyright --pythonpath $(BIN)/python

arrows: $(VENV)/.ready-dev
	$(BIN)/lint-imports --no-logo --no-cache

unit: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --durations 10 --durations-min 2

test-slow: $(VENV)/.ready-dev
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations 10 --durations-min 2 -m slow

test-lanes:
	@.ci/lanes

clean:
	rm -rf out build dist difax.egg-info .venv .venv-3.* .pytest_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("difax needs Python 3.11 or newer and $(PYTHON) is %d.%d: name another, as in make test PYTHON=python3.12" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv --clear $(VENV) || \
	  { rm -rf $(VENV); echo "$(PYTHON) could not make a virtual environment (Debian, Ubuntu: install python3-venv)" >&2; exit 1; }

$(VENV)/.ready-run: pyproject.toml | $(BIN)/python
	@echo "installing difax into $(VENV): a minute or two, the first time only"
	@$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.ready-dev: pyproject.toml | $(BIN)/python
	@echo "installing difax and its development tools into $(VENV): a minute or two, the first time only"
	@$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(VENV)/.ready-run $@
