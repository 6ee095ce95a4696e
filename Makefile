# make demo   installs into .venv and runs the main job on a tiny SDXL; its last line names the picture
# make test   installs into .venv and runs ruff, mypy and pytest; its last line is pytest's
# make lint   ruff and mypy only
# make clean  removes what the build and the tools left, and .venv
#
# make test PYTEST_ARGS='-k layers' WORKERS=0    some tests, in one process
# make test PYTHON=python3.12                    another interpreter (before .venv is made)
# make demo CONSTRAINTS=                         the newest versions in place of the tested ones

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PYTEST_ARGS ?=
CONSTRAINTS ?= -c constraints.txt
# PyPI's torch for Linux brings CUDA along, gigabytes of it; without a GPU the CPU build is asked for first.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi 2>/dev/null),,https://download.pytorch.org/whl/cpu)

PIP := $(VENV)/bin/python -m pip
INPUTS := setup.py pyproject.toml constraints.txt
# Two workers on two cores: one thread each, else they wait for one another.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export MPLBACKEND ?= Agg

.PHONY: demo test lint clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(VENV)/bin/python tools/demo.py

test: lint
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m mypy

# The stamps are written last, so an install that broke off is done again.
$(VENV)/.made:
	$(PYTHON) -m venv --clear $(VENV)
	$(if $(TORCH_INDEX),$(PIP) install --no-deps --retries 0 --timeout 15 --index-url $(TORCH_INDEX) $(CONSTRAINTS) torch \
		|| echo 'No CPU build of torch at $(TORCH_INDEX); taking the default one.')
	touch $@

$(VENV)/.installed: $(VENV)/.made $(INPUTS)
	$(PIP) install $(CONSTRAINTS) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.made $(INPUTS)
	$(PIP) install $(CONSTRAINTS) -e '.[dev]'
	touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache diffengine_sdxl/.mim
	find diffengine_sdxl tools tests configs -name __pycache__ -prune -exec rm -rf {} +
