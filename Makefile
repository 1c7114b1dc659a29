# Everything is run in the virtual environment that scripts/setup makes. VENV=.venv-3.12 takes another one.

VENV ?= .venv
EXTRAS ?= test,dev,demo
PYTEST_ARGS ?=
BENCH_ARGS ?=
DEMO_ARGS ?=
PYTHON_HERE := $(VENV)/bin/python
CHECKED := $(wildcard src tests examples benchmarks)

.PHONY: all setup test lint types demo bench format clean

all: lint types test

setup:
	@VENV=$(VENV) EXTRAS=$(EXTRAS) scripts/setup

test: setup
	$(PYTHON_HERE) -m pytest $(PYTEST_ARGS)

lint: setup
	$(PYTHON_HERE) -m ruff check $(CHECKED)
	$(PYTHON_HERE) -m ruff format --check $(CHECKED)

types: setup
	$(PYTHON_HERE) -m mypy

demo: setup
	$(PYTHON_HERE) examples/demo.py $(DEMO_ARGS)

bench: setup
	$(PYTHON_HERE) -m benchmarks $(BENCH_ARGS)

format: setup
	$(PYTHON_HERE) -m ruff format $(CHECKED)

# The virtual environments stay: they take minutes to make. `rm -rf .venv*` removes them.
clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
