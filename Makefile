# make demo, make two-phases, make test: everything is set up first, into .venv, once, with the extras that demo and tests need.
#
#   make test-fast   unit tests, a minute
#   make test        lint, types, unit tests and the distributed tests that guard the promises, some ten minutes on two cores
#   make test-all    every test, with a small SLURM where one can be started
#
#   PYTHON  interpreter, 3.10-3.12   (default: the first that fits)
#   TORCH   what pip is given for torch, before anything that depends on it; for the CPU build from PyTorch's own index:
#           make test TORCH="torch --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
TORCH ?= torch==2.13.0
BIN := .venv/bin
READY := .venv/.ready
TYPED := megatron_ssu
export OMP_NUM_THREADS ?= 1
# Random kills that a run survives in the kill test; each costs about 4 seconds.
export MEGATRON_SSU_KILLS ?= 10

# Tests that run at a time; many of them wait for ranks or processes of their own.
JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -q -p no:cacheprovider -n $(JOBS) --dist worksteal

.PHONY: demo two-phases test test-fast test-rest test-slurm test-all gpu-report lint format clean

demo: $(READY)
	$(BIN)/python examples/demo/run.py --output demo_out

two-phases: $(READY)
	$(BIN)/python examples/two_phases/run.py --output two_phases_out

test: lint
	$(PYTEST) tests/unit tests/dist tests/gpu -m "not slow"

test-fast: $(READY)
	$(PYTEST) tests/unit -m "not slow and not process"

# What `make test` leaves out, but for SLURM.
test-rest: $(READY)
	$(PYTEST) tests/unit tests/dist tests/gpu -m slow

test-slurm: $(READY)
	$(BIN)/python -m pytest -q -p no:cacheprovider tests/slurm

test-all: test
	$(MAKE) test-rest
	$(MAKE) test-slurm

# On a machine with a GPU: tests, benchmarks and a profile within ten minutes, as JSON and Markdown in gpu-report/, and their
# tables in docs/.
gpu-report: $(READY)
	$(BIN)/python benchmarks/gpu_report.py --output gpu-report --update-docs

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(TYPED)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(READY): pyproject.toml setup.py $(wildcard csrc/*)
	@test -n "$(PYTHON)" || { echo "no Python 3.10-3.12 found; name one: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q $(TORCH)
	$(BIN)/pip install -q "setuptools>=77" wheel ninja pybind11
	$(BIN)/pip install -q --no-build-isolation -e ".[test]"
	touch $(READY)

clean:
	rm -rf .venv build demo_out two_phases_out study_out *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find megatron_ssu -name '*.so' -delete
