# Everything runs in the environment that tools/setup_env.sh makes.
.PHONY: checks format lint types test slow lattice setup transformers457 deepspeed

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

# The MOSS-VL tests on the older transformers line.
transformers457:
	bash tools/run_transformers457.sh

# MOSS-VL under ZeRO-2 and ZeRO-3 on two CPU processes.
deepspeed:
	bash tools/run_deepspeed.sh
