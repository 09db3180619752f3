# The commands of lap_ext. Each sets up all that it needs (Python >= 3.10, a C++ compiler and make are enough) in .venv
# and build/, and repeats only what has changed.
# SPDX-License-Identifier: MIT
PYTHON ?= python3
TORCH ?= torch==2.13.0#  what pip is given for torch, e.g. make test TORCH="torch==2.11.0"
FUZZ_SECONDS ?= 20
DEMO_ARGS ?=#  see: make demo DEMO_ARGS=--help
PYTEST_ARGS ?=
PYTEST_WORKERS ?= 2#  processes that share the test files; 0: one after the other
BENCH_ARGS ?=
GPU_ARGS ?=
MAX_JOBS ?= $(shell nproc 2>/dev/null || echo 1)
export MAX_JOBS
# OpenMP threads that wait by spinning make training 20 times slower where another program has a core
demo test-py: export OMP_WAIT_POLICY ?= passive

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
TORCH_STAMP := $(STAMPS)/torch-$(shell echo '$(TORCH)' | cksum | cut -d' ' -f1)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
CPP_SOURCES = $(shell find csrc tests/cpp -type f ! -name doctest.h)
NATIVE_SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml lap_ext/__init__.py

.PHONY: help demo test test-py test-cpp asan tsan fuzz bench gpu gpu-prepare tools dev check abi format clean
.DELETE_ON_ERROR:
.NOTPARALLEL: # pip in one environment; the compilers use MAX_JOBS

help:
	@echo "make demo      train, prune by lookahead and by magnitude, compare (table and plot in demo-out/)"
	@echo "make test      C++ tests on every SIMD level, then pytest (test-cpp, test-py: one of them)"
	@echo "make asan      C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer; make tsan: ThreadSanitizer"
	@echo "make fuzz      fuzz the selection for FUZZ_SECONDS=$(FUZZ_SECONDS)"
	@echo "make bench     benchmarks: table, JSON and plot"
	@echo "make gpu       builds, tests and measures the CUDA kernels; without a GPU: reports of ptxas, byte counts"
	@echo "make gpu-prepare  builds what a machine with a GPU, but without a network, needs (GPU_ARGS=--prebuilt there)"
	@echo "make dev       everything for development; make check: what CI checks; make format: puts the style right"
	@echo "make clean     removes .venv, build and the built libraries"

demo: $(STAMPS)/demo
	$(BIN)/python -m lap_ext.demo $(DEMO_ARGS)

test: test-cpp
	@$(MAKE) --no-print-directory test-py

test-py: $(STAMPS)/test
	$(BIN)/python -m pytest --numprocesses $(PYTEST_WORKERS) --dist loadfile $(PYTEST_ARGS)

bench: $(STAMPS)/bench
	$(BIN)/python -m benchmarks $(BENCH_ARGS)

gpu: $(STAMPS)/bench
	$(BIN)/python -m benchmarks.gpu $(GPU_ARGS)

gpu-prepare: $(STAMPS)/bench
	$(BIN)/python -m benchmarks.gpu.prepare $(GPU_ARGS)

dev: $(STAMPS)/dev

tools: $(STAMPS)/tools

# --- C++ without Python or torch: cmake and ninja come from pip, so they need not be installed ---------------------------
CMAKE = $(BIN)/cmake -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -S .
CTEST = $(BIN)/ctest --output-on-failure --parallel $(MAX_JOBS) --test-dir
# ThreadSanitizer of older compilers stops on kernels that randomize addresses more than it knows
NO_ASLR = $(shell setarch -R true 2>/dev/null && echo setarch -R)

# $(call build,FOLDER,OPTIONS,TARGET): configures (silent unless it fails) and builds
define build
$(CMAKE) -B build/$(1) $(2) >build/$(1).log || { cat build/$(1).log; exit 1; }
$(BIN)/cmake --build build/$(1) --parallel $(MAX_JOBS) --target $(3)
endef
# .ci/run compiles and runs each emulated GPU once: small sizes, which lie at every border, under the sanitizers; real
# sizes, which take long there, without
ASAN_TARGET ?= all
ASAN_ARGS ?=
CPP_TARGET ?= all
CPP_ARGS ?=
ASAN := -DLAP_TESTS=ON -DLAP_FUZZ=ON -DLAP_SANITIZE=address,undefined

test-cpp: $(STAMPS)/tools
	$(call build,cpp,-DLAP_TESTS=ON,$(CPP_TARGET))
	$(CTEST) build/cpp $(CPP_ARGS)

asan: $(STAMPS)/tools
	$(call build,asan,$(ASAN),$(ASAN_TARGET))
	$(CTEST) build/asan $(ASAN_ARGS)

tsan: $(STAMPS)/tools
	$(call build,tsan,-DLAP_TESTS=ON -DLAP_SANITIZE=thread,all)
	$(NO_ASLR) $(CTEST) build/tsan

fuzz: $(STAMPS)/tools
	$(call build,asan,$(ASAN),lap_fuzz)
	build/asan/lap_fuzz -max_total_time=$(FUZZ_SECONDS)

# --- checks -----------------------------------------------------------------------------------------------------------
check: $(STAMPS)/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)

# the libraries use nothing of torch but its stable ABI: one build loads on every torch >= 2.11
abi: $(STAMPS)/dev
	$(BIN)/torch-abi-audit lap_ext --check torch

format: $(STAMPS)/dev
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP_SOURCES)

# --- set-up: one stamp a step -----------------------------------------------------------------------------------------
$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "lap_ext needs Python >= 3.10: make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $(STAMPS) build && touch $@

$(STAMPS)/tools: $(STAMPS)/venv
	$(PIP) "setuptools>=77" wheel "pybind11>=2.13" "cmake>=3.22" ninja
	@touch $@

# torch first and alone: no later step may choose another one
$(TORCH_STAMP): $(STAMPS)/venv
	$(PIP) '$(strip $(TORCH))'
	@rm -f $(STAMPS)/torch-* && touch $@

# The package in place (so that tests run against the checkout) with the extra named by the stamp: demo, test, bench, or
# dev, which is all of them
$(STAMPS)/demo $(STAMPS)/test $(STAMPS)/bench $(STAMPS)/dev: $(STAMPS)/tools $(TORCH_STAMP) $(NATIVE_SOURCES)
	LAP_EXT_BUILD=require $(PIP) --no-build-isolation --editable '.[$(@F)]'
	@touch $@ $(if $(filter dev,$(@F)),$(addprefix $(STAMPS)/,demo test bench))

clean:
	rm -rf $(VENV) build dist demo-out *.egg-info lap_ext/*.so .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find lap_ext tests benchmarks -name __pycache__ -type d -exec rm -rf {} +
