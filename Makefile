# `make trial` and `make test` do all of their own set-up, on a machine with Python 3.10 or newer and make.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m
INSTALLED := $(VENV)/.installed

.PHONY: trial test install clean

trial: install
	$(RUN) devices.trial

test: install
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(RUN) pytest

install: $(INSTALLED)

# torch first, by version: it is the CPU build, where a newer one would bring gigabytes of CUDA
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --disable-pip-version-check torch==2.13.0
	$(RUN) pip install --quiet --disable-pip-version-check --editable .[dev]
	touch $@

clean:
	rm -rf $(VENV) runs
