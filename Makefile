# Every task of this repository. `make help` is the index; each target sets up what it needs, once.
SHELL := /bin/bash -o pipefail
.DEFAULT_GOAL := help

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
SOURCES := services models tests examples deploy
IMAGES := $(patsubst deploy/docker/%.Dockerfile,%,$(wildcard deploy/docker/*.Dockerfile))
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)

# pip reads its own environment and configuration: a source of CPU wheels set there is honoured.
INSTALLED := $(VENV)/.installed
GENERATED := gen/.generated
PROTOS := $(shell find protos -name '*.proto' 2>/dev/null)

.PHONY: help setup protos format lint typecheck imports protolint check test demo run bench chaos eval k8s images clean

help:  ## show this index
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## */\1\t/' | sort | expand -t 12

setup: $(INSTALLED) $(GENERATED)  ## create .venv, install the pinned packages, generate the stubs

$(PY):
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): pyproject.toml requirements.lock | $(PY)
	$(BIN)/pip install -q -c requirements.lock hatchling editables
	$(BIN)/pip install -q -c requirements.lock --no-build-isolation -e '.[embedded,dev]'
	@touch $@

# Written beside the old stubs and moved over them, so that a program starting meanwhile finds a whole tree.
$(GENERATED): $(PROTOS) | $(INSTALLED)
	@rm -rf gen/.next && mkdir -p gen/.next
	$(PY) -m grpc_tools.protoc -Iprotos --python_out=gen/.next --pyi_out=gen/.next --grpc_python_out=gen/.next $(PROTOS)
	@rm -rf gen/.last && if [ -e gen/likeness ]; then mv gen/likeness gen/.last; fi
	@mv gen/.next/likeness gen/likeness && rm -rf gen/.next gen/.last
	@touch $@

protos: $(GENERATED)  ## generate the gRPC stubs into gen/ (protos/ -> gen/likeness/)

format: setup  ## rewrite the sources in the house's format, mend what can be mended
	$(BIN)/ruff check -q --fix-only $(SOURCES)
	$(BIN)/ruff format -q $(SOURCES)

lint: setup  ## style and format; edits nothing
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

typecheck: setup  ## static types
	$(BIN)/mypy

imports: setup  ## who may import whom (the contracts in pyproject.toml)
	@PYTHONPATH=.:gen $(BIN)/lint-imports --no-logo

protolint: setup  ## the rules that the protos follow
	$(PY) -m pytest -q tests/contract/test_proto_rules.py

check: lint typecheck imports protolint  ## lint, format, types, imports, protos

test: check  ## check, then the whole test suite
	$(PY) -m pytest $(PYTEST_ARGS)

demo: setup  ## teach the base model a robot over HTTP; out/sheet.png shows it before and after
	$(PY) examples/demo.py

run: setup  ## serve the embedded platform until Ctrl-C
	@exec $(PY) -m services.launcher

bench: setup  ## speed and memory, as ratios against peers
	$(PY) -m tests.bench

chaos: setup  ## kill trainings, then storage and its S3 server, at random moments: the same bits, nothing lost
	$(PY) -m tests.chaos $(CHAOS_ARGS)
	$(PY) -m tests.chaos.storing $(CHAOS_ARGS)

eval: setup  ## picture quality: what the base draws, what trainings teach it; writes docs/evaluation
	$(PY) -m tests.eval

k8s: setup  ## render every overlay of deploy/k8s and check it: schemas, policy, placement, reachability
	$(PY) -m pytest -q tests/unit/deploy/test_manifests.py

images: $(addprefix image-,$(IMAGES))  ## build all container images (deploy/docker); the workers' for CUDA

image-%:
	docker build -f deploy/docker/$*.Dockerfile --build-arg VERSION=$(VERSION) \
	    --build-arg REVISION=$$(git rev-parse HEAD) -t likeness/$*:$(VERSION)$(if $(findstring worker,$*),-cuda) .

clean:  ## remove what is built; keeps .venv and the platform's data in .likeness
	rm -rf gen build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find services models tests -name __pycache__ -type d -prune -exec rm -rf {} +
