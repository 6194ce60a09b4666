# One set-up for everything: the first target that needs it makes .venv from constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= auto
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test test-whole test-triton36 test-thirdparty lint fmt kernels bench gpu rehearse mutants wheel clean

demo: .venv/ready  ## train on handwritten digits; accuracy, times, out/digits.png
	$(BIN)/python -m fusedlstm train

test: .venv/ready  ## every test that this machine can run, in four processes
	$(BIN)/pytest tests/cpu -n $(WORKERS)
	$(BIN)/pytest tests/kernels -n $(WORKERS)
	$(BIN)/pytest tests/compiled -n $(WORKERS)
	$(BIN)/pytest tests/fake_cuda -n $(WORKERS)

test-whole:  ## the same with every grid whole (tests/helpers/grids.py)
	FUSEDLSTM_WHOLE_GRIDS=1 $(MAKE) test

test-triton36: .venv-triton36/ready  ## kernel tests in bfloat16, the exchange, and the LSTM's kernels for sm_90, with Triton 3.6.0
	.venv-triton36/bin/pytest tests/kernels -n $(WORKERS) -k "(bf16 or bfloat16 or seeded or agree or nan_passes) and not norms"
	.venv-triton36/bin/pytest tests/compiled -n $(WORKERS) -k "(sm_90 and dense and bf16 and not norms) or not (test_compiles or family or norms)"

test-thirdparty: .venv-thirdparty/ready  ## other libraries' models train with ours (downloads 1.7 GB of libraries)
	.venv-thirdparty/bin/pytest tests/thirdparty --disable-warnings

lint: .venv/ready  ## check only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fmt: .venv/ready  ## rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

kernels: .venv/ready .venv-triton36/ready  ## compile every plan for every target; rewrites bench/results/kernels.csv and the list of spills
	$(BIN)/python -m bench.kernels
	.venv-triton36/bin/python -m bench.kernels --spills
	$(BIN)/python -m bench.kernels --refresh
	.venv-triton36/bin/python -m bench.kernels --spills

bench: .venv/ready  ## the CPU rows and README's table
	$(BIN)/python -m bench.run --set cpu
	$(BIN)/python -m bench.report bench/results/cpu.csv --readme README.md --block cpu

gpu:  ## on a machine with a GPU, with its own Python and torch: tests, ceilings, checkers, table, profile; results in OUT
	$(PYTHON) -m bench.gpu --out $(or $(OUT),out/gpu)

rehearse: .venv/ready  ## the parts of `make gpu` on a CPU, interpreted, tiny: a minute
	$(BIN)/python -m bench.gpu --out $(or $(OUT),out/rehearsal) --rehearse

mutants: .venv/ready  ## faults on purpose: each must make a test fail (some minutes)
	$(BIN)/python tests/mutants.py

wheel: .venv/ready  ## build the wheel and import it from outside the repository
	rm -rf build out/wheel
	$(BIN)/pip wheel -q --no-deps --no-build-isolation -w out/wheel .
	$(PYTHON) -m zipfile -e out/wheel/fusedlstm-*.whl out/wheel/unpacked
	cd out/wheel/unpacked && ../../../$(BIN)/python -I -c "import sys; sys.path.insert(0, '.'); import fusedlstm; \
	from fusedlstm.kernels import recurrence_fwd; assert 'unpacked' in recurrence_fwd.__file__, recurrence_fwd.__file__; \
	print('wheel', fusedlstm.__version__, 'imports')"

clean:
	rm -rf .venv .venv-triton36 .venv-thirdparty build dist out *.egg-info

.venv/ready: constraints.txt setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt setuptools wheel torch
	$(BIN)/pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

# Triton 3.6.0 cannot interpret loops with a newer numpy.
.venv-triton36/ready: constraints.txt setup.py
	test -x .venv-triton36/bin/python || $(PYTHON) -m venv .venv-triton36
	.venv-triton36/bin/pip install -q torch==2.13.0 triton==3.6.0 "numpy<2.4" pytest==9.1.1 pytest-xdist==3.8.0 rich==15.0.0 setuptools wheel
	.venv-triton36/bin/pip install -q --no-build-isolation --no-deps -e .
	touch $@

# Without dependencies: Triton is a gigabyte that no library here needs.
.venv-thirdparty/ready: tests/thirdparty/requirements.txt setup.py
	test -x .venv-thirdparty/bin/python || $(PYTHON) -m venv .venv-thirdparty
	.venv-thirdparty/bin/pip install -q -r tests/thirdparty/requirements.txt
	.venv-thirdparty/bin/pip install -q --no-build-isolation --no-deps -e .
	touch $@
