# One target per habit. Each sets up what it needs, so any of them can be the first command after a clone.
#
#   make demo    train a tiny model on this machine's CPU, a few minutes
#   make test    what a change must pass: check, then the tests
#   make test-vllm   the vLLM engine's tests, with the real vLLM in an environment of its own (.venv-vllm, 3 GB)
#   make test-cuda   the whole path on a CUDA device, against the CPU; a minute
#   make check   lint, types and import contracts alone
#   make bench   the missing figures of docs/results/bench, about two hours on two cores
#   make storm   the missing figures of docs/results/reliability.md: kills, damage, hostile answers; about half an hour
#   make lab     the missing experiments of docs/results/lab, about three hours on two cores
#   make docs    the documentation as a site in build/site, links checked
#   make wheel   build the wheel, install it into an empty environment and run the demo there for two steps
#   make setup   the environment in .venv, for everything above
#   make clean   remove .venv, .venv-vllm and all caches (runs/ stays)
#
# Variables: PYTHON (python3), TORCH_INDEX (see scripts/setup.sh), ARGS (more arguments for pytest or the demo),
# COVERAGE ("--cov --cov-report=term": measure coverage and require 90%, as CI does), BENCH_ARGS (more arguments for every
# benchmark).

PYTHON ?= python3
ARGS ?=
COVERAGE ?=
BENCH_ARGS ?=
BIN := .venv/bin
export PYTHON TORCH_INDEX

.PHONY: announce setup demo test test-vllm test-cuda check bench storm lab docs wheel clean
.DELETE_ON_ERROR:

setup: .venv/.stamp-dev

.venv/.stamp-dev: pyproject.toml constraints.txt scripts/setup.sh scripts/pip.sh
	scripts/setup.sh dev
	touch .venv/.stamp-base $@

.venv/.stamp-base: pyproject.toml constraints.txt scripts/setup.sh scripts/pip.sh
	scripts/setup.sh
	touch $@

ifeq ($(wildcard .venv/.stamp-base),)
.venv/.stamp-base: | announce
endif
announce:
	@echo "installing into .venv: torch for this machine, transformers, math-verify and what they need, 1.1 GB on disk without CUDA"
	@echo "(about 300 MB to download; a minute or two). Then the demo trains for a few minutes."

# a second `make demo` continues an interrupted run, and shows the result of a finished one
DEMO = $(if $(wildcard runs/demo/checkpoints/step-*),--resume runs/demo,recipes/demo.toml)
demo: .venv/.stamp-base
	$(BIN)/deepgrpo train $(DEMO) $(ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The tests' tensors are tiny: more threads per process only stand in each other's way. All tests of a file run in one process,
# so that what they share, such as a Ray cluster, is built once; tests/conftest.py has the files that take longest first. Four
# processes for two cores, because many tests wait for processes of their own. Compiled tests are kept, else each of the four
# compiles all of them.
test: export OMP_NUM_THREADS = 1
test: export PYTHONDONTWRITEBYTECODE =
test: check
	$(BIN)/pytest -n 4 --dist loadfile --no-loadscope-reorder $(COVERAGE) $(ARGS)

.venv-vllm/.stamp: pyproject.toml constraints.txt scripts/setup-vllm.sh scripts/pip.sh
	scripts/setup-vllm.sh
	touch $@

# the engine contract for both engines, and what only vLLM has to show; everything else is in `make test`
test-vllm: export OMP_NUM_THREADS = 1
test-vllm: .venv-vllm/.stamp
	.venv-vllm/bin/python -m pytest tests/contract tests/with_vllm $(ARGS)

# on the first CUDA device: kernels, engine, runs, commands; skipped without one
test-cuda: .venv/.stamp-dev
	$(BIN)/pytest tests/with_cuda tests/equivalence/test_tree_flex.py -m gpu $(ARGS)

# A file per benchmark, written when it is done: an interrupted `make bench` goes on with the first that is missing, and
# one that is deleted is measured again. Close everything else meanwhile.
BENCH := docs/results/bench
BENCH_learner-S := --repeats 5
BENCH_learner-L := --repeats 3
BENCH_logprobs-V := --repeats 5
BENCH_sampling-S := --repeats 3
BENCH_sampling-D := --repeats 2
# a round takes some twenty minutes: beside that, what only a first round does is nothing
BENCH_step-D := --repeats 2 --warmup 0 --no-memory
# one thread: its workers and its learner share the cores
BENCH_distribution-D := --repeats 5 --threads 1
# the machine must be quiet but for what it starts itself
BENCH_busy := --repeats 2 --page docs/results/busy.md
BENCHMARKS := busy learner-S learner-L logprobs-V sampling-S sampling-D step-D distribution-D

bench: $(BENCHMARKS:%=$(BENCH)/%.json) $(BENCH)/distribution-D.png $(BENCH)/engines.png

# both engines, with prefixes reused and without, in one run; some half an hour
WITH_VLLM := --workload D --no-memory --vllm-python .venv-vllm/bin/python
$(BENCH)/engines-sampling.json: | .venv/.stamp-dev .venv-vllm/.stamp
	$(BIN)/python -m benchmarks sampling $(WITH_VLLM) --repeats 2 --json $@ $(BENCH_ARGS) \
	  --arms engine_bf16 engine_bf16_no_keep vllm_bf16 vllm_bf16_no_prefix

$(BENCH)/engines-step.json: | .venv/.stamp-dev .venv-vllm/.stamp
	$(BIN)/python -m benchmarks step $(WITH_VLLM) --repeats 2 --warmup 0 --json $@ $(BENCH_ARGS) \
	  --arms tree_bf16 tree_bf16_no_keep tree_vllm_bf16 tree_vllm_bf16_no_prefix

# their picture, and their tables in docs/results/engines.md
$(BENCH)/engines.png: $(BENCH)/engines-sampling.json $(BENCH)/engines-step.json
	$(BIN)/python -m benchmarks.plot_engines $^ docs/results/engines.md

# its picture, and its tables in docs/results/distribution.md
$(BENCH)/distribution-D.png: $(BENCH)/distribution-D.json
	$(BIN)/python -m benchmarks.plot_distribution $< docs/results/distribution.md

# A file per subject, likewise; what is finished of one is kept in runs/storm. It fails if a run hung, lied or lost anything.
# STORM_ARGS: more arguments, e.g. --only kills, --share 0.1
STORM_ARGS ?=
storm: export OMP_NUM_THREADS = 1
storm: setup
	PYTHONPATH=tests $(BIN)/python -m storm docs/results/reliability $(STORM_ARGS)

# An experiment is compared, and what of it is published goes to docs/results/lab. `deepgrpo compare` keeps finished runs, so
# an interrupted `make lab` goes on where it stopped. LAB_ARGS: more arguments for it, e.g. --dir.
LAB := docs/results/lab
LAB_ARGS ?= --jobs 2
EXPERIMENTS := methods short_chains saturation hard ablations naive_scaling \
  rates strict strict_saturation recovery search facts late late_again late_low horizon sums lookup
REGIMES := base strict recovery recovery-at-once search facts late horizon

lab: $(EXPERIMENTS:%=$(LAB)/%.json) $(REGIMES:%=$(LAB)/regimes/%.json) $(LAB)/probe-methods.json $(LAB)/pivot_errors.json

$(EXPERIMENTS:%=$(LAB)/%.json): $(LAB)/%.json: | .venv/.stamp-dev
	$(BIN)/deepgrpo compare recipes/lab/$*.toml $(LAB_ARGS)
	$(BIN)/python -m benchmarks.publish_lab runs/$* $(LAB)

$(LAB)/late_again.json $(LAB)/late_low.json: $(LAB)/late.json  # they start from its warm start

# before any training; the tables of docs/results/regimes.md
$(LAB)/regimes/%.json: | .venv/.stamp-dev
	$(BIN)/python -m benchmarks.regimes $* --page docs/results/regimes.md

$(LAB)/probe-methods.json: $(LAB)/methods.json
	$(BIN)/deepgrpo probe runs/methods/warmstart/seed-1/start --arms methods --prompts 256 --json $@

$(LAB)/pivot_errors.json: $(LAB)/methods.json
	$(BIN)/python -m benchmarks.pivot_errors runs/methods --json $@

# the environment only has to be there: a newer one makes no figure wrong
$(BENCH)/%.json: | .venv/.stamp-dev
	$(BIN)/python -m benchmarks $(subst -, --workload ,$*) $(BENCH_$*) --json $@ $(BENCH_ARGS)

.venv/.stamp-docs: pyproject.toml constraints.txt scripts/setup.sh scripts/pip.sh
	scripts/setup.sh docs
	touch $@

# needs no network once it is installed; zensical's cache may not see a page that was written anew
docs: .venv/.stamp-docs
	$(BIN)/python scripts/site.py
	$(BIN)/zensical build --strict --clean
	@echo "look at it: python3 -m http.server --bind 127.0.0.1 --directory build/site 8000, then http://127.0.0.1:8000"

wheel:
	scripts/wheel.sh

clean:
	rm -rf .venv .venv-vllm build dist htmlcov .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis .coverage .coverage.*
	find . -name __pycache__ -prune -exec rm -rf {} +
