# make demo: everything on the embedded base.   make real: the same on a real one.   make test: the suite.
# Each sets up what it needs.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

BASE := smollm2-135m

.PHONY: demo real test slow lint setup clean

demo: setup
	$(BIN)/dft-lora demo --out runs/demo

real: setup
	$(BIN)/dft-lora demo --base $(BASE) --out runs/real

test: setup
	$(BIN)/python -m pytest

slow: setup
	$(BIN)/python -m pytest -m slow -n 0

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

setup: $(READY)

$(READY): pyproject.toml constraints.txt setup.sh
	./setup.sh $(VENV)
	touch $@

clean:
	rm -rf $(VENV)
