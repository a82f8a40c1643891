# keepstep from a clean clone: needs Python 3.11 or newer with venv, and make. Everything else comes into .venv
# from files with hashes. A second `make` of what is there already does nothing.

PYTHON ?= $(shell for name in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$name -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$name && break; done)
VENV := .venv
BIN := $(VENV)/bin
# The system's certificates where there are any, as pip takes them: networks that inspect TLS add theirs there.
CERTIFICATES := $(wildcard /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt /etc/ssl/cert.pem)
UV_SYSTEM_CERTS ?= $(if $(CERTIFICATES),true,false)
UV := UV_SYSTEM_CERTS=$(UV_SYSTEM_CERTS) UV_HTTP_TIMEOUT=60 VIRTUAL_ENV=$(VENV) $(BIN)/uv
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
# Tests wait for other processes much of the time: one runner a core. Those that come late are taken over.
ABREAST := -n auto --dist worksteal
QUICK := unit property golden contract integration

TORCH := $(shell sed -n 's/^torch==\([^ ]*\).*/\1/p' requirements/torch.txt)
HAS_GPU := test -e /proc/driver/nvidia/version || nvidia-smi -L >/dev/null 2>&1

# Some environments forbid bytecode to be written. Importing torch without it takes three times as long, in every
# process: in .venv it is written.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-long test-all check lint types contracts tidy format bench requirements clean

help: ## what there is to make
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 24

setup: $(VENV)/.installed ## the environment in .venv, with keepstep editable in it

demo: setup ## a gang that trains while ranks and a node are killed under it
	$(BIN)/keepstep demo

test: setup ## the quick suites: a few minutes
	$(PYTEST) $(ABREAST) $(wildcard $(QUICK:%=tests/%)) -m "not slow and not long"

test-slow: setup $(VENV)/.peers $(VENV)/.ray ## what `make test` leaves out: slow ones and e2e
	$(if $(wildcard tests/e2e/test_*.py),$(PYTEST) $(ABREAST) tests/e2e -m "not long" --durations=25)
	$(PYTEST) tests/contract -m "slow and not long" --durations=10  # one after the other: a Ray cluster takes the whole machine for its own
	$(PYTEST) $(ABREAST) tests --ignore=tests/e2e --ignore=tests/contract -m "slow and not long" --durations=25

test-long: setup $(VENV)/.peers $(VENV)/.ray ## what CI has no time for: before a release
	$(PYTEST) $(ABREAST) tests --ignore=tests/contract -m long --durations=25
	$(PYTEST) tests/contract -m long --durations=10

test-all: test test-slow test-long ## every suite

check: lint types contracts tidy ## lint, format, types, import contracts, tidiness (-k: all of them)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

contracts: setup
	$(BIN)/lint-imports --no-logo

tidy: setup
	$(PYTEST) -q tests/unit/test_tidy.py

format: setup ## let ruff write what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup ## figures, each against a peer or a limit
	@for bench in tests/bench/*.py; do echo "== $$bench"; $(BIN)/python $$bench || exit 1; done

clean: ## everything that was made here
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage
	find agents controller trainer tests -type d -name __pycache__ -prune -exec rm -rf {} +

# The environment, in three steps that are each redone only when their files change.

$(VENV)/.uv: requirements/uv.txt
	@test -n "$(PYTHON)" || { echo "keepstep needs Python 3.11 or newer with venv (Debian: apt install python3-venv)." >&2; \
		echo "  Or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/uv.txt
	@touch $@

$(VENV)/.requirements: $(VENV)/.uv requirements/dev.txt requirements/torch.txt
	$(UV) pip install --quiet --no-deps --require-hashes -r requirements/dev.txt
	@# PyTorch's CPU build is a tenth of the size. Its index has files (and hashes) of its own and may be out of
	@# reach; the registry's build runs everywhere.
	@have=$$($(BIN)/python -c "import importlib.metadata as m; print(m.version('torch'))" 2>/dev/null); \
	if [ "$$have" = "$(TORCH)+cpu" ]; then exit 0; fi; \
	if [ "$$have" != "$(TORCH)" ] && ! { $(HAS_GPU); }; then \
		echo "No NVIDIA driver here: asking for PyTorch's CPU build."; \
		if UV_HTTP_RETRIES=0 $(UV) pip install --quiet --no-deps --torch-backend cpu torch==$(TORCH); then exit 0; fi; \
		echo "Not to be had: taking the registry's build, which brings CUDA with it (about 3 GB)."; \
	fi; \
	$(UV) pip install --quiet --no-deps --require-hashes -r requirements/torch.txt
	@touch $@

$(VENV)/.installed: $(VENV)/.requirements pyproject.toml
	$(UV) pip install --quiet --no-deps --no-build-isolation -e .
	@# What everything imports, once, before several processes at a time do.
	$(BIN)/python -c "import keepstep.llama.preload, keepstep.cli.main, keepstep.api.process"
	@touch $@

# Other people's trainers, which the slow suite runs unchanged.
$(VENV)/.peers: $(VENV)/.installed requirements/peers.txt
	$(UV) pip install --quiet --no-deps --require-hashes -r requirements/peers.txt
	@touch $@

# A Ray cluster for the pool's tests, and Ray Train beside keepstep.
$(VENV)/.ray: $(VENV)/.peers requirements/ray.txt
	$(UV) pip install --quiet --no-deps --require-hashes -r requirements/ray.txt
	@touch $@

# NVIDIA's launcher, beside which tests/bench/recovery.py measures: wheels for CPython 3.10 to 3.12 alone. In an
# environment of its own that sees ours, since a package that it needs makes PyTorch warn whenever it is imported.
$(VENV)/.nvrx: $(VENV)/.installed requirements/nvrx.txt
	$(BIN)/python -m venv --without-pip $(VENV)/nvrx
	$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" > "$$(ls -d $(VENV)/nvrx/lib/python*/site-packages)/ours.pth"
	UV_SYSTEM_CERTS=$(UV_SYSTEM_CERTS) $(BIN)/uv pip install --quiet --python $(VENV)/nvrx --no-deps --require-hashes -r requirements/nvrx.txt
	@touch $@

# Meta's trainer, beside which tests/bench/trainer.py measures. Apart as well: nothing else should load what it needs.
$(VENV)/.torchtitan: $(VENV)/.installed requirements/torchtitan.txt
	$(BIN)/python -m venv --without-pip $(VENV)/torchtitan
	$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" > "$$(ls -d $(VENV)/torchtitan/lib/python*/site-packages)/ours.pth"
	UV_SYSTEM_CERTS=$(UV_SYSTEM_CERTS) $(BIN)/uv pip install --quiet --python $(VENV)/torchtitan --no-deps --require-hashes -r requirements/torchtitan.txt
	@touch $@

# Hashes of everything, and the addresses of nothing. PyTorch and what only it needs for CUDA stand apart.

COMPILE := pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url \
	--no-annotate --no-header
CUDA := ^(torch|triton|cuda-[a-z]+|nvidia-[a-z0-9-]+)==
NOT_CUDA := ^nvidia-ml-py==

requirements: $(VENV)/.uv ## resolve the hashed requirement files anew (newest: UPGRADE=--upgrade)
	cat requirements/dev.txt requirements/torch.txt > requirements/all.txt
	$(UV) $(COMPILE) $(UPGRADE) --extra train --extra postgres --extra kubernetes --extra dev pyproject.toml requirements/build.in \
		-o requirements/all.txt
	awk '/^[a-z]/ { cuda = $$0 ~ /$(CUDA)/ && $$0 !~ /$(NOT_CUDA)/ } !cuda' \
		requirements/all.txt > requirements/dev.txt
	awk '/^[a-z]/ { cuda = $$0 ~ /$(CUDA)/ && $$0 !~ /$(NOT_CUDA)/ } cuda' \
		requirements/all.txt > requirements/torch.txt
	@# What only the peers need, in versions that go with the rest.
	$(UV) $(COMPILE) $(UPGRADE) --extra train --extra postgres --extra kubernetes --extra dev --extra peers pyproject.toml \
		requirements/build.in -c requirements/dev.txt -c requirements/torch.txt -o requirements/all.txt
	awk '/^[a-z]/ { theirs = !(FILENAME ~ /all/ ? $$1 in have : 0); have[$$1] } FILENAME ~ /all/ && theirs' \
		requirements/dev.txt requirements/torch.txt requirements/all.txt > requirements/peers.txt
	@# And what only Ray needs.
	$(UV) $(COMPILE) $(UPGRADE) --extra train --extra postgres --extra kubernetes --extra dev --extra peers --extra ray-tests pyproject.toml \
		requirements/build.in -c requirements/dev.txt -c requirements/torch.txt -c requirements/peers.txt -o requirements/all.txt
	awk '/^[a-z]/ { theirs = !(FILENAME ~ /all/ ? $$1 in have : 0); have[$$1] } FILENAME ~ /all/ && theirs' \
		requirements/dev.txt requirements/torch.txt requirements/peers.txt requirements/all.txt > requirements/ray.txt
	@# And what only NVRx needs.
	echo nvidia-resiliency-ext==0.4.1 | $(UV) $(COMPILE) $(UPGRADE) - \
		-c requirements/dev.txt -c requirements/torch.txt -o requirements/all.txt
	awk '/^[a-z]/ { theirs = !(FILENAME ~ /all/ ? $$1 in have : 0); have[$$1] } FILENAME ~ /all/ && theirs' \
		requirements/dev.txt requirements/torch.txt requirements/all.txt > requirements/nvrx.txt
	@# And what only torchtitan needs. It wants an older datasets, which our other libraries do not go with, and
	@# which it only imports here.
	echo 'datasets>=4' > requirements/override.txt
	echo torchtitan==0.3.0 | $(UV) $(COMPILE) $(UPGRADE) - --override requirements/override.txt \
		-c requirements/dev.txt -c requirements/torch.txt -c requirements/peers.txt -o requirements/all.txt
	awk '/^[a-z]/ { theirs = !(FILENAME ~ /all/ ? $$1 in have : 0); have[$$1] } FILENAME ~ /all/ && theirs' \
		requirements/dev.txt requirements/torch.txt requirements/all.txt > requirements/torchtitan.txt
	rm requirements/all.txt requirements/override.txt
	echo uv | $(UV) $(COMPILE) $(UPGRADE) - -o requirements/uv.txt
