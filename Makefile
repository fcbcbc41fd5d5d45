# Thin wrappers: `make train` and `make test` do what the plain commands in the README do, in a .venv of their own.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test clean

train: .venv/requirements.stamp
	$(BIN)/python train.py config/long_ctx.py

test: .venv/requirements-dev.stamp
	$(BIN)/python -m pytest

.venv/%.stamp: %.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "nanoSUS needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r $<
	touch $@

.venv/requirements-dev.stamp: requirements.txt

clean:
	rm -rf .venv
