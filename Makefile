# diffuserve: two commands on a fresh machine are `make demo` and `make test`.

VENV := .venv
PYTHON := $(VENV)/bin/python
# The first of these that exists makes the virtual environment; PYTHON3=... chooses another.
PYTHON3 ?= $(firstword $(foreach name,python3.11 python3.12 python3,$(shell command -v $(name) 2>/dev/null)))
INSTALLED := $(VENV)/.installed

PROMPT ?= a large red circle on a blue background
CHECKPOINT ?= checkpoints/shapes
TARGET ?= onnxruntime-cpu
PRECISION ?= fp32
OUT ?= build/deployments/$(or $(NAME),$(if $(RANDOM_WEIGHTS),$(FAMILY)),$(notdir $(CHECKPOINT)))
DEPLOYMENT ?= build/deployments/shapes
HTTP_PORT ?= 8000
GRPC_PORT ?= 8001
METRICS_PORT ?= 8002
WORKERS ?= 2

export PYTHONPATH := checkpoints

.DEFAULT_GOAL := help
.PHONY: help install demo test accept-client accept-engine accept-families accept-requests accept-sharing accept-tensorrt check format export serve gpu-check bench-serving bench-engine bench-attention bench-lora bench-control bench-simulate simulate clean

help: ## This list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(INSTALLED) ## The virtual environment in .venv, with every extra

$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON3)" || { echo "no python3 found: install Python 3.11 or 3.12"; exit 2; }
	$(PYTHON3) -m venv $(VENV)
	$(PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# Of TensorRT only the types: the stubs ask for the package, and hold some lines that are no Python.
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/stubs tensorrt-stubs==10.13.0.35.1
	sed -i -E 's/\bin: /in_: /; s/channel_axis: int\) ->/channel_axis: int = ...) ->/' $(VENV)/stubs/tensorrt_bindings/tensorrt.pyi
	@touch $@

demo: $(INSTALLED) ## Export the reference checkpoint, start Triton, make build/demo.png (PROMPT="...")
	$(PYTHON) -m diffuserve_export --checkpoint checkpoints/shapes --target onnxruntime-cpu --out build/deployments/shapes
	$(PYTHON) bench/demo.py "$(PROMPT)"

# A worker has all tests of a file. In their order: integration tests, which take longest, come before unit tests.
# What looks at the clock comes last, by itself.
test: $(INSTALLED) ## All tests but the long ones, real Triton included [WORKERS=2]
	$(PYTHON) -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not alone" --ignore tests/acceptance
	$(PYTHON) -m pytest -m alone tests/integration

accept-client: $(INSTALLED) ## The client: 500 requests to a server that is killed twice, hand-over, TLS, the page of compare in Chromium [ONLY=killed WRITE_DOCS=1]
	$(PYTHON) -m pytest -s --timeout 3600 $(if $(ONLY),-k "$(ONLY)") tests/acceptance/test_client_*.py

accept-engine: $(INSTALLED) ## The step engine's long checks: 10,000 requests that fail and cancel, 200 random mixes
	$(PYTHON) -m pytest -s --timeout 3600 tests/acceptance/test_engine_soak.py tests/acceptance/test_same_picture_in_any_company.py

accept-families: $(INSTALLED) ## Small checkpoints of every family through the whole service, against diffusers, and in half precision
	$(PYTHON) -m pytest -s --timeout 3600 tests/acceptance/test_families.py tests/acceptance/test_half_precision.py

accept-requests: $(INSTALLED) ## 50 steps, snapshots after every step, clients that exhaust a server, masks with every sampler, previews, tiles
	$(PYTHON) -m pytest -s --timeout 3600 tests/acceptance/test_fifty_steps.py tests/acceptance/test_handing_over.py \
		tests/acceptance/test_exhaustion.py tests/acceptance/test_inpainting.py tests/acceptance/test_previews_and_tiles.py

accept-tensorrt: $(INSTALLED) ## Full-size SD1.5 and SDXL to TensorRT-RTX engines, quantized pictures: 20 GB of memory and of disk [ONLY=sdxl WRITE_DOCS=1]
	$(PYTHON) -m pytest -s --timeout 7200 $(if $(ONLY),-k "$(ONLY)") \
		tests/acceptance/test_full_size.py tests/acceptance/test_quantized_sizes.py tests/acceptance/test_quantized_quality.py

accept-sharing: $(INSTALLED) ## LoRAs, ControlNets, checkpoints that share a server, rollouts, stored deployments, full-size SD1.5 with LoRA [ONLY=control WRITE_DOCS=1]
	$(PYTHON) -m pytest -s --timeout 7200 $(if $(ONLY),-k "$(ONLY)") tests/acceptance/test_sharing.py \
		tests/acceptance/test_control.py tests/acceptance/test_loras.py tests/acceptance/test_lora_graphs.py \
		tests/acceptance/test_rollout.py tests/acceptance/test_killed_transfers.py tests/acceptance/test_lora_full_size.py

check: $(INSTALLED) ## Formatting, lint, types, and generated files that must not drift
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy
	$(VENV)/bin/hadolint deploy/Dockerfile
	$(VENV)/bin/yamllint --strict --config-file deploy/yamllint.yaml deploy
	$(VENV)/bin/check-jsonschema --quiet --builtin-schema vendor.compose-spec deploy/compose.yaml
	$(PYTHON) -m diffuserve_export.public_model --check
	$(PYTHON) -m diffuserve_export.operations_page --check
	$(PYTHON) -m diffuserve.sampling.matrix --check
	$(PYTHON) -m diffuserve_client._help_page --check

format: $(INSTALLED) ## Apply ruff's formatting and safe fixes
	$(VENV)/bin/ruff check --fix
	$(VENV)/bin/ruff format

export: $(INSTALLED) ## CHECKPOINT=folder, file or hub id, or FAMILY=sdxl RANDOM_WEIGHTS=1 [TARGET PRECISION NAME SIZES=min:opt:max MAX_ROWS VAE_TILE PREVIEW_VAE CONTROLNET LORA_RANK OUT COMPUTE_CAPABILITY]
	$(PYTHON) -m diffuserve_export $(if $(RANDOM_WEIGHTS),--random-weights,--checkpoint "$(CHECKPOINT)") \
		$(if $(FAMILY),--family "$(FAMILY)") $(if $(CONFIG),--config "$(CONFIG)") $(if $(ALLOW_PICKLE),--allow-pickle) \
		$(if $(VAE_PRECISION),--vae-precision "$(VAE_PRECISION)") --target "$(TARGET)" --precision "$(PRECISION)" --out "$(OUT)" \
		$(if $(NAME),--name "$(NAME)") $(if $(SIZES),--sizes "$(SIZES)") $(if $(MAX_ROWS),--max-rows "$(MAX_ROWS)") \
		$(if $(VAE_TILE),--vae-tile "$(VAE_TILE)") $(if $(PREVIEW_VAE),--preview-vae "$(PREVIEW_VAE)") \
		$(if $(CONTROLNET),--controlnet "$(CONTROLNET)") \
		$(if $(LORA_RANK),--lora-rank "$(LORA_RANK)") \
		$(if $(COMPUTE_CAPABILITY),--compute-capability "$(COMPUTE_CAPABILITY)") \
		$(if $(WORKSPACE),--workspace "$(WORKSPACE)") $(if $(MEMORY_BUDGET),--memory-budget "$(MEMORY_BUDGET)") \
		$(if $(CUDA_GRAPHS),--cuda-graphs) $(if $(PROVIDER),--provider "$(PROVIDER)") \
		$(if $(CALIBRATION),--calibration "$(CALIBRATION)") \
		$(if $(CALIBRATION_STEPS),--calibration-steps "$(CALIBRATION_STEPS)") \
		$(if $(QUALITY_GATE),--quality-gate "$(QUALITY_GATE)") \
		$(if $(QUALITY_PICTURES),--quality-pictures "$(QUALITY_PICTURES)")

serve: $(INSTALLED) ## Serve DEPLOYMENT on loopback until Ctrl-C [HTTP_PORT GRPC_PORT METRICS_PORT GRACE EMBEDDINGS LORAS LORA_BUDGET_MB MEMORY_BUDGET=GB IDLE_RELEASE=minutes WEIGHTS="a=2 b=1" PIN="a"]
	@exec $(PYTHON) -m diffuserve.server --deployment "$(DEPLOYMENT)" \
		--http-port $(HTTP_PORT) --grpc-port $(GRPC_PORT) --metrics-port $(METRICS_PORT) $(if $(GRACE),--grace $(GRACE)) \
		$(if $(EMBEDDINGS),--embeddings "$(EMBEDDINGS)") $(if $(LORAS),--loras "$(LORAS)") \
		$(if $(LORA_BUDGET_MB),--lora-budget-mb $(LORA_BUDGET_MB)) $(if $(MEMORY_BUDGET),--memory-budget $(MEMORY_BUDGET)) \
		$(if $(IDLE_RELEASE),--idle-release $(IDLE_RELEASE)) $(addprefix --weight ,$(WEIGHTS)) $(addprefix --pin ,$(PIN))

gpu-check: $(INSTALLED) ## Build for this GPU, compare with ONNX, measure, write build/gpu-check/report.md [CHECKPOINT TARGET PRECISION]
	$(PYTHON) -m diffuserve_export.gpu_check --checkpoint "$(CHECKPOINT)" --precision "$(PRECISION)" \
		--target "$(if $(filter tensorrt%,$(TARGET)),$(TARGET),tensorrt-rtx)"

bench-serving: $(INSTALLED) ## This service, diffusers behind a lock, and the bare engine, in one run
	$(PYTHON) -m diffuserve_export --checkpoint checkpoints/shapes --target onnxruntime-cpu --out build/deployments/shapes
	$(PYTHON) bench/serving.py

bench-engine: $(INSTALLED) ## This service beside other designs, long [QUICK=1 PARTS=closed,open,overload,limit,loop]
	$(PYTHON) -m diffuserve_export --checkpoint checkpoints/shapes --target onnxruntime-cpu --out build/deployments/shapes
	$(PYTHON) bench/engine.py $(if $(QUICK),--quick) $(if $(PARTS),--parts "$(PARTS)")

bench-attention: $(INSTALLED) ## Attention as one ONNX node and as many, for each target that runs here [WRITE_DOCS=1]
	$(PYTHON) bench/attention.py $(if $(WRITE_DOCS),--write-docs)

bench-lora: $(INSTALLED) ## What LoRA adapters as an input cost in ONNX Runtime [WRITE_DOCS=1]
	$(PYTHON) bench/lora.py $(if $(WRITE_DOCS),--write-docs)

bench-control: $(INSTALLED) ## What a ControlNet that is built in costs in ONNX Runtime [WRITE_DOCS=1]
	$(PYTHON) bench/control.py $(if $(WRITE_DOCS),--write-docs)

bench-simulate: $(INSTALLED) ## The real server at three loads beside the simulated one [WRITE_DOCS=1]
	$(PYTHON) -m diffuserve_export --checkpoint checkpoints/shapes --target onnxruntime-cpu --out build/deployments/shapes
	$(PYTHON) bench/simulate.py agree $(if $(WRITE_DOCS),--write-docs)

simulate: $(INSTALLED) ## Simulated servers and fleets: the tables and figures of docs/simulator.md [WRITE_DOCS=1]
	$(PYTHON) bench/simulate.py tables $(if $(WRITE_DOCS),--write-docs)

clean: ## Remove what was built; the virtual environment and caches stay
	rm -rf build/deployments build/demo.png dist
