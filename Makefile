# Everything a user or CI does. `make help` lists the targets.

STAGES := $(CURDIR)/target/stages
# How long `make test-faults` takes, about, and `make fuzz` for each of its targets.
test-faults: MINUTES ?= 20
fuzz: MINUTES ?= 5

.DEFAULT_GOAL := help
.PHONY: help demo build stages test test-faults fuzz bench budget lint clean
.NOTPARALLEL:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: build ## build everything and run the blog on what is embedded: no Kafka, PostgreSQL or Redis needed
	@scripts/foreground target/release/host run examples/blog/pipeline.toml

build: stages ## leave target/release/host and target/stages/<name>.wasm
	cargo build --release --package host --bin host

stages: ## compile the stages to WebAssembly: target/stages/<name>.wasm
	@scripts/install-deps build
	@scripts/build-stages $(STAGES)

test: stages ## run all tests, on real servers that are started for them (or KAFKA_BROKERS, DATABASE_URL, REDIS_URL)
	@scripts/install-deps test
	jars=$$(scripts/kafka-jars) && clients=$$(scripts/kafka-clients) && \
	STAGES_DIR=$(STAGES) KAFKA_JARS=$$jars KAFKA_CLIENTS=$$clients scripts/with-servers cargo test --workspace --no-fail-fast; \
	tested=$$?; $(MAKE) budget && exit $$tested

budget: ## count the instructions that a message costs in the lanes, and hold them against host/benches/budget/budget.toml
	@scripts/install-deps test
	cargo build --workspace --example budget --config host/benches/budget/profile.toml
	$${CARGO_TARGET_DIR:-target}/debug/examples/budget check host/benches/budget/budget.toml

test-faults: stages ## break hosts, servers and the network for about MINUTES=20 (FAULTS_SEED repeats a run), and judge what became of the messages
	@scripts/install-deps test
	jars=$$(scripts/kafka-jars) && \
	STAGES_DIR=$(STAGES) KAFKA_JARS=$$jars FAULTS_MINUTES=$(MINUTES) cargo test --package host --test faults

fuzz: ## look for bytes that break what is read (files, rows, bodies, requests), MINUTES=5 for each of the TARGETS of host/fuzz/corpus
	@scripts/install-deps build
	scripts/fuzz $(MINUTES) $(TARGETS)

bench: stages ## measure the host beside native programs on real servers, for about 16 minutes (ROWS="F1 F6" for some); see bench/
	@scripts/install-deps bench
	cargo build --release --package host --package bench --bin host --bin bench
	jars=$$(scripts/kafka-jars) && \
	STAGES_DIR=$(STAGES) KAFKA_JARS=$$jars KAFKA_JVM="-Xms1g -Xmx1g" HOST_BINARY=target/release/host \
	scripts/with-servers target/release/bench run --out bench $(ROWS)

lint: ## check format, clippy and the dependencies
	@scripts/install-deps build
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo clippy --target wasm32-wasip2 --package publisher --package cache-manager --package test-guests --lib --examples -- -D warnings
	@scripts/check-dependencies

clean: ## remove what was built and downloaded; data of the demo stays
	rm -rf target .cache
