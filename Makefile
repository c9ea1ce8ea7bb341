# Everything that a person does with this project. Needs make and Python 3.11 or newer, nothing else.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The first Python that is new enough; PYTHON=... overrides.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python; do \
  "$$p" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet --quiet
WORKERS ?= auto
# TESTS=tests/mm runs a part.
TESTS ?= tests
PYTEST := $(BIN)/pytest --durations 10 --durations-min 1

export GRPC_ENABLE_FORK_SUPPORT := 0

.PHONY: help setup gen demo test check format up bench docs pictures lock contract clean

help:  ## list the verbs
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(VENV)/generated.stamp  ## .venv with all dependencies, and the generated code; quick when nothing has changed

$(VENV)/dependencies.stamp: constraints.txt
	@if [ -z "$(PYTHON)" ]; then echo "make: no Python 3.11 or newer with venv and pip was found (set PYTHON=...)" >&2; exit 1; fi
	@echo "setup: $(VENV) and its dependencies (about half a minute)"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --require-hashes -r constraints.txt
	@touch $@

# What looks at a server and what makes the pages is large; the demo and most tests do without.
$(VENV)/extras.stamp: $(VENV)/generated.stamp extras-constraints.txt
	@echo "setup: the extras [top], [console], [docs] and [otel]"
	@$(PIP) install --require-hashes -r extras-constraints.txt
	@touch $@

$(VENV)/generated.stamp: $(VENV)/dependencies.stamp build-constraints.txt pyproject.toml $(wildcard proto/mmu/v1/*.proto)
	@echo "setup: generated code in gen/, mmubus in $(VENV)"
	@$(PIP) install --no-deps --build-constraint build-constraints.txt --editable .
	@touch $@

gen:  ## generate code from proto/ again
	@rm -f $(VENV)/generated.stamp
	@$(MAKE) --no-print-directory setup

demo: setup  ## show the drivers at work on a recorded program
	@$(BIN)/mmubus demo

# Those with processes of their own (e2e) run one at a time, afterwards: what they wait for is real time. 5: none was found.
test: setup  ## all tests
	@status=0; \
	$(PYTEST) -n $(WORKERS) --dist worksteal -m 'not e2e' $(TESTS) || status=$$?; \
	[ $$status = 0 ] || [ $$status = 5 ] || exit $$status; \
	$(PYTEST) -n 0 -m e2e $(TESTS) || [ $$? = 5 -a $$status = 0 ]

check: $(VENV)/extras.stamp node_modules/.stamp  ## formatter, linter, types, layering, the contract's lint
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/pytest -q -n 0 tests/test_layering.py tests/test_contract.py tests/test_docs.py tests/test_deploy.py tests/test_kubernetes.py
	@if [ -x node_modules/.bin/buf ]; then \
	  node_modules/.bin/buf lint && node_modules/.bin/buf format -d --exit-code && \
	  node_modules/.bin/buf breaking --against proto/released.binpb && echo "buf: the contract is clean"; \
	else echo "buf: not run (no node or no registry); tests/test_contract.py has checked the contract"; fi

# buf comes from npm. Without node the contract is still linted, by tests/test_contract.py.
node_modules/.stamp: package.json package-lock.json
	@mkdir -p node_modules
	@if command -v npm >/dev/null; then echo "check: buf, from npm"; \
	  npm ci --silent --ignore-scripts --no-audit --no-fund || echo "check: npm could not install buf"; fi
	@mkdir -p node_modules && touch $@

format: setup  ## format the code and the contract, and fix what the linter can
	@$(BIN)/ruff check --fix --exit-zero --quiet .
	@$(BIN)/ruff format .
	@if [ -x node_modules/.bin/buf ]; then node_modules/.bin/buf format -w; fi

# UP=--bootstrap on a machine without an image registry.
up:  ## server, application and two drivers in containers, and what each of them did
	@PYTHON="$(PYTHON)" deploy/up.sh $(UP)

bench: setup  ## benchmarks
	@for file in tests/benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file; done
	@$(BIN)/mmubus bench --quick

docs: $(VENV)/extras.stamp  ## the documents as pages, in site/; a link that leads nowhere is an error
	@$(BIN)/python -m mkdocs --quiet build --strict

pictures: $(VENV)/extras.stamp  ## the pictures of the documents again; needs Chromium
	@$(BIN)/python docs/pictures/make.py

contract: setup  ## store the contract as released: what later changes must not break
	@$(BIN)/python -m grpc_tools.protoc -Iproto --include_imports --descriptor_set_out=proto/released.binpb proto/mmu/v1/*.proto

# The versions that setup installs. Needs uv on the PATH. No registry address is written.
lock:  ## resolve the dependencies anew
	@UV="uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header"; \
	$$UV --extra dev pyproject.toml --output-file constraints.txt >/dev/null; \
	$$UV --constraint constraints.txt --extra dev --extra top --extra console --extra docs --extra otel pyproject.toml \
	  --output-file extras-constraints.txt >/dev/null; \
	echo 'pip>=25.3' | $$UV --no-annotate --constraint constraints.txt pyproject.toml - --output-file deploy/constraints.txt >/dev/null; \
	$(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' | \
	$$UV --no-annotate - --output-file build-constraints.txt >/dev/null

clean:  ## remove everything that was made here
	@rm -rf $(VENV) gen/mmu/v1 node_modules site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage htmlcov
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
