# How does the suite get from a bare Python 3.11 to a trained model (`make quickstart`) or to tested code (`make test`)?
#
# One environment, .venv, in two layers: `.venv/.core` is what the quickstart needs, `.venv/.dev` adds the test tools.
# Both are stamps that hang on pyproject.toml and constraints.txt, so a second run installs nothing. `.venv/.unfinished`
# exists while pip works, with the number of the make process in it: an installation that was killed, and a .venv that
# was moved or whose interpreter is gone, is made anew. Versions: constraints.txt.
#
#   PYTHON=python3.12            the interpreter to build .venv from (default: the first of python3.11 ... python3)
#   TORCH_INDEX=URL              where torch and torchvision come from, e.g. https://download.pytorch.org/whl/cpu
#   EXTRAS=train,eval,demo       for `make extras`
#   PYTEST_ARGS='-k tiling'      for `make test`
#   WORKERS=2                    parallel test processes

PYTHON ?= python3.11 python3.12 python3.13 python3.14 python3 python
TORCH_INDEX ?=
EXTRAS ?= train,eval,demo
PYTEST_ARGS ?=
WORKERS ?= 2

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help quickstart setup dev extras test lint format clean

help:  ## Show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | while IFS="$$(printf '\t')" read -r name text; \
		do printf '  make %-11s %s\n' "$$name" "$$text"; done

quickstart: .venv/.core  ## From nothing to a trained, scored, chattable model
	$(BIN)/vlm quickstart

setup: .venv/.core  ## The environment alone: .venv with the core install

dev: .venv/.dev  ## The environment with the test and lint tools

extras: .venv/.core  ## Add EXTRAS=train,eval,demo to the environment
	$(PIP) --quiet --no-build-isolation --editable '.[$(EXTRAS)]'

test: .venv/.dev  ## Run the tests on two cores
	$(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

lint: .venv/.dev  ## ruff, ruff format, pyright, import-linter: all of them, then fail if any did
	@status=0; \
	for tool in "ruff check ." "ruff format --check ." "pyright" "lint-imports"; do \
		echo "== $$tool"; $(BIN)/$$tool || status=1; \
	done; exit $$status

format: .venv/.dev  ## Let ruff sort imports and format every file
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the environment and the caches; runs/ and data/ stay
	rm -rf .venv .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Is .venv in order? (.core holds the folder it was made in, because the scripts in .venv/bin name it.)
IN_ORDER := $(shell [ "$$(cat .venv/.core 2>&1)" = "$(CURDIR)" ] && [ ! -e .venv/.unfinished ] \
	&& $(BIN)/python -c "" 2>&1 && echo yes)

.PHONY: again
.venv/.core: pyproject.toml constraints.txt $(if $(IN_ORDER),,again)
	@$(REMOVE_BROKEN)
	@$(CREATE)
	@echo $$PPID > .venv/.unfinished
	@echo "== torch (the largest download)"
	@$(PIP) $(FROM_INDEX) torch
	@echo "== everything else: a minute or two"
	@$(PIP) --quiet --no-deps $(FROM_INDEX) torchvision
	@$(PIP) --quiet hatchling editables
	@$(PIP) --quiet --no-build-isolation --editable .
	@rm .venv/.unfinished
	@echo "$(CURDIR)" > $@

.venv/.dev: .venv/.core
	@echo "== test and lint tools"
	@echo $$PPID > .venv/.unfinished
	@$(PIP) --quiet --no-build-isolation --editable '.[dev]'
	@rm .venv/.unfinished
	@touch $@

# torch goes first and alone, so that nothing else can pull in a second build of it; torchvision comes without its
# dependencies for the same reason (it asks for torch, numpy and pillow). The build tools are installed rather than
# fetched into a throw-away environment: that is what --no-build-isolation is for.
FROM_INDEX = $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

define REMOVE_BROKEN
if [ -e .venv/.unfinished ] && kill -0 "$$(cat .venv/.unfinished)" 2>/dev/null; then \
	echo "Another make (process $$(cat .venv/.unfinished)) is installing into .venv: wait for it, or run make clean." >&2; \
	exit 1; \
elif [ -e .venv/.unfinished ] || { [ -e .venv ] && ! $(BIN)/python -m pip --version >/dev/null 2>&1; } \
	|| { [ -e .venv/.core ] && [ "$$(cat .venv/.core)" != "$(CURDIR)" ]; }; then \
	echo "== .venv is unfinished, broken or from another folder: making it anew"; rm -rf .venv; \
fi
endef

# Starting each candidate is the test: a version manager may have put a name on PATH for a version that is not there.
define CREATE
if [ ! -e .venv ]; then \
	for name in $(PYTHON); do \
		if "$$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
			echo "== .venv from $$(command -v $$name)"; \
			mkdir .venv && echo $$PPID > .venv/.unfinished && exec "$$name" -m venv .venv; \
		fi; \
	done; \
	echo "No Python 3.11 or newer with its venv module found (tried: $(PYTHON)). Install one (Debian, Ubuntu:" \
		"apt install python3 python3-venv) or name it: make PYTHON=/path/to/python3.11 ..." >&2; \
	exit 1; \
fi
endef
