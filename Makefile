# Every target creates .venv with everything in it when it is missing or older than pyproject.toml or
# constraints.txt, which names the versions of all libraries but torch. Nothing else is needed but Python >= 3.11.
# Another interpreter: make test PYTHON=/path/to/python3
# The first of these that runs and is new enough.
ifndef PYTHON
PYTHON := $(shell for candidate in python3.11 python3 python3.12 python3.13 python3.14 python; do \
  "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$candidate"; exit; }; done; echo python3)
endif
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# A later release of torch needs only this line; on a machine with a GPU set TORCH=torch to take the newest build.
TORCH ?= torch==2.13.0
DEMO := runs/demo
# Test processes, each with one thread: two of them are faster than one with two threads.
WORKERS ?= 2

.PHONY: demo test test-fast lint docs bench install constraints clean help
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(STAMP)  ## the main job on real input: fine-tune MiniLM on the standard library's docstrings, at most 6 minutes on 2 cores
	@if [ -f $(DEMO)/run.json ]; then set -x; $(BIN)/partwise tune --out $(DEMO) --resume; else set -x; $(BIN)/partwise tune --out $(DEMO); fi

test: $(STAMP)  ## the whole suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

test-fast: $(STAMP)  ## the suite without tests over 5 seconds
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow"

lint: $(STAMP)  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(STAMP)  ## write the generated pages anew, fail if that changed one, and run the code in all pages
	$(BIN)/python benchmarks/report.py --fail-on-change
	$(BIN)/python -m pytest tests/test_docs.py

bench: $(STAMP)  ## every benchmark program in turn, then the generated pages; hours
	@for program in benchmarks/*_*.py; do echo "== $$program"; $(BIN)/python "$$program" || exit 1; done
	$(BIN)/python benchmarks/report.py

install: $(STAMP)  ## only .venv

constraints: $(STAMP)  ## the newest libraries that pyproject.toml allows, and their versions into constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --upgrade-strategy eager "$(TORCH)" --editable ".[all,dev]"
	$(BIN)/python -c 'import importlib.metadata, pathlib, re; path = pathlib.Path("constraints.txt"); \
	  path.write_text(re.sub(r"(?m)^([\w-]+)==.*", lambda line: f"{line[1]}=={importlib.metadata.version(line[1])}", path.read_text()))'
	@touch $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "error: partwise needs Python 3.11 or later, and $(PYTHON) says: $$("$(PYTHON)" --version 2>&1 || true)" >&2; \
	  echo "Install Python 3.11, or name another interpreter: make $(or $(MAKECMDGOALS),test) PYTHON=/path/to/python3" >&2; exit 1; }
	@[ -x $(BIN)/python ] || "$(PYTHON)" -m venv $(VENV) || { \
	  rm -rf $(VENV); echo "error: '$(PYTHON) -m venv' failed. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@echo "Setting up $(VENV): torch, then partwise with its extras. This takes a few minutes, once."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[all,dev]"
	@touch $@

clean:  ## remove .venv, caches and the demo run
	rm -rf $(VENV) $(DEMO) .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist
