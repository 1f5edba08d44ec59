# isthmus: `make help` lists what there is.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint format bench clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: .venv/.ready ## make .venv with the tested versions (a few minutes, about 8 GB)

.venv/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "isthmus needs Python 3.11; say which one with: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@echo "setting up .venv (a few minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,mpnet,regions]'
	@touch $@

demo: .venv/.ready ## the main job on rendered scenes, then a search; prints where everything is
	@$(BIN)/python -m pipeline run less
	@$(BIN)/python -m pipeline search latest "two green stars" "a striped heart in the snow" --page runs/search.html

test: .venv/.ready ## the tests, without the slow ones
	@$(BIN)/python -m pytest -m "not slow"

test-slow: .venv/.ready ## the slow tests
	@$(BIN)/python -m pytest -m slow

lint: .venv/.ready ## style, types and the import contract
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: .venv/.ready ## rewrite the files in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.ready ## ratios, each measured in one run: extraction, its checks, caches elsewhere, imports, training, ranks
	@for file in benchmarks/bench_*.py; do $(BIN)/python $$file || exit 1; done

clean: ## remove the caches of the tools (features, runs and .venv stay)
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
