# make test         environments, ruff, then the whole core suite (CPU, no network after installation)
# make lint         ruff, pinned, in an environment of its own
# make test-faults  every broken file, flag and setting on the real commands, three ways
# make demo         environment, then train.py on the bundled model, data and tests
# make results      every experiment of lab/ that is not cached, the figures, docs/results.md
# make figures      docs/figures from the recorded results and from the losses themselves
# make bench        speed and memory beside transformers, PEFT and TRL; takes hours, can be stopped
# make test-peers   parity with transformers, PEFT and TRL, in an environment of their own
# make test-crash   KILLS=200 kills at random moments, POINTS=60 at chosen system calls, bad disks
# make test-properties   tests/properties: 200 drawn examples each, in an environment of its own
# make coverage     the core suite again, measured: 97% of all lines and branches, losses and LoRA 100%
# make mutants      how many small faults the tests notice, file by file; an hour, see docs/mutants.md
# make red          every mutation that a test names, applied to a copy: each must turn its test red
# make TORCH_INDEX=URL ...   takes torch from another index, such as PyTorch's own CPU builds
PYTHON ?= python3
TORCH_INDEX ?=
KILLS ?= 200
POINTS ?= 60
ONE = OMP_NUM_THREADS=1

test: lint .venv/ready
	$(ONE) .venv/bin/python -m pytest

lint: .venv-lint/ready
	.venv-lint/bin/ruff check .

test-faults: .venv/ready
	$(ONE) .venv/bin/python -m tests.faults.run
	$(ONE) .venv/bin/python -O -m tests.faults.run
	LC_ALL=C PYTHONUTF8=0 $(ONE) .venv/bin/python -m tests.faults.run

demo: .venv/ready
	.venv/bin/python train.py

results: .venv/ready
	for name in tables scores mixture shapes beta saturation optimum online hints figures \
		math_figures results; do \
		$(ONE) .venv/bin/python -m lab.$$name || exit 1; done

figures: .venv/ready
	.venv/bin/python -m lab.figures
	.venv/bin/python -m lab.math_figures

bench: .venv-peers/ready
	.venv-peers/bin/python -m bench.run

test-peers: .venv-peers/ready
	$(ONE) .venv-peers/bin/python -m pytest tests/peers

test-crash: .venv/ready
	$(ONE) .venv/bin/python -m tests.crash.run --kills $(KILLS) --points $(POINTS)
	$(ONE) .venv/bin/python -m tests.crash.disk
	$(ONE) .venv/bin/python -m tests.crash.cost

test-properties: .venv-proofs/ready
	$(ONE) .venv-proofs/bin/python -m pytest tests/properties

coverage: .venv-proofs/ready
	$(ONE) .venv-proofs/bin/python -m pytest --cov --cov-report=
	.venv-proofs/bin/python -m coverage report --skip-covered --fail-under=97
	.venv-proofs/bin/python -m coverage report --include=losses.py,lora.py --fail-under=100

mutants: .venv-proofs/ready
	$(ONE) .venv-proofs/bin/python tests/mutants.py

red: .venv/ready
	$(ONE) .venv/bin/python tests/red.py

.venv/ready: requirements.txt
.venv-lint/ready: requirements-lint.txt
.venv-peers/ready: requirements-peers.txt requirements.txt
.venv-proofs/ready: requirements-proofs.txt requirements.txt
%/ready:
	$(PYTHON) -m venv $* || { echo "python3-venv is missing: install it first"; exit 1; }
	! grep -hq '^torch==' $^ || \
		$*/bin/pip install -q --disable-pip-version-check $(TORCH_INDEX:%=--index-url %) \
		$$(grep -h '^torch==' $^)
	$*/bin/pip install -q --disable-pip-version-check -r $<
	touch $@

.PHONY: test lint test-faults test-crash demo results figures bench test-peers test-properties coverage \
	mutants red
