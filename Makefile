# Everything runs in .venv, which the first target makes and which nothing outside uses.
# Plain make 3.81 and sh are enough, so that a bare Mac can do it; .ci/venv holds the steps.

BIN := .venv/bin
ARGS :=

# Where it is set, as in many containers, every command compiles its imports again: a second more each.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo rlhf test test-gpu fuzz check docs dist clean

help:
	@echo 'make demo    install, then fine-tune a small model in a few minutes'
	@echo 'make rlhf    the whole road to PPO: SFT, a reward model, PPO on built-in reviews'
	@echo 'make test    install with the development tools, then run every test  (ARGS="-k gae" picks)'
	@echo 'make test-gpu  hold what this machine computes against the CPU'\''s numbers (mlxft selftest)'
	@echo 'make fuzz    10,000 hostile folders, recipes and rows through the commands  (ARGS="--seed 1" makes others)'
	@echo 'make check   style, types and layout'
	@echo 'make docs    build the documentation into site/; a broken link fails'
	@echo 'make dist    build sdist and wheel, and try the wheel in an empty environment  (ARGS=--quick: without the demo)'
	@echo 'make clean   remove .venv and caches; runs/ stays'

demo: .venv/.base
	$(BIN)/mlxft demo $(ARGS)

rlhf: .venv/.base
	$(BIN)/mlxft rlhf $(ARGS)

test: .venv/.dev
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

test-gpu: .venv/.base
	$(BIN)/mlxft selftest $(ARGS)

fuzz: .venv/.dev
	$(BIN)/python tests/fuzz.py --folders 1000 --recipes 4500 --rows 4500 $(ARGS)

check: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layout.py

docs: .venv/.docs
	$(BIN)/python -m mkdocs build --strict --clean $(ARGS)

dist: .venv/.base
	sh .ci/dist $(ARGS)

clean:
	rm -rf .venv build dist site *.egg-info .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps: a second `make` installs nothing unless pyproject.toml has changed.
.venv/.base: pyproject.toml .ci/venv
	@sh .ci/venv base

.venv/.dev: pyproject.toml .ci/venv
	@sh .ci/venv dev

.venv/.docs: pyproject.toml .ci/venv
	@sh .ci/venv docs
