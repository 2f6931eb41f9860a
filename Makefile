# The project's commands. Needs git, make and Python >= 3.11; everything else goes into .venv.
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo test test-postgres test-s3 test-browser test-clients test-orchestrators test-ray test-slow test-faults test-faults-postgres test-torch examples docs lint hooks format serve screenshots recording bench bench-full wheel ci constraints clean chaos cluster-demo fuzz test-mutations

VENV := .venv
TORCH := .venv-torch
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
# Old versions of pip build a source distribution in a way that was dropped later, with a long warning.
export PIP_USE_PEP517 := 1
# The tests start hundreds of processes, each of which would compile the package again. `make clean` removes the files.
unexport PYTHONDONTWRITEBYTECODE
# The environment follows these files; a change of either brings it up to date on the next command.
PINS := pyproject.toml constraints.txt

help: ## Show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(VENV)/.dev ## Make .venv with everything needed for development

OPEN ?=
demo: $(VENV)/.demo ## Score real data through a real server, end to end; OPEN=1 leaves it running
	@$(BIN)/batchserve demo $(if $(OPEN),--keep)

# Two processes: a test spends half of its time waiting for processes that it starts.
SIDE_BY_SIDE := --numprocesses 2
# Together they occupy the cores: further threads of BLAS and OpenMP would spend most of their time in waiting for each
# other, which they do busily.
test test-slow test-postgres test-s3 test-browser test-orchestrators: export OMP_NUM_THREADS := 1

test: $(VENV)/.dev ## Run the tests, without the slow ones
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) --dist loadfile

# The suites whose services have an embedded database otherwise, and where a server is other code; then the slow ones,
# and those of kills and failing disks.
ON_POSTGRES := $(wildcard tests/test_api_*.py) $(addprefix tests/test_,accumulate.py audit.py cli.py client.py clock.py contents.py \
	direct.py direct_scoring.py doctor.py http.py keys.py locations.py online.py origin.py outages.py retention.py sweep.py unreadable.py wire.py)
SLOW_ON_POSTGRES := tests/test_crashes.py tests/test_schedules_killed.py tests/test_turns.py tests/test_webhook_crashes.py
FAULTS_ON_POSTGRES := tests/faults/test_leases.py tests/faults/test_system_calls.py
test-postgres: $(VENV)/.dev ## Run the suites of databases and services on PostgreSQL; starts its own server
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) --dist loadfile -m 'postgres and not slow and not faults' -rs
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) --dist loadfile --on-postgres $(ON_POSTGRES)

test-s3: $(VENV)/.dev ## Run the tests of storages and jobs on S3; starts its own server
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) --dist loadfile -m 's3 and not faults and not postgres' -rs

test-browser: $(VENV)/.dev ## Run the tests of the pages in Chromium, which must be installed
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m browser -rs

test-clients: $(VENV)/.dev ## Generate clients from docs/openapi.json, compile them, run them on a server; needs npm
	@.ci/clients

test-orchestrators: $(VENV)/.dev ## Run the recipes of Airflow, Dagster and Prefect, each in an environment of its own
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) --dist loadgroup -m orchestrators -rs

test-ray: $(VENV)/.ray ## Run the tests on a Ray cluster of two network namespaces; as root, with iproute2
	@$(BIN)/python -m pytest -m ray -rs

test-slow: $(VENV)/.dev ## Run the slow tests: crashes, big inputs, many estimators
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) --dist worksteal -m 'slow and not alone and not postgres and not s3 and not ray'
	@$(BIN)/python -m pytest -m 'slow and alone and not postgres and not ray'
	@$(BIN)/python -m pytest -m 'slow and postgres' -rs
	@$(BIN)/python -m pytest $(SIDE_BY_SIDE) --dist loadfile -m 'slow and not alone' --on-postgres $(ON_POSTGRES)
	@$(BIN)/python -m pytest -m slow --on-postgres $(SLOW_ON_POSTGRES)

test-faults: $(VENV)/.dev ## Run the tests of kills, full disks, power cuts; best as root, with strace, xfsprogs, faketime
	@$(BIN)/python -m pytest -m faults -rs

test-faults-postgres: $(VENV)/.dev ## Run those of leases and of failing system calls on PostgreSQL
	@$(BIN)/python -m pytest -m faults -rs --on-postgres $(FAULTS_ON_POSTGRES)

test-torch: ## Run the tests with PyTorch and img2feat, in .venv-torch (2 GB, made on first use); needs npm
	@$(MAKE) --no-print-directory VENV=$(TORCH) $(TORCH)/.torch
	@$(TORCH)/bin/python -m pytest -m torch

ONLY ?=
WITH_TORCH := animals imagenet one-row
examples: $(VENV)/.dev ## Run the examples, each with its own server; ONLY=iris runs one
	@$(if $(filter $(or $(ONLY),$(WITH_TORCH)),$(WITH_TORCH)),$(MAKE) --silent VENV=$(TORCH) $(TORCH)/.torch)
	@$(BIN)/python -m examples $(ONLY)

# Its theme says at each build that it is in maintenance.
docs: export NO_MKDOCS_2_WARNING := 1
docs: $(VENV)/.docs ## Write what is generated (pages, openapi.json), and build the documentation into build/site
	@$(BIN)/python -m website
	@$(BIN)/python -m mkdocs build --strict --quiet
	@echo 'build/site/index.html'

test-mutations: $(VENV)/.dev ## Remove one mechanism at a time and check that a test fails
	@PYTHONPATH=tests $(BIN)/python -m mutations

SECONDS ?= 60
CLUSTER ?=
chaos: $(VENV)/$(if $(filter ray,$(CLUSTER)),.ray,.dev) ## Kill a service under load for SECONDS=60, count what was lost; CLUSTER=1, CLUSTER=ray
	@PYTHONPATH=tests $(BIN)/python -m chaos --seconds $(SECONDS) $(if $(CLUSTER),--cluster $(filter ray,$(CLUSTER)))

ROWS ?= 10000000
cluster-demo: $(VENV)/.ray ## Run the cluster of docker-compose.yml as processes, kill each in a job of ROWS=10000000
	@PYTHONPATH=tests $(BIN)/python -m cluster --rows $(ROWS)

SEED ?=
fuzz: $(VENV)/.dev ## Send malformed inputs, options, models and HTTP for SECONDS=60, and count faults
	@PYTHONPATH=tests $(BIN)/python -m fuzz --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

lint: $(VENV)/.dev ## Check format, lint rules, types and layers
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	@for script in examples/*/*.py; do $(BIN)/mypy --no-error-summary $$script || exit 1; done
	$(BIN)/lint-imports --no-cache --no-logo

hooks: $(VENV)/.dev ## Check format, rules and subjects at each commit, types and layers at each push
	@$(BIN)/pre-commit install --hook-type pre-commit --hook-type commit-msg --hook-type pre-push

format: $(VENV)/.dev ## Format the code and fix what ruff can fix
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

serve: $(VENV)/.demo ## Serve on http://127.0.0.1:8000, data in storage/
	@$(BIN)/batchserve serve

screenshots: $(VENV)/.dev ## Take the pictures of the pages in docs/images; needs Chromium
	@PYTHONPATH=tests $(BIN)/python -m pictures screenshots

recording: $(VENV)/.dev ## Record a kill at 60 % and a restart into docs/images/kill.svg
	@PYTHONPATH=tests $(BIN)/python -m pictures recording

bench: $(VENV)/.dev ## Measure against the limit of this machine (5 minutes); bench.json
	@$(BIN)/python -m benchmarks

bench-full: $(VENV)/.dev ## Measure all sizes and alternatives (45 minutes, 25 GB); docs/benchmarks.md
	@$(BIN)/python -m benchmarks --full --history benchmarks/history.jsonl

wheel: $(VENV)/.dev ## Build the wheels of the service and of its client alone into dist/
	@$(PIP) wheel --no-deps --wheel-dir dist . ./packaging/client
	@ls dist/*.whl

ci: ## Run all checks of continuous integration
	@.ci/run

constraints: ## Rewrite constraints.txt with the latest versions
	@$(MAKE) --no-print-directory clean
	@$(MAKE) --no-print-directory VENV=$(TORCH) $(TORCH)/bin/python
	@$(TORCH)/bin/python -m pip --quiet install --editable '.[dev-torch,dev-ray,docs,s3]'
	@{ head -n 1 constraints.txt; $(TORCH)/bin/python -m pip freeze --exclude-editable | sed 's/+.*//'; } > $(TORCH)/constraints.txt
	@mv $(TORCH)/constraints.txt constraints.txt

clean: ## Remove .venv, .venv-torch, dist and caches; storage/ stays
	rm -rf $(VENV) $(TORCH) dist build .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find batchserve benchmarks examples migrations tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@python=; for candidate in $(PYTHON) python3.13 python3.12 python3.11 python3; do \
		if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then echo 'batchserve needs Python 3.11 or newer: install it, or name it: make PYTHON=/path/to/python3' >&2; exit 1; fi; \
	if ! $$python -c 'import ensurepip, venv' >/dev/null 2>&1; then \
		echo "$$python cannot make virtual environments. On Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 1; \
	fi; \
	$$python -m venv --clear $(VENV)

$(VENV)/.demo: $(PINS) | $(BIN)/python
	@echo 'Installing batchserve into $(VENV) (about 1 minute) ...'
	@$(PIP) install --constraint constraints.txt --editable '.[demo]'
	@touch $@

# The development environment includes the requirements of the demo.
$(VENV)/.dev: $(PINS) | $(BIN)/python
	@echo 'Installing batchserve and its development tools into $(VENV) (about 1 minute) ...'
	@$(PIP) install --constraint constraints.txt --editable '.[dev,s3]'
	@touch $(VENV)/.demo $@

# Only for its own tests: 285 MB.
$(VENV)/.ray: $(VENV)/.dev
	@echo 'Installing Ray into $(VENV) ...'
	@$(PIP) install --constraint constraints.txt --editable '.[dev-ray,s3]'
	@touch $@

# Only for the site: 60 MB.
$(VENV)/.docs: $(VENV)/.dev
	@echo 'Installing MkDocs into $(VENV) ...'
	@$(PIP) install --constraint constraints.txt --editable '.[dev,docs,s3]'
	@touch $@

$(VENV)/.torch: $(PINS) | $(BIN)/python
	@echo 'Installing batchserve, PyTorch and img2feat into $(VENV) (some minutes) ...'
	@$(PIP) install --constraint constraints.txt --editable '.[dev-torch,dev-ray,docs,s3]'
	@touch $@
