# `make run` serves, `make test` runs all tests. `make help` lists the rest.

SHELL := bash
CARGO ?= cargo
# Two profiles (see Cargo.toml): quick builds in minutes, for run and test; dist is optimized as a whole program, for
# packages and benchmarks.
# All members of the workspace are selected each time, so that all commands agree on the features of the
# dependencies and compile them once.
QUICK := --profile quick --workspace
DIST := --profile dist --workspace
ADDR ?= 127.0.0.1:7878
MINUTES ?= 5
GUEST_TARGET := wasm32-wasip2
GUEST_OUT := target/$(GUEST_TARGET)/guest
GUESTS := hello echo discard chargen daytime qotd ident resp
CARGO_DENY := ~0.20
CARGO_DEB := ~3.8
# The benchmark compares with the wasmtime that the host is built with.
WASMTIME := ~48.0

.PHONY: help run test build guests lint bench bench-guests soak audit deb toolchain test-tools bench-tools

help:
	@echo 'make run     build a server quickly and serve static/ on $(ADDR) (ADDR=… for another address)'
	@echo 'make test    lint, then run all tests'
	@echo 'make build   build an optimized target/dist/wasinetd, and target/guests/NAME.wasm'
	@echo 'make guests  build the guests only'
	@echo 'make lint    check format, clippy and documentation'
	@echo 'make bench   compare with a native server and others (needs wrk; BENCH=--help lists its parts)'
	@echo 'make soak    mix good and hostile clients and guests for MINUTES=5, then look for leaks'
	@echo 'make deb     build a Debian package in target/package/'
	@echo 'make audit   check the licences and known advisories of all dependencies'

# Only what is served here: the server and one guest.
run: toolchain
	@$(SAY) 'building the guest hello and the server: about 8 minutes the first time on 2 cores'
	$(CARGO) build --profile guest --target $(GUEST_TARGET) --package hello
	@mkdir -p target/guests && cp $(GUEST_OUT)/hello.wasm target/guests/
	$(CARGO) build $(QUICK) --bin wasinetd
	@$(SAY) 'serving on http://$(ADDR)/ until Ctrl-C'
	target/quick/wasinetd serve --listen $(ADDR) --dir static::/static target/guests/hello.wasm

build: guests
	@$(SAY) 'building the optimized server: about 12 minutes the first time on 2 cores'
	$(CARGO) build $(DIST) --bin wasinetd

guests: toolchain
	$(CARGO) build --profile guest --target $(GUEST_TARGET) $(GUESTS:%=--package %)
	$(CARGO) build --profile guest --target $(GUEST_TARGET) --package fixtures --examples
	@mkdir -p target/guests/fixtures
	@cp $(GUESTS:%=$(GUEST_OUT)/%.wasm) target/guests/
	@cp $(GUEST_OUT)/examples/*.wasm target/guests/fixtures/
	@rm -f target/guests/fixtures/*-????????????????.wasm

# One profile for the server and all tests, so that wasmtime is compiled once. The runner lets libtest time each test.
# As many tests as cores run at once: with more, tests that measure time begin to fail. TEST_THREADS=… changes that.
TEST_THREADS ?= $(shell nproc 2>/dev/null || echo 2)
HOST := $(shell rustc -vV 2>/dev/null | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')
TIMED := env CARGO_TARGET_$(HOST)_RUNNER='env RUSTC_BOOTSTRAP=1'
test: test-tools lint guests
	@$(SAY) 'building the server and the tests: about 8 minutes the first time on 2 cores'
	$(CARGO) build $(QUICK) --bin wasinetd --tests
	@$(SAY) 'running the tests: about 10 minutes on 2 cores'
	$(CARGO) test $(QUICK) --lib --bin bench
	$(CARGO) test $(QUICK) --doc
	@set -o pipefail; $(TIMED) $(CARGO) test $(QUICK) --test all -- -Z unstable-options --report-time \
		--test-threads $(TEST_THREADS) | tee target/tests.log
	@echo 'make: the ten slowest tests, in seconds:'
	@sed -n 's/^test \(.*\) \.\.\. ok <\(.*\)s>$$/  \2 \1/p' target/tests.log | sort -rn | head -n 10
	@$(SAY) 'all tests passed'

lint: toolchain
	@$(SAY) 'checking format, lints and documentation: about 4 minutes the first time on 2 cores'
	$(CARGO) fmt --all --check
	$(CARGO) clippy $(QUICK) --all-targets -- -D warnings
	$(CARGO) clippy --profile guest --target $(GUEST_TARGET) $(GUESTS:%=--package %) --package fixtures --examples -- -D warnings
	$(CARGO) clippy --profile guest --target $(GUEST_TARGET) --package http-p2 --package http-p3 --package padded -- -D warnings
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc $(QUICK) --no-deps

bench: bench-tools build bench-guests
	$(CARGO) bench $(DIST) --bench sandbox
	$(CARGO) build $(DIST) --bin bench
	target/dist/bench $(BENCH)

soak: build
	$(CARGO) build $(DIST) --bin bench
	target/dist/bench --soak $(MINUTES)

# Advisories come from the network, so they are checked last: without a network the rest is checked all the same.
audit: toolchain
	@test -x target/tools/bin/cargo-deny || $(CARGO) install cargo-deny --version '$(CARGO_DENY)' --locked --root target/tools
	target/tools/bin/cargo-deny --locked check licenses bans sources
	target/tools/bin/cargo-deny --locked check advisories

# The program writes its own manual and completions.
PACKAGE := target/package
deb: build
	@test -x target/tools/bin/cargo-deb || $(CARGO) install cargo-deb --version '$(CARGO_DEB)' --locked --root target/tools
	@rm -rf $(PACKAGE)
	@mkdir -p $(PACKAGE)/man $(PACKAGE)/completions
	@target/dist/wasinetd man $(PACKAGE)/man
	@for shell in bash zsh fish; do \
		target/dist/wasinetd completions $$shell > $(PACKAGE)/completions/wasinetd.$$shell || exit 1; done
	target/tools/bin/cargo-deb --quiet --no-build --profile dist --package wasinetd --output $(PACKAGE)/

# Built apart from the other guests, whose dependencies would otherwise get more features.
bench-guests: toolchain
	@mkdir -p target/guests/bench
	$(CARGO) build --profile guest --target $(GUEST_TARGET) --package http-p2 --package http-p3
	@cp $(GUEST_OUT)/http_p2.wasm $(GUEST_OUT)/http_p3.wasm target/guests/bench/
	@for kib in 0 64 256 1024 4096 16384; do \
		PADDING_KIB=$$kib $(CARGO) build --quiet --profile guest --target $(GUEST_TARGET) --package padded && \
		cp $(GUEST_OUT)/padded.wasm target/guests/bench/padded_$$kib.wasm || exit 1; done

# rust-toolchain.toml names the toolchain and the target of guests. rustup installs both by itself, unless its settings
# forbid that.
SAY := echo; echo "make: [$$(date +%H:%M:%S)]"
toolchain:
	@command -v $(CARGO) >/dev/null || { echo 'make: cargo is missing: install Rust from https://rustup.rs' >&2; exit 1; }
	@$(CARGO) --version >/dev/null 2>&1 || rustup toolchain install
	@test -d "$$(rustc --print target-libdir --target $(GUEST_TARGET))" || rustup target add $(GUEST_TARGET)

# Clients and proxies for the tests. Root, such as in a container of CI, gets missing ones installed. Without one, the
# tests that need it are skipped, and say so.
TEST_PACKAGES := nc:netcat-openbsd redis-benchmark:redis-tools socat:socat haproxy:haproxy sslscan:sslscan
test-tools:
	@missing=$$(for tool in $(TEST_PACKAGES); do command -v $${tool%%:*} >/dev/null || echo $${tool#*:}; done); \
	if test -n "$$missing" && test "$$(id -u)" = 0 && command -v apt-get >/dev/null; then \
		echo "make: installing for the tests:" $$missing; \
		{ apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends $$missing; } >/dev/null 2>&1 || true; fi
	@for tool in $(TEST_PACKAGES) systemd-socket-activate:systemd ss:iproute2; do command -v $${tool%%:*} >/dev/null || \
		echo "make: without $${tool%%:*} some tests are skipped: apt-get install $${tool#*:}" >&2; done
	@command -v chromium >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || test -n "$$CHROMIUM" || \
		echo 'make: without Chromium the tests of the dashboard are skipped: apt-get install chromium' >&2
	@for tool in curl openssl; do command -v $$tool >/dev/null || { echo "make: $$tool is missing: apt-get install $$tool" >&2; exit 1; }; done

# Only wrk is required. The report names every other server that is missing.
bench-tools: toolchain
	@command -v wrk >/dev/null || { echo 'make: wrk is missing: apt-get install wrk' >&2; exit 1; }
	@for tool in nginx socat; do command -v $$tool >/dev/null || echo "make: without $$tool the benchmark has one server less: apt-get install $$tool" >&2; done
	@test -x target/bench/tools/bin/wasmtime || $(CARGO) install wasmtime-cli --version '$(WASMTIME)' --locked \
		--root target/bench/tools --no-default-features \
		--features run,serve,cranelift,parallel-compilation,pooling-allocator,component-model-async
