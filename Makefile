# Two commands for a new user: `make demo` and `make test`. Each makes .venv if it is missing and installs what it
# needs; a second run starts at once. `make PYTHON=python3.12 demo` uses another interpreter, in .venv-python3.12.

PYTHON ?= python3
ifeq ($(origin PYTHON),file)
VENV ?= .venv
else
VENV ?= .venv-$(notdir $(PYTHON))
endif
BIN := $(VENV)/bin
ARGS ?=
# A process for each core, four at most: each holds PyTorch. A file's tests stay in one process, and share what they made.
PARALLEL ?= -n auto --maxprocesses 4 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow fuzz check format bench bench-machinery bench-similarity bench-sweeps bench-prediction bench-allocator bench-store bench-views bench-residency bench-trials experiments zoo clean

help:
	@echo "make demo    compare the levels of recycling on images and texts (ARGS=--quick: in 90 seconds)"
	@echo "make test    run the tests"
	@echo "make fuzz ARGS='--count 200000'   open so many hostile stores; a failure is made small and its files are kept"
	@echo "make check   format, lint, types and tests"
	@echo "make bench   measure against the same suffix trained from RAM tensors, by hand"
	@echo "make bench-machinery   microseconds that a recycled step adds, and where they go"
	@echo "make bench-similarity   training through Lightning's trainer, and evaluating 20,000 objects"
	@echo "make bench-sweeps ARGS='--cars DIR --faq FILE'   two sweeps on real data (an hour on two cores)"
	@echo "make bench-prediction ARGS='--cars DIR --faq FILE'   what is predicted of each level beside what comes (ten minutes)"
	@echo "make bench-allocator   what it costs that freed memory goes back to the system (five minutes)"
	@echo "make bench-store   the store against RAM, the disk and five others, with 4 GB each (ARGS=--quick: in a minute)"
	@echo "make bench-views ARGS='--cars DIR'   quality against the number of views, and augmented activations (an hour)"
	@echo "make bench-residency   step times of three models, from disk, RAM and GPU, against the suffix by hand"
	@echo "make bench-trials ARGS=cars/   20 trials over one fill beside 20 ordinary ones"
	@echo "make experiments CARS=DIR FAQ=FILE   quality by level, by amount of data, speed (eight hours; goes on if stopped)"
	@echo "make zoo     cut some 750 models of five libraries and judge each (hours; ARGS=--sample: in three minutes)"
	@echo "make clean   remove the virtual environment and what the demo keeps"
	@echo "make PYTHON=python3.12 demo   with another interpreter"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "$(PYTHON) is not Python 3.10 or newer: name one with make PYTHON=python3.12 demo"; exit 1; }
	@echo "Making $(VENV) with $$($(PYTHON) --version) ..."
	@$(PYTHON) -m venv $(VENV) || { echo "python -m venv failed: on Debian, apt install python3-venv"; exit 1; }

# One stamp per set of extras: made anew when pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml $(BIN)/python
	@echo "Installing torchrecycle with the extra '$*' into $(VENV) (PyTorch is large: minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$*]'
	@touch $@

demo: $(VENV)/.installed-demo
	@$(BIN)/torchrecycle demo $(ARGS)

test: $(VENV)/.installed-test
	@echo "Running the tests ..."
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-slow: $(VENV)/.installed-test
	@$(BIN)/python -m pytest -m slow $(ARGS)

fuzz: $(VENV)/.installed-test
	@OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz/store.py $(ARGS)

check: $(VENV)/.installed-dev
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright --pythonpath $(BIN)/python
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) $(ARGS)

format: $(VENV)/.installed-dev
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(VENV)/.installed-demo
	@$(BIN)/python benchmarks/bench.py $(ARGS)

bench-machinery: $(VENV)/.installed-demo
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/machinery.py $(ARGS)

bench-similarity: $(VENV)/.installed-test
	@$(BIN)/python benchmarks/similarity.py $(ARGS)
	@$(BIN)/python benchmarks/evaluation.py

bench-sweeps: $(VENV)/.installed-demo
	@$(BIN)/python benchmarks/sweeps.py $(ARGS)

bench-prediction: $(VENV)/.installed-demo
	@$(BIN)/python benchmarks/prediction.py $(ARGS)

bench-allocator: $(VENV)/.installed-demo
	@$(BIN)/python benchmarks/allocator.py $(ARGS)

bench-store: $(VENV)/.installed-bench
	@$(BIN)/python benchmarks/keys.py $(filter --quick --no-results,$(ARGS))
	@$(BIN)/python benchmarks/store.py $(ARGS)
	@$(BIN)/python benchmarks/filling.py $(filter --no-results,$(ARGS)) $(if $(filter --quick,$(ARGS)),--objects 256 --rounds 1)

bench-views: $(VENV)/.installed-demo
	@$(BIN)/python benchmarks/views.py --table docs/augmentation.md --plot docs/augmentation.svg $(ARGS)

bench-residency: $(VENV)/.installed-demo
	@$(BIN)/python benchmarks/residency.py $(ARGS)

bench-trials: $(VENV)/.installed-test
	@$(BIN)/python benchmarks/trials.py $(ARGS)

# Hours on two cores; a run that is stopped goes on where it was.
experiments: $(VENV)/.installed-demo
	@test -e "$(CARS)" -a -e "$(FAQ)" || { echo "make experiments CARS=cars/ FAQ=cloud_faq_dataset.jsonl"; exit 1; }
	@$(BIN)/python experiments/seconds.py --cars $(CARS) --faq $(FAQ)
	@$(BIN)/python experiments/speed.py
	@$(BIN)/python experiments/classification.py --faq $(FAQ)
	@$(BIN)/python experiments/questions.py --faq $(FAQ)
	@$(BIN)/python experiments/levels.py --cars $(CARS)
	@$(BIN)/python experiments/amount.py --cars $(CARS)
	@$(BIN)/python experiments/levers.py --cars $(CARS)
	@$(BIN)/python experiments/tables.py docs/experiments.md

zoo: $(VENV)/.installed-zoo
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/zoo/run.py --table docs/zoo.md $(ARGS)

clean:
	rm -rf $(VENV) .torchrecycle-demo
