# The two commands of a fresh machine: `make demo` and `make test`. Both make a virtual environment in .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO := runs/demo
DATA := $(DEMO)/data

.DELETE_ON_ERROR:
.PHONY: help install demo page test test-slow test-all lint format clean-demo

help:
	@echo "make demo      synthetic data, training, evaluation and report under $(DEMO) (two CPU cores)"
	@echo "make page      the model of make demo on a page in the browser"
	@echo "make test      style, format, imports, spelling, types and the fast tests"
	@echo "make test-all  the same, then the tests that start and kill processes"
	@echo "make install   the virtual environment in $(VENV)"
	@echo "make lint      style, format, imports, spelling and types"
	@echo "make format    format the code"
	@echo "make clean-demo  remove $(DEMO)"

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq --disable-pip-version-check --upgrade pip
	$(BIN)/pip install -qq --no-compile -e ".[dev]"
	@# Byte code, by all cores: it only saves time, and PyTorch has a file for newer versions of Python
	$(BIN)/python -m compileall -qq -j 0 -x "/tests?/|/testing/_internal/" $(VENV)/lib || \
		echo "some files were not compiled ahead; they are when they are first imported"
	touch $@

demo: $(DEMO)/report.html
	@$(BIN)/python scripts/demo_summary.py $(DEMO)

# Answers until it is interrupted; the address is printed
page: demo
	@$(BIN)/python -c "import gradio, uvicorn" 2> /dev/null || $(BIN)/pip install --quiet -e ".[page]"
	@$(BIN)/annexe serve $(DEMO) --page

# Runs a stage and notes its seconds: $(call stage,NAME,COMMAND)
stage = start=$$(date +%s); $(2) && mkdir -p $(DEMO) && \
	echo "$(1) $$(($$(date +%s) - start))" >> $(DEMO)/stages.txt

$(DATA)/synthetic.json: | install
	$(call stage,drawing,$(BIN)/annexe synth $(DATA) --images 3400 --seed 1 --height 240)

$(DEMO)/trained: $(DATA)/synthetic.json
	$(call stage,training,$(BIN)/torchrun --standalone --nproc_per_node 1 train.py \
		--cfg-path train_configs/annexe_tiny.yaml --options run.output_dir=$(DEMO) \
		datasets.ego_irgbench.data_root=$(DATA) run.resume=auto)
	touch $@

$(DEMO)/eval/metrics.json: $(DEMO)/trained
	$(call stage,evaluation,$(BIN)/torchrun --standalone --nproc_per_node 1 \
		eval_scripts/eval_egoirgbench.py --cfg-path eval_configs/annexe_tiny.yaml \
		--dataset ego_irgbench --options run.checkpoint=$(DEMO) run.output_dir=$(DEMO)/eval \
		datasets.ego_irgbench.data_root=$(DATA))

$(DEMO)/report.html: $(DEMO)/eval/metrics.json
	rm -rf $(DEMO)/report
	cp -r $(DEMO)/eval/report $(DEMO)/report
	cp $(DEMO)/eval/report.html $@

PYTEST := $(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist worksteal

test: install lint
	$(PYTEST) -m "not slow"

test-slow: install
	$(PYTEST) -m slow

test-all: test test-slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/codespell
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean-demo:
	rm -rf $(DEMO)
