# Every target sets up what it needs; the second call finds it ready.
#   make test PYTHON=python3.12    another Python, 3.10 or newer
#   make test AHA_BUILD=cuda       what to compile: auto, cpu, cuda or none (see setup.py)
#   make quick ROOM=attributors    the fast tests of one room
#   make test ARGS="-k native"     passed on to pytest, to aha demo, or to bench.report (--help lists its options)
PYTHON ?= python3
AHA_BUILD ?= $(if $(shell nvidia-smi -L 2>/dev/null),auto,cpu)
ARGS ?=
ROOM ?=
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
BUILT := $(VENV)/.built-$(AHA_BUILD)
export AHA_BUILD

# two processes that take whole files, so that what a file sets up is set up once; long files first (tests/conftest.py)
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo quick test bench sanitize wheel lint clean

demo: $(BUILT)
	$(VENV)/bin/aha demo $(ARGS)

# what is not marked slow; of one room with ROOM=attributors, which is a folder or a file of tests/
quick: $(BUILT)
	@test -z "$(ROOM)" || test -n "$(wildcard tests/$(ROOM) tests/test_$(ROOM).py)" || { echo "there is no room tests/$(ROOM)"; exit 2; }
	$(PYTEST) -m "not slow" $(if $(ROOM),$(wildcard tests/$(ROOM) tests/test_$(ROOM).py)) $(ARGS)

test: $(BUILT)
	$(PYTEST) $(ARGS)

bench: $(BUILT)
	$(PY) -m bench.report $(ARGS)

# the operator tests on a build that reports reads and writes out of bounds and undefined behaviour;
# AHA_FUZZ=10000 make sanitize ARGS="-k fuzz" makes that many random calls of every operator (tests/kernels/test_fuzz.py)
sanitize: $(INSTALLED)
	rm -rf build/sanitize && mkdir -p build/sanitize
	cp -r aha csrc kernels tests setup.py pyproject.toml LICENSE README.md build/sanitize && rm -f build/sanitize/aha/*.so
	ln -s ../kernels build/sanitize/aha/kernels
	cd build/sanitize && AHA_BUILD=cpu AHA_SANITIZE=1 ../../$(PY) setup.py -q build_ext --inplace
	cd build/sanitize && PYTHONPATH=. OMP_NUM_THREADS=2 ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	../../$(PY) -m pytest tests/kernels -m "not slow and not gpu" $(ARGS)

# for glibc 2.28 on, or a warning that says what stands against it, which pip would hide
# build/lib is never cleaned by setuptools: what a module left there would be shipped
wheel: $(INSTALLED)
	rm -rf build/lib* build/bdist* build/wheel
	$(PY) setup.py -q bdist_wheel -d build/wheel
	@mkdir -p dist && cp -v build/wheel/*.whl dist

# mypy reads a tree laid out as it installs, where kernels/ is aha/kernels/
lint: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	@rm -rf build/lint && mkdir -p build/lint/aha
	@cd build/lint/aha && ln -s ../../../aha/* . && ln -s ../../../kernels kernels
	$(VENV)/bin/mypy

clean:
	rm -rf build dist *.egg-info aha/*.so $(VENV)/.built-* .mypy_cache .pytest_cache .ruff_cache

$(INSTALLED): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit("aha needs Python 3.10 or newer, $(PYTHON) is %d.%d; name another with PYTHON=..." % v[:2])'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -c constraints.txt setuptools wheel ninja torch
	AHA_BUILD=none $(PY) -m pip install -c constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

# not by pip: it would hide the warnings and compile everything again
$(BUILT): $(INSTALLED) $(wildcard csrc/*.* csrc/*/*.*)
	$(PY) setup.py -q build_ext --inplace
	@rm -f $(VENV)/.built-* && touch $@
