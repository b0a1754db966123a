# `make` alone lists what there is.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
# torch 2.11 is the release built for triton 3.6.0. Without a GPU any torch does, as a CPU build
# where there is one: set TORCH_INDEX to PyTorch's index of CPU builds if your default one has none.
TORCH ?= $(if $(HAS_GPU),torch==2.11.*,torch==2.13.0)
TORCH_INDEX ?=
EXTRAS ?= test,plot
# Processes of the tests: one for each core, or as many as share a GPU's memory well.
WORKERS ?= $(if $(HAS_GPU),4,logical)

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types golden docs bench check clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

$(VENV)/.$(EXTRAS): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	touch $@

setup: $(VENV)/.$(EXTRAS) ## make .venv with maskdsl, torch and the test tools in it

demo: setup ## compile a mask, run it here, check it against dense, explain it, draw it
	$(BIN)/python examples/quickstart.py

test: setup ## the tests (no GPU needed; those marked gpu run where there is one)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: ## ruff, import layers, spelling
	$(MAKE) --no-print-directory setup EXTRAS=dev
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/codespell maskdsl codegen patterns tests docs benchmarks examples *.md

types: ## mypy --strict
	$(MAKE) --no-print-directory setup EXTRAS=dev
	$(BIN)/mypy

golden: setup ## write the golden kernels anew; read the diff before you commit it
	$(BIN)/python -m pytest tests/golden --update-golden

docs: ## build the site, warnings are errors
	$(MAKE) --no-print-directory setup EXTRAS=docs
	$(BIN)/mkdocs build --strict

bench: setup ## the main benchmarks, on this machine's GPU, into docs/benchmarks
	$(BIN)/python -m benchmarks.run forward dense million cold host cpu

check: lint types test docs ## everything CI could ask

clean: ## remove what the targets made
	rm -rf $(VENV) site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
