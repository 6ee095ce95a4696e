# make demo   installs into .venv and runs the main job on a tiny SDXL; its last line names the picture
# make test   installs into .venv and runs ruff, mypy and pytest; its last line is pytest's
# make lint   ruff and mypy only
# make parity the tests that claim bitwise equality, with other kernels and numbers of threads; some hours
# make newest make test in .venv-newest, with the newest versions of all packages, and with torchvision (6 GB)
# make clean  removes what the build and the tools left, .venv and .venv-newest
#
# make test PYTEST_ARGS='-k layers' WORKERS=0    some tests, in one process
# make parity SETTINGS=OTHER_KERNELS=1 THREADS=1 in one setting only
# make test PYTHON=python3.12                    another interpreter (before .venv is made)
# make demo CONSTRAINTS=                         the newest versions in place of the tested ones

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
PYTEST_ARGS ?=
CONSTRAINTS ?= -c constraints.txt
# PyPI's torch for Linux brings CUDA along, gigabytes of it; without a GPU the CPU build is asked for first.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi 2>/dev/null),,https://download.pytorch.org/whl/cpu)
# Packages that come first, in one step: torch and torchvision must match.
FIRST ?=
# What lets libraries choose other kernels: the processor's own, AVX2 at most in MKL and in oneDNN, ATen without vectors,
# and kernels that round differently by name (tests/other_kernels.py). Each is an assignment of the environment.
SETTINGS ?= OTHER_KERNELS=0 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=default \
            OTHER_KERNELS=1
THREADS ?= 1 2

PIP := $(VENV)/bin/python -m pip
INPUTS := setup.py pyproject.toml constraints.txt
# Two workers on two cores: one thread each, else they wait for one another.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export MPLBACKEND ?= Agg

.PHONY: demo test lint parity newest clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(VENV)/bin/python tools/demo.py

test: lint
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m mypy

# All settings are tried, whatever fails; as many processes times threads as there are workers.
parity: $(VENV)/.installed-dev
	@failed=; for threads in $(THREADS); do for setting in $(SETTINGS); do \
		echo "== $$setting OMP_NUM_THREADS=$$threads"; \
		env $$setting OMP_NUM_THREADS=$$threads $(VENV)/bin/python -m pytest --bitwise --dist loadfile \
			-n $$(( ($(WORKERS) + threads - 1) / threads )) $(PYTEST_ARGS) || failed="$$failed $$setting/$$threads"; \
	done; done; if [ -n "$$failed" ]; then echo "Failed with:$$failed"; exit 1; fi

# PyPI's torchvision cannot be imported beside the CPU build of torch.
newest:
	$(MAKE) test VENV=.venv-newest CONSTRAINTS= TORCH_INDEX= FIRST='torch torchvision'

# The stamps are written last, so an install that broke off is done again.
$(VENV)/.made:
	$(PYTHON) -m venv --clear $(VENV)
	$(if $(TORCH_INDEX),$(PIP) install --no-deps --retries 0 --timeout 15 --index-url $(TORCH_INDEX) $(CONSTRAINTS) torch \
		|| echo 'No CPU build of torch at $(TORCH_INDEX); taking the default one.')
	$(if $(FIRST),$(PIP) install $(CONSTRAINTS) $(FIRST))
	touch $@

$(VENV)/.installed: $(VENV)/.made $(INPUTS)
	$(PIP) install $(CONSTRAINTS) -e .
	touch $@

$(VENV)/.installed-dev: $(VENV)/.made $(INPUTS)
	$(PIP) install $(CONSTRAINTS) -e '.[dev]'
	touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) .venv-newest build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache diffengine_sdxl/.mim
	find diffengine_sdxl tools tests configs -name __pycache__ -prune -exec rm -rf {} +
