# Each target makes the virtual environment that it needs: .venv-demo, or .venv-dev for work on the library.
PYTHON ?= python3
DEMO := .venv-demo/bin/python
DEV := .venv-dev/bin/python
# Threads that wait do not spin: on cores that others use too, that is four times faster.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: help demo test check clean

help:
	@echo "make demo    pre-train a small LLaMA model at density 0.3 into runs/demo (about five minutes)"
	@echo "make test    the tests"
	@echo "make check   format, lint, types and tests: what must be green before a commit"
	@echo "             TORCHES='PYTHON ...': Pythons with other releases of torch, in which private names are looked up"
	@echo "make clean   remove the virtual environments and caches (not runs/)"
	@echo "PYTHON=...   the Python to make environments with (3.11 or newer; now: $(PYTHON))"

demo: .venv-demo/ready
	rm -rf runs/demo
	$(DEMO) -m smet_compile pretrain --preset tiny --density 0.3 --steps 400 --out runs/demo

test: .venv-dev/ready
	$(DEV) -m pytest -n 2 --dist worksteal

check: .venv-dev/ready
	$(DEV) -m ruff format --check .
	$(DEV) -m ruff check .
	$(DEV) -m mypy
	$(DEV) -m pytest -n 2 --dist worksteal
	@for python in $(TORCHES); do $$python -m tests.support.private_names --check || exit 1; done

clean:
	rm -rf .venv-demo .venv-dev build .pytest_cache .hypothesis .mypy_cache .ruff_cache *.egg-info

.venv-demo/ready: EXTRAS := pretrain
.venv-dev/ready: EXTRAS := dev

.venv-demo/ready .venv-dev/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + ": name another one, make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@
