# Everything runs in the environment that tools/setup_env.sh makes.
.PHONY: checks format lint types test slow lattice setup

VENV := $(or $(MM_VENV),.venv)

checks: lint types test

setup:
	@bash tools/setup_env.sh >/dev/null

format: setup
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

lint: setup
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

types: setup
	$(VENV)/bin/mypy

test:
	bash tests/run.sh

slow:
	bash tests/run.sh -m slow

lattice:
	bash tests/run.sh -m lattice -s
