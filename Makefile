# What a developer does, one command each. `make` alone lists them.
PYTHON ?= $(shell test -x .venv/bin/python && echo .venv/bin/python || echo python3)
MACHINE ?= x86_64

.DEFAULT_GOAL := help
.PHONY: help dev test fast lint types docs bench wheel

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-6s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

dev:  ## make .venv with everything to develop with, and the hooks that run ruff before a commit
	python3 -m venv .venv
	.venv/bin/pip install -q -e ".[test,wheel]" pre-commit
	.venv/bin/pre-commit install

test:  ## run every test, on the CPU, in two processes
	$(PYTHON) -m pytest -q -n 2 --dist loadfile

fast:  ## run the tests that take less than a second or two (under a minute)
	$(PYTHON) -m pytest -q -m "not slow"

lint:  ## check style and formatting
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:  ## check the types of the package as installed, and of a user's program
	$(PYTHON) scripts/check_types.py

docs:  ## write docs/cli.md and docs/api.md from the code, and run the examples
	$(PYTHON) scripts/write_cli_docs.py
	$(PYTHON) scripts/write_api_docs.py
	$(PYTHON) -m pytest -q tests/docs

bench:  ## measure decoding beside transformers and llama.cpp (needs the extra bench)
	$(PYTHON) scripts/bench_decode.py --cap 1000MB --tokens 48 --repeats 3

wheel:  ## build dist/*.whl with the kernels inside; MACHINE=aarch64 for the other machine
	$(PYTHON) scripts/build_wheel.py --machine $(MACHINE)
