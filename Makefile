# ddpm-pipe: everything a checkout needs. Works with GNU make 3.81 (macOS) and later; `make help` lists the targets.
#
#   make train ARGS="--preset mnist"            arguments for `ddpm-pipe train`
#   make test PYTEST_ARGS="-k schedule -x"      arguments for pytest
#   make test JOBS=0                            one test after another, in one process
#   make soak SEED=7 MINUTES=60                 random faults; without SEED a fresh one, which is printed
#   make PYTHON=/opt/python3.13/bin/python3 ... another Python than the newest of 3.11 to 3.14 on PATH

SHELL := /bin/sh
ARGS ?=
PYTEST_ARGS ?=
JOBS ?= 2
SEED ?=
MINUTES ?= 30
VENV := .venv
PYTHONS := 3.14 3.13 3.12 3.11
BIN := $(VENV)/bin

# Two stamps, each named by a checksum of what it stands for: another lock file makes the environment anew, from nothing, so that it holds
# exactly what the lock says; another pyproject.toml installs the project again.
LOCK_ID := $(shell cksum < requirements.lock | tr ' ' '-')
PROJECT_ID := $(shell cksum < pyproject.toml | tr ' ' '-')
LOCKED := $(VENV)/.locked-$(LOCK_ID)
INSTALLED := $(VENV)/.installed-$(LOCK_ID)-$(PROJECT_ID)
# shut off from the network and from your files
PYTEST := $(BIN)/python tests/hermetic.py -n $(JOBS) --dist loadscope --no-loadscope-reorder

.PHONY: help setup train quick test test-all pythons soak mutants bench bench-quick lint lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(INSTALLED) ## make .venv from the hashed lock file and install the project into it

train: $(INSTALLED) ## train on the embedded digits, draw samples and score them (about 4 minutes on two cores)
	@$(BIN)/ddpm-pipe train $(ARGS)

quick: $(INSTALLED) ## tests for the desk, without Ray: at most three minutes
	@$(PYTEST) -m "not ray and not slow and not all" $(PYTEST_ARGS)

test: lint ## lint, types and a real test of every promise; what CI runs
	@$(PYTEST) -m "not all" $(PYTEST_ARGS)

test-all: lint ## lint, types and every test, the quick ones under each Python: after a larger change, and before a release
	@$(PYTEST) $(PYTEST_ARGS)
	@$(MAKE) pythons

# one environment of 6.5 GB for each, which stays until `make clean`
pythons: $(INSTALLED) ## the quick tests under every other Python of 3.11 to 3.14 that this machine has
	@for version in $(PYTHONS); do \
	    $(BIN)/python -c "import sys; sys.exit('%d.%d' % sys.version_info[:2] != '$$version')" && continue; \
	    for python in python$$version "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$$version.*/bin/python$$version; do \
	        "$$python" -c "" 2>/dev/null || continue; \
	        $(MAKE) quick VENV=.venv-$$version PYTHON="$$python" || exit 1; \
	        break; \
	    done; \
	done

soak: $(INSTALLED) ## random faults and random examples, with the seed SEED, for MINUTES
	@$(BIN)/python -m tests.kit.soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))

mutants: $(INSTALLED) ## put 200 random faults into the code, SEED=... for the same again; the tests must find 90 %
	@$(BIN)/python -m tests.mutants $(if $(SEED),--seed $(SEED)) $(ARGS)

bench: $(INSTALLED) ## speed beside diffusers, bare loops and bare Ray, into benchmarks/results.json (half an hour, idle machine)
	@$(BIN)/python -m benchmarks.bench $(ARGS)

bench-quick: $(INSTALLED) ## the same keys in at most five minutes
	@$(BIN)/python -m benchmarks.bench --quick $(ARGS)

lint: $(INSTALLED) ## formatting, lint and types only
	@$(BIN)/ruff format --check --quiet . || { echo "run: $(BIN)/ruff format ." >&2; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy

lock: ## resolve pyproject.toml anew into requirements.lock (needs uv and the network)
	@command -v uv >/dev/null || { echo "make lock needs uv: pip install uv" >&2; exit 1; }
	uv pip compile pyproject.toml --universal --extra test --generate-hashes --python-version 3.11 \
	    --no-emit-index-url --no-header -o requirements.lock

clean: ## remove .venv, caches and built files; runs, datasets and mlflow.db stay
	rm -rf $(VENV) $(PYTHONS:%=.venv-%) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps' names say all, so no file times: switching branches back and forth rebuilds nothing.
$(LOCKED):
	@python=""; for candidate in $(or $(PYTHON),$(PYTHONS:%=python%) python3); do \
	    if "$$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	    echo "Python 3.11 to 3.14 is needed; $(or $(PYTHON),python3) is $$($(or $(PYTHON),python3) --version 2>/dev/null || echo missing). Get one: uv python install 3.13 (https://docs.astral.sh/uv), apt install python3 python3-venv, dnf install python3.13 or brew install python@3.13; or name it: make PYTHON=/path/to/python3.13" >&2; \
	    exit 1; \
	fi; \
	echo "Making $(VENV) from requirements.lock with $$("$$python" --version): some minutes and several GB the first time"; \
	"$$python" -m venv --clear $(VENV) || { echo "this Python has no venv module: on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }
	@$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --only-binary :all: -r requirements.lock
	@touch $@

$(INSTALLED): | $(LOCKED)
	@$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@rm -f $(VENV)/.installed-*
	@touch $@
