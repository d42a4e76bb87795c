# Everything from a fresh clone: each target sets up what it needs. PYTHON chooses the interpreter (3.10 or newer).
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The versions that CI tests with; any torch >= 2.11 with triton >= 3.6 works: `make test TRITON=triton==3.6.0
# VENV=.venv-3.6` tests with another release.
TORCH ?= torch==2.13.0
TRITON ?= triton==3.8.0
# The interpreter of Triton 3.6 fails with a newer NumPy, on a range whose bounds are tensors.
NUMPY ?= $(if $(filter triton==3.6%,$(TRITON)),numpy<2.4,numpy)
RAW := PYTHONPATH=.:kernels
# One thread a process: the tests run in as many processes as there are cores.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q
WORKERS ?= 2
# pip's output: progress bars on a terminal, errors alone in a log.
PIP_WORDS := $(shell test -t 2 || echo --quiet)
# Where benchmarks put their files; a file whose marked block a report rewrites from them, none if empty.
RESULTS ?= benchmarks/results
README =
REPORT = $(RAW) $(BIN)/python -m benchmarks report --results $(RESULTS) $(if $(README),--readme $(README))

# For the targets that install nothing: sets `python` to that of the environment if it has torch, else to PYTHON, and
# ends with one line where that cannot import what the target NEEDS.
define FIND_PYTHON
python="$(PYTHON)"; \
if $(BIN)/python -c "import torch" 2>/dev/null; then python="$(BIN)/python"; fi; \
words=$$($$python -c "import $(NEEDS)" 2>&1) || { \
	echo "make $@ needs a Python with $(NEEDS): $$python: $$(echo "$$words" | tail -n 1)" >&2; exit 1; }
endef

.PHONY: setup test test-cpu test-interpreted test-compiled test-neighbours test-emulated gpu-test gpu-sanitize gpu lint format demo bench report clean

setup: $(VENV)/.installed

# pip shows its progress on a terminal.
$(VENV)/.installed: pyproject.toml
	@echo "Setting up $(VENV): 2.5 GB on the disk with a build of PyTorch for CPUs, 8 GB and more with one for CUDA."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP_WORDS) $(TORCH) $(TRITON) "$(NUMPY)"
	$(BIN)/pip install $(PIP_WORDS) --editable ".[dev]" "$(NUMPY)"
	@touch $@

# Interpreted and compiled kernels need separate processes: TRITON_INTERPRET is read when a kernel is decorated.
test: test-cpu test-interpreted test-compiled test-neighbours

test-cpu: setup
	$(TEST) -n $(WORKERS) --dist loadgroup tests/cpu tests/examples tests/gpu

test-interpreted: setup
	TRITON_INTERPRET=1 $(TEST) -n $(WORKERS) tests/interpreted

# The emulator by itself; then the kernels as compiled for GPUs that are not there, some of them executed.
test-compiled: setup
	$(TEST) -n $(WORKERS) --maxschedchunk 1 -m "not long" tests/emulator tests/compiled

# With the libraries of docs/neighbours.md, added to the environment: 230 MB, no other release of PyTorch or Triton.
test-neighbours: $(VENV)/.neighbours
	$(TEST) tests/neighbours
	$(TEST) tests/cpu/test_docs.py -k neighbours

$(VENV)/.neighbours: $(VENV)/.installed
	$(BIN)/pip install $(PIP_WORDS) $(TORCH) $(TRITON) "$(NUMPY)" --editable ".[neighbours]"
	$(BIN)/python -c "import lightning, opacus, sb3_contrib, torchrl"
	@touch $@

# What of that takes too long for every change: all cases that are executed, all planted faults.
test-emulated: setup
	$(TEST) -n $(WORKERS) --maxschedchunk 1 -m long tests/emulator tests/compiled

# On a machine with a GPU, from the checkout, with the Python that is there.
gpu-test: NEEDS = torch, triton, pytest
gpu-test:
	@$(FIND_PYTHON); set -x; $(RAW) $$python -m pytest -q -m gpu tests/gpu

# The kernels under NVIDIA's compute-sanitizer: accesses outside of tensors, races in shared memory, uneven barriers.
gpu-sanitize: NEEDS = torch, triton, pytest
gpu-sanitize:
	@$(FIND_PYTHON); set -e; for tool in memcheck racecheck synccheck; do \
		$(RAW) PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 9 \
			$$python -m tests.support.small_launches; done

# Trains the four main forms of the cell against torch.nn.LSTM on real text. One thread: on a busy machine PyTorch's
# threads wait for each other and a run takes minutes; with one it takes as long as it takes alone.
demo: setup
	mkdir -p demo
	OMP_NUM_THREADS=1 $(BIN)/python examples/train_text.py --steps 200 --plot demo/curves.png

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# On a CPU: its suites, then tables and plots of all results there are.
bench: setup
	$(RAW) $(BIN)/python -m benchmarks run --suite cpu --suite overhead --suite overhead-cell --suite compile \
		--device cpu --budget 280 --results $(RESULTS)
	$(REPORT)

# On a machine with a GPU, from the checkout, with the Python that is there: parity tests, constants, suites.
gpu: NEEDS = torch, triton, pytest, typer, rich
gpu:
	@$(FIND_PYTHON); set -x; $(RAW) $$python -m benchmarks gpu --budget 540 --results $(RESULTS)

# Tables and plots from the results files that are there; with README=README.md its block, too.
report: setup
	$(REPORT)

clean:
	rm -rf $(VENV) demo build dist .pytest_cache .hypothesis .mypy_cache .ruff_cache
