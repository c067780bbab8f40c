# make atlas   set up .venv and run the workflow of config/config.yaml
# make emoe    the same of EMoE, before tuning and tuned, config/emoe.yaml: up to 30 minutes, not part of make atlas
# make moa     train models whose attention heads are experts and look into them, config/moa.yaml: up to 30 minutes, not part of make atlas
# make test    set up .venv and run the tests
# make setup   set up .venv alone
# make test-cluster   run a reduced demo on a real Slurm, which it starts and stops (root; apt-get install slurm-wlm munge)
# make bench   measure time and memory beside other tools, about 20 minutes and 20 GB of disk; ARGS=--quick a minute
# make lint    check the layout of the code and of the rules
# make lock    resolve requirements.in again; writes requirements.txt and environment.yml
#
# make atlas ARGS="-n"            what would run
# make PYTHON=python3.12 setup    another Python
# make TORCH_INDEX= setup         torch from PyPI, which on Linux brings CUDA along

SHELL := /bin/sh
CORES ?= all
ARGS ?=

# The first Python that is new enough.
PYTHON ?= $(shell for name in python3 python3.11 python3.12 python3.13; do \
	"$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$$name" && break; done)

# Without an NVIDIA GPU, Linux takes the build of torch without CUDA, which is gigabytes smaller. The index is asked for
# torch alone and may be out of reach: pip then takes what its own sources have.
ifeq ($(shell uname -s),Linux)
ifeq ($(shell command -v nvidia-smi),)
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
endif
endif

# Rules call `python`, which is then the one of .venv. No installed command is called by its own name, because those
# name the folder that they were installed in: a moved checkout goes on working.
VENV_PYTHON := .venv/bin/python
RUN := PATH="$(CURDIR)/.venv/bin:$$PATH" $(VENV_PYTHON) -m

# The file is named after the content of the lock, so that neither a touched file nor a copied folder installs again.
LOCKED := .venv/locked-$(shell cksum < requirements.txt | tr ' ' '-')

torch = $(1) -m pip install --no-deps $(if $(TORCH_INDEX),--retries 0 --timeout 10 --extra-index-url $(TORCH_INDEX)) \
	"$$(grep -o '^torch==[^ ]*' $(2))" || $(1) -m pip install --no-deps "$$(grep -o '^torch==[^ ]*' $(2))"

.PHONY: atlas emoe moa test test-cluster bench setup lint lock python

atlas: setup
	$(RUN) snakemake --cores $(CORES) $(ARGS)

emoe: setup
	$(RUN) snakemake --cores $(CORES) $(ARGS) emoe

moa: setup
	$(RUN) snakemake --cores $(CORES) $(ARGS) moa

# Files begin in their own order: by number of tests, the longest ones would come last and one core would wait.
test: setup
	$(RUN) pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# The plugins lie beside .venv's own packages, so that no other run loads them; nodes get PYTHONPATH from the run.
CLUSTER := $(CURDIR)/.venv/cluster-$(shell cksum < requirements-cluster.txt | tr ' ' '-')

test-cluster: setup $(CLUSTER)
	PYTHONPATH="$(CLUSTER)" $(RUN) pytest -p no:cacheprovider tests/cluster/slurm_tests.py $(ARGS)

$(CLUSTER): requirements-cluster.txt
	$(VENV_PYTHON) -m pip install --no-deps --target "$@" -r requirements-cluster.txt

# What other tools need is beside .venv's own packages too.
BENCH := $(CURDIR)/.venv/bench-$(shell cksum < requirements-bench.txt | tr ' ' '-')

bench: setup $(BENCH)
	PYTHONPATH="$(BENCH)" $(RUN) benchmarks.run $(ARGS)

$(BENCH): requirements-bench.txt
	$(VENV_PYTHON) -m pip install --no-deps --target "$@" -r requirements-bench.txt

lint: setup
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) snakefmt --check workflow
	$(RUN) snakemake --lint

setup: $(LOCKED)

$(LOCKED):
	@$(MAKE) --no-print-directory python
	@echo "Installing into .venv: about 2 GB, some minutes, once."
	"$(PYTHON)" -m venv --clear .venv
	$(call torch,$(VENV_PYTHON),requirements.txt)
	$(VENV_PYTHON) -m pip install -r requirements.txt
	touch $@

python:
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "error: MoE Atlas needs Python 3.11 or newer; install it or name it: make PYTHON=/path/to/python3.11" >&2; \
		exit 1; }

lock: python
	rm -rf .venv/lock
	"$(PYTHON)" -m venv .venv/lock
	$(call torch,.venv/lock/bin/python,requirements.in)
	.venv/lock/bin/python -m pip install -r requirements.in
	{ sed -n '/^# /p;/^[^#]/q' requirements.txt; \
		.venv/lock/bin/python -m pip list --format freeze --exclude pip \
		| sed 's/+.*//' | grep -v -i -E '^(nvidia|triton|cuda)'; } > .venv/lock/requirements.txt
	{ sed '/^  - pip:/q' environment.yml; sed -n 's/^\([^#].*\)/      - \1/p' .venv/lock/requirements.txt; } \
		> .venv/lock/environment.yml
	mv .venv/lock/requirements.txt .venv/lock/environment.yml .
	rm -rf .venv/lock
