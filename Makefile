# make demo | test | check | venv: each sets up what it needs. A fresh machine needs Python >= 3.10 with venv, and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: venv demo test test-slow check format demo-checkpoints clean

venv: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@echo "building $(VENV) from requirements.lock (about 3 minutes, 7 GB: PyTorch brings CUDA)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: venv
	$(BIN)/fourmill demo --out runs/demo

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest

test-slow: venv
	$(BIN)/python -m pytest -m slow

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Trains what ships in fourmill/demo/checkpoints again, from scenes: about an hour of CPU time (docs/demo-checkpoints.md).
demo-checkpoints: venv
	$(BIN)/python -m fourmill.demo.teachers depth --minutes 14
	$(BIN)/python -m fourmill.demo.teachers semseg --minutes 8
	$(BIN)/python -m fourmill.demo.teachers clip --minutes 6
	$(BIN)/python -m fourmill.demo.teachers caption --minutes 9
	$(BIN)/python -m fourmill.demo.tokenizers

clean:
	rm -rf $(VENV) runs
