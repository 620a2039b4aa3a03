# What a person or a CI run calls. Everything that is missing is installed by apt and cargo (as root), or named.
#
#   make demo         build, and show the main job on a sample image (DEMO=host|vm to choose where)
#   make test         every test: cargo, samples, a real kernel as user-mode Linux, and the races' part in QEMU
#   make lint         formatting, clippy and rustdoc, warnings are errors
#   make test-long    the long modes: everything in QEMU as well, crash and kill loops, models with more schedules
#   make package      target/debian/img-tcmu_*.deb: program, unit, bus policy, manual pages, completions (needs cargo-deb)
#   make test-package the package is installed, looked at and purged in a throw-away Debian 12 root
#   make bench        criterion benchmarks, then the comparison with the peers in the guest
#   make bench-peers  the NBD exports beside qemu-nbd and nbdkit, with plots in target/peers
#   make bench-formats  reads by format and stream, beside QEMU and nbdkit (if there is one)
#   make fuzz-smoke   each fuzz target for a minute (FUZZ_SECONDS=n, FUZZ_TARGETS="a b"); uses a nightly toolchain if there is one

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
export PATH := $(HOME)/.cargo/bin:$(PATH):/usr/sbin:/sbin

# The guest's tests run the release binary.
BIN := $(abspath $(or $(CARGO_TARGET_DIR),target))/release/img-tcmu
# What of the guest's tests runs in QEMU too, with two CPUs, in `make test`.
SMP_TESTS ?= 10 31 33

.PHONY: all build install demo test test-cargo test-samples test-vm test-smp test-long lint bench fuzz-smoke clean

all: build

toolchain:
	@command -v cargo >/dev/null || { echo "There is no cargo. Install the stable Rust toolchain: https://rustup.rs" >&2; exit 1; }
.PHONY: toolchain

# Host packages: a C compiler for the compression libraries, and what the test bed calls.
install:
	@tests/vm/install

build: toolchain install
	cargo build --release --locked

demo: build
	@BIN=$(BIN) dist/demo

test: test-cargo test-samples test-vm test-smp
	@echo "make test: all parts passed"

# A second opinion on VHDX, and a writer of seekable zstd, that Debian does not package; in an environment of their own unless they are there already.
readers: install
	@python3 -c 'import dissect.hypervisor, pyzstd' 2>/dev/null || \
	    target/python/bin/python -c 'import dissect.hypervisor, pyzstd' 2>/dev/null || \
	    { python3 -m venv target/python && target/python/bin/pip -q install dissect.hypervisor pyzstd; }
.PHONY: readers

test-cargo: toolchain install readers
	@cargo nextest --version >/dev/null 2>&1 || cargo install --locked cargo-nextest || \
	    echo "make: cargo-nextest cannot be installed, using cargo test"
	python3 -c 'import dissect.hypervisor, pyzstd' 2>/dev/null || export DISSECT_PYTHON=$(CURDIR)/target/python/bin/python; \
	if cargo nextest --version >/dev/null 2>&1; then \
	    cargo nextest run --workspace --locked && cargo test --workspace --locked --doc -q; \
	else \
	    cargo test --workspace --locked --no-fail-fast; \
	fi

test-samples: install
	samples/check

test-vm: build
	tests/vm/suite --uml --bin $(BIN)

test-smp: build
	tests/vm/suite --qemu --bin $(BIN) $(SMP_TESTS)

test-long: build
	FORMATS_TEST_LONG=1 cargo nextest run --workspace --locked --run-ignored all --cargo-profile long
	tests/vm/suite --uml --bin $(BIN) 8
	tests/vm/suite --qemu --bin $(BIN)

# Manual pages and completions come from the program itself.
package: build
	@cargo deb --version >/dev/null 2>&1 || cargo install --locked cargo-deb
	rm -rf target/documents && $(BIN) documents target/documents
	cargo deb --no-build --locked

test-package: package
	tests/package target/debian/img-tcmu_*.deb
.PHONY: package test-package

lint: toolchain install
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" cargo doc --workspace --no-deps --locked --document-private-items

bench: build
	cargo bench --workspace --locked --bench ring
	tests/vm/suite --uml --bin $(BIN) 90

bench-peers: build
	benches/peers/compare --install $(BIN)
.PHONY: bench-peers

bench-formats: toolchain install
	cargo bench --locked --bench formats
.PHONY: bench-formats

# Without a nightly toolchain the stable one is told to be one: it has the sanitizer's runtime, too.
FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?= $(shell sed -n 's/^path = "fuzz_targets\/\(.*\)\.rs"/\1/p' fuzz/Cargo.toml)
FUZZ_LIMITS := -rss_limit_mb=1024 -timeout=10 -malloc_limit_mb=256

fuzz-smoke: toolchain install
	@cargo fuzz --version >/dev/null 2>&1 || cargo install --locked cargo-fuzz
	fuzz/seeds.sh
	@if cargo +nightly --version >/dev/null 2>&1; then nightly=+nightly; else nightly=; export RUSTC_BOOTSTRAP=1; fi; \
	scratch=$$(mktemp -d); trap 'rm -rf "$$scratch"' EXIT; export CACHE_DIRECTORY=$$scratch; \
	cd fuzz && cargo $$nightly fuzz build && for target in $(FUZZ_TARGETS); do \
	    mkdir -p corpus/$$target seeds/$$target; echo "== $$target"; \
	    cargo $$nightly fuzz run $$target corpus/$$target seeds/$$target -- $(FUZZ_LIMITS) -max_len=65536 -len_control=10 \
	        -max_total_time=$(FUZZ_SECONDS) -print_final_stats=1 2>$$scratch/log || { tail -60 $$scratch/log; exit 1; }; \
	    grep -aE 'stat::number_of_executed_units|DONE' $$scratch/log; \
	done

clean:
	cargo clean
