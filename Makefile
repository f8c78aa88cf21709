PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/bench
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test slow lint format bench support clean

demo: $(VENV)/.installed  ## the main job on the bundled model, offline
	$(BIN)/sightline demo

test: $(VENV)/.installed  ## every test that needs neither a GPU nor minutes
	$(BIN)/python -m pytest -n 2 --dist loadfile

slow: $(VENV)/.installed
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed  ## what tracing, replaying, the backends and compression cost; BENCH="--layers 32 ..." and BACKENDS="...", ANALYSES="...", COMPRESSING="..." for other sizes
	$(BIN)/sightline study speed $(BENCH)
	$(BIN)/sightline study backends $(BACKENDS)
	$(BIN)/sightline study analyses $(ANALYSES)
	$(BIN)/sightline study compressing $(COMPRESSING)

support: $(VENV)/.installed  ## write the tables of families, and of passes by family, from the contract tests
	SIGHTLINE_WRITE_SUPPORT=1 $(BIN)/python -m pytest tests/probe/test_contract.py tests/compress/test_contract.py -q

# torch comes first and by itself: the index's default build is what its pinned version gives on this machine.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep ^torch== constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
