# Everything a fresh clone needs: each target sets up .venv by itself, once, and again when the dependencies change.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PYTEST_ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup book chapter test trust lint clean constraints

help:  ## show the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(READY)  ## create .venv with the package and all its tools

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "adalfl-lite needs Python 3.11 or newer and '$(PYTHON)' is not: name one, as in 'make $(or $(MAKECMDGOALS),setup) PYTHON=python3.12'" >&2; exit 1; }
	@echo 'Setting up .venv: PyTorch and all tools, about 7 GB and a few minutes'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet --compile-bytecode --constraint constraints.txt --editable '.[book,cluster,dev,methods]'
	touch $@

book: $(READY)  ## build the book from nothing, running every chapter
	rm -rf book/_build
	JUPYTER_PREFER_ENV_PATH=1 $(BIN)/jupyter-book build book -W --keep-going
	@echo "The book: file://$(CURDIR)/book/_build/html/index.html"

chapter: $(READY)  ## run one chapter alone, into a notebook beside it: make chapter NAME=ml3
	@test -f 'book/$(NAME).md' || { echo "there is no chapter '$(NAME)': make chapter NAME=... with the name of a file book/*.md" >&2; exit 1; }
	$(BIN)/jupytext --quiet --to notebook book/$(NAME).md
	JUPYTER_PREFER_ENV_PATH=1 $(BIN)/jupyter-execute --inplace book/$(NAME).ipynb

test: export OMP_NUM_THREADS ?= 1
test: $(READY)  ## run all tests, in up to four processes
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(PYTEST_ARGS)

trust: $(READY)  ## what can go wrong, tried: bad input, kills, damaged files, properties, mutants; prints the counts
	$(BIN)/python -m pytest tests/trust $(PYTEST_ARGS)
	$(BIN)/python tests/trust/mutants.py

lint: $(READY)  ## ruff, codespell and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

constraints: $(READY)  ## resolve the pins of constraints.txt anew
	$(BIN)/uv pip compile --upgrade --universal --fork-strategy fewest --python-version 3.11 --all-extras --quiet \
	  --no-header --no-annotate --no-emit-index-url --no-emit-find-links pyproject.toml --output-file constraints.txt

clean:  ## remove what was built; .venv stays
	rm -rf book/_build build *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
