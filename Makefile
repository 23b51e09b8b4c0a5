# make demo: the whole way on the embedded base.   make test: the suite.   Both set up what they need.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test slow lint setup clean

demo: setup
	$(BIN)/dft-lora demo --out runs/demo

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
