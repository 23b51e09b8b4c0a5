# make demo: everything on the embedded base.   make real: the same on a real one.   make test: the suite.
# make gpu: what a GPU shows, in ten minutes.
# Each sets up what it needs.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

BASE := smollm2-135m

.PHONY: demo real test slow gpu lint setup clean

demo: setup
	$(BIN)/dft-lora demo --out runs/demo

real: setup
	$(BIN)/dft-lora demo --base $(BASE) --out runs/real

test: setup
	$(BIN)/python -m pytest

slow: setup
	$(BIN)/python -m pytest -m slow -n 0

gpu: setup
	$(BIN)/python -m dft_lora.bench gpu --out runs/gpu --minutes 10

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
