# Everything a person or CI runs. `make` lists the targets.
#
# The package is installed, not linked, into .venv, and the tests import what was installed. Each
# build has its own folder under build/, so that one does not undo another.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= python3
VENV ?= .venv
# More arguments for pytest in `make test`, for example ARGS="-k foci -x".
ARGS ?=
# Test files run side by side, each in one process. For a debugger pass ARGS="-n0 --pdb".
SIDE_BY_SIDE := -n logical --maxprocesses 4 --dist loadfile
# `make test` compiles CUDA kernels for one architecture, to save time: this machine's GPU, or
# Hopper where there is none. `make check` compiles for all.
CUDA_ARCHITECTURES ?= $(if $(wildcard /dev/nvidia0 /dev/dxg),native,90-real)

# Where there is no nvcc, `make check` leaves compiled kernels out, and the emulator runs the sources.
NVCC := $(shell command -v "$${CUDACXX:-nvcc}")

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
# The build tools are in .venv, in their pinned versions, so that rebuilding is incremental;
# `make check-wheel` builds in isolation, as a user's pip does.
BUILD := --no-build-isolation -C cmake.define.LCODEC_WERROR=ON -C cmake.define.LCODEC_EMULATE=ON \
    -C cmake.define.LCODEC_INSTRUMENTS=ON
# Folders too: their time stamps tell of files that were added or removed.
SOURCES := $(shell find csrc lcodec_ext tests/emulate -name __pycache__ -prune -o -print) \
    CMakeLists.txt pyproject.toml README.md LICENSE

define CHECK_PYTHON
import os, sys, sysconfig
name = os.path.basename(sys.executable) + " " + sys.version.split()[0]
if sys.version_info < (3, 11):
    sys.exit("lcodec_ext needs Python 3.11 or newer; this is " + name
             + ". Name another one: make PYTHON=python3.12 ...")
try:
    import ensurepip, venv
except ImportError:
    sys.exit(name + " cannot make virtual environments. On Debian or Ubuntu: "
             "apt install python3-venv python3-dev")
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    sys.exit(name + " has no C headers. On Debian or Ubuntu: apt install python3-dev")
endef
export CHECK_PYTHON

.PHONY: help demo test check lint docs bench clean
.PHONY: check-wheel check-release check-objects check-ptx check-sanitize check-long check-paths

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

demo: $(VENV)/.installed ## Delete samples from a trained network and show what happened
	$(BIN)/python examples/digits_deletion.py

test: $(VENV)/.installed ## Build for this machine and run the tests
	HYPOTHESIS_PROFILE=short $(BIN)/pytest $(SIDE_BY_SIDE) $(ARGS)

check: lint docs check-wheel check-release check-objects $(if $(NVCC),check-ptx) check-sanitize check-long check-paths ## All that CI checks beyond `make test`

lint: $(VENV)/.installed ## Formatting, style, types and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc tests/emulate tests/ptx \( -name '*.[ch]pp' -o -name '*.cu' -o -name '*.cuh' \) -print0 \
	    | xargs -0 $(BIN)/clang-format --dry-run -Werror
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

docs: $(VENV)/.installed ## The documentation site, in build/docs; warnings are errors
	rm -rf build/docs
	$(BIN)/python -P -m sphinx -q -W --keep-going -b html docs build/docs

bench: $(VENV)/.installed ## Time the package beside other implementations
	$(BIN)/python benchmarks/run.py $(ARGS)

clean: ## Remove what was built; .venv and its downloads stay
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis $(VENV)/.installed
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# --------------------------------------------------------------------------------------------
# The parts of `make check`

# A wheel as a release has it: from the sdist, in an isolated environment, for all architectures.
# It is then used where nothing but NumPy is installed.
check-wheel: $(VENV)/.installed ## Part of check: sdist, wheel for all GPUs, import with NumPy alone
	rm -rf build/wheel
	mkdir -p build/wheel
	$(BIN)/pyproject-build --no-isolation --sdist --outdir build/wheel .
	$(PIP) wheel -v --no-deps --build-constraint constraints.txt --wheel-dir build/wheel \
	    -C cmake.define.LCODEC_WERROR=ON -C cmake.define.CMAKE_CUDA_FLAGS=-Xptxas=-v \
	    build/wheel/lcodec_ext-*.tar.gz >build/wheel/log.txt 2>&1 \
	    || { cat build/wheel/log.txt; exit 1; }
	grep -oE 'lcodec_ext: CUDA .*|(Compiling entry|ptxas info +: Used|[0-9]+ bytes stack).*' \
	    build/wheel/log.txt | c++filt
	awk '/Compiling entry/ { kernel = $$0 } \
	    / spill stores/ && kernel ~ /_ZN6lcodec/ && !/ 0 bytes spill stores, 0 bytes spill loads/ \
	        { print kernel, $$0; spills = 1 } END { exit spills }' build/wheel/log.txt
	$(BIN)/python -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install -q -c constraints.txt build/wheel/lcodec_ext-*.whl
	build/wheel/venv/bin/python -P tests/core_only.py

# What an index or an installer would refuse. A wheel with the tag manylinux runs on other Linux systems,
# and one without libtorch's symbols beside any PyTorch. A peer asks for torchvision without using it.
check-release: check-wheel ## Part of check: metadata, platform, PyTorch's ABI, requirements that fit
	$(BIN)/twine check --strict build/wheel/lcodec_ext-*
	$(BIN)/auditwheel show build/wheel/lcodec_ext-*.whl | tee build/wheel/platform.txt
	grep -q '"manylinux_' build/wheel/platform.txt
	$(BIN)/torch-abi-audit build/wheel/venv/lib/python*/site-packages/lcodec_ext \
	    | tee build/wheel/torch.txt
	grep -q 'Torch ABI: *NO-TORCH$$' build/wheel/torch.txt
	build/wheel/venv/bin/python -m pip check
	{ $(PIP) check || test $$? = 1; } | { ! grep -v -e 'requires torchvision, which' -e '^No broken'; }

# The linker keeps one copy of a function that several objects define. Were it one compiled for
# AVX-512, the module would crash on every other CPU.
check-objects: $(VENV)/.installed ## Part of check: no shared function is compiled for one SIMD level
	@objects=$$(find build/dev -path '*lcodec_score_*' -name '*.o'); \
	test -n "$$objects"; \
	for object in $$objects; do \
	    nm -C --defined-only "$$object" | awk '$$2 ~ /^[WVu]$$/' | { ! grep .; } \
	        || { echo "$$object defines these for others to share"; exit 1; }; \
	done; \
	echo "SIMD objects share no function: $$(echo "$$objects" | wc -l) checked"

# A build of its own: kernels compiled to PTX for one architecture, and nothing else. One process, so
# that the last test sees what all have executed.
check-ptx: $(VENV)/.installed ## Part of check: compiled CUDA kernels, run by a PTX interpreter
	$(BIN)/cmake -S . -B build/ptx -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	    -DCMAKE_BUILD_TYPE=Release -DCMAKE_CUDA_ARCHITECTURES=90-virtual -DLCODEC_CUDA=ON \
	    -DLCODEC_INTERPRET=ON -DLCODEC_WERROR=ON -DPython_EXECUTABLE=$(abspath $(BIN))/python \
	    -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)"
	$(BIN)/cmake --build build/ptx --target _interpreted
	PYTHONPATH=build/ptx:tests/ptx HYPOTHESIS_PROFILE=short $(BIN)/pytest tests/ptx/check_kernels.py

# This one is also the build without CUDA. Emulated kernels run in one order of threads, shuffled. The
# runtimes are preloaded because Python itself is not built with them: ASan must come first, and needs
# the C++ library's exceptions at its start.
check-sanitize: $(VENV)/.installed ## Part of check: native tests on an ASan + UBSan build without CUDA
	rm -rf build/sanitize/site
	$(PIP) install --no-deps $(BUILD) -C build-dir=build/sanitize/cmake -C cmake.build-type=Debug \
	    -C cmake.define.LCODEC_SANITIZE=address,undefined -C cmake.define.LCODEC_CUDA=OFF \
	    --target build/sanitize/site .
	runtime() { ldd build/sanitize/site/lcodec_ext/_core*.so | awk -v name="$$1" '$$1 ~ name { print $$3 }'; }; \
	export LD_PRELOAD="$$(runtime asan) $$(runtime libstdc)" ASAN_OPTIONS=detect_leaks=0 \
	    UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$$PWD/build/sanitize/site"; \
	$(BIN)/python -P -c 'import lcodec_ext as m; assert m.build_info()["sanitizers"], m.__file__'; \
	HYPOTHESIS_PROFILE=short $(BIN)/pytest $(SIDE_BY_SIDE) -m native -k 'not forward0 and not reversed0' \
	    $$(grep -rl --include='*.py' mark.native tests)

# The profile changes nothing for other tests. These few are shared out one by one.
check-long: $(VENV)/.installed ## Part of check: tests of properties with the long Hypothesis profile
	HYPOTHESIS_PROFILE=long $(BIN)/pytest $(SIDE_BY_SIDE) --dist worksteal -m hypothesis $(ARGS) \
	    $$(grep -l 'from hypothesis' tests/test_*.py)

# Another CPU rounds otherwise: its vectors are of another length, MKL takes other kernels on AMD, and
# threads split sums. The first run takes the least that torch, MKL and oneDNN offer, and two threads,
# which sleep while they wait: spinning is slow where both cores are busy. Where there is AVX-512, a
# second run takes AVX2; elsewhere `make test` does, with one thread.
# The files are those in which torch's arithmetic decides. The others test dependence (exact on every
# path), kernels (`make check-sanitize`), ledgers, reports, memory, the command line, and torch.compile,
# which does not work under ATEN_CPU_CAPABILITY. Measured seconds are judged by `make test`.
PATHS_TESTS = $(filter-out %_report.py %_ledger.py %_memory.py, \
    $(wildcard tests/test_before_redesign.py tests/test_compat_scrub.py tests/test_curvature_*.py \
    tests/test_docs.py tests/test_unlearning_*.py))
PATHS_RUN = LCODEC_TEST_TORCH_THREADS=2 OMP_WAIT_POLICY=passive HYPOTHESIS_PROFILE=short \
    $(BIN)/pytest $(SIDE_BY_SIDE) -m 'not native' -k 'not test_seconds_are' $(PATHS_TESTS)
check-paths: $(VENV)/.installed ## Part of check: tests of torch arithmetic on other CPU code paths
	ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41 $(PATHS_RUN)
	if grep -qws avx512f /proc/cpuinfo; then ATEN_CPU_CAPABILITY=avx2 $(PATHS_RUN); fi

# --------------------------------------------------------------------------------------------
# The virtual environment, in two stamps: tools, and the package with all it needs

$(VENV)/.tools: constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "$(PYTHON) not found; name a Python: make PYTHON=..." >&2; exit 1; }
	@test -x $(BIN)/python || { "$(PYTHON)" -c "$$CHECK_PYTHON" && "$(PYTHON)" -m venv $(VENV); }
	$(PIP) install -q -c constraints.txt pip
	$(PIP) install -q -c constraints.txt scikit-build-core pybind11 cmake ninja
	touch $@

$(VENV)/.installed: $(VENV)/.tools $(SOURCES)
	$(PIP) install -c constraints.txt $(BUILD) -C build-dir=build/dev \
	    -C cmake.define.CMAKE_CUDA_ARCHITECTURES=$(CUDA_ARCHITECTURES) '.[dev]'
	$(PIP) install -q -c constraints.txt --no-deps curvlinops-for-pytorch backpack-for-pytorch
	touch $@
