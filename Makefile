# Two commands do all: `make train-student` (the main job from nothing) and `make test`.
PYTHON ?= python3
CONFIG ?= pipeline/configs/$(if $(LONG),evidence,demo).yaml
VENV   ?= .venv
BIN    := $(VENV)/bin
comma  := ,
SCHOLIAST := $(BIN)/scholiast
# LAUNCH=slurm submits batch jobs (see pipeline/launch/README.md) where otherwise this machine does the work.
LAUNCH ?= here

# The evidence: table 1 for three seeds, or with LONG=1 all of it, on more text (on a GPU: two cores take days).
ifdef LONG
TABLES ?= 1 2 3 4
SEEDS  ?= 3
STEPS  ?= 420
else
TABLES ?= 1
SEEDS  ?= 3
STEPS  ?= 49
endif
REPRODUCE = $(SCHOLIAST) reproduce $(CONFIG) --tables "$(TABLES)" --seeds $(SEEDS) --steps $(STEPS)

FUZZ_SECONDS ?= 600

.DEFAULT_GOAL := help
.PHONY: help setup cache-teachers train-student reproduce test test-long test-gpu test-s3 test-cluster fuzz bench-cache bench-step \
	bench-gpu lint clean

help:  ## what can be made
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# What is imported is compiled then: all 18,000 files at once would take a minute and a half.
define install
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[$(1)]'
endef

$(BIN)/.installed: pyproject.toml constraints.txt
	$(call install,demo)
	@touch $@

# Not by way of the above: from nothing that would ask pip twice.
$(BIN)/.installed-test: pyproject.toml constraints.txt
	$(call install,demo$(comma)test)
	@touch $(BIN)/.installed $@

setup: $(BIN)/.installed  ## the environment alone, in .venv

ifeq ($(LAUNCH),slurm)
cache-teachers: $(BIN)/.installed
	$(SCHOLIAST) launch slurm $(CONFIG) --cache-only --submit

train-student: $(BIN)/.installed
	$(SCHOLIAST) launch slurm $(CONFIG) --submit
else
cache-teachers: $(BIN)/.installed  ## stage one: every teacher once over the corpus (CONFIG=path, LAUNCH=slurm)
	$(SCHOLIAST) cache-teachers $(CONFIG)

train-student: cache-teachers  ## the whole job: cache, train, evaluate, report (CONFIG=path, LAUNCH=slurm)
	$(SCHOLIAST) train-student $(CONFIG)
	$(SCHOLIAST) evaluate $(CONFIG) > /dev/null
	$(SCHOLIAST) report $(CONFIG)
endif

reproduce: $(BIN)/.installed  ## the evidence, resumable: table 1 (LONG=1: all tables, on more text)
	$(REPRODUCE)

lint: $(BIN)/.installed-test  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two workers with two threads each would wait for one another: a quarter of the time.
test: lint  ## lint, then the tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

test-long: $(BIN)/.installed-test  ## the long tests: kills, races, damages by the hundred, lm-eval, compiled passes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long

test-gpu: $(BIN)/.installed-test  ## the same numbers on a GPU; skipped without one
	$(BIN)/python -m pytest -n 0 tests/gpu

test-s3: $(BIN)/.installed-test  ## only the tests against a real S3 server, started on loopback
	$(BIN)/python -m pytest -n 0 tests/integration/test_remote.py

test-cluster: $(BIN)/.installed-test  ## real jobs on a private two-node Slurm on loopback (Debian; as root, to install it)
	PATH=$$PATH:/usr/sbin; { command -v slurmctld && command -v slurmd && command -v sbatch && \
	  command -v munged; } > /dev/null || { \
	  [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null || { \
	    echo "test-cluster needs slurmctld, slurmd, sbatch, munged: install them, or run as root on Debian" >&2; \
	    exit 1; }; apt-get update -qq && \
	  apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge; }
	$(BIN)/python -m pytest -n 0 tests/cluster

$(BIN)/.installed-fuzz: $(BIN)/.installed-test
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[demo,test,fuzz]'
	@touch $@

fuzz: $(BIN)/.installed-fuzz  ## damaged and forged configurations, caches, corpora, checkpoints (FUZZ_SECONDS=600)
	OMP_NUM_THREADS=1 nice -n 5 $(BIN)/python tests/fuzz/run.py --seconds $(FUZZ_SECONDS)

bench-cache: $(BIN)/.installed-test  ## size, rounding and speed of the cache; stage one's overhead; 10^6 parts
	cd tests/benchmarks && ../../$(BIN)/python cache.py ../../runs/bench
	cd tests/benchmarks && ../../$(BIN)/python annotation.py ../../runs/bench/assets/models/generalist
	cd tests/benchmarks && ../../$(BIN)/python scale.py
	cd tests/benchmarks && ../../$(BIN)/python order.py

bench-step: $(BIN)/.installed-test  ## the student's step: memory, time, and whether it learns what online distillation does
	$(BIN)/python tests/benchmarks/step.py runs/bench
	$(BIN)/python tests/benchmarks/faithful.py runs/bench

bench-gpu: $(BIN)/.installed-test  ## both stages on one GPU: the loss, a teacher's reading, a student's steps; three minutes
	$(BIN)/python tests/benchmarks/gpu.py runs/bench

clean:  ## remove the virtual environment (runs/ is yours and stays)
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
