# `make run` serves, `make test` proves it. `make help` lists the rest.

CARGO ?= cargo
ADDR ?= 127.0.0.1:7878
GUEST_TARGET := wasm32-wasip2
GUEST_OUT := target/$(GUEST_TARGET)/guest
GUESTS := hello echo

.PHONY: help run test build guests lint bench toolchain test-tools bench-tools

help:
	@echo 'make run     build everything and serve static/ on $(ADDR) (ADDR=… for another address)'
	@echo 'make test    lint, then run all tests'
	@echo 'make build   build target/release/wasinetd and target/guests/NAME.wasm'
	@echo 'make guests  build the guests only'
	@echo 'make lint    check format, clippy and documentation'
	@echo 'make bench   measure against a native server (needs wrk)'

run: build
	target/release/wasinetd serve --listen $(ADDR) --dir static::/static target/guests/hello.wasm

build: guests
	$(CARGO) build --release --package wasinetd

guests: toolchain
	$(CARGO) build --profile guest --target $(GUEST_TARGET) $(GUESTS:%=--package %)
	$(CARGO) build --profile guest --target $(GUEST_TARGET) --package fixtures --examples
	@mkdir -p target/guests/fixtures
	@cp $(GUESTS:%=$(GUEST_OUT)/%.wasm) target/guests/
	@cp $(GUEST_OUT)/examples/*.wasm target/guests/fixtures/
	@rm -f target/guests/fixtures/*-????????????????.wasm

# One profile for all, so that wasmtime is compiled once.
test: test-tools lint build
	$(CARGO) test --release --workspace

lint: toolchain
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --workspace --all-targets -- -D warnings
	$(CARGO) clippy --profile guest --target $(GUEST_TARGET) $(GUESTS:%=--package %) --package fixtures --examples -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --release --workspace --no-deps

bench: bench-tools build
	$(CARGO) build --release --package bench
	target/release/bench

# rust-toolchain.toml names the toolchain and the guests' target; rustup fetches both by itself
# unless it is told not to.
toolchain:
	@command -v $(CARGO) >/dev/null || { echo 'make: cargo is missing: install Rust from https://rustup.rs' >&2; exit 1; }
	@$(CARGO) --version >/dev/null 2>&1 || rustup toolchain install
	@test -d "$$(rustc --print target-libdir --target $(GUEST_TARGET))" || rustup target add $(GUEST_TARGET)

test-tools:
	@command -v curl >/dev/null || { echo 'make: curl is missing: apt-get install curl' >&2; exit 1; }

bench-tools:
	@command -v wrk >/dev/null || { echo 'make: wrk is missing: apt-get install wrk' >&2; exit 1; }
