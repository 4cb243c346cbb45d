# `make trial` and `make test` create their environment. They need make and Python 3.10 or newer with venv.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m
LOWEST := $(VENV)/lowest
INSTALLED := $(VENV)/.installed
# a separate folder, because onnxruntime-training also installs a package named onnxruntime
TRAINING := $(VENV)/ort-training
export HAS_NO_TRAINING_WHEEL := import platform, sys; sys.exit(platform.machine() == "x86_64" and sys.version_info < (3, 13))
# Processes that run tests, for two cores: a test waits for a fifth of its time. A file's tests stay in one process, and
# tests/conftest.py starts long files first.
WORKERS ?= 3
PARALLEL := --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: trial test lint test-lowest test-arm64 faults lock tools tools-arm64 install clean

trial: install
	$(RUN) devices.trial

test: install tools lint
	$(RUN) pytest $(PARALLEL)
	@if [ -d $(TRAINING)/onnxruntime ]; then \
		echo "the tests of engines again, with onnxruntime-training" && \
		PYTHONPATH=$(CURDIR)/$(TRAINING) $(RUN) pytest $(PARALLEL) -m ort_training tests/unit/test_engines.py \
			tests/unit/test_build.py tests/unit/test_probe.py; \
	else \
		echo "not tested here: onnxruntime-training is not installed"; \
		[ "$$CI" != true ] || $(VENV)/bin/python -c "$$HAS_NO_TRAINING_WHEEL"; fi

lint: install
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

# A device with the lowest versions that pyproject.toml allows. They have no wheels for Python 3.13: PYTHON=python3.12
test-lowest: install
	$(RUN) pip install --quiet --disable-pip-version-check uv
	$(RUN) uv venv --quiet --clear --python $(PYTHON) $(LOWEST)
	$(RUN) uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct --editable .[edge,text] "pytest>=8"
	$(LOWEST)/bin/python -m pytest --noconftest tests/lowest tests/unit/test_images.py tests/unit/test_unreadable.py

# an emulated Raspberry Pi: qemu, and Debian's arm64 programs in .arm64/
test-arm64: install tools tools-arm64
	$(RUN) pytest tests/arm64 $(PARALLEL)

# All fault tests in their long form; make test runs the short form. After an interruption the same command goes on. It
# writes the table of docs/reliability.md, also when tests fail.
faults: WORKERS := 2
faults: install tools
	$(RUN) pytest tests/faults --full --numprocesses $(WORKERS) --maxschedchunk 1

# devices/requirements.txt: the packages of a device with their hashes, for every Python that a device may have
lock: install
	$(RUN) pip install --quiet --disable-pip-version-check uv
	$(RUN) uv pip compile pyproject.toml --extra edge --universal --generate-hashes --python-version 3.10 --upgrade \
		--no-header --no-annotate --no-emit-index-url --quiet --output-file devices/requirements.txt

# Programs that tests need beside Python. Without them their tests are skipped, or fail with CI=true (tests/support/tools.py).
tools:
	@$(call apt_install,mosquitto faketime chromium strace ip iptables mkfs.ext4,mosquitto faketime chromium strace iproute2 iptables e2fsprogs)

tools-arm64:
	@$(call apt_install,mmdebstrap qemu-aarch64-static,mmdebstrap qemu-user-static)

# $(1): programs, $(2): their Debian packages. Prints why they could not be installed.
define apt_install
for program in $(1); do \
	PATH="$$PATH:/usr/sbin" command -v $$program > /dev/null && continue; \
	if [ "$$(id -u)" != 0 ]; then echo "$$program is missing: as root, run apt-get install $(2)"; \
	elif ! command -v apt-get > /dev/null; then echo "$$program is missing, and there is no apt-get: install $(2)"; \
	else log=$$(apt-get update -q 2>&1 && apt-get install -qy --no-install-recommends $(2) 2>&1) || \
		{ echo "$$program is missing: apt-get could not install $(2):"; echo "$$log" | tail -n 3; }; fi; \
	break; \
done
endef

install: $(INSTALLED)

# torch first, by version: it is the CPU build, where a newer one would bring gigabytes of CUDA
$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) pip install --quiet --disable-pip-version-check torch==2.13.0
	$(RUN) pip install --quiet --disable-pip-version-check --editable .[dev]
	@$(RUN) pip install --quiet --disable-pip-version-check --no-deps --target $(TRAINING) \
		onnxruntime-training-cpu==1.19.2 || echo "onnxruntime-training is not installed: it has wheels for x86-64 and Python 3.12 or older"
	touch $@

clean:
	rm -rf $(VENV) .arm64 runs
