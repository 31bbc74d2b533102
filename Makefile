# Every command sets up what it needs, once, on a machine that has only Python >= 3.11 and make.
# PYTHON=/path/to/python chooses the interpreter.

# Taken as typed: make expands $ in variables, and a prompt may hold anything.
override PROMPT := $(value PROMPT)
export PROMPT

VENV := .venv/bin
WORKERS ?= 2
PIN := -c constraints.txt

.PHONY: help venv generate test test-parity test-kernels test-aot test-newest gpu soak lint wheel clean
.DELETE_ON_ERROR:

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' Makefile

venv: .venv/.stamp  ## make .venv with everything but torch

.venv/.stamp: pyproject.toml constraints.txt
	@.ci/make-venv .venv 3.11 $(PIN) -e ".[test,train,dev,triton]"
	@# Beside the other packages, and not among them: JAX would load the plugin, and complain about the missing GPU.
	@if [ "$$(uname -sm)" = "Linux x86_64" ]; then \
	  $(VENV)/python -m pip install --quiet --disable-pip-version-check $(PIN) --no-deps --upgrade --target .venv/aot \
	    jax-cuda13-plugin jax-cuda13-pjrt nvidia-cuda-nvcc nvidia-nvvm; fi
	@touch $@

.venv-parity/.stamp: pyproject.toml constraints.txt
	@# torch by itself first: exactly this version, so that transformers finds it there and pulls no other build.
	@.ci/make-venv .venv-parity 3.11 torch==2.13.0
	@.ci/make-venv .venv-parity 3.11 $(PIN) -e ".[test,parity]"
	@touch $@

generate: .venv/.stamp  ## continue a text: make generate PROMPT="def fib(n):" [ARGS="--max-tokens 32"]
	@$(VENV)/python -m glm_jax.generate $(ARGS) -- "$$PROMPT"

test: .venv/.stamp  ## unit, property, sharding and end-to-end tests on the CPU: make test [ARGS="-k rope"]
	@$(VENV)/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

test-parity: .venv-parity/.stamp  ## the same numbers as transformers, in an environment of its own
	@.venv-parity/bin/python -m pytest -n $(WORKERS) --dist worksteal -m parity $(ARGS)

test-kernels: .venv/.stamp  ## the GPU kernels in Triton's interpreter, without a GPU
	@TRITON_INTERPRET=1 $(VENV)/python -m pytest -n $(WORKERS) --dist worksteal -m "(kernels or gpu) and not soak" $(ARGS)

test-aot: .venv/.stamp  ## the GPU programs compiled for cards that are not here: launches, memory, spills
	@$(VENV)/python -m pytest -n $(WORKERS) --dist worksteal -m "aot and not soak" $(ARGS)

test-newest: .venv/.stamp  ## a smoke run on the newest JAX, when a Python >= 3.12 is on the machine
	@.ci/smoke-newest

gpu:  ## on a machine with an NVIDIA GPU: its tests and short benchmarks, 8 minutes: make gpu [PYTHON=python3]
	@.ci/gpu

soak: .venv/.stamp  ## the long tests, with new random examples each time
	@TRITON_INTERPRET=1 $(VENV)/python -m pytest -m "soak and (kernels or gpu)" --hypothesis-profile=soak $(ARGS)
	@$(VENV)/python -m pytest -m "soak and not kernels and not gpu" --hypothesis-profile=soak $(ARGS)
	@$(VENV)/python -m pytest -n $(WORKERS) --hypothesis-profile=soak $(ARGS)

lint: .venv/.stamp  ## ruff and pyright
	@$(VENV)/ruff check .
	@$(VENV)/ruff format --check .
	@$(VENV)/pyright

wheel: .venv/.stamp  ## build dist/*.whl, and check that it installs, imports and generates by itself
	@.ci/wheel

clean:  ## remove what make made, environments included
	rm -rf .venv .venv-parity .venv-newest .venv-gpu .cache .hypothesis .pytest_cache .ruff_cache build dist
