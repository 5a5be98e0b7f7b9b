# Everything runs from a virtual environment that each target builds if it is not there, with the versions of constraints.txt.
# Only python3 (3.11 or newer) and a package index are needed. `make PYTHON=python3.12 test` picks another Python.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PIP := $(VENV)/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
SOURCES := fisedit_compiler benchmarks tests docs .ci $(wildcard examples)

.PHONY: help demo test replay lint types format docs hooks wheel matrix bench clean

help:
	@echo "make demo    generate an image and edit it with the embedded model, into demo-output/"
	@echo "make test    run the tests, in two processes; 'make WORKERS=8 test' in eight"
	@echo "make replay BASE=<commit>   compare what this tree compiles and computes with that commit, into replay-output/"
	@echo "make lint    ruff, and which room imports from which; 'make format' mends what it can"
	@echo "make types   mypy over the package"
	@echo "make docs    the documents as a site that opens without a network, site/index.html"
	@echo "make hooks   run lint, types and docs before every commit of this clone"
	@echo "make wheel   build the package into dist/, run its demo in an empty environment"
	@echo "make matrix  some tests on the oldest and newest Python and torch, where they are to be had"
	@echo "make bench   the benchmarks on this machine's CPU, into bench-output/"
	@echo "make clean   remove caches and outputs, keep the environment"

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "$(PYTHON) is older than 3.11: run make PYTHON=<a newer one>"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch first: it is the largest piece, and a failure there should say so by itself.
$(VENV)/.runtime-installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) torch
	$(PIP) -e .
	@touch $@

$(VENV)/.test-installed: $(VENV)/.runtime-installed
	$(PIP) -e '.[test]'
	@touch $@

$(VENV)/.docs-installed: $(VENV)/.runtime-installed
	$(PIP) -e '.[docs]'
	@touch $@

$(VENV)/.dev-installed: $(VENV)/.runtime-installed
	$(PIP) -e '.[dev]'
	@touch $@

demo: $(VENV)/.runtime-installed
	$(VENV)/bin/fisedit demo --output demo-output

# A file of tests stays in one process, so that what it compiles is compiled once.
test: $(VENV)/.test-installed
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

# For a refactoring: graphs, slots, plans and results of every model of the zoo, here and at BASE.
replay: $(VENV)/.test-installed
	@test -n "$(BASE)" || { echo "name a commit to compare with: make replay BASE=<commit>"; exit 1; }
	PYTHONPATH=tests $(VENV)/bin/python -m replay $(BASE) $(REPLAY_ARGS)

lint: $(VENV)/.test-installed
	$(VENV)/bin/ruff check $(SOURCES)
	$(VENV)/bin/ruff format --check $(SOURCES)
	$(VENV)/bin/lint-imports --no-cache --no-logo

format: $(VENV)/.test-installed
	$(VENV)/bin/ruff check --fix $(SOURCES)
	$(VENV)/bin/ruff format $(SOURCES)

types: $(VENV)/.test-installed
	$(VENV)/bin/mypy

# Fails on links and anchors that lead nowhere and on pages that nothing leads to.
docs: $(VENV)/.docs-installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --clean
	@echo "site/index.html"

hooks: $(VENV)/.dev-installed
	$(VENV)/bin/pre-commit install

wheel: $(VENV)/.dev-installed
	$(VENV)/bin/python .ci/wheel.py

matrix: | $(VENV)/bin/python
	$(VENV)/bin/python .ci/matrix.py

bench: $(VENV)/.runtime-installed
	@mkdir -p bench-output
	$(VENV)/bin/python -m benchmarks.step_latency --json bench-output/step_latency.json
	$(VENV)/bin/python -m benchmarks.wrapper_overhead --json bench-output/wrapper_overhead.json
	$(VENV)/bin/python -m benchmarks.compile_time --json bench-output/compile_time.json
	$(VENV)/bin/python -m benchmarks.ablation --json bench-output/ablation.json
	$(VENV)/bin/python -m benchmarks.edit_latency --json bench-output/edit_latency.json
	$(VENV)/bin/python -m benchmarks.entry_points --json bench-output/entry_points.json

clean:
	rm -rf build dist site demo-output bench-output replay-output .fisedit-cache .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
