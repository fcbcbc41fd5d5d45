# Thin wrappers around the plain commands in the README, in a .venv of their own.
PYTHON ?= python3
BIN := .venv/bin
# A core with nothing left to do takes over tests of another.
CORES := -n auto --maxprocesses=8 --dist worksteal

.PHONY: train test test-slow lint clean

train: .venv/requirements.stamp
	$(BIN)/python train.py config/long_ctx.py

# What every change is held against: at most five minutes on two cores.
test: .venv/requirements-dev.stamp
	$(BIN)/python -m pytest -m "not slow" $(CORES)

# The rest: at most ten minutes more.
test-slow: .venv/requirements-dev.stamp
	$(BIN)/python -m pytest -m slow $(CORES)

lint: .venv/requirements-dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/%.stamp: %.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nanoSUS needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r $<
	touch $@

.venv/requirements-dev.stamp: requirements.txt

clean:
	rm -rf .venv
