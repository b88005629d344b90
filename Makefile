# `make test` and `make bench` need nothing but Python >= 3.10, a C++ compiler and pip's access to packages.
# Everything is installed in $(VENV); a second run installs only what has changed.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BENCH ?= --quick
FUZZ ?= 100000
SEED ?= 0

# `pip install .` compiles the CUDA kernels for all kinds of GPUs, which takes minutes; here it is for those at hand.
GPUS := $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | \
  grep -Ex '([89]|1[0-9])\.[0-9]' | sort -u | sed 's/^9\.0/9.0a/')
export TORCH_CUDA_ARCH_LIST ?= $(or $(GPUS),8.0+PTX)

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := pyproject.toml setup.py $(wildcard tools/*.py csrc/*.* csrc/*/*.*)
CPP := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh tests/cuda_host/* tests/amx_host/* examples/*.cpp tools/*.cpp)
CUDA_HOST := tests/test_ops.py tests/test_ops_edges.py tests/test_cuda.py tests/test_stack.py tests/test_second_order.py
AMX := tests/test_amx.py tests/test_ops.py tests/test_ops_edges.py tests/test_threads.py
SANITIZERS = $(foreach name,asan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))
TORCH_STAMP := $(VENV)/.torch-$(shell printf %s '$(TORCH)' | tr -c 'A-Za-z0-9.' _)

.PHONY: help test integration bench docs lint format sanitized asan fuzz cuda-host ptx mutants gpu clean
.DELETE_ON_ERROR:

help:
	@echo "make test     install everything in $(VENV) and run all tests   (ARGS='-k gru': pytest's arguments)"
	@echo "make integration  programs written for torch.nn (fastai, darts, ...) run on fusedrnn"
	@echo "make bench    install, time fusedrnn against its peers, train the demo   (BENCH=: the full benchmark)"
	@echo "make lint     ruff, clang-format and mypy;  make format  lets the first two change the files"
	@echo "make docs     draw the pictures and build the documentation: build/docs/index.html"
	@echo "make asan     the kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make fuzz     calls of all kinds with mistakes in them, under the same   (FUZZ=100000 of them; SEED=0: other ones)"
	@echo "make cuda-host  the CUDA kernels' tests on the CPU, no GPU needed;  make mutants  what those tests would catch"
	@echo "make ptx      some of those tests with the kernels as nvcc compiles them, and a search for data races"
	@echo "make gpu      on a machine with a GPU: build, test, compute-sanitizer, benchmark against cuDNN"
	@echo "make clean    remove $(VENV) and what was built"
	@echo "PYTHON=$(PYTHON)  TORCH=$(TORCH)  VENV=$(VENV)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "fusedrnn: error: Python >= 3.10 is needed and '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true):" \
	    "make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

$(TORCH_STAMP): | $(BIN)/python
	$(PIP) install '$(TORCH)'
	rm -f $(VENV)/.torch-*
	touch $@

# Each stamp is the package, built and installed editable, with one extra's dependencies.
$(VENV)/.test $(VENV)/.integration $(VENV)/.bench $(VENV)/.dev $(VENV)/.docs: $(VENV)/.%: $(TORCH_STAMP) $(SOURCES)
	$(PIP) install -e '.[$*]'
	touch $@

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

integration: $(VENV)/.integration
	$(BIN)/python -m pytest tests/integration $(ARGS)

bench: $(VENV)/.bench
	$(BIN)/python -m bench $(BENCH)
	$(BIN)/python examples/char_lm.py

docs: $(VENV)/.docs
	$(BIN)/python -m docs.draw
	$(BIN)/python -m sphinx -q -W --keep-going docs build/docs

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# Python itself isn't instrumented, so the runtime comes first by LD_PRELOAD, and its leaks are not ours.
UNDER_ASAN = PYTHONPATH=build/asan:tools LD_PRELOAD="$(PRELOADED) $(SANITIZERS)" \
  ASAN_OPTIONS=detect_leaks=0$(ASAN_OPTIONS_TOO) UBSAN_OPTIONS=print_stacktrace=1
# Not captured, reports don't go down with the process.
ASAN_PYTEST = $(UNDER_ASAN) $(BIN)/pytest -q -p sanitized --capture=sys
sanitized: $(VENV)/.dev
	CXX="$(CXX)" FUSEDRNN_SANITIZE=address,undefined $(BIN)/python setup.py -q build --build-lib build/asan

asan: sanitized
	$(ASAN_PYTEST) -n 2 --every 53 tests/test_ops.py tests/test_ops_edges.py $(ARGS)
	$(ASAN_PYTEST) -n 2 -k 'test_amx or python_threads or (amx and bfloat16 and not all_options)' $(AMX) $(ARGS)
	$(ASAN_PYTEST) -n 2 -p cuda_host --ops fusedrnn_cuda_host --every 127 $(CUDA_HOST) $(ARGS)

# In 20 processes, as hypothesis remembers all that it has tried. No case needs 256 MB, and none may try.
fuzz: PRELOADED = $(CURDIR)/build/asan/throwing_new.so
fuzz: ASAN_OPTIONS_TOO = :verify_asan_link_order=0:allocator_may_return_null=1:max_allocation_size_mb=256
fuzz: sanitized
	$(CXX) -O1 -shared -fPIC -o build/asan/throwing_new.so tools/throwing_new.cpp
ifdef CASE
	$(UNDER_ASAN) $(BIN)/python tests/fuzzing.py $(CASE)
else
	@for seed in $$(seq 1 20); do \
	  FUSEDRNN_FUZZ=$$(($(FUZZ) / 20)) $(ASAN_PYTEST) --hypothesis-seed=$$(($(SEED) + seed)) \
	    --hypothesis-show-statistics tests/test_fuzz_ops.py tests/test_fuzz_api.py $(ARGS) || \
	    { cat build/fuzz_case.txt; echo "was the last case; again: make fuzz CASE=build/fuzz_case.txt"; exit 1; }; \
	done
endif

# Every thread of a block is a fiber, in an order that differs from test to test.
cuda-host: $(VENV)/.test
	PYTHONPATH=tools $(BIN)/pytest -q -n 2 -p cuda_host --ops fusedrnn_cuda_host --every 17 $(CUDA_HOST) $(ARGS)

# The same kernels as nvcc compiles them, interpreted: what only a GPU would run, and a search for data races.
ptx: $(VENV)/.test
	PYTHONPATH=tools $(BIN)/pytest -q -n 2 -p cuda_host --ops fusedrnn_cuda_host --ptx 9.0a --every 127 -k 'not large_ragged' $(CUDA_HOST) $(ARGS)

mutants: $(VENV)/.test
	PYTHONPATH=tools $(BIN)/python tools/mutants.py

gpu:
	PYTHON='$(PYTHON)' bash bench/gpu_check.sh

clean:
	rm -rf $(VENV) build dist *.egg-info fusedrnn/lib fusedrnn/_C.*.so .*_cache .hypothesis
