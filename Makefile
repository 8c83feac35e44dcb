# Everything here can be typed by hand; the README says how.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RUN := quickstart-$(shell date +%Y%m%d-%H%M%S)

.PHONY: help quickstart test test-gpu test-slow test-demo faults audit lint benchmark benchmark-gpu benchmark-smoke scaling tensorboard outside wheel docs docs-serve notebooks constraints clean
help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 18

# Of what pip installs without compiling, only what is imported is compiled, once: 20 s less.
unexport PYTHONDONTWRITEBYTECODE
$(INSTALLED): pyproject.toml plugins/serve/pyproject.toml constraints.txt plugins/amx_kernels/lightning_lora_amx/kernels.c
	@echo "installing pinned versions into $(VENV): some minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[embedded,dev]' -e plugins/serve
	@if grep -qs amx_bf16 /proc/cpuinfo; then $(BIN)/python -m pip install --quiet -c constraints.txt -e plugins/amx_kernels; fi
	@touch $@

quickstart: $(INSTALLED)  ## install, fine-tune on film reviews, test before and after (minutes)
	$(BIN)/python main.py fit --name $(RUN)
	$(BIN)/python main.py test --run logs/$(RUN) --baselines true
	@echo "with:          source $(BIN)/activate"

test: $(INSTALLED)  ## the whole test suite, offline, on the CPU
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-gpu: $(INSTALLED)  ## what needs a GPU, and training on it (python -m pytest -m gpu, where torch is there already)
	$(BIN)/python -m pytest -m gpu

test-slow: $(INSTALLED)  ## the embedded default at full size, every architecture in every export format
	$(BIN)/python -m pytest -m slow

test-demo: $(INSTALLED)  ## the page of demo, and Spaces: installs Gradio and Playwright; in Chromium where that is installed
	$(BIN)/python -m pip install --quiet -c constraints.txt -e 'plugins/demo[browser]'
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m pytest -rs plugins/demo tests/export/test_space.py

faults: $(INSTALLED)  ## kills, signals, damage and hostile files, all of them (a quarter of an hour)
	$(BIN)/python -m pytest tests/faults tests/experiments/test_ablate.py tests/experiments/test_search.py \
		tests/commands/test_fit_budget.py tests/experiments/test_cluster.py tests/inference/test_predict_files.py -m "faults or not faults"

audit: $(INSTALLED)  ## known vulnerabilities of the pinned packages (needs the network)
	$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/pip-audit -r constraints.txt --no-deps --disable-pip

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

benchmark: $(INSTALLED)  ## this project and its peers on the same rows, half an hour: DATA=folder BENCHMARK='more options'
	$(BIN)/python benchmarks/suite.py --out logs/benchmark $(if $(DATA),--data $(DATA)) $(BENCHMARK)

benchmark-gpu: $(INSTALLED)  ## packed and captured steps on a GPU, right and how fast, beside the Trainer
	$(BIN)/python benchmarks/gpu.py --out logs/gpu.json

benchmark-smoke: $(INSTALLED)  ## the same with a few rows: does it still run?
	$(BIN)/python benchmarks/suite.py --smoke --out logs/benchmark-smoke
	$(BIN)/python benchmarks/gpu.py --tiny --only training evaluation fallback architectures

scaling: $(INSTALLED)  ## how cost grows with rows, length, rank and batch
	$(BIN)/python benchmarks/scaling.py --out logs/scaling

tensorboard: $(INSTALLED)  ## curves of all runs, on this machine only
	$(BIN)/tensorboard --logdir logs --host 127.0.0.1

outside: $(INSTALLED)  ## do other programs read what runs leave? twelve of them, some minutes; or one export: EXPORT=logs/NAME/export TEXTS=file
ifdef EXPORT
	$(PYTHON) -m venv .venv-outside
	.venv-outside/bin/python -m pip install --quiet -c constraints.txt torch transformers peft safetensors tokenizers onnxruntime
	.venv-outside/bin/python examples/load_anywhere.py $(EXPORT) $(TEXTS)
else
	$(PYTHON) -m venv .venv-clients
	$(BIN)/python -c "import site; print(f'import site; site.addsitedir({site.getsitepackages()[0]!r})')" > "$$(echo .venv-clients/lib/python*/site-packages)/project.pth"
	.venv-clients/bin/python -m pip install --quiet 'mlflow>=3.17' openvino optuna-dashboard playwright polars sentence-transformers
	.venv-clients/bin/python benchmarks/outside.py --out logs/outside
endif

wheel: $(INSTALLED)  ## build the distribution, and use the wheel in a fresh environment, from another folder (needs the network)
	$(BIN)/python -m pip install --quiet -c constraints.txt build twine
	rm -rf dist .venv-wheel && $(BIN)/python -m build --outdir dist . \
		&& for plugin in demo serve; do $(BIN)/python -m build --wheel --outdir dist plugins/$$plugin; done && $(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet -c constraints.txt "$$(ls dist/lightning_lora-*.whl)[embedded]" dist/lightning_lora_serve-*.whl
	folder=$$(mktemp -d) && environment=$$PWD/.venv-wheel/bin && cd $$folder && $$environment/lightning-lora recipes > recipes.txt \
		&& $$environment/lightning-lora serve --help > serve.txt \
		&& $$environment/lightning-lora fit --config default --data.train_rows 100 --data.val_size 20 --data.max_length 64 --trainer.max_epochs 1 --name first \
		&& $$environment/lightning-lora predict --run logs/first 'A beautiful film, wonderfully acted.' && rm -r $$folder

docs: $(INSTALLED)  ## build the site of docs/ into site/, a warning is an error
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

notebooks: docs  ## write the notebooks of docs/tutorials from their scripts
	$(BIN)/jupytext --quiet --to ipynb docs/tutorials/*.py

docs-serve: docs  ## show it on this machine
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

constraints:  ## renew constraints.txt: the newest versions that fit together, torch as it is (then: make clean test)
	$(PYTHON) -m venv .venv-new
	.venv-new/bin/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)" -e '.[embedded,dev,docs,scale]' -e plugins/serve -e 'plugins/demo[browser]' build twine
	.venv-new/bin/python -m pip check
	.venv-new/bin/python -m pip freeze --exclude-editable > .venv-new/frozen
	{ grep '^#' constraints.txt; sed 's/+cpu$$//' .venv-new/frozen | LC_ALL=C sort -f; } > constraints.new
	mv constraints.new constraints.txt && rm -rf .venv-new

clean:  ## remove the environment and caches of tools (runs stay)
	rm -rf $(VENV) .venv-outside .venv-clients .venv-wheel dist site .pytest_cache .mypy_cache .ruff_cache build *.egg-info plugins/*/build plugins/*/*.egg-info plugins/*/*/_kernels*
