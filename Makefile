# `make run` and `make test` need Python 3.11 or newer and a package index, and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RECIPE ?= recipes/offline.env
BENCH ?=
KILLS ?= 100
TORCH := $(shell sed -n 's/^ *"\(torch==.*\)",/\1/p' pyproject.toml)

.PHONY: run test lint workflows-check torture bench install lock clean

run: install  ## the whole job on this machine: embedded base model, shipped data, no Hub
	$(BIN)/python -m job --recipe $(RECIPE) run

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The checkers stay out of the job's environment: an environment of their own, thrown away afterwards.
workflows-check:  ## the workflows, the GitLab file and the report's schema against their schemas; zizmor for security
	rm -rf .workflows-check && $(PYTHON) -m venv .workflows-check
	.workflows-check/bin/python -m pip install --quiet check-jsonschema==0.39.0 zizmor==1.32.0
	.workflows-check/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	.workflows-check/bin/check-jsonschema --builtin-schema vendor.gitlab-ci --data-transform gitlab-ci deploy/gitlab-ci.yml
	.workflows-check/bin/check-jsonschema --check-metaschema job/report.schema.json
	.workflows-check/bin/zizmor --offline --no-progress .github/workflows
	rm -rf .workflows-check

torture: install  ## kill so many processes of whole runs at random points; each run has to end as if it had not been
	PYTHONPATH=. $(BIN)/python tests/torture.py --kills $(KILLS)

# TRL, which the bench compares with, stays out of the job's environment but uses its torch and transformers.
bench: install .bench-packages/installed  ## training throughput; BENCH="--rounds 5 --json bench.jsonl" gives it options
	PYTHONPATH=.bench-packages $(BIN)/python -m bench.train $(BENCH)

.bench-packages/installed: bench/requirements.txt
	rm -rf .bench-packages
	$(BIN)/python -m pip install --quiet --no-deps --target .bench-packages -r bench/requirements.txt
	touch $@

install: $(VENV)/installed

# Everything but torch comes from the hash-checked locks, which list what each package needs. torch comes last, by
# version alone: each kind of machine has a build of its own, and pip takes the one its indexes offer first.
$(VENV)/installed: pyproject.toml requirements.lock requirements-dev.lock requirements-offline.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes \
		-r requirements.lock -r requirements-dev.lock -r requirements-offline.lock
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# Resolved for every platform and every Python from 3.11 on; torch and what only its CUDA build needs stay out.
UV_COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header
lock: install
	$(UV_COMPILE) pyproject.toml \
		| awk '/^[a-z]/ {keep = !/^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z-]+)==/} keep' > requirements.lock
	$(UV_COMPILE) --constraint requirements.lock --group dev > requirements-dev.lock
	$(UV_COMPILE) --no-deps --group offline > requirements-offline.lock

.env.example: job/settings.py
	$(BIN)/python -m job settings --env-example > $@

clean:
	rm -rf $(VENV) .bench-packages .workflows-check build *.egg-info .mypy_cache .pytest_cache .ruff_cache
