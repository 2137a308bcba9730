VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: setup demo space test lint style clean

# One set-up for everything: the pinned versions, the package itself in editable mode.
# torch goes first: where a local CPU build of the pinned version is offered, pip takes it before anything asks for CUDA.
$(READY): setup.cfg pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(VENV)/bin/pip install --quiet -c constraints.txt torch
	$(VENV)/bin/pip install --quiet -c constraints.txt -e ".[eval,demo,dev]"
	touch $(READY)

setup: $(READY)

# Trains the bundled digits on the CPU in about two minutes; the last lines say where everything lies.
# One thread: for so small a network a second one gains little, and on a busy machine it loses tenfold.
demo: $(READY)
	OMP_NUM_THREADS=1 $(PYTHON) train_unconditional.py --preset digits --output_dir runs/digits --overwrite_output_dir

# Opens the Space on the model that `make demo` made, or another: make space MODEL=folder or Hub id
MODEL := runs/digits
space: $(READY)
	DDPM_MODEL=$(MODEL) $(PYTHON) spaces/app.py

test: $(READY)
	$(PYTHON) -m pytest

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

style: $(READY)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) runs
