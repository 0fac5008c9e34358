# Every target sets the project up first; a set-up that is already there costs a fraction of a second.
#   make demo        the demo study on the demo model, from a bare machine
#   make test        the whole test suite
#   make setup ENGINE=cuda PYTHON=python3.12     another engine, another interpreter

PYTHON ?= python3
ENGINE ?= cpu

BIN := .venv/bin

# No usage reports from runs of this project's own tests and demo.
export DO_NOT_TRACK := 1
export RAY_USAGE_STATS_ENABLED := 0

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-model test test-fast lint types check format clean

help:
	@echo "make setup | demo | demo-model | test | test-fast | lint | types | check | format | clean"

setup:
	@$(PYTHON) .ci/setup_env.py --engine $(ENGINE)

demo-model: setup
	@$(BIN)/python -m batch_jobs.demo_model

demo: demo-model
	$(BIN)/vllm-steer study run configs/studies/demo.yaml

test: setup
	$(BIN)/python -m pytest

test-fast: setup
	$(BIN)/python -m pytest -m "not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

check: lint types

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
