# make setup: .venv with everything; make demo: the main job; make test: the tests but for slow ones;
# make test-all: all tests; make test-latest: the tests of the export with the newest libraries, in an
# environment of their own; make cover: coverage of all tests; make mutate ROOM=edge_sdk/protocol:
# whether the tests of a room notice small changes of its code.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := 2.13.0

.PHONY: setup demo python test test-all test-latest cover mutate lint clean

setup: $(VENV)/.ready

# With uv where it is installed; "make setup UV=" takes pip.
UV ?= $(shell command -v uv 2>/dev/null)

python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Cutlayer needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }

$(VENV)/.ready: pyproject.toml | python
	$(PYTHON) -m venv $(VENV)
	@$(PYTHON) tools/set_up.py --python $(BIN)/python --torch $(TORCH) --uv "$(UV)"
	touch $@

demo: setup
	$(BIN)/cutlayer demo

# A file's tests stay in one process, for its fixtures.
PYTEST := -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: setup
	$(BIN)/python $(PYTEST)

test-all: setup
	$(BIN)/python $(PYTEST) -m "slow or not slow"

LATEST := build/latest

test-latest: python
	$(PYTHON) -m venv $(LATEST)
	@$(PYTHON) tools/newest.py --python $(LATEST)/bin/python --torch $(TORCH) --uv "$(UV)"

COVERAGE := $(CURDIR)/build/coverage

cover: export COVERAGE_FILE = $(COVERAGE)/data
cover: setup
	rm -rf $(COVERAGE)
	mkdir -p $(COVERAGE)
	$(BIN)/coverage run $(PYTEST) -m "slow or not slow"
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage json --quiet -o $(COVERAGE)/coverage.json
	$(BIN)/python -m tests.lib.coverage_table $(COVERAGE)/coverage.json

ROOM ?= edge_sdk/protocol
COUNT ?= 20
SEED ?= 0

mutate: setup
	$(BIN)/python -m tests.lib.mutate --room $(ROOM) --count $(COUNT) --seed $(SEED)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy edge_sdk export server_hub

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
