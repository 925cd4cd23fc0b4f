# `make demo` shows what reidreg does, `make test` whether it works. Both need Python 3.10 or newer,
# make and git, and make their environment in VENV.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUN    := log/quickstart

.PHONY: demo test check clean

demo: $(VENV)/.installed
	$(BIN)/reidreg fit --config configs/quickstart.yaml
	$(BIN)/reidreg evaluate --ckpt $(RUN)/checkpoints/best.ckpt --report
	@$(BIN)/python -c "import json; \
	lines = [json.loads(line) for line in open('$(RUN)/metrics.jsonl')]; \
	values = [line['val/mAP'] for line in lines if 'val/mAP' in line]; \
	print(f'mAP {values[0]:.1%} untrained, {max(values):.1%} trained')"
	@echo "figures: $(RUN)/metrics.json   to look at: $(RUN)/report/index.html"

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n auto

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache
