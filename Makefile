# Two commands for a newcomer: `make demo` and `make test`. Both set up .venv with the CPU build of torch.
PYTHON ?= python3
PROMPT ?= a parrot
OUT ?=
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint clean

demo: $(VENV)/demo-ready
	$(BIN)/animatelcm generate "$(PROMPT)" --force $(if $(OUT),--out "$(OUT)")

test: $(VENV)/test-ready
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: $(VENV)/test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo-ready: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

$(VENV)/test-ready: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@ $(VENV)/demo-ready

clean:
	rm -rf $(VENV) build dist
