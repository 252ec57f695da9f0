# The project's commands. Each first does the set-up it needs, once (see launch/install.py).
#
#   make train    train on Fashion-MNIST: CONFIG, RANKS, and overrides in ARGS ("optimizer.lr=0.1")
#   make test     run all tests, three files at a time; ARGS go to pytest ("-k sharding", "-n 0")
#   make chaos    200 runs in which ranks die, disks fill and links break (TRIALS, FIRST, SEED; as root)
#   make lint     ruff, mypy and the rule which room may import which (pyproject.toml)
#   make bench    compare speed with alternatives, for the docs; TORCH=1 installs PyTorch for it
#   make setup    only set up; GPU=1 for machines with NVIDIA GPUs
#   make prove-gpu  as root: that set-up from nothing, in a Debian without a GPU (4 GB, 20 minutes)
#   make data     set up, and find or download Fashion-MNIST
#   make clean    remove caches and build output; not .venv, not runs

PYTHON ?= python3
RANKS ?= 2
CONFIG ?= configs/quickstart.yaml
ARGS ?=
TRIALS ?= 200
FIRST ?= 0
SEED ?= 0

INSTALL = $(PYTHON) launch/install.py $(if $(GPU),--gpu)

.PHONY: train test chaos lint bench prove-gpu setup data clean python

train: python
	@$(INSTALL) $(if $(findstring data.,$(ARGS))$(shell grep -sE '^[^#]*(dataset|folder)' $(CONFIG)),,--data)
	@$(if $(findstring folder-example,$(CONFIG)),.venv/bin/python -m tests.make_folder build/folder-example)
	@LAUNCHED_BY=make .venv/bin/python -m launch local -n $(RANKS) --quiet -- \
		.venv/bin/python -m trainer train $(CONFIG) $(ARGS)

test: python
	@$(INSTALL) --dev --test-system
	.venv/bin/python -m pytest -n 3 --dist loadfile $(ARGS)

chaos: python
	@$(INSTALL) --dev --test-system
	.venv/bin/python -m benchmarks.chaos --trials $(TRIALS) --first $(FIRST) --seed $(SEED)

lint: python
	@$(INSTALL) --dev
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports

bench: python $(if $(TORCH),.venv-bench/bin/torchrun)
	@$(INSTALL) --data
	.venv/bin/python -m benchmarks.speed $(ARGS)

prove-gpu: python
	@$(INSTALL)
	.venv/bin/python -m benchmarks.prove_gpu $(ARGS)

.venv-bench/bin/torchrun: benchmarks/requirements.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install -r benchmarks/requirements.txt
	touch $@

setup: python
	@$(INSTALL)

data: python
	@$(INSTALL) --data

python:
	@command -v $(PYTHON) >/dev/null || \
		{ echo "set-up stopped: no $(PYTHON): apt-get install python3-venv" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 7))' || \
		{ echo "set-up stopped: $(PYTHON) is not 3.7 or later: export PYTHON=python3.11" >&2; exit 1; }

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
