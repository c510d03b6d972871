# Two commands do everything: `make demo` and `make test`. `make help` lists the rest.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# The interpreter that makes the environment; empty: the first of CANDIDATES that is 3.11 or newer.
PYTHON ?=
# The parts that `make test-all` runs; empty: every part that has not passed on this tree.
PART ?=
# Further arguments for pytest, `cachedit demo` and tests/fuzz.py.
PYTEST_ARGS ?= -n auto --dist loadgroup
DEMO_ARGS ?=
FUZZ_ARGS ?= --cases 500

CANDIDATES := python3.11 python3 python3.12 python3.13
VENV := .venv
CONSTRAINTS := constraints.txt
# What `make test-newest` tests with: the newest torch that is supported.
NEWEST := torch==2.14.1
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --no-input -qq

# A stamp is touched when its step has succeeded, so an interrupted step is done again. The checkout's path is in it, because an
# environment and an editable install hold it too: a checkout that was moved gets a new environment.
WHERE := $(shell pwd -P | cksum | cut -d' ' -f1)
CREATED := $(VENV)/.stamp-created-$(WHERE)
INSTALLED := $(VENV)/.stamp-installed
INSTALLED_DEV := $(VENV)/.stamp-installed-dev
INSTALLED_PEERS := $(VENV)/.stamp-installed-peers

.PHONY: help demo test test-all test-newest lint format typecheck pytest faults fuzz compiler clean distclean

help: ## this list
	@echo "cachedit_fx: targets"
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1|\2/p' Makefile | while IFS='|' read -r t d; do printf '%-18s %s\n' "$$t" "$$d"; done
	@echo
	@echo "Variables"
	@echo "  PYTHON=/path/to/python        makes .venv with this interpreter (3.11 or newer); after 'make distclean'"
	@echo "  PYTEST_ARGS='-k NAME'         goes to pytest: '-n 2', '--part=zoo', 'tests/runtime/test_policy.py', ..."
	@echo "  PART='zoo fuzz'               the parts that 'make test-all' runs; docs/tested.md lists them"
	@echo "  FUZZ_ARGS='--cases 2000'       goes to tests/fuzz.py: '--help', '--seed N', ..."
	@echo "  DEMO_ARGS='--help'            goes to 'cachedit demo'"

demo: compiler $(INSTALLED) ## pictures with the bundled model, without and with the cache
	$(VENV)/bin/cachedit demo $(DEMO_ARGS)

test: compiler lint typecheck pytest ## lint, type-check, and the tests that run by default

test-all: compiler lint typecheck $(INSTALLED_PEERS) ## all tests, in parts that go on where they stopped (PART); writes docs/tested.md
	$(PY) tests/parts.py $(addprefix --part ,$(PART)) -- $(PYTEST_ARGS)

test-newest: ## the default tests with the newest torch, in .venv-newest (6 GB if only a CUDA build is to be had)
	$(MAKE) VENV=.venv-newest CONSTRAINTS=.venv-newest.txt pytest

.venv-newest.txt: constraints.txt Makefile
	sed -E 's/^torch==.*/$(NEWEST)/' constraints.txt > $@

lint: $(INSTALLED_DEV) ## ruff: rules and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(INSTALLED_DEV) ## ruff: mend what it can, and format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# The package as it is once installed, with kernels/ and passes/ inside; mypy must run there, or it finds the package twice.
MYPY_TREE := .mypy_tree
MYPY_ARGS = cachedit_fx $(foreach dir,tests examples,$(if $(shell find $(dir) -name '*.py' -print -quit 2>/dev/null),$(dir)))

typecheck: $(INSTALLED_DEV) ## mypy
	@rm -rf $(MYPY_TREE) && mkdir -p $(MYPY_TREE)/cachedit_fx
	@for entry in cachedit_fx/*; do ln -s "../../$$entry" $(MYPY_TREE)/cachedit_fx/; done
	@for dir in $(wildcard kernels passes); do ln -s "../../$$dir" $(MYPY_TREE)/cachedit_fx/; done
	@for dir in $(wildcard tests examples); do ln -s "../$$dir" $(MYPY_TREE)/; done
	cd $(MYPY_TREE) && ../$(PY) -m mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache $(MYPY_ARGS) \
	    | sed -E 's#^cachedit_fx/(kernels|passes)/#\1/#'

pytest: compiler $(INSTALLED_DEV) ## the default tests alone (PYTEST_ARGS)
	$(PY) -m pytest $(PYTEST_ARGS)

faults: $(INSTALLED_DEV) ## apply each fault of tests/faults and see the default tests fail
	$(PY) tests/faults/run.py

fuzz: $(INSTALLED_DEV) ## random models, held to what must be true of every model (FUZZ_ARGS)
	$(PY) tests/fuzz.py $(FUZZ_ARGS)

# Inductor compiles C++ that includes Python.h. Looked for before the install: else it shows as a traceback in the middle of a run.
compiler: $(CREATED)
	@command -v "$${CXX:-g++}" >/dev/null || { \
	    echo "error: no C++ compiler ($${CXX:-g++}), which torch.compile needs." >&2; \
	    echo "       On Debian: apt-get install g++   (or set CXX)" >&2; exit 1; }
	@$(PY) -c 'import os, sys, sysconfig; \
	    sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' || { \
	    echo "error: $$($(PY) -V) has no Python.h, which torch.compile needs." >&2; \
	    echo "       On Debian: apt-get install python3-dev" >&2; exit 1; }

$(CREATED):
	@python=""; \
	for candidate in $(or $(PYTHON),$(CANDIDATES)); do \
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	        python="$$candidate"; break; \
	    fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "error: no Python 3.11 or newer (tried: $(or $(PYTHON),$(CANDIDATES)))." >&2; \
	    echo "       On Debian 12: apt-get install python3 python3-venv python3-dev   (or: make PYTHON=/path/to/python3.11 ...)" >&2; \
	    exit 1; \
	fi; \
	echo "Making $(VENV) with $$("$$python" -V)"; \
	"$$python" -m venv --clear $(VENV) || { \
	    echo "error: $$python could not make a virtual environment (see above)." >&2; \
	    echo "       On Debian: apt-get install python3-venv" >&2; exit 1; }
	@touch $@

# A comma inside an argument of $(call) would end it.
comma := ,

# $(call install,WHAT): an editable install. setuptools goes in first, so that the build takes the pinned one and downloads no other.
define install
@echo "Installing $(1) into $(VENV), a minute or more"
@$(PIP) install -c $(CONSTRAINTS) setuptools \
    && $(PIP) install -c $(CONSTRAINTS) --no-build-isolation -e "$(1)" \
    || { echo "error: the install failed (see above). Is the package index within reach? Run make again to go on;" >&2; \
         echo "       'make distclean' starts afresh." >&2; exit 1; }
@$(PY) -c 'import torch; print("Installed: torch", torch.__version__)'
endef

$(INSTALLED): $(CREATED) pyproject.toml $(CONSTRAINTS)
	$(call install,.)
	@touch $@

$(INSTALLED_DEV): $(CREATED) pyproject.toml $(CONSTRAINTS)
	$(call install,.[dev$(comma)quantization])
	@touch $@ $(INSTALLED)

# cache-dit, which the part `peers` runs.
$(INSTALLED_PEERS): $(INSTALLED_DEV)
	$(call install,.[peers])
	@touch $@

clean: ## remove caches and builds
	rm -rf build dist *.egg-info .mypy_cache $(MYPY_TREE) .pytest_cache .ruff_cache .hypothesis
	find cachedit_fx kernels passes tests examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## remove the environments too
	rm -rf $(VENV) .venv-newest .venv-newest.txt
