# The two commands of README.md, from nothing but Python.
PYTHON ?= python3
VENV ?= .venv
# A plain `torch` can pull several GB of CUDA; name another build here if you want it.
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test fast pytest lint bench docs generated coverage dist release lowest highest

demo: $(VENV)/.installed
	$(BIN)/lightning-lora demo

# One process for each core, each with one thread: tiny models gain nothing from more. Files are handed out whole, so that
# what the tests of a file share is set up once, in the order of tests/conftest.py. Compiled files are kept, also where
# Python is told not to write them.
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# The linters run beside the tests, which wait for processes now and then.
test: $(VENV)/.developing
	$(MAKE) --jobs 2 lint pytest

pytest:
	$(PYTEST) $(if $(FAST),-m "not slow")

fast: $(VENV)/.developing
	$(MAKE) --jobs 2 lint pytest FAST=1

# A look at the training step in seconds; real measurements: python -m benchmarks.step --help
bench: $(VENV)/.developing
	$(BIN)/python -m benchmarks.step --workload tiny --repetitions 10 --out build/benchmarks

lint: $(VENV)/.developing
	$(BIN)/ruff check lightning_lora tests benchmarks docs studies
	$(BIN)/ruff format --check lightning_lora tests benchmarks docs studies
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: $(VENV)/.developing
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs build/docs

# What is written from the code: the picture of the rooms, the tables of commands, the page of errors, the public surface.
generated: $(VENV)/.developing
	$(BIN)/python -m docs.rooms
	$(BIN)/python -m docs.commands
	$(BIN)/python -m docs.errors_page
	UPDATE_PUBLIC_SURFACE=1 $(BIN)/python -m pytest -q tests/test_public_surface.py

# Lines and branches of the package that the fast tests run, by room; all tests with FAST= .
coverage: FAST = 1
coverage: $(VENV)/.developing
	.ci/coverage $(BIN)/python $(if $(FAST),-m "not slow")

dist: $(VENV)/.developing
	rm -rf dist
	$(BIN)/python -m build --no-isolation

# What is checked before a version is published: the wheel in an empty environment, the source archive by its own tests.
release: dist
	.ci/release $(BIN)/python

# The fast tests with the lowest and the highest versions that pyproject.toml allows.
lowest:
	.ci/versions lowest 3.10

highest:
	.ci/versions highest 3.13

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.developing: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	touch $@
