# The environment is made on the first call and after a change of pyproject.toml; otherwise nothing is installed.
#   PYTHON=python3.12   interpreter of a new environment (default: the first of python3, python3.13, ... that is >= 3.11)
#   VENV=directory      where the environment is (default: .venv)
#   ARGS="..."          more arguments for pytest or the quickstart
#   EXTRA=test,parity   extras of pyproject.toml for test and lint: parity compares with PyTorch and transformers
VENV ?= .venv
EXTRA ?= test
export PYTHON

.NOTPARALLEL:
.PHONY: help quickstart test lint clean

help:
	@echo "make quickstart   raw text to a language model that follows instructions, in minutes"
	@echo "make test         run the tests"
	@echo "make lint         check style and formatting"
	@echo "make clean        remove the environment and caches (never runs/)"

quickstart:
	@bash tools/environment.sh "$(VENV)"
	"$(VENV)/bin/python" -m jaxllm.quickstart $(ARGS)

test:
	@bash tools/environment.sh "$(VENV)" "$(EXTRA)"
	"$(VENV)/bin/python" -m pytest $(ARGS)

lint:
	@bash tools/environment.sh "$(VENV)" "$(EXTRA)"
	"$(VENV)/bin/python" -m ruff check
	"$(VENV)/bin/python" -m ruff format --check
	"$(VENV)/bin/python" tools/check_style.py

clean:
	test ! -f "$(VENV)/pyvenv.cfg" || rm -rf "$(VENV)"
	rm -rf build dist .pytest_cache .ruff_cache .hypothesis
	find jaxllm tests tools -name __pycache__ -prune -exec rm -rf {} +
