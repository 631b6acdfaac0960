# On a machine with Python >= 3.11 and make, each target works from nothing: it makes .venv and installs what it needs.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
CODE := xlora_jax interop tests $(wildcard examples benchmarks)
TYPED := xlora_jax interop $(wildcard examples benchmarks)
# The pin stands in pyproject.toml only.
TORCH := $(shell sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' pyproject.toml)

# Most of the time of a small test goes into compiling: without optimisation that takes half as long. (The programs are
# XLA's own all the same; only their translation to machine code is plainer.) `make test XLA_FLAGS=` optimises.
XLA_FLAGS ?= --xla_backend_optimization_level=0

# One thread for each test process: several processes that each start a thread for every core slow one another down.
# NPROC is what XLA's CPU client takes for the number of cores, the others are for torch and numpy.
TEST_ENV := XLA_FLAGS="$(XLA_FLAGS)" NPROC=1 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

# Time for each target of the fuzzing tests: `make fuzz` takes an hour each, continuous integration 20 s.
FUZZ_SECONDS ?= 3600

.PHONY: help venv test quick lint format demo fuzz clean

help:
	@echo "make venv    set up $(VENV) (the other targets do so themselves)"
	@echo "make test    the whole test suite, in $(JOBS) processes"
	@echo "make quick   the tests that are not marked slow"
	@echo "make lint    ruff and mypy"
	@echo "make format  ruff's formatter and its safe fixes"
	@echo "make fuzz    read damaged files for FUZZ_SECONDS=$(FUZZ_SECONDS) per kind of file (FUZZ_TARGETS=... chooses)"
	@echo "make demo    examples/quickstart.py: train, mix, generate, export, check against PEFT"

venv: $(INSTALLED)

# torch goes first, alone: whichever build of that version pip finds (CPU only, or with CUDA) is then the one that
# the rest of the installation accepts.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"Python >= 3.11 is needed, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet "$(TORCH)"
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable ".[test]"
	@touch $@

test: $(INSTALLED)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

quick: $(INSTALLED)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow" $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy $(TYPED)

format: $(INSTALLED)
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

demo: $(INSTALLED)
	$(BIN)/python examples/quickstart.py

fuzz: $(INSTALLED)
	$(TEST_ENV) FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m tests.fuzz.run $(FUZZ_TARGETS)

clean:
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
