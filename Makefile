# From a clean checkout: `make demo` and `make test`. Each makes .venv first when there is none.
#   make PYTHON=/path/to/python        the interpreter to build .venv from (default: newest suitable one found)
#   make VENV=.venv-old PINS="transformers==5.17.0 torch==2.11.0 numpy<2.4" test      another set of versions
#                                      (the interpreter of triton 3.6, which that torch brings, needs numpy before 2.4)
#   make test PYTEST_ARGS="tests/packaging -k wheel"                          some of the tests

VENV ?= .venv
PINS ?=
PYTEST_ARGS ?=
# each test process is single-threaded; two were fastest on a busy machine of four cores
PYTEST_WORKERS ?= 2
GPU_WORKERS ?= 8
GPU_ARGS ?=
BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed
# any Python 3.11+ can run the installer; it chooses the one to build .venv from
BOOTSTRAP := for p in "$$PYTHON" python3.12 python3.11 python3 python; do \
	  [ -n "$$p" ] && "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && exec "$$p"

export PYTHON
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
# nothing here loads from a hub; a typing error in a path must not become a download
export HF_HUB_OFFLINE ?= 1

.PHONY: help demo test test-gpu lint type floors readme install clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    quantize, serve and judge the shipped models; ends with one table"
	@echo "make test    ruff, mypy, import floors and all tests"
	@echo "make test-gpu                    the tests that need an NVIDIA GPU, kernels and captured steps among them"
	@echo "make lint | type | floors        one of the checks"
	@echo "make readme                      bring README.md's table and file map up to date"
	@echo "make install | clean             make .venv | remove it and every cache"

install: $(STAMP)

$(STAMP): setup.cfg pyproject.toml .ci/install.py
	@$(BOOTSTRAP) .ci/install.py "$(VENV)" $(PINS); done; \
	  echo "no Python 3.11 or newer found: install one, or name it: make PYTHON=/path/to/python" >&2; exit 1
	@touch $@

demo: $(STAMP)
	@$(BIN)/python -m eval.demo

test: $(STAMP)
	@.ci/test.sh $(BIN) $(PYTEST_WORKERS) $(PYTEST_ARGS)

test-gpu: $(STAMP)
	@$(BIN)/python -m eval gpu-tests --workers $(GPU_WORKERS) $(GPU_ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check .

type: $(STAMP)
	@$(BIN)/mypy

floors: $(STAMP)
	@$(BIN)/lint-imports --no-cache

# the parts of README.md that are generated: the demo's table and the file map
readme: $(STAMP)
	@$(BIN)/python .ci/readme.py

clean:
	rm -rf $(VENV) build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
