# Everything runs in this folder's own .venv, made on first use. A second call installs
# nothing: each set of packages leaves a stamp, renewed when pyproject.toml changes.

VENV := .venv
BIN := $(VENV)/bin
DEMO := $(VENV)/.installed-demo
DEV := $(VENV)/.installed-dev
BENCH := $(VENV)/.installed-bench

UV := $(shell command -v uv 2>/dev/null)
PYTHONS := python3 python3.13 python3.12 python3.11
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))

export PIP_ROOT_USER_ACTION := ignore
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# What one target starts may run side by side; targets do not.
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow crash-test compatibility doctor-results tutorial site \
  check format bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

demo: $(DEMO) ## train the tutorial's model on MNIST, eager beside the fastest gear
	@KERAS_BACKEND=tensorflow $(BIN)/loopscope mnist

# Keras reads its backend once per process, so the suite runs in one process for each.
# Two at a time they take a third less time than one after the other, on two cores.
PYTEST = TF_CPP_MIN_LOG_LEVEL=3 KERAS_BACKEND=$(1) $(BIN)/python -m pytest

test: $(DEV) ## run the tests on TensorFlow, JAX and PyTorch
	@$(BIN)/python tests/side_by_side.py

# pytest ends with 5 when no test was left to run; here that is not a failure.
test-slow: $(DEV) ## run the slow tests that `test` leaves out
	@echo "== slow tests on TensorFlow"
	@$(call PYTEST,tensorflow) -m "slow" || [ $$? -eq 5 ]
	@echo "== slow tests on JAX"
	@$(call PYTEST,jax) -m "slow and not once" || [ $$? -eq 5 ]
	@echo "== slow tests on PyTorch"
	@$(call PYTEST,torch) -m "slow and not once" || [ $$? -eq 5 ]

crash-test: $(DEV) ## kill trainings 200 times, go on, compare their ends (half an hour)
	@$(BIN)/python tests/crash/run.py --kills 200

# docs/compatibility.md lists what the tests beside Keras have compared.
compatibility: $(DEV) ## compare with Keras's fit, and write docs/compatibility.md
	@for backend in tensorflow jax; do \
	  TF_CPP_MIN_LOG_LEVEL=3 KERAS_BACKEND=$$backend $(BIN)/python -m pytest -q \
	    --junitxml=build/parity-$$backend.xml tests/test_parity_*.py || exit 1; \
	done
	@$(BIN)/python tests/compatibility.py build/parity-tensorflow.xml \
	  build/parity-jax.xml > docs/compatibility.md

# docs/doctor-results.md says what the doctor finds of what was planted.
doctor-results: $(DEV) ## plant every bug, and write docs/doctor-results.md
	@mkdir -p build
	@for backend in tensorflow jax; do \
	  TF_CPP_MIN_LOG_LEVEL=3 KERAS_BACKEND=$$backend $(BIN)/python \
	    tests/doctor/results.py examine > build/doctor-$$backend.json || exit 1; \
	done
	@$(BIN)/python tests/doctor/results.py page build/doctor-tensorflow.json \
	  build/doctor-jax.json > docs/doctor-results.md

# The site shows what the cells of the tutorial gave when this was last run.
tutorial: $(DEV) ## execute the notebooks of the tutorial, for the site (minutes)
	@$(BIN)/python docs/tutorial/execute.py

site: $(DEV) ## build the site of the docs, strictly, in build/site
	@$(BIN)/python docs/make_site.py

check: $(DEV) ## check format, lint, types, import rules and docs; build the site
	@$(BIN)/ruff format --check --quiet --diff .
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo
	@if [ -e tests/test_docs.py ]; then $(call PYTEST,tensorflow) -q tests/test_docs.py; fi
	@$(BIN)/python docs/make_site.py

format: $(DEV) ## rewrite the code in the one format, mend what lint can mend
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(BENCH) ## measure speed; the tests never do
	@$(BIN)/python benchmarks/run.py

clean: ## remove caches and built packages; .venv stays
	@rm -rf build dist .coverage .hypothesis .import_linter_cache .mypy_cache \
	  .pytest_cache .ruff_cache
	@find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

$(DEMO): EXTRAS := tensorflow,view
$(DEV): EXTRAS := tensorflow,jax,dev
$(BENCH): EXTRAS := tensorflow,jax,view,bench

$(DEMO) $(DEV) $(BENCH): pyproject.toml | $(BIN)/python
	@echo "Installing loopscope[$(EXTRAS)] into $(VENV); the first time takes minutes"
ifdef UV
	@$(UV) pip install --quiet --python $(BIN)/python --editable ".[$(EXTRAS)]"
else
	@$(BIN)/python -m pip install -qq --editable ".[$(EXTRAS)]"
endif
# Each of the three sets holds all that `make demo` needs.
	@touch $(DEMO) $@

# A half-made .venv would look finished the next time: take it away again.
$(BIN)/python:
ifdef UV
	@$(UV) venv --quiet --python ">=3.11,<3.14" $(VENV)
else
	@for python in $(PYTHONS); do \
	  if $$python -c '$(SUPPORTED)' 2>/dev/null; then \
	    $$python -m venv $(VENV) && exit 0; \
	    rm -rf $(VENV); \
	    echo "$$python cannot make a virtual environment (Debian and Ubuntu: install python3-venv)" >&2; \
	    exit 1; \
	  fi; \
	done; \
	echo "loopscope needs Python 3.11, 3.12 or 3.13 (or uv); none of these is one: $(PYTHONS)" >&2; \
	exit 1
endif
