VENV := .venv
PYTHON := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: setup demo space test lint style clean

# Install the pinned versions, and this package in editable mode. Install torch first, so that pip picks a local CPU
# build of the pinned version, if there is one, before another package asks for CUDA. pip shows its progress.
$(READY): setup.cfg pyproject.toml constraints.txt
	@echo "Installing into $(VENV), about 2 GB. This takes one to two minutes, and the time of the downloads."
	python3 -m venv $(VENV)
	@echo "1 of 2: PyTorch"
	$(VENV)/bin/pip install -c constraints.txt torch
	@echo "2 of 2: diffusers, Gradio and the other packages"
	$(VENV)/bin/pip install -c constraints.txt -e ".[eval,demo,dev]"
	@touch $(READY)
	@echo "Installed. Now type: source $(VENV)/bin/activate"

setup: $(READY)

# Train on the bundled digits, three minutes on a CPU. The last lines of the output name the files.
# Use one thread: a second one gains little for so small a network, and makes it ten times slower on a busy machine.
demo: $(READY)
	OMP_NUM_THREADS=1 $(PYTHON) train_unconditional.py --preset digits --output_dir runs/digits --overwrite_output_dir

# Open the Space with the MNIST model of examples/, else with the model of `make demo`, or with another one:
# make space MODEL=FOLDER_OR_HUB_ID
MODEL := $(if $(wildcard examples/mnist/model_index.json),examples/mnist,runs/digits)
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
