# Every target makes and uses .venv/ by itself; PYTHON chooses the interpreter that it is made with (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := f2llm_jax configs tests

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow tpu-check lint format clean

help:  ## Print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(INSTALLED)  ## Train a small multilingual model on the embedded corpus, export it and check it
	PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/demo.sh

# By file, because what a file's tests share (a corpus, a compiled step) is then made once and not once a worker.
test: $(INSTALLED)  ## Run the tests on the CPU
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -q -n 2 --dist loadfile

test-slow: $(INSTALLED)  ## Run the tests that take minutes each
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -q -m slow

# libtpu stands apart from the environment: with it there, JAX would look for a TPU in every command. The version is jax[tpu]'s own:
# a newer one compiles too, but writes programs that this jaxlib cannot read.
tpu-check: $(INSTALLED)  ## Compile every size for its TPU slice, no TPU needed
	test -d build/libtpu/libtpu || $(BIN)/python -m pip install --quiet --no-deps --target build/libtpu 'libtpu==0.0.42.*'
	JAX_PLATFORMS=cpu PYTHONPATH=build/libtpu $(BIN)/python -m pytest -q tests/test_compilation.py
	PYTHONPATH=build/libtpu $(BIN)/python tests/benchmarks/slices.py --out build/slices

lint: $(INSTALLED)  ## Check style and formatting
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)

format: $(INSTALLED)  ## Rewrite the sources in the house format
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:  ## Remove the environment and every cache
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find $(SOURCES) -type d -name __pycache__ -prune -exec rm -rf {} +

# The stamp is touched last and removed first: a failed install is tried again. torch comes first, pinned as in
# pyproject.toml, because a torch that pip is free to choose brings gigabytes of CUDA along.
$(INSTALLED): pyproject.toml
	@rm -f $@
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@
