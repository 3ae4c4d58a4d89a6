# One target per habit. Each sets up what it needs, so any of them can be the first command after a clone.
#
#   make demo    train a tiny model on this machine's CPU, a few minutes
#   make test    what a change must pass: check, then the tests with their coverage
#   make check   lint, types and import contracts alone
#   make setup   the environment in .venv, for everything above
#   make clean   remove .venv and all caches (runs/ stays)
#
# Variables: PYTHON (python3), TORCH_INDEX (see scripts/setup.sh), ARGS (more arguments for pytest or the demo).

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
export PYTHON TORCH_INDEX

.PHONY: setup demo test check clean
.DELETE_ON_ERROR:

setup: .venv/.stamp-dev

.venv/.stamp-dev: pyproject.toml constraints.txt scripts/setup.sh
	scripts/setup.sh dev
	touch .venv/.stamp-base $@

.venv/.stamp-base: pyproject.toml constraints.txt scripts/setup.sh
	scripts/setup.sh
	touch $@

demo: .venv/.stamp-base
	$(BIN)/deepgrpo train recipes/demo.toml $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# the tests' tensors are tiny: more threads per process only stand in each other's way
test: export OMP_NUM_THREADS = 1
test: check
	$(BIN)/pytest -n 2 --cov --cov-report=term $(ARGS)

clean:
	rm -rf .venv build dist htmlcov .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage .coverage.*
	find . -name __pycache__ -prune -exec rm -rf {} +
