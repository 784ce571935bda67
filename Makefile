# Ostler: thin targets only; what they do is in tools/, in pyproject.toml and in the `ostler` command.

.DEFAULT_GOAL := help
SHELL := /bin/sh
PY := .venv/bin/python
CARGO ?= cargo
DASHBOARD := src/ostler/api/static/index.html
WEB_SOURCES := $(shell find web -name node_modules -prune -o -type f -print)
RUST_SOURCES := $(shell find rust -name target -prune -o \( -name '*.rs' -o -name 'Cargo.*' \) -print)

.PHONY: help setup run test test-rust test-python test-web lint fuzz lockstep trials bench bars hostile test-kvm conformance clean

help: ## Say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/.setup $(DASHBOARD) ## Install what is missing; leave .venv/bin/ostler

.venv/.setup: tools/setup pyproject.toml tools/ostler_build.py tools/ostler_version.py $(RUST_SOURCES)
	@tools/setup

$(DASHBOARD): $(WEB_SOURCES) tools/web | .venv/.setup
	@tools/web build

run: ## Boot a Debian kernel: a shell with a terminal, else a report and power-off
	@tools/run

test: setup test-rust test-web test-python ## Set up, then run every test: the engine's, the package's, real guests

test-rust: setup
	@tools/cargo test --manifest-path rust/Cargo.toml --workspace --exclude ostler-soft-py --quiet
	@tools/cargo test --manifest-path rust/agent/Cargo.toml --quiet
	@tools/fuzz --instructions 2_000_000

test-web: setup
	@tools/web test

test-python: setup
	@{ command -v chromium || command -v google-chrome; } >/dev/null || tools/apt-install chromium || true
	@env --default-signal=INT,QUIT $(PY) -m pytest

lint: setup ## ruff, mypy, import-linter, rustfmt, clippy
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports
	@tools/web check
	@tools/cargo fmt --manifest-path rust/Cargo.toml --all --check
	@tools/cargo fmt --manifest-path rust/agent/Cargo.toml --check
	@tools/cargo clippy --manifest-path rust/Cargo.toml --workspace --all-targets --quiet -- -D warnings
	@tools/cargo clippy --manifest-path rust/agent/Cargo.toml --all-targets --quiet -- -D warnings

fuzz: setup ## Random programs on the host's CPU, the interpreter and the translator, compared
	@tools/fuzz --require-coverage $(FUZZ)
	@tools/fuzz --mode robust

lockstep: setup ## A boot and a Python run on interpreter and translator at once, compared by instruction
	@command -v mmdebstrap >/dev/null || tools/apt-install mmdebstrap
	@$(PY) -m benches.trials lockstep

trials: setup ## 200 boots, stress-ng, programs that generate code, a leak run; takes an hour
	@command -v mmdebstrap >/dev/null || tools/apt-install mmdebstrap
	@$(PY) -m benches.trials $(TRIALS)

bench: setup ## Engine speed, start to power-off, programs in a guest, beside QEMU's TCG and native
	@command -v mmdebstrap >/dev/null || tools/apt-install mmdebstrap
	@$(PY) -c 'import matplotlib' 2>/dev/null || $(PY) -m pip install --quiet 'matplotlib>=3.8'
	@$(PY) -m benches.bench
	@$(PY) -m benches.workloads --json bench.json --picture bench.png
	@$(PY) -m benches.network
	@$(PY) -m benches.disks
	@$(PY) -m benches.migration

bars: setup ## Every promised figure, measured for real; takes long
	@command -v mmdebstrap >/dev/null || tools/apt-install mmdebstrap
	@$(PY) -m benches.bars $(BARS)

hostile: setup ## A million random and damaged requests and accesses at every virtio device
	@$(PY) -m benches.hostile $(HOSTILE)

test-kvm: setup ## The KVM accelerator on a real KVM, nested in QEMU's emulation of one
	@{ command -v qemu-system-x86_64 && command -v mmdebstrap; } >/dev/null || \
		tools/apt-install qemu-system-x86 mmdebstrap || true
	@$(PY) tools/nested_lab.py $(LAB)

conformance: setup ## kvm-unit-tests: make conformance KUT=<folder of the built tests>
	@$(PY) tools/conformance.py $(KUT)

clean: ## Remove what setup made here; the cache of guest material stays
	rm -rf .venv rust/target rust/agent/target src/ostler/_soft*.so src/ostler/agent/data src/ostler/api/static web/node_modules
