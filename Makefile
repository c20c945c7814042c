# Set-up, demo, tests, linters and benchmarks. Needs Python >= 3.10, make and a shell; compilers are used where they are.
#   make demo            train a real model with the reference layer and with ours
#   make test            every test that needs no GPU; WORKERS=4 in four processes
#   make quick           the tests to run while editing, in a minute and a half
#   make lint            ruff, mypy, clang-format
#   make docs            pages of the public names, out of their docstrings, into build/docs
#   make bench           benchmarks, tables and plots
#   make gpu             on a machine with a GPU, offline, with PYTHON's own packages: tests, tuning, benchmarks, report
#   make TORCH=2.14.1 …  another torch than the default

PYTHON ?= python3
TORCH ?= 2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed-$(TORCH)
BUILT := $(VENV)/.built-$(TORCH)
CSRC := $(wildcard csrc/*/*)
WORKERS ?= 2
# What is promised: the package's own names, and two modules; the others are left out.
PAGES := lora_kernels '!lora_kernels\..+' lora_kernels.integrations.peft lora_kernels.distributed
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

.PHONY: setup demo test quick lint docs bench gpu clean

setup: $(BUILT)

$(INSTALLED): requirements-dev.txt requirements-data.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python >= 3.10 is needed: make PYTHON=/path/to/python3"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade-strategy only-if-needed \
		"torch==$(TORCH)" -r requirements-dev.txt
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-data.txt
	@rm -f $(VENV)/.installed-* && touch $@

$(BUILT): $(INSTALLED) setup.py pyproject.toml $(CSRC)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	@rm -f $(VENV)/.built-* && touch $@

demo: $(BUILT)
	$(BIN)/python -m lora_kernels demo

# The interpreter lane has processes of its own: Triton reads the variable when it is imported. Both parts always run.
test: $(BUILT)
	@status=0; set -x; \
	$(PYTEST) tests --ignore=tests/interpreter || status=1; \
	TRITON_INTERPRET=1 $(PYTEST) tests/interpreter || status=1; \
	{ set +x; } 2>/dev/null; exit $$status

quick: $(BUILT)
	$(PYTEST) tests --ignore=tests/interpreter -m "not slow"

lint: $(BUILT)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

docs: $(BUILT)
	$(BIN)/python -m pdoc --no-show-source --output-directory build/docs $(PAGES)

bench: $(BUILT)
	$(BIN)/python -m lora_kernels bench --preset laptop --output benchmarks/results
	$(BIN)/python -m lora_kernels report benchmarks/results

gpu:
	PYTHON=$(PYTHON) sh benchmarks/gpu.sh

clean:
	rm -rf $(VENV) build demo *.egg-info lora_kernels/*.so .pytest_cache .mypy_cache .ruff_cache
