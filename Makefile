# Everything runs in .venv, which the first target makes from nothing but Python 3.11+ and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

NATIVE := build/native.stamp

.PHONY: setup demo recipe test chaos soak idle lint format types protos gpu-kernels clean native-sanitize native-fuzz
.PHONY: interop interop-lm-eval interop-clients interop-object-store interop-trl interop-peft interop-compressed-tensors interop-rivals

setup: $(STAMP) $(NATIVE)

$(STAMP): pyproject.toml constraints.txt scripts/setup.sh scripts/install_megablocks.sh
	PYTHON="$(PYTHON)" scripts/setup.sh $(VENV)
	@touch $@

# The part in C++, anew when one of its files has changed; without a compiler, a line that says so.
$(NATIVE): $(STAMP) scripts/build_native.sh $(shell find native -type f)
	PYTHON=$(BIN)/python scripts/build_native.sh
	@touch $@

# Its own tests under sanitizers: of addresses and undefined behaviour, then of threads. Needs a compiler, and no set-up.
native-sanitize:
	SANITIZE=address,undefined scripts/build_native.sh build/sanitized-address
	for test in build/sanitized-address/*_test; do $$test || exit 1; done
	SANITIZE=thread scripts/build_native.sh build/sanitized-thread
	for test in build/sanitized-thread/*_test; do $$test || exit 1; done

# Ten million frames of nonsense in a ring, and as many over a socket, some minutes. FRAMES=1000000 for fewer.
native-fuzz:
	SANITIZE=address,undefined scripts/build_native.sh build/sanitized-address
	build/sanitized-address/ring_fuzz_test $(or $(FRAMES),10000000)
	build/sanitized-address/frames_fuzz_test $(or $(FRAMES),10000000)

demo: setup
	$(BIN)/trinity demo $(if $(filter-out 0,$(KEEP)),--keep)

# From text to a model that chats, in stages: less than a quarter of an hour on two cores.
recipe: setup
	$(BIN)/python examples/recipe.py $(if $(filter-out 0,$(RESUME)),--resume)

# Where the environment forbids compiled files, each of the hundreds of processes would compile the project anew.
test: export PYTHONDONTWRITEBYTECODE =
# Many tests wait for processes: two at a time take little more than half as long. A file stays on one side, and all that want Ray
# in this process on the same one; the files that take longest begin first (tests/conftest.py), so that both sides end together.
test: setup
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

chaos: setup
	$(BIN)/pytest -s -m chaos tests

# An hour of a server under mixed traffic: does any process grow? MINUTES=10 for less.
soak: export PYTHONDONTWRITEBYTECODE =
soak: setup
	$(BIN)/python -m tests.chaos.soak $(if $(MINUTES),--minutes $(MINUTES))

# Ten thousand streams that are open and get nothing: what does a server hold for each? STREAMS=1000 for fewer.
idle: setup
	$(BIN)/python -m tests.chaos.idle $(if $(STREAMS),--streams $(STREAMS))

# lm-eval in an environment of its own, over this one's torch and transformers, against our server.
interop-lm-eval: setup
	scripts/setup_beside.sh $(BIN)/python .venv-lm-eval 'lm_eval[api]==0.4.13' accelerate peft
	LM_EVAL_PYTHON=$(CURDIR)/.venv-lm-eval/bin/python $(BIN)/pytest -m interop tests/interop/test_lm_eval.py

# TRL in an environment of its own, over this one's torch and transformers: losses and gradients on the same tiny models.
interop-trl: setup
	scripts/setup_beside.sh $(BIN)/python .venv-trl trl==1.16.0 accelerate
	.venv-trl/bin/python -m pytest -m interop tests/interop/test_trl.py

# PEFT in an environment of its own, over this one's torch and transformers: adapters' folders, ours there and theirs here.
interop-peft: setup
	scripts/setup_beside.sh $(BIN)/python .venv-peft peft==0.21.2 accelerate
	.venv-peft/bin/python -m pytest -m interop tests/interop/test_peft.py

# compressed-tensors in an environment of its own, over this one's torch: quantised checkpoints of its making, read by us.
interop-compressed-tensors: setup
	scripts/setup_beside.sh $(BIN)/python .venv-compressed-tensors compressed-tensors==0.20.1
	.venv-compressed-tensors/bin/python -m pytest -m interop tests/interop/test_compressed_tensors.py

# Clients of OpenAI's and Anthropic's APIs in an environment of their own, against our server.
CLIENTS := anthropic langchain-openai litellm instructor openai-agents
interop-clients: setup
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/pip install --quiet --disable-pip-version-check $(CLIENTS)
	CLIENTS_PYTHON=$(CURDIR)/.venv-clients/bin/python $(BIN)/pytest -m interop tests/interop/test_clients.py

# vLLM for CPUs and llama.cpp in an environment of their own: what `trinity bench rivals decode` and `prefixes` measure against.
interop-rivals: setup
	scripts/setup_rivals.sh $(BIN)/python .venv-rivals

# S3's client wants an older dateutil than matplotlib has: it lies beside our environment, not in it.
S3 := s3fs==2026.9.0 aiobotocore==3.10.0 botocore==1.43.117 aioitertools jmespath 'python-dateutil<3' six
interop-object-store: setup
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade --target .venv-s3 --no-deps $(S3)
	PYTHONPATH=.venv-s3 $(BIN)/pytest tests/unit/test_remote.py tests/unit/test_cache.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: setup
	PYTHON=$(BIN)/python scripts/generate_protos.sh

# Other people's clients, in folders of their own. Tests that need them are skipped by name where they are not.
interop:
	npm install --prefix examples/node --no-package-lock --ignore-scripts --no-audit --no-fund

gpu-kernels: setup
	scripts/gpu_kernels.sh $(BIN)/python

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache
