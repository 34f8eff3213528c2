# make steer: the main job on the embedded model.   make overthinking: shorter thoughts on the dense one.   make test: all tests.   make check: format, lint, types, rules, fast tests.
PYTHON ?= python3
# The build of PyTorch to install; on a machine with GPUs: make setup TORCH="torch==2.13.0 --index-url <your CUDA wheel index>"
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

# Where make same keeps what the commands did before: make same SAME=FOLDER ARGS="--changed 'help/*'"
SAME ?= ../same-store

.PHONY: setup steer overthinking test check same bench clean

setup: $(STAMP)

# torch first: an open range would pull gigabytes of CUDA packages onto a machine without a GPU.
$(STAMP): pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip freeze 2>/dev/null | grep -i '^torch==' > $(VENV)/constraints.txt
	PIP_CONSTRAINT=$(VENV)/constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,dev]'
	touch $(STAMP)

steer: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed launch/steer_r1.py $(ARGS)

overthinking: $(STAMP)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed launch/reduce_overthinking.py $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses 2 --dist loadfile $(ARGS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n auto --maxprocesses 2 --dist loadfile -m "not slow" $(ARGS)

# The first time it stores what every command says and writes, later it compares: the net for changes that change nothing.
same: $(STAMP)
	$(BIN)/python tests/same.py auto $(SAME) $(ARGS)

bench: $(STAMP)
	$(BIN)/python tests/bench/steering_cost.py
	$(BIN)/python tests/bench/direction_speed.py
	$(BIN)/python tests/bench/direction_memory.py

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
