# make demo      a question about a long document, answered by a real model; then a table of results
# make test      lint, types and the test suite         make test-all   with the slow tests
# make bench     the figures of the README              make lint       ruff and mypy only
# make test-compat TORCH=2.12.0 TRANSFORMERS=5.17.0      the tests on other versions, in an environment of their own
# make test-transformers SOURCE=/path/to/transformers MODELS="llama qwen2"      its generation tests, on compiled models
#
# All of them build .venv first, and reuse it afterwards. Choose a Python with `make PYTHON=/path/to/python3.12 ...`.
# Where packages come from is pip's own configuration. torch==2.13.0 in constraints.txt also stands for its CPU
# build (2.13.0+cpu), which pip prefers where it is on offer.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV := .venv
PINS := constraints.txt
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# one process per core, each with one thread: most of a test's time is spent in Python
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses=auto --maxprocesses=8 --dist=loadfile
PYTHON ?=
PYTHONS := $(or $(PYTHON),python3 python3.14 python3.13 python3.12 python3.11)

# torch's compiler calls $CXX, or g++ when that is not set
ifeq ($(origin CXX),default)
CXX := $(shell command -v g++ || command -v clang++ || command -v c++)
endif
export CXX

.PHONY: help demo test test-all test-compat test-transformers lint bench clean compiler
help:
	@sed -n 's/^# make/make/p' Makefile

demo: compiler $(STAMP)
	@$(BIN)/python examples/quickstart.py

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/mypy examples

test: compiler lint
	@$(PYTEST) -m "not slow"

test-all: compiler lint
	@$(PYTEST)

# TESTS narrows what runs; only torch and transformers are pinned, all else is what fits them (the interpreter of
# triton 3.6, which torch 2.11 comes with, takes no newer numpy).
COMPAT := .venv-torch-$(TORCH)-transformers-$(TRANSFORMERS)
TESTS ?= tests
test-compat: compiler
	@: $(or $(TORCH),$(error give TORCH=<version>)) $(or $(TRANSFORMERS),$(error give TRANSFORMERS=<version>))
	@mkdir -p build
	@printf 'torch==%s\ntransformers==%s\nnumpy<2.4\n' "$(TORCH)" "$(TRANSFORMERS)" >build/$(COMPAT).txt
	@$(MAKE) VENV=$(COMPAT) PINS=build/$(COMPAT).txt $(COMPAT)/.installed
	@OMP_NUM_THREADS=1 $(COMPAT)/bin/pytest --numprocesses=auto --maxprocesses=8 --dist=loadfile -m "not slow" $(TESTS)

# SOURCE is a checkout of transformers, best of the version in constraints.txt; its tests need a few packages more.
PEER := .venv-transformers
MODELS ?= llama qwen2
test-transformers: compiler
	@: $(or $(SOURCE),$(error give SOURCE=<a checkout of transformers>))
	@$(MAKE) VENV=$(PEER) $(PEER)/.installed
	@$(PEER)/bin/python -m pip install -q --disable-pip-version-check -c $(PINS) parameterized httpx datasets
	@mkdir -p build
	@OMP_NUM_THREADS=1 $(PEER)/bin/python tests/transformers_generation.py "$(SOURCE)" --models $(MODELS) \
	  --json build/transformers-generation.json

bench: compiler $(STAMP)
	@$(BIN)/python benchmarks/decode.py
	@$(BIN)/python benchmarks/first_call.py
	@$(BIN)/python benchmarks/capture.py

clean:
	@rm -rf $(VENV) .venv-torch-* $(PEER) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage htmlcov
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

compiler:
	@command -v "$(firstword $(CXX))" >/dev/null || { \
	  echo "no C++ compiler found: torch.compile needs one."; \
	  echo "  fix: install g++ (apt install g++, dnf install gcc-c++, xcode-select --install), or set CXX"; \
	  exit 1; } >&2

# A Python counts when it is new enough and can make an environment; one with its C headers is preferred, because
# torch's compiler includes Python.h.
define FIND_PYTHON
usable='import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))'; \
headers='import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))'; \
python=; without=; \
for candidate in $(PYTHONS); do \
  "$$candidate" -c "$$usable" 2>/dev/null || continue; \
  if "$$candidate" -c "$$headers"; then python="$$candidate"; break; fi; \
  without="$${without:-$$candidate}"; \
done; \
if [ -z "$$python" ] && [ -n "$$without" ]; then \
  python="$$without"; \
  echo "warning: $$python has no Python.h, which torch.compile includes (apt install python3-dev)" >&2; \
fi; \
if [ -z "$$python" ]; then \
  echo "no Python from 3.11 to 3.14 with the venv module found; tried: $(PYTHONS)"; \
  echo "  fix: install one (apt install python3 python3-venv python3-dev), or make PYTHON=/path/to/python3.12"; \
  exit 1; \
fi >&2
endef

$(STAMP): pyproject.toml $(PINS)
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  $(FIND_PYTHON); \
	  echo "making $(VENV) with $$("$$python" --version)"; \
	  rm -rf $(VENV); "$$python" -m venv $(VENV); \
	fi
	@echo "installing torch and friends into $(VENV) (several hundred MB, or some GB where torch" \
	  "comes with CUDA; the first time takes minutes) ..."
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c $(PINS) -e ".[test]"
	@touch $@
