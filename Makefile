# One set-up for everything: the first target that needs it makes .venv from constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
WORKERS ?= auto --dist worksteal
# A process each: Triton decides at import whether it interprets.
TESTS := cpu kernels compiled fake_cuda
SOME_KERNELS := (bf16 or bfloat16 or seeded or agree or nan_passes) and not (norms or heads or noise or recompute)
SLOW_COMPILED := test_compiles or family or norms or litmus or spills or refused or 1150 or (critical_path and sm_80)
SOME_COMPILED := (sm_90 and dense and bf16 and not norms) or not ($(SLOW_COMPILED))
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# A hundred tests start a process, and each would compile the package anew where this is set.
export PYTHONDONTWRITEBYTECODE :=
# The time of the files in a wheel: that of the last commit, or a fixed one.
export SOURCE_DATE_EPOCH ?= $(or $(shell git log -1 --format=%ct 2> /dev/null),315532800)

.PHONY: demo fuzz test test-whole test-triton36 test-triton39 test-oldest test-newest test-thirdparty lint fmt typecheck
.PHONY: kernels bench precision gpu rehearse mutants endure compatibility site wheel audit clean

demo: .venv/ready  ## train on handwritten digits; accuracy, times, out/digits.png
	$(BIN)/python -m fusedlstm train

test: .venv/ready  ## every test that this machine can run; a folder that fails does not stop the next
	@passed=; failed=; for folder in $(TESTS); do \
	if $(BIN)/pytest tests/$$folder -n $(WORKERS); then passed="$$passed $$folder"; else failed="$$failed $$folder"; fi; \
	done; echo "passed:$${passed:- none}; failed:$${failed:- none}"; test -z "$$failed"

test-whole:  ## the same with every grid whole (tests/helpers/grids.py)
	FUSEDLSTM_WHOLE_GRIDS=1 $(MAKE) test

# Kernel tests in bfloat16, the exchange, and the LSTM's kernels for sm_90, with the oldest Triton and with one that is
# newer than the extra `triton` allows: it narrows some loads, so the order of its machine code is not tested.
test-triton36: MACHINE_CODE := $(SOME_COMPILED)
test-triton39: MACHINE_CODE := ($(SOME_COMPILED)) and not critical_path
test-triton36 test-triton39: test-%: .venv-%/ready
	.venv-$*/bin/python -m pytest tests/kernels -n $(WORKERS) -k "$(SOME_KERNELS)"
	.venv-$*/bin/python -m pytest tests/compiled -n $(WORKERS) -k "$(MACHINE_CODE)"

# The ends of what setup.py claims: tests/cpu, and of the others as much as above. PyPI has these torches only with
# CUDA, gigabytes; PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu has small ones. PYTHON says which Python.
test-oldest test-newest: test-%: .venv-%/ready
	.venv-$*/bin/pytest tests/cpu -n $(WORKERS)
	.venv-$*/bin/pytest tests/kernels -n $(WORKERS) -k "$(SOME_KERNELS)"
	.venv-$*/bin/pytest tests/compiled -n $(WORKERS) -k "$(SOME_COMPILED)"

test-thirdparty: .venv-thirdparty/ready  ## other libraries' models train with ours (downloads 2.2 GB of libraries)
	.venv-thirdparty/bin/pytest tests/thirdparty --disable-warnings

lint: .venv/ready  ## check only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fmt: .venv/ready  ## rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

typecheck: .venv/ready  ## annotations; [tool.mypy] in pyproject.toml says of what
	$(BIN)/mypy

kernels: .venv/ready .venv-triton36/ready  ## compile every plan; rewrites kernels.csv and the list of spills
	$(BIN)/python -m bench.kernels
	.venv-triton36/bin/python -m bench.kernels --spills
	$(BIN)/python -m bench.kernels --refresh
	.venv-triton36/bin/python -m bench.kernels --spills

bench: .venv/ready  ## the CPU rows, and the tables and the picture of docs/benchmarks.md
	$(BIN)/python -m bench.run --set cpu
	$(BIN)/python -m bench.loops
	$(BIN)/python -m bench.report bench/results/cpu.csv --readme docs/benchmarks.md --block cpu \
	--picture docs/benchmarks.png

precision: .venv/ready  ## the errors of every layer against float64, for docs/precision.md; kernels interpreted
	TRITON_INTERPRET=1 $(BIN)/python -m bench.precision --page docs/precision.md

gpu:  ## on a machine with a GPU, with its own torch: tests, litmus tests, ceilings, checkers, table, profile; results in OUT
	$(PYTHON) -m bench.gpu --out $(or $(OUT),out/gpu)

rehearse: .venv/ready  ## the parts of `make gpu` on a CPU, interpreted, tiny: a minute
	$(BIN)/python -m bench.gpu --out $(or $(OUT),out/rehearsal) --rehearse

mutants: .venv/ready  ## faults on purpose: each must make a test fail (half an hour or more)
	$(BIN)/python tests/mutants.py

endure: .venv/ready  ## MINUTES (10) of training, threads, forks, interrupts, little memory: nothing grows, all is right
	$(BIN)/python tests/endure.py --minutes $(or $(MINUTES),10)

compatibility: .venv/ready  ## what users do with a layer, ours and torch's: a table in out/compatibility.md
	$(BIN)/python tests/compatibility.py

site: .venv/ready  ## the documentation as a site in out/site; a warning is an error
	rm -rf out/site
	$(BIN)/sphinx-build -qEW --keep-going -d out/doctrees docs out/site

wheel: .venv/ready  ## build the source distribution and from it the wheel, twice; check both; import and install them
	rm -rf build *.egg-info out/wheel out/again  # setuptools adds the files that an egg-info lists
	PYTHON=$(BIN)/python .ci/build . out/wheel
	$(BIN)/twine check --strict out/wheel/*
	tar -tzf out/wheel/fusedlstm-*.tar.gz | cut -d/ -f2- | sort > out/wheel/files
	git ls-files 2> /dev/null | grep -vE '^\.(github|gitignore|pre-commit)' | sort | comm -23 - out/wheel/files | \
	{ ! grep .; }  # what is missing
	mkdir -p out/again && umask 077 && tar -xzmf out/wheel/fusedlstm-*.tar.gz -C out/again --no-same-permissions
	PYTHON=$(BIN)/python .ci/build out/again/fusedlstm-* out/again
	cmp out/wheel/fusedlstm-*.tar.gz out/again/fusedlstm-*.tar.gz && cmp out/wheel/*.whl out/again/*.whl
	sha256sum out/wheel/fusedlstm-*
	$(PYTHON) -m zipfile -e out/wheel/fusedlstm-*.whl out/wheel/unpacked
	cd out/wheel/unpacked/fusedlstm && test -f py.typed && test -f plan/measured.json && test -f plan/spills.json
	cd out/wheel/unpacked && $(abspath $(BIN))/python -I -c "import sys; sys.path.insert(0, '.'); import fusedlstm; \
	from fusedlstm.kernels import recurrence_fwd; assert 'unpacked' in recurrence_fwd.__file__, recurrence_fwd.__file__; \
	print('wheel', fusedlstm.__version__, 'imports')"

fuzz: .venv/ready  ## calls drawn at random for MINUTES (10), right and wrong ones; prints the faulty ones as tests
	PYTHONPATH=tests/helpers $(BIN)/python -W ignore -m fuzz $(or $(MINUTES),10) $(SEED)

# What users install with the package, and what it is developed with. docutils has one file under the GPL, in Emacs Lisp.
LICENCES := MIT;BSD;Apache;PSF;Python Software Foundation;MPL;Mozilla Public License;ISC;0BSD;Zlib;CC0
audit: .venv/ready .venv-audit/ready  ## known vulnerabilities in constraints.txt (asks PyPI); licences of all of .venv
	.venv-audit/bin/pip-licenses --python $(BIN)/python --summary
	.venv-audit/bin/pip-licenses --python $(BIN)/python --partial-match --allow-only="$(LICENCES)" > /dev/null
	.venv-audit/bin/pip-licenses --python $(BIN)/python --partial-match --fail-on="GPL;General Public License" \
	--ignore-packages docutils > /dev/null
	.venv-audit/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

clean:
	rm -rf .venv .venv-* build dist out *.egg-info

# Without --no-compile pip takes half a minute more, for bytecode that mostly nobody imports.
.venv/ready: constraints.txt setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --no-compile -c constraints.txt setuptools wheel torch
	$(BIN)/pip install -q --no-compile -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

SITE := "import site; print(site.getsitepackages()[0])"
# Triton 3.6.0 cannot interpret loops with a newer numpy.
.venv-triton36/ready .venv-oldest/ready: TRITON = triton==3.6.0 "numpy<2.4"
.venv-triton39/ready: TRITON = triton==3.9.0 numpy
.venv-newest/ready: TRITON = "triton>=3.7,<3.8" numpy
.venv-oldest/ready: TORCH = torch==2.11.0
.venv-newest/ready: TORCH = torch

# Another Triton before all else that is in .venv.
.venv-triton36/ready .venv-triton39/ready: %/ready: .venv/ready
	test -x $*/bin/python || $(PYTHON) -m venv $*
	$*/bin/pip install -q --no-compile --no-deps $(TRITON)
	echo "import site; site.addsitedir('$$($(BIN)/python -c $(SITE))')" > $$($*/bin/python -c $(SITE))/all_else.pth
	touch $@

.venv-oldest/ready .venv-newest/ready: %/ready: constraints.txt setup.py
	test -x $*/bin/python || $(PYTHON) -m venv $*
	$*/bin/pip install -q $(TORCH) $(TRITON) setuptools wheel
	$*/bin/pip install -q --no-build-isolation $(TORCH) $(TRITON) -e ".[dev]"
	touch $@

.venv-audit/ready:
	test -x .venv-audit/bin/python || $(PYTHON) -m venv .venv-audit
	.venv-audit/bin/pip install -q pip-audit==2.10.1 pip-licenses==5.5.5
	touch $@

# Without dependencies: Triton is a gigabyte that no library here needs.
.venv-thirdparty/ready: tests/thirdparty/requirements.txt setup.py
	test -x .venv-thirdparty/bin/python || $(PYTHON) -m venv .venv-thirdparty
	.venv-thirdparty/bin/pip install -q -r tests/thirdparty/requirements.txt
	.venv-thirdparty/bin/pip install -q --no-build-isolation --no-deps -e .
	touch $@
