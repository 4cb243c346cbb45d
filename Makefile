# `make trial` and `make test` do all of their own set-up, on a machine with Python 3.10 or newer and make.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m
INSTALLED := $(VENV)/.installed
# onnxruntime-training: another package named onnxruntime, so it lies beside the environment and not in it
TRAINING := $(VENV)/ort-training

.PHONY: trial test test-arm64 faults tools tools-arm64 install clean

trial: install
	$(RUN) devices.trial

test: install tools
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(RUN) pytest
	@if [ -d $(TRAINING)/onnxruntime ]; then \
		echo "once more what concerns engines, with onnxruntime-training" && \
		PYTHONPATH=$(CURDIR)/$(TRAINING) $(RUN) pytest tests/unit/test_engines.py tests/unit/test_build.py \
			tests/integration/test_packages.py tests/integration/test_a_trial.py; \
	else echo "onnxruntime-training has no wheel here: its engine is not tested"; fi

# a Raspberry Pi in software: qemu, and Debian's arm64 programs in .arm64/
test-arm64: install tools tools-arm64
	$(RUN) pytest tests/arm64 --numprocesses 2 --dist loadfile -rs

# every fault in its long form; make test runs the short one
faults: install tools
	$(RUN) pytest tests/faults --full

# what the tests want beyond Python: a real broker, and a clock that jumps. Without them some tests are skipped, and say so
tools:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && ! { PATH=$$PATH:/usr/sbin command -v mosquitto && \
		command -v faketime; } > /dev/null; then \
		apt-get update -q > /dev/null && apt-get install -qy --no-install-recommends mosquitto faketime > /dev/null; \
	fi || true

tools-arm64:
	@if [ "$$(id -u)" = 0 ] && command -v apt-get > /dev/null && ! { command -v mmdebstrap && \
		command -v qemu-aarch64-static; } > /dev/null; then \
		apt-get update -q > /dev/null && apt-get install -qy --no-install-recommends mmdebstrap qemu-user-static > /dev/null; \
	fi || true

install: $(INSTALLED)

# torch first, by version: it is the CPU build, where a newer one would bring gigabytes of CUDA
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --disable-pip-version-check torch==2.13.0
	$(RUN) pip install --quiet --disable-pip-version-check --editable .[dev]
	$(RUN) pip install --quiet --disable-pip-version-check --no-deps --target $(TRAINING) \
		onnxruntime-training-cpu==1.19.2 || true
	touch $@

clean:
	rm -rf $(VENV) .arm64 runs
