# make demo   train, prune, cut, verify and measure on scikit-learn's digits (a few minutes on 2 cores)
# make test   lint, format check, types, tests
# make architectures   what the analysis finds in networks people use, into benchmarks/results/
# make zoo    every network of torchvision, a timm network of every module, every transformers type (hours, resumable)
# make generated   2,000 random networks, each cut at random and compared
# make scaling     how the analysis grows: 64 layers, 1,000 layers, 70 billion parameters
# make operators   every operator of torch, cut between layers
# make analysis_cost   the analysis against a forward pass at the sizes of networks in use
# make step_cost   a step with a method against the base optimizer's, and what it takes in memory
# make cut_cost    an iteration once units have left, against the share of the FLOPs that is left
# make stock       subnets as ordinary checkpoints of transformers and timm, read without this library; GGUF
# make export_zoo   every network of the test zoo, cut, as torch.export and ONNX programs
# make export_speed   slim models in eager mode, ONNX Runtime and AOTInductor, next to dense ones and to Torch-Pruning's
# make latency_budget   what a target in latency promises, next to what the subnet takes
# make exact_counts   every method reaches the count asked for: digits, ten seeds, 10 to 95 %
# make quality   accuracy per FLOP of one training next to Torch-Pruning, HESSO and narrow networks (hours, resumable)
# make quality_encoder   the pretrained sentence encoder at half of its FLOPs, in a long training (an hour)
# make quality_wall_time   seconds of a training with cuts over the dense one's
# make fuzz        10,000 mutated folders of saved subnets: a named error or the saved model, and nothing else
# make round_trips every network of the test zoo, saved here and loaded by a fresh process
#
# Both create .venv on the first call and rebuild it when pyproject.toml or this file changes. torch goes in
# first, so that nothing that depends on it chooses the build. TORCH_OPTIONS goes to that installation,
# for an index of your own, say.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_OPTIONS ?=
WORKERS ?= 2

BIN := $(VENV)/bin
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test architectures zoo generated scaling operators analysis_cost step_cost cut_cost exact_counts export_zoo export_speed stock quality quality_encoder quality_wall_time latency_budget fuzz round_trips lint format clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

$(VENV)/.torch: pyproject.toml Makefile
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH_OPTIONS) $(TORCH)
	@touch $@

$(VENV)/.demo: $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --editable ".[demo]"
	@touch $@

$(VENV)/.dev: $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

$(VENV)/.bench: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --editable ".[bench]"
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/python examples/digits.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -q -n $(WORKERS)

architectures: $(VENV)/.dev
	$(BIN)/python -m benchmarks.architectures

zoo generated scaling operators analysis_cost step_cost cut_cost exact_counts export_zoo latency_budget fuzz round_trips: $(VENV)/.dev
	$(BIN)/python -m benchmarks.$@

stock export_speed: $(VENV)/.bench
	$(BIN)/python -m benchmarks.$@

quality: $(VENV)/.bench
	$(BIN)/python -m benchmarks.quality --budget flops steps
	$(BIN)/python -m benchmarks.quality.same_size
	$(BIN)/python -m benchmarks.quality.report

quality_encoder: $(VENV)/.bench
	$(BIN)/python -m benchmarks.quality --task minilm_long --levels 0.5 --seeds 1 --competitor ours \
		--out benchmarks/results/quality_encoder.jsonl

quality_wall_time: $(VENV)/.bench
	$(BIN)/python -m benchmarks.quality.wall_time

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
