# The two commands of README.md, from nothing but Python.
PYTHON ?= python3
VENV ?= .venv
# A plain `torch` can pull several GB of CUDA; name another build here if you want it.
TORCH ?= torch==2.13.0
BIN = $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test fast lint

demo: $(VENV)/.installed
	$(BIN)/lightning-lora demo

test: lint
	$(BIN)/python -m pytest

fast: lint
	$(BIN)/python -m pytest -m "not slow"

lint: $(VENV)/.developing
	$(BIN)/ruff check lightning_lora tests
	$(BIN)/ruff format --check lightning_lora tests
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
