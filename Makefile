# Two commands for newcomers: `make demo` and `make test`. Each makes .venv first if it is missing.
PYTHON ?= python3.12
BIN := .venv/bin
SOURCES := vega_policy envs scripts tests
STARTED := $(shell date +%s)

# Containers often set it. Without bytecode, each process that a test starts would compile torch and LeRobot again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test check format lint types slow audit clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    collect demonstrations, train, evaluate; prints where the video and the report lie"
	@echo "make test    run the tests"
	@echo "make check   format, lint, types, then the tests"
	@echo "make slow    the tests that take minutes: LeRobot's command lines, an installed wheel; then make audit"
	@echo "make audit   known vulnerabilities of the pinned packages; needs PyPI's advisories"

.venv/.installed: requirements.lock pyproject.toml
	@command -v $(PYTHON) >/dev/null 2>&1 && $(PYTHON) -c "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))" 2>/dev/null || { \
		echo "Python 3.12 with venv is needed, and '$(PYTHON)' is not it. Install it (Debian/Ubuntu:"; \
		echo "apt install python3.12 python3.12-venv; or: uv python install 3.12; or: pyenv install 3.12),"; \
		echo "or name another interpreter: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	@touch $@

demo: .venv/.installed
	@$(BIN)/python scripts/demo.py --started $(STARTED)

# glibc gives freed blocks back to the system, which clears their pages again one by one: 9% of some tests.
test: .venv/.installed
	@MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296 OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n 2 --dist worksteal

# The audit is shown and does not fail the tests: an advisory may be newer than the lock, or out of reach.
slow: .venv/.installed
	@$(BIN)/python -m pytest -m slow
	-@$(MAKE) --no-print-directory audit

audit: .venv/.installed
	$(BIN)/uvx pip-audit --strict --requirement requirements.lock --require-hashes --disable-pip

# Pyright leaves a core free, on which Python compiles what the tests import.
check: .venv/.installed
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/pyright & types=$$!; $(BIN)/python -m pytest --collect-only >/dev/null 2>&1; wait $$types
	@$(MAKE) --no-print-directory test

format: .venv/.installed
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

clean:
	rm -rf .venv build dist *.egg-info
