# What people run; CI makes the same check, and its tests are these and the long ones (.ci/run).
# `bash setup.sh --dev` makes the environment; SKIP_SETUP=1 uses python3 as it is.

ifeq ($(SKIP_SETUP),1)
bin :=
else
bin := .venv/bin/
endif
python := $(if $(bin),$(bin)python,$(or $(PYTHON),python3))
shell_files := $(wildcard *.sh tests/*.sh benchmarks/*.sh slurm/*.sbatch) .ci/run
shfmt := $(bin)shfmt --indent 2

.PHONY: help check fix test setup

help:
	@echo "make check   ruff, mypy, shellcheck, shfmt: report, change nothing (about a minute)"
	@echo "make fix     what ruff and shfmt can mend by themselves"
	@echo "make test    the tests that need no GPU but the long ones (under 10 minutes on two cores)"

check: setup
	$(python) -m ruff format --check .
	$(python) -m ruff check .
	$(python) -m mypy
	$(bin)shellcheck --external-sources $(shell_files)
	$(shfmt) --diff $(shell_files)

fix: setup
	$(python) -m ruff format .
	$(python) -m ruff check --fix .
	$(shfmt) --write $(shell_files)

test:
	bash tests/run.sh

setup:
	@bash setup.sh --dev
