# The two commands of README.md, from nothing but Python.
PYTHON ?= python3
VENV ?= .venv
# A plain `torch` can pull several GB of CUDA; name another build here if you want it.
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test fast lint bench

demo: $(VENV)/.installed
	$(BIN)/lightning-lora demo

# One process for each core, each with one thread: tiny models gain nothing from more.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test: lint
	$(PYTEST)

fast: lint
	$(PYTEST) -m "not slow"

# A look at the training step in seconds; real measurements: python -m benchmarks.step --help
bench: $(VENV)/.developing
	$(BIN)/python -m benchmarks.step --workload tiny --repetitions 10 --out build/benchmarks

lint: $(VENV)/.developing
	$(BIN)/ruff check lightning_lora tests benchmarks
	$(BIN)/ruff format --check lightning_lora tests benchmarks
	$(BIN)/pyright --pythonpath $(BIN)/python

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
