# make bench     speed, memory and accuracy of stock against accelerated Qwen3-VL (FAMILY=qvl: of QVL; MODEL=PATH: of a real checkpoint; ARGS=... for options)
# make test      the tests that fit into 20 minutes on 2 cores
# make lint      ruff (lint and format), clang-format and mypy; make test does it first
# make setup     only the environment (.venv) and the C++ extension; the two above do it themselves
# make test-all  every test, also on older supported transformers and, under emulation, on aarch64; and make mutate
# make test-between / test-oldest  what differs between versions of transformers, on 5.23 and on the oldest supported one
# make test-install  qvl built and installed as users do, into an empty environment
# make test-torch TORCH=2.14.1  the tests on another PyTorch
# make test-python  the extension built and imported on every supported Python that is installed (PYTHONS="python3.12 ...")
# make mutate    faults put into a copy of the tree, each of which some test must see
# make sanitize  the kernel tests over an extension built with AddressSanitizer and UBSan
# make audit     every Triton kernel compiled for every GPU architecture and read back; needs no GPU
# make audit-oldest  the same on the oldest supported Triton, without writing the result file
# make bench-gpu GPU tests and benchmarks (a plain PyTorch image is enough); without a GPU it builds every case
# make peers     OpenVINO, llama.cpp and ik_llama.cpp, each in an environment of its own under the cache, for the benchmark to compare with
# make bench-kernels / make bench-all / make aarch64 / make clean

SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
BETWEEN := .venv-5.23
CXX ?= g++
PINNED_TORCH := 2.13.0
CSRC := $(shell find csrc -type f)

.PHONY: audit audit-oldest bench bench-all bench-gpu bench-kernels lint mutate peers test test-all test-between test-install test-oldest test-python test-torch aarch64 sanitize setup clean

bench: setup
	$(VENV)/bin/python -m bench $(if $(FAMILY),--family $(FAMILY)) $(if $(MODEL),--model "$(MODEL)") $(ARGS)

bench-all: setup
	$(VENV)/bin/python -m bench --all $(if $(FAMILY),--family $(FAMILY)) $(if $(MODEL),--model "$(MODEL)") $(ARGS)

peers: setup
	$(VENV)/bin/python -m bench.engines $(ARGS)

bench-kernels: setup
	$(VENV)/bin/python -m bench.kernels $(ARGS)

# On a machine with a GPU as it is: nothing is installed, and nothing is fetched; the extension is built where it is missing.
bench-gpu: BEGAN := $(shell date +%s)
bench-gpu:
	@if $(PYTHON) -c 'import sys, torch, triton, transformers; sys.exit(not torch.cuda.is_available())' 2>/dev/null; \
	then QVL_BENCH_START=$(BEGAN) $(PYTHON) -m bench.gpu $(ARGS); else $(MAKE) setup && $(VENV)/bin/python -m bench.gpu $(ARGS); fi

audit: setup
	$(VENV)/bin/python -m bench.compile_check $(ARGS)

audit-oldest: setup $(OLDEST)/.installed
	$(OLDEST)/bin/python -m bench.compile_check --no-write $(ARGS)

lint: $(VENV)/.dependencies
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $$(find csrc tests/cpp -name '*.cpp' -o -name '*.h')
	$(VENV)/bin/mypy

# Two processes, a file of tests to one of them: most tests are bound by Python.
test: lint setup
	TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest -n 2 --dist worksteal -m "not slow" tests/gpu
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile -m "not slow" --durations=15 $(ARGS)

test-all: lint setup
	TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest tests/gpu
	$(VENV)/bin/python -m pytest --durations=40 $(ARGS)
	$(MAKE) mutate audit
	$(MAKE) test-install test-between test-oldest audit-oldest
	@if command -v qemu-aarch64 >/dev/null && command -v aarch64-linux-gnu-g++ >/dev/null; then $(MAKE) aarch64; \
	else echo "aarch64 left out: needs qemu-aarch64 and aarch64-linux-gnu-g++ (apt-get install qemu-user g++-aarch64-linux-gnu)"; fi

mutate: setup
	$(VENV)/bin/python tests/helpers/mutate.py $(ARGS)

# The extension in the source tree serves all environments: it is built against Python only.
VERSION_TESTS := tests/model/test_model_*.py tests/model/test_generation*.py tests/model/test_capacity*.py tests/model/test_quantized_checkpoint.py \
  tests/model/test_auto.py tests/model/test_external_checkpoints.py tests/model/test_attention_by_name.py tests/qvl tests/training

test-oldest: setup $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -m "not slow" $(VERSION_TESTS)

# On another PyTorch: make test-torch TORCH=2.14.1 (gigabytes, unless a build for CPUs is at hand). It brings the Triton that it needs.
test-torch: setup
	@test -n "$(TORCH)" || { echo "qvl: which PyTorch? make test-torch TORCH=2.14.1"; exit 1; }
	$(MAKE) .venv-torch-$(TORCH)/.installed
	.venv-torch-$(TORCH)/bin/python -m pytest -m "not slow" $(ARGS)

# As users install it: into an empty environment that has PyTorch.
test-install:
	PYTHON=$(PYTHON) TORCH=$(PINNED_TORCH) bash tests/install.sh

test-python:
	PYTHONS="$(PYTHONS)" bash tests/python_versions.sh

test-between: setup $(BETWEEN)/.installed
	$(BETWEEN)/bin/python -m pytest -m "not slow" $(VERSION_TESTS)

aarch64:
	bash tests/aarch64.sh

sanitize: setup
	CXX="$(CXX)" PYTHON=$(VENV)/bin/python bash tests/sanitize.sh

setup: $(VENV)/.built

# With the targets that are only for tests.
$(VENV)/.built $(VENV)/.installed: export QVL_TEST_TARGETS := 1

$(VENV)/.built: $(VENV)/.installed $(CSRC)
	$(VENV)/bin/python setup.py -q build_ext --inplace
	@touch $@

$(VENV)/.installed: $(VENV)/.dependencies pyproject.toml setup.py
	@command -v $(firstword $(CXX)) >/dev/null || { echo "qvl: no C++ compiler ($(CXX)). Install one that knows C++17 and OpenMP: apt-get install g++ (or set CXX)."; exit 1; }
	$(VENV)/bin/python -m pip install -q --no-build-isolation -e .
	@touch $@

$(VENV)/.dependencies: requirements.txt requirements-common.txt requirements-lint.txt
	$(call create-environment,$(VENV))
	$(VENV)/bin/python -m pip install -q -r requirements.txt -r requirements-lint.txt
	@touch $@

$(OLDEST)/.installed: requirements-oldest.txt requirements-common.txt
	$(call create-environment,$(OLDEST))
	$(OLDEST)/bin/python -m pip install -q -r requirements-oldest.txt
	@touch $@

$(BETWEEN)/.installed: requirements-5.23.txt requirements-common.txt
	$(call create-environment,$(BETWEEN))
	$(BETWEEN)/bin/python -m pip install -q -r requirements-5.23.txt
	@touch $@

.venv-torch-%/.installed: requirements.txt requirements-common.txt
	$(call create-environment,.venv-torch-$*,$*)
	.venv-torch-$*/bin/python -m pip install -q -r requirements-common.txt $$(grep ^transformers== requirements.txt)
	@touch $@

# Torch goes in first and pinned, so that no later dependency chooses another build.
define create-environment
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "qvl: needs Python 3.11 or newer as $(PYTHON) (or set PYTHON=...)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "qvl: $(PYTHON) cannot create environments: apt-get install python3-venv python3-dev"; exit 1; }
	test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
	$(1)/bin/python -m pip install -q torch==$(or $(2),$(PINNED_TORCH))
endef

clean:
	rm -rf $(VENV) $(OLDEST) $(BETWEEN) build *.egg-info qvl_kernels/_C*.so
