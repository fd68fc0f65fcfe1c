# make demo         a real model, quantized, verified and measured, in build/quickstart
# make test         the tests (minutes); make test-slow: the long ones too
# (one thread each: the models of the tests are tiny, and a busy machine does not stall them)
# make test-device  the device half's tests, in an environment without torch
# make lint types   ruff and mypy
#
# Everything runs in virtual environments below this folder, made by plain pip; nothing else is touched.
# Another Python:           make demo PYTHON=python3.12
# Other flags for pip:      make demo PIP_FLAGS="--find-links DIR"   (a folder with torch without CUDA, say)
# Other flags for cmake:    make demo CMAKE_FLAGS=-DGGML_METAL=OFF    (llama.cpp without a Mac's GPU, say)

PYTHON ?= python3
PIP_FLAGS ?=
CMAKE_FLAGS ?=
PYTEST_FLAGS ?=

VENV := .venv
DEVICE_VENV := .venv-device
CORES := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu 2>/dev/null || echo 2)
# llama-cpp-python compiles here: without llama.cpp's examples and its vision library, in half the time
# and without AMX, whose kernels GCC miscompiles (ggml-org/llama.cpp#26954): with it, no weights can be repacked
NO_AMX := $(shell grep -qw amx_tile /proc/cpuinfo 2>/dev/null && echo -mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
# (its own CMakeLists.txt forces LLAMA_BUILD_COMMON on, which a plain variable of the same name, set before it, hides)
COMPILE = CMAKE_ARGS="-DCMAKE_PROJECT_llama_cpp_INCLUDE=$(CURDIR)/$(@D)/llama.cmake -DLLAVA_BUILD=OFF $(CMAKE_FLAGS)" \
  CMAKE_BUILD_PARALLEL_LEVEL=$(CORES) CFLAGS="$(NO_AMX) $(CFLAGS)" CXXFLAGS="$(NO_AMX) $(CXXFLAGS)"
PIP_INSTALL := -m pip install --disable-pip-version-check -c constraints.txt $(PIP_FLAGS)

.PHONY: demo test test-slow test-device lint types clean

demo: $(VENV)/.demo
	$(VENV)/bin/edgeslm build recipes/quickstart.toml --out build/quickstart

test: $(VENV)/.test
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -m "not slow" $(PYTEST_FLAGS)

test-slow: $(VENV)/.test $(VENV)/.shuttle
	$(VENV)/bin/python -m pytest -q -m slow --timeout=1800 $(PYTEST_FLAGS)

test-device: $(DEVICE_VENV)/.test
	$(DEVICE_VENV)/bin/python -m pytest -q -m "not workstation and not slow" $(PYTEST_FLAGS)

lint: $(VENV)/.test
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .

types: $(VENV)/.test
	$(VENV)/bin/python -m mypy

clean:
	rm -rf $(VENV) $(DEVICE_VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(VENV)/.demo: $(VENV)/llama.cmake pyproject.toml constraints.txt
	$(COMPILE) $(VENV)/bin/python $(PIP_INSTALL) -e ".[workstation,demo]"
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(VENV)/bin/python $(PIP_INSTALL) -e ".[workstation,demo,test]"
	touch $@

# NASA's shuttle readings, which a recipe and slow tests learn from, lie in this package; what it needs itself is not
# needed for them, and where there is no wheel those tests skip themselves
$(VENV)/.shuttle: $(VENV)/.test
	$(VENV)/bin/python $(PIP_INSTALL) --no-deps --only-binary=:all: river==0.26.1 && touch $@ \
	  || echo "no river here: the tests on its shuttle readings will be skipped"

$(DEVICE_VENV)/.test: $(DEVICE_VENV)/llama.cmake pyproject.toml constraints.txt
	$(COMPILE) $(DEVICE_VENV)/bin/python $(PIP_INSTALL) -e ".[gguf,onnx,test]"
	touch $@

%/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "edgeslm needs Python 3.11 or newer, and $(PYTHON) is not: try  make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "$(PYTHON) can't make virtual environments; on Debian:  sudo apt install python3-venv"; exit 1; }
	@command -v c++ >/dev/null || { \
	  echo "llama.cpp needs a C++ compiler; on Debian:  sudo apt install g++ cmake"; exit 1; }
	$(PYTHON) -m venv $*
	touch $@

$(VENV)/llama.cmake $(DEVICE_VENV)/llama.cmake: %/llama.cmake: %/.made
	echo 'set(LLAMA_BUILD_COMMON OFF)' > $@
