# `make demo` and `make test` set up everything they need in .venv.
VENV ?= .venv
BIN := $(VENV)/bin
# The first interpreter on the path that starts and is new enough.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	  "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  && echo $$p && break; done)
DEMO_ARGS ?= --config=configs/digits.py

.PHONY: demo test lint format clean

demo: $(VENV)/.demo
	$(BIN)/python launch/main.py $(DEMO_ARGS)

test: $(VENV)/.test lint
	$(BIN)/python -m pytest -q -n 2 --dist worksteal --durations=15

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 on the path; \
	install one or run 'make PYTHON=/path/to/python ...'" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# uv installs a few times faster than pip; where it cannot be had, pip does it.
$(VENV)/.demo $(VENV)/.test: $(VENV)/.%: pyproject.toml | $(BIN)/python
	@echo "installing into $(VENV) ..."
	@$(BIN)/python -m pip install -q uv 2>/dev/null \
	  && $(BIN)/uv pip install -q --python $(BIN)/python -e '.[$*]' \
	  || $(BIN)/python -m pip install -q -e '.[$*]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
