# Seven verbs. A machine needs Python 3.11 or newer (with pip and venv) and make; everything else goes into .venv.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
DEMO_FLAGS ?=
TEST_FLAGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
INSTALL := PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_INPUT=1 $(BIN)/python -m pip install -qq
CODE := unipo tests scripts benchmarks

# Threads that wait for work sleep instead of spinning: on a busy machine this is the difference between 0.7 s and 7 s an update.
export OMP_WAIT_POLICY ?= passive

.PHONY: setup demo test lint format docs bench clean
.DEFAULT_GOAL := setup

setup: $(STAMP)  ## the environment, with exactly the versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "UniPO needs Python 3.11 or newer, found " + sys.version.split()[0] + ": make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)")'
	@echo "installing into $(VENV) (a few minutes the first time) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(INSTALL) -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP)  ## GRPO lifts a small transformer's held-out accuracy on arithmetic; ends with the path of report.html
	@$(BIN)/unipo run grpo arithmetic --out runs/demo $(DEMO_FLAGS)

test: $(STAMP)  ## the whole test-suite (TEST_FLAGS="-k ledger" for a part of it)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 MPLBACKEND=Agg $(BIN)/python -m pytest -n $(WORKERS) $(TEST_FLAGS)

lint: $(STAMP)  ## style, types, and imports that only go down
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(STAMP)  ## rewrite the code as `make lint` wants it
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

docs: $(STAMP)  ## build/docs: the pages of docs/ and the reference from the docstrings, as HTML; fails on a broken link
	$(BIN)/python scripts/build_docs.py --out build/docs

bench: $(STAMP)  ## speed beside pinned peers (QUICK=1: under five minutes; ROWS="grpo-s1 ppo-cartpole": only these)
	$(BIN)/python -m benchmarks.bench $(ROWS) $(if $(QUICK),--quick)

clean:  ## remove what was built (not .venv, not runs/)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
