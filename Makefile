# The environment is made once and again when setup.cfg or constraints.txt change.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo gallery test test-slow bench models docs lint clean
.venv/.ready: setup.cfg constraints.txt pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "scorelab needs Python 3.11 or newer"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[data,log,interop,dev]'
	touch $@

demo: .venv/.ready
	$(BIN)/python -m toy.demo

gallery: .venv/.ready
	$(BIN)/python -m benchmarks.gallery

test: .venv/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-slow: .venv/.ready
	$(BIN)/python -m pytest -m slow -s

.venv-bench/.ready: setup.cfg constraints.txt benchmarks/peers.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[data]' -r benchmarks/peers.txt
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check --no-deps azula==0.11.1 k-diffusion==0.1.1.post1 smalldiffusion==0.5.0
	touch $@

bench: .venv-bench/.ready
	.venv-bench/bin/python -m benchmarks.solvers
	.venv-bench/bin/python -m benchmarks.stochastic
	.venv-bench/bin/python -m benchmarks.foreign
	.venv-bench/bin/python -m benchmarks.overhead
	.venv-bench/bin/python -m benchmarks.calibration
	.venv-bench/bin/python -m benchmarks.large
	.venv-bench/bin/python -m benchmarks.training
	.venv-bench/bin/python -m benchmarks.networks
	.venv-bench/bin/python -m benchmarks.inverse
	.venv-bench/bin/python -m benchmarks.restoring
	.venv-bench/bin/python -m benchmarks.report

models: .venv/.ready
	$(BIN)/python -m benchmarks.pretrained

.venv/.docs: .venv/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

docs: .venv/.docs
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going docs docs/_build

lint: .venv/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv .venv-bench runs docs/_build docs/api
