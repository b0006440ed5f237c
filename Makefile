# Sets up its own virtual environment: needs only make, git and Python 3.11-3.13.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo federation test test-all test-gpu lint bench wire setup clean

setup: $(READY)

# torch first and pinned: an unconstrained resolve brings gigabytes of CUDA packages.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
		{ echo "error: Python 3.11, 3.12 or 3.13 is needed" >&2; echo "hint: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	touch $(READY)

demo: $(READY)
	$(BIN)/coterie simulate heart

# A coordinator, four sites and an operator as processes of their own, on loopback; compared with a simulation.
federation: $(READY)
	$(BIN)/python -m simulations.federation
	$(BIN)/python -m simulations.federation --secagg

test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal

test-all: $(READY)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not gpu'

test-gpu: $(READY)
	$(BIN)/python -m pytest -m gpu

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The classes of the control messages, generated from their description and committed.
wire: $(READY)
	$(BIN)/python -m grpc_tools.protoc -Icommon/transport --python_out=common/transport --pyi_out=common/transport \
		common/transport/wire.proto

bench: $(READY)
	$(BIN)/python -m simulations.benchmarks engine --json
	$(BIN)/python -m simulations.benchmarks dp --json
	$(BIN)/python -m simulations.benchmarks plane --json
	$(BIN)/python -m simulations.benchmarks secagg --json
	$(BIN)/python -m simulations.benchmarks cohort --json

clean:
	rm -rf .venv build dist *.egg-info
