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

# Two processes; a file of tests stays in one, since its tests share what is dear to make. Tests that start Ray clusters
# and kill them come after, one at a time: two clusters on one machine get into each other's way.
CLUSTERS := tests/test_runner.py tests/test_submit.py tests/test_train_ray.py
test: check
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile $(addprefix --ignore=,$(CLUSTERS))
	$(BIN)/python -m pytest $(CLUSTERS)

test-slow: venv
	$(BIN)/python -m pytest -m slow

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Trains what ships in fourmill/demo/checkpoints again, from scenes: about three hours of CPU time, one thread
# (docs/demo-checkpoints.md).
TEACHERS := $(BIN)/python -m fourmill.demo.teachers
demo-checkpoints: venv
	$(TEACHERS) depth --minutes 18
	$(TEACHERS) normal --minutes 12
	$(TEACHERS) semseg --minutes 18
	$(TEACHERS) panoptic --minutes 37
	$(TEACHERS) detection --minutes 13
	$(TEACHERS) sam --minutes 33
	$(TEACHERS) clip --minutes 6
	$(TEACHERS) caption --minutes 26
	$(BIN)/python -m fourmill.demo.tokenizers

clean:
	rm -rf $(VENV) runs
