# Every target installs what it needs into .venv; `make help` lists them.
PYTHON ?= python3
# What `make parity` compares with, from PyTorch's index of CPU builds where it can be reached: a
# build marked +cpu goes before the same version from PyPI, which brings gigabytes of CUDA.
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# A hub id, a folder, or an llm.c file with gpt2_tokenizer.bin beside it.
MODEL ?=
# How long `make fuzz` runs.
FUZZ_SECONDS ?= 60

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The extra for this machine's driver, looked up once and only where it is needed.
EXTRA = $(eval EXTRA := $$(shell $$(PYTHON) tools/detect_extra.py))$(EXTRA)
# Kernels compile without a GPU, so tests install CUDA's compiler everywhere.
TEST_EXTRA = $(or $(EXTRA),cuda12)
ARCHS := sm_75 sm_80 sm_86 sm_89 sm_90 sm_100 sm_120
LOWEST := .venv-lowest
LOWEST_PIP := $(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check

# One environment, filled by one pip at a time.
.NOTPARALLEL:
.PHONY: help demo test test-lowest compile-all parity e2e fuzz gpu-test bench lint format docs
.PHONY: records release-check clean sanitize

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

$(VENV)/base: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.10 or newer is needed: make PYTHON=python3.x" if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(PIP) -e '.$(if $(EXTRA),[$(EXTRA)])'
	@touch $@

$(VENV)/test: $(VENV)/base
	$(PIP) -e '.[$(TEST_EXTRA),serve,test]'
	@touch $@

$(VENV)/parity: $(VENV)/test
	$(PIP) --no-deps --retries 1 --extra-index-url $(TORCH_INDEX) '$(TORCH)'
	$(PIP) -e '.[parity]'
	@touch $@

# After parity, whose PyTorch lm-eval takes then.
$(VENV)/e2e: $(VENV)/parity
	$(PIP) -e '.[serve,e2e]'
	@touch $@

# Not for every Python and machine has atheris a wheel; what needs it says so and passes.
$(VENV)/fuzz: $(VENV)/base
	-$(PIP) --only-binary :all: 'atheris>=3'
	@touch $@

$(VENV)/bench: $(VENV)/test
	$(PIP) -e '.[bench]'
	@touch $@

$(VENV)/docs: $(VENV)/base
	$(PIP) -e '.[docs]'
	@touch $@

$(VENV)/lint: $(VENV)/base
	$(PIP) -e '.[lint]'
	@touch $@

demo: $(VENV)/base ## Install and stream text from the embedded model
	@$(BIN)/gpt2cupy generate "ROMEO:" --max-new-tokens 200 --temperature 0.8 --top-k 50 --seed 7

# The tests look into kernels of the embedded model, which are compiled faster beforehand.
test: $(VENV)/test ## Run every test that needs no GPU
	$(BIN)/gpt2cupy compile --model shakespeare --ops --arch sm_75 --arch sm_90
	$(BIN)/python -m pytest -m "not gpu" --ignore=tests/parity --ignore=tests/e2e -n auto --dist worksteal

e2e: $(VENV)/e2e ## A real server on the CPU: its interface, what it survives, clients that others wrote
	$(BIN)/python -m pytest tests/e2e -n auto --dist loadfile

# Every "name>=version" of pyproject.toml as "name==version", but for the extra of the other CUDA.
# Needs a Python that the oldest NumPy has wheels for: 3.10 to 3.12.
$(LOWEST)/test: pyproject.toml
	$(PYTHON) -m venv --clear $(LOWEST)
	sed '/^$(filter-out $(TEST_EXTRA),cuda12 cuda13) = /,/^]/d' pyproject.toml \
	  | grep -o '"[a-z][A-Za-z0-9_-]*>=[0-9.]*' | sed 's/"//; s/>=/==/' > $(LOWEST)/versions
	$(LOWEST_PIP) -c $(LOWEST)/versions -e '.[$(TEST_EXTRA),test]'
	@touch $@

# The tests on the oldest libraries that pyproject.toml admits.
test-lowest: $(LOWEST)/test
	$(LOWEST)/bin/gpt2cupy compile --model shakespeare --ops --arch sm_75 --arch sm_90
	$(LOWEST)/bin/python -m pytest -m "not gpu" --ignore=tests/parity --ignore=tests/e2e

compile-all: $(VENV)/test ## Compile every kernel for all seven architectures
	$(BIN)/gpt2cupy compile --ops $(ARCHS:%=--arch %)

parity: $(VENV)/parity ## Compare with Hugging Face transformers on the CPU; MODEL=gpt2 too
	$(if $(MODEL),GPT2CUPY_PARITY_MODEL='$(MODEL)') $(BIN)/python -m pytest tests/parity -n auto --dist worksteal

fuzz: $(VENV)/fuzz ## Fuzz loaders and tokenizer with atheris, for a minute or FUZZ_SECONDS=
	$(BIN)/python tests/fuzz/fuzz_loaders.py --seconds $(FUZZ_SECONDS)

gpu-test: $(VENV)/test ## On a GPU: run the GPU tests and write bench/results/gpu-tests.json
	$(BIN)/python tools/gpu_test.py

# The tests that tests/sanitized.txt lists: under the sanitizer each takes seconds. Errors of calls of
# the driver are not reported: cuda.bindings asks it for functions that it may lack.
sanitize: $(VENV)/test ## On a GPU, with compute-sanitizer on the PATH: memcheck and racecheck over the kernels
	@$(BIN)/gpt2cupy info --device cuda
	for tool in "memcheck --report-api-errors no" racecheck; do sed '/^#/d' tests/sanitized.txt | GPT2CUPY_TEST_TORCH=0 xargs compute-sanitizer \
	  --tool $$tool --error-exitcode 9 $(BIN)/python -m pytest -q || exit 1; done

bench: $(VENV)/bench ## On a GPU: make the records that are missing or stale, and the documents' tables
	$(BIN)/python bench/all.py
	$(BIN)/python -m bench.report --draw

lint: $(VENV)/lint ## Check with ruff, mypy, clang-format and hadolint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror cuda_src/*.cu cuda_src/*.cuh
	$(BIN)/hadolint tools/docker/Dockerfile

format: $(VENV)/lint ## Rewrite sources in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i cuda_src/*.cu cuda_src/*.cuh

docs: $(VENV)/docs ## Write docs/api.md from the docstrings
	$(BIN)/python tools/make_api.py

records: $(VENV)/base ## List the benchmark and GPU-test records: current, stale, cut off or missing
	@$(BIN)/python -m bench.report --records

# A batch killed 100 times, 10,000 requests against 256 slots, and bodies at random for ten minutes.
release-check: $(VENV)/test ## Fail if a record is stale or cut off, a table has none, or a long test fails
	@$(BIN)/python -m bench.report --records --strict
	GPT2CUPY_E2E_REQUESTS=10000 $(BIN)/python -m pytest -q tests/e2e/test_survival.py -k beyond_the_slots
	$(BIN)/python tests/fuzz/fuzz_server.py --seconds 600
	$(BIN)/python -m pytest -q tests/generation/test_batch.py -k kills --kills 100

clean: ## Remove the environment and caches
	rm -rf $(VENV) $(LOWEST) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
