# `make demo` and `make test` set up what they need by themselves; a fresh .venv is left alone.
PYTHON := $(shell command -v python3.11 || command -v python3.12 || command -v python3)
BIN := .venv/bin

.PHONY: demo test check format bench-start clean

demo: .venv/fresh
	$(BIN)/opd-mcp demo $(ARGS)

test: .venv/fresh
	$(BIN)/python -m pytest $(ARGS)

check: .venv/fresh
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/fresh
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/fresh: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
