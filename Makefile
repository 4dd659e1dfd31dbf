# `make run` serves, `make test` proves it. `make help` lists the rest.

CARGO ?= cargo
ADDR ?= 127.0.0.1:7878
MINUTES ?= 5
GUEST_TARGET := wasm32-wasip2
GUEST_OUT := target/$(GUEST_TARGET)/guest
GUESTS := hello echo discard chargen daytime qotd ident resp
CARGO_DENY := ~0.20
CARGO_DEB := ~3.8
# To measure against: the version that the host is built with.
WASMTIME := ~48.0

.PHONY: help run test build guests lint bench bench-guests soak audit deb toolchain test-tools bench-tools

help:
	@echo 'make run     build everything and serve static/ on $(ADDR) (ADDR=… for another address)'
	@echo 'make test    lint, then run all tests'
	@echo 'make build   build target/release/wasinetd and target/guests/NAME.wasm'
	@echo 'make guests  build the guests only'
	@echo 'make lint    check format, clippy and documentation'
	@echo 'make bench   measure against a native server and others (needs wrk; BENCH=--help for parts of it)'
	@echo 'make soak    good and hostile clients and guests together for MINUTES=5, then look for what is lost'
	@echo 'make deb     build a Debian package in target/package/'
	@echo 'make audit   check the licences and known advisories of all dependencies'

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
	$(CARGO) clippy --profile guest --target $(GUEST_TARGET) --package http-p2 --package http-p3 --package padded -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc --release --workspace --no-deps

bench: bench-tools build bench-guests
	$(CARGO) bench --package wasinetd --bench sandbox
	$(CARGO) build --release --package bench
	target/release/bench $(BENCH)

soak: build
	$(CARGO) build --release --package bench
	target/release/bench --soak $(MINUTES)

# Licences, sources and known advisories of all dependencies. Advisories come from the network: where
# it is not to be had, the rest is checked all the same.
audit: toolchain
	@test -x target/tools/bin/cargo-deny || $(CARGO) install cargo-deny --version '$(CARGO_DENY)' --locked --root target/tools
	target/tools/bin/cargo-deny --locked check licenses bans sources
	target/tools/bin/cargo-deny --locked check advisories

# Of the program that is built, which writes its own manual and completions.
PACKAGE := target/package
deb: build
	@test -x target/tools/bin/cargo-deb || $(CARGO) install cargo-deb --version '$(CARGO_DEB)' --locked --root target/tools
	@rm -rf $(PACKAGE)
	@mkdir -p $(PACKAGE)/man $(PACKAGE)/completions
	@target/release/wasinetd man $(PACKAGE)/man
	@for shell in bash zsh fish; do \
		target/release/wasinetd completions $$shell > $(PACKAGE)/completions/wasinetd.$$shell || exit 1; done
	target/tools/bin/cargo-deb --quiet --no-build --package wasinetd --output $(PACKAGE)/

# Apart from ours: built together, the features of their dependencies would change our guests.
bench-guests: toolchain
	@mkdir -p target/guests/bench
	$(CARGO) build --profile guest --target $(GUEST_TARGET) --package http-p2 --package http-p3
	@cp $(GUEST_OUT)/http_p2.wasm $(GUEST_OUT)/http_p3.wasm target/guests/bench/
	@for kib in 0 64 256 1024 4096 16384; do \
		PADDING_KIB=$$kib $(CARGO) build --quiet --profile guest --target $(GUEST_TARGET) --package padded && \
		cp $(GUEST_OUT)/padded.wasm target/guests/bench/padded_$$kib.wasm || exit 1; done

# rust-toolchain.toml names the toolchain and the guests' target; rustup fetches both by itself
# unless it is told not to.
toolchain:
	@command -v $(CARGO) >/dev/null || { echo 'make: cargo is missing: install Rust from https://rustup.rs' >&2; exit 1; }
	@$(CARGO) --version >/dev/null 2>&1 || rustup toolchain install
	@test -d "$$(rustc --print target-libdir --target $(GUEST_TARGET))" || rustup target add $(GUEST_TARGET)

# Peers of the server in tests. Where this is root's machine, such as a container of CI, those that are small and missing are
# installed; where they are not to be had, the tests that need them are left out by name.
TEST_PACKAGES := nc:netcat-openbsd redis-benchmark:redis-tools socat:socat haproxy:haproxy sslscan:sslscan
test-tools:
	@missing=$$(for tool in $(TEST_PACKAGES); do command -v $${tool%%:*} >/dev/null || echo $${tool#*:}; done); \
	if test -n "$$missing" && test "$$(id -u)" = 0 && command -v apt-get >/dev/null; then \
		echo "make: installing for the tests:" $$missing; \
		{ apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends $$missing; } >/dev/null 2>&1 || true; fi
	@for tool in $(TEST_PACKAGES) systemd-socket-activate:systemd ss:iproute2; do command -v $${tool%%:*} >/dev/null || \
		echo "make: without $${tool%%:*} some tests are left out: apt-get install $${tool#*:}" >&2; done
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || test -n "$$CHROMIUM" || \
		echo 'make: without Chromium the tests of the dashboard are left out: apt-get install chromium' >&2
	@for tool in curl openssl; do command -v $$tool >/dev/null || { echo "make: $$tool is missing: apt-get install $$tool" >&2; exit 1; }; done

# What is missing beside wrk is left out of the report by name.
bench-tools: toolchain
	@command -v wrk >/dev/null || { echo 'make: wrk is missing: apt-get install wrk' >&2; exit 1; }
	@for tool in nginx socat; do command -v $$tool >/dev/null || echo "make: without $$tool the benchmark has one server less: apt-get install $$tool" >&2; done
	@test -x target/bench/tools/bin/wasmtime || $(CARGO) install wasmtime-cli --version '$(WASMTIME)' --locked \
		--root target/bench/tools --no-default-features \
		--features run,serve,cranelift,parallel-compilation,pooling-allocator,component-model-async
