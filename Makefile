# Every target sets the project up first; a set-up that is already there costs a fraction of a second.
#   make demo        the demo study on the demo model, from a bare machine
#   make test        the whole test suite
#   make peers       packages whose vectors people bring, beside the environment; tests of them are skipped without
#   make test-clients   the clients that people use, in an environment of their own, against the real server
#   make test-harnesses   lm-eval in process: packages of the clients' environment behind the project's own
#   make conformance what is exact with which feature and family, into docs/conformance.md
#   make bench       what it costs, in a small form: a quarter of an hour at first; tables, and which goals hold
#   make bench-record   the same in full, for hours on a quiet machine, into benchmarks/results/cpu and docs/performance.md
#   make bench-gpu ENGINE=cuda   kernels, engine and hooks on an NVIDIA GPU, on random weights in the shape of a 7B model
#   make setup ENGINE=cuda PYTHON=python3.12     another engine, another interpreter

PYTHON ?= python3
ENGINE ?= cpu

BIN := .venv/bin
CLIENTS := .venv-clients
PEERS := build/peers
NODE_PACKAGES := tests/clients/node_modules/.package-lock.json
RECORDS := benchmarks/results/cpu
GPU_RECORDS := benchmarks/results/gpu
# Per cent of statements and branches that the tests without an engine must reach; see tests/coverage_floor.py.
COVERAGE_FLOOR := 90
# A file's tests share an engine, so a file stays in one process; those of real servers come first.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder

# No usage reports from runs of this project's own tests and demo.
export DO_NOT_TRACK := 1
export RAY_USAGE_STATS_ENABLED := 0

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-model test test-fast peers clients test-clients test-harnesses conformance docs patches compat compat-run bench bench-record bench-gpu readme-performance \
	lint types check format clean

help:
	@echo "make setup | demo | demo-model | test | test-fast | peers | test-clients | test-harnesses | conformance | docs | patches | compat VLLM=... | compat-run VLLM=... | bench | bench-record | bench-gpu | readme-performance | lint | types | check | format | clean"

setup:
	@$(PYTHON) .ci/setup_env.py --engine $(ENGINE)

demo-model: setup
	@$(BIN)/python -m batch_jobs.demo_model

demo: demo-model
	$(BIN)/vllm-steer study run configs/studies/demo.yaml

# Two engines at once, each in a process of its own. Ray wants the machine for itself.
test: setup $(NODE_PACKAGES)
	$(BIN)/python -m pytest -m "not ray and not breadth" $(PARALLEL) --coverage-floor $(COVERAGE_FLOOR)
	$(BIN)/python -m pytest -m ray $$(grep -rl "mark\.ray" tests --include='test_*.py')

test-fast: setup
	$(BIN)/python -m pytest -m "not slow" $(PARALLEL)

# Without what they ask for (NumPy 1, transformers 4), and so in a folder of their own; see tests/support/peers.py.
$(PEERS)/made: tests/support/peers.txt
	@$(MAKE) setup
	rm -rf $(PEERS)
	$(BIN)/python -m pip --disable-pip-version-check install --quiet --no-deps --no-compile --target $(PEERS) -r $<
	touch $@

peers: $(PEERS)/made

# Made anew when a pin changes; the stamp comes last, so that an installation that was cut short does not count.
$(CLIENTS)/made: tests/clients/requirements.txt | $(NODE_PACKAGES)
	@$(MAKE) setup
	rm -rf $(CLIENTS)
	$(BIN)/python -m venv --without-pip $(CLIENTS)
	$(BIN)/python -m pip --disable-pip-version-check --python $(CLIENTS)/bin/python install --quiet --no-deps --no-compile \
		-r tests/clients/requirements.txt
	touch $@

# OpenAI's client and Vercel's AI SDK for Node, and the accessibility checker that the playground's browser tests run.
$(NODE_PACKAGES): tests/clients/package-lock.json
	if command -v npm >/dev/null; then npm ci --prefix tests/clients --no-audit --no-fund; fi

clients: $(CLIENTS)/made

test-clients: demo-model clients
	$(CLIENTS)/bin/python -m pytest -c tests/clients/pytest.ini tests/clients

# The project's own settings, but for the list of what other targets run.
test-harnesses: demo-model clients
	$(BIN)/python -m pytest -o addopts="--strict-markers --strict-config --import-mode=importlib -ra --durations=10" \
		-m "not breadth" tests/harnesses

conformance: setup
	$(BIN)/python -m pytest -m "conformance or breadth" --conformance=docs/conformance.md $(PARALLEL)
	$(BIN)/python -m pytest -o addopts="--strict-markers --strict-config --import-mode=importlib" -m breadth tests/harnesses

# The site, in build/site; an unresolved link or name is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# What is changed in vLLM and why, from the declarations.
patches: setup
	$(BIN)/python -m tests.compat.own_patches

# Against the source of a release that need not be installed: make compat VLLM=0.33.0
compat: setup
	$(BIN)/python -m tests.compat.check $(VLLM)

# The tests that know vLLM, beside another release in an environment of its own, an hour on two cores: make compat-run
# VLLM=0.33.0; SELECT='-m "not slow"' takes a quarter of it
compat-run: setup
	$(BIN)/python -m tests.compat.overlay $(VLLM) build/compat/$(VLLM)
	build/compat/$(VLLM)/bin/python -m pytest -p tests.compat.run_beside --vllm-release $(VLLM) $(PARALLEL) $(SELECT) \
		tests/engine tests/server tests/compat

bench: demo-model
	$(BIN)/python -m benchmarks.overhead.bench --small --out build/bench/overhead.json
	$(BIN)/python -m benchmarks.hooks.bench --small --out build/bench/hf-hooks.json
	$(BIN)/python -m benchmarks.op --small --out build/bench/op.json
	@$(BIN)/python -m benchmarks.report.summary build/bench

bench-record: demo-model
	$(BIN)/python -m benchmarks.overhead.bench --out $(RECORDS)/overhead.json
	$(BIN)/python -m benchmarks.hooks.bench --out $(RECORDS)/hf-hooks.json
	$(BIN)/python -m benchmarks.op --out $(RECORDS)/op.json
	$(BIN)/python -m benchmarks.scale.bench --parts specs,registered --out $(RECORDS)/scale.json
	$(BIN)/python -m benchmarks.scale.bench --parts driver,actors --out $(RECORDS)/scale-ray.json
	$(BIN)/python -m benchmarks.peers.bench --out $(RECORDS)/peers.json
	$(BIN)/python -m benchmarks.admission --out $(RECORDS)/admission.json
	$(BIN)/python -m benchmarks.overhead.idle_op --out $(RECORDS)/idle-op.json
	$(BIN)/python -m benchmarks.overhead.start --out $(RECORDS)/start.json
	$(BIN)/python -m benchmarks.server.bench --out $(RECORDS)/server.json
	$(BIN)/python -m benchmarks.demo --out $(RECORDS)/demo.json
	$(BIN)/python -m benchmarks.scoring --out $(RECORDS)/score.json
	$(BIN)/python -m benchmarks.scale.grid --out $(RECORDS)/grid-scale.json
	$(MAKE) readme-performance

bench-gpu: setup
	$(BIN)/python -m benchmarks.gpu.run --out $(GPU_RECORDS)

readme-performance: setup
	@$(BIN)/python -m benchmarks.report.summary $(RECORDS) --readme docs/performance.md
	@$(BIN)/python -m benchmarks.report.summary $(GPU_RECORDS) --readme docs/performance.md

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
	rm -rf .venv $(CLIENTS) tests/clients/node_modules build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
