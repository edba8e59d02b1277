# Every target installs what it needs into .venv; `make help` lists them.
PYTHON ?= python3
# The torch that `make parity` installs; the CPU build is enough.
TORCH ?= torch
MODEL ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
EXTRA := $(shell $(PYTHON) tools/detect_extra.py)
# Kernels compile without a GPU, so tests install CUDA's compiler everywhere.
TEST_EXTRA := $(or $(EXTRA),cuda12)
ARCHS := sm_75 sm_80 sm_86 sm_89 sm_90 sm_100 sm_120

.PHONY: help demo test compile-all parity gpu-test lint format records release-check clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

$(VENV)/base: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e '.$(if $(EXTRA),[$(EXTRA)])'
	@touch $@

$(VENV)/test: $(VENV)/base
	$(PIP) -e '.[$(TEST_EXTRA),test]'
	@touch $@

$(VENV)/parity: $(VENV)/test
	$(PIP) '$(TORCH)'
	$(PIP) -e '.[parity]'
	@touch $@

$(VENV)/lint: $(VENV)/base
	$(PIP) -e '.[lint]'
	@touch $@

demo: $(VENV)/base ## Install and stream text from the embedded model
	@$(BIN)/gpt2cupy generate "ROMEO:" --max-new-tokens 200 --temperature 0.8 --top-k 50 --seed 7

test: $(VENV)/test ## Run every test that needs no GPU; compile the kernels for sm_75 and sm_90
	$(BIN)/python -m pytest -m "not gpu" --ignore=tests/parity
	$(BIN)/gpt2cupy compile --arch sm_75 --arch sm_90

compile-all: $(VENV)/test ## Compile every kernel for all seven architectures
	$(BIN)/gpt2cupy compile $(ARCHS:%=--arch %)

parity: $(VENV)/parity ## Compare with Hugging Face transformers on the CPU
	$(if $(MODEL),GPT2CUPY_PARITY_MODEL=$(MODEL)) $(BIN)/python -m pytest tests/parity

gpu-test: $(VENV)/test ## On a GPU: run the GPU tests and write bench/results/gpu-tests.json
	$(BIN)/python tools/gpu_test.py

lint: $(VENV)/lint ## ruff, mypy, clang-format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror cuda_src/*.cu cuda_src/*.cuh

format: $(VENV)/lint ## Rewrite sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i cuda_src/*.cu cuda_src/*.cuh

records: $(VENV)/base ## List the benchmark and GPU-test records, current or stale
	@$(BIN)/python bench/report.py --records

release-check: $(VENV)/base ## Fail if a record is stale
	@$(BIN)/python bench/report.py --records --strict

clean: ## Remove the environment and caches
	rm -rf $(VENV) dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
