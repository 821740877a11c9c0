# make quickstart   the main job on the embedded default task (no downloads), in an environment made here
# make test         the tests
# make docs         the documentation site, in build/docs
PYTHON ?= python3
VENV ?= .venv
ARGS ?=

# A machine with a GPU keeps the torch that pip chooses; one without takes the CPU build.
CONSTRAINTS := $(if $(shell command -v nvidia-smi 2>/dev/null),,-c constraints-cpu.txt)

.PHONY: quickstart test test-all test-faults lint docker-check notebooks docs clean

quickstart: $(VENV)/.installed
	$(VENV)/bin/python recipes/quickstart.py $(ARGS)

test: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest $(ARGS)

# Everything a CPU can run, the slow and multi-process tests included.
test-all: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -m "not gpu and not net" $(ARGS)

# The tests that kill and starve, then every trainer killed at every file event of a save: one table.
test-faults: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest -m fault
	$(VENV)/bin/python tests/trainers/chaos.py $(ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/codespell rlkd recipes tests benchmarks docs docker prompts README.md
	$(VENV)/bin/hadolint docker/Dockerfile.*
	$(VENV)/bin/nbstripout --verify --extra-keys metadata.language_info recipes/notebooks/*.ipynb

# Both Dockerfiles and their build stage, without a Docker engine.
docker-check: $(VENV)/.installed-dev
	$(VENV)/bin/hadolint docker/Dockerfile.*
	$(VENV)/bin/python -m pytest tests/test_docker.py -n 0 -m "slow or not slow"

# Every notebook from top to bottom.
notebooks: $(VENV)/.installed-dev
	$(VENV)/bin/python -m pytest tests/test_notebooks.py -n 0 -m "slow or not slow" --durations 0

# Warnings are errors: links that lead nowhere, pages in no table of contents, names that are gone.
docs: $(VENV)/.installed-dev
	$(VENV)/bin/python -m sphinx -W --keep-going -b html docs build/docs

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints-cpu.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet $(CONSTRAINTS) -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml constraints-cpu.txt | $(VENV)/bin/python
	$(VENV)/bin/python -m pip install --quiet $(CONSTRAINTS) -e '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
