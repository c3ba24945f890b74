# make demo    train five mixers on associative recall and draw recall against memory
# make test    the default test suite            make test-all   the slow and statistical tests too
# make gates   lint, format, types, import contract, and compiling for TPU and H200 without one
# make format  let ruff rewrite                  make clean      remove environments and caches (never runs/)
#
# The first target makes .venv once. PYTHON=/path/to/python picks the interpreter; WORKERS=4 the test processes.

SHELL := /bin/bash
PYTHON ?= python3.12 python3.13 python3.14 python3 python
WORKERS ?= logical
PYTEST_ARGS ?=
BIN := .venv/bin
STAMP := .venv/.installed
SUITE_LIMIT := 720

CUDA_WHEELS := jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt
GATES := .venv-gates
OLDEST := .venv-gates-oldest
OLDEST_JAX := 0.11.2
OLDEST_LIBTPU := 0.0.48.1

.PHONY: venv install demo test test-all gates lint compile-gates compile-gates-oldest format clean
.DELETE_ON_ERROR:

venv install: $(STAMP)

# $(call new_venv,DIR): an environment of a Python that is new enough, or one line that says there is none. A name may
# exist and still not run (pyenv's shims), so each candidate is asked.
define new_venv
	@[ -x $(1)/bin/python ] || { \
	for python in $(PYTHON); do \
	  if "$$python" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then \
	    echo "making $(1) with $$("$$python" --version)"; exec "$$python" -m venv $(1); \
	  fi; \
	done; \
	echo "error: no Python >= 3.12 with venv among: $(PYTHON). Install one (Debian, Ubuntu: python3.12 and python3.12-venv) or name it: make PYTHON=/path/to/python3.12" >&2; \
	exit 2; }
endef

$(STAMP): pyproject.toml constraints.txt
	$(call new_venv,.venv)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]' -c constraints.txt
	@touch $@

demo: $(STAMP)
	$(BIN)/python -m train --config mqar/demo --workdir runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 15 --suite-limit $(SUITE_LIMIT) $(PYTEST_ARGS)

test-all: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 25 -m '' $(PYTEST_ARGS)

gates: lint compile-gates compile-gates-oldest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

# The compilers live in environments of their own, so that tests on the CPU never load a plugin. libtpu holds a lock:
# one process at a time.
compile-gates: $(GATES)/.installed
	$(GATES)/bin/python -m tests.gates tpu cuda export
	$(GATES)/bin/python -m tests.gates.kernels_tpu
	$(GATES)/bin/python -m tests.gates.kernels_gpu

# The oldest jax that pyproject.toml admits: compiled, and run on the CPU.
compile-gates-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m tests.gates run export
	$(OLDEST)/bin/python -m tests.gates.kernels_tpu v5e
	$(OLDEST)/bin/python -m tests.gates.kernels_gpu

define install_gates
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[gates]' -c $(2)
	$(1)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(CUDA_WHEELS) -c $(2)
endef

$(GATES)/.installed: pyproject.toml constraints.txt
	$(call new_venv,$(GATES))
	$(call install_gates,$(GATES),constraints.txt)
	@touch $@

$(OLDEST)/.installed: pyproject.toml constraints.txt
	$(call new_venv,$(OLDEST))
	@sed -E 's/^(jax|jaxlib|jax-cuda13-plugin|jax-cuda13-pjrt)==.*/\1==$(OLDEST_JAX)/; s/^libtpu==.*/libtpu==$(OLDEST_LIBTPU)/' \
	  constraints.txt > $(OLDEST)/constraints.txt
	$(call install_gates,$(OLDEST),$(OLDEST)/constraints.txt)
	@touch $@

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv $(GATES) $(OLDEST) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
