# make quickstart   train, sample and evaluate on real digits, on the CPU
# make test         what CI runs: `make check` and the whole suite
# make test-fast    the tests that are not slow
# make check        linter, formatter and type checker, changing nothing
# make lint         let the linter and the formatter mend what they can
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-fast check lint clean

quickstart: $(VENV)/.installed
	PATH="$(CURDIR)/$(BIN):$$PATH" ./quickstart.sh

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-fast: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal -m "not slow"

check: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lint: $(VENV)/.installed-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable ".[all]"
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --editable ".[all,test]"
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV)
