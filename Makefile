PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
DEMO := .venv/.demo
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e

TESTS := -n auto --dist loadfile
KERNELS =

.PHONY: setup demo test test-all test-kernels test-peft test-comparison test-trackers notebooks test-oldest test-dist dist lint bench results docs clean
setup: $(STAMP)  ## make .venv and install the project with everything the tests need

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) '.[dev]'
	touch $@ $(DEMO)

$(DEMO): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) '.[demo]' --no-compile
	touch $@

demo: $(DEMO)  ## MiniLM on labelled tweets: plain LoRA against cntlora; sets up only what it needs, then about two minutes on 2 cores
	$(BIN)/cntlora demo

test: setup lint  ## the fast tests, as many side by side as cores and memory allow; one process: make test TESTS=
	$(BIN)/python -m pytest $(TESTS)

test-all: setup lint  ## all tests, also those marked slow, published and packages
	$(BIN)/python -m pytest $(TESTS) -m ''

test-kernels: setup  ## the numeric core under other CPU kernels and numbers of threads; everything: make test-kernels KERNELS='--all tests'
	$(BIN)/python -m tests.kernels $(KERNELS)

test-peft: setup  ## PEFT's own tests on adapters that we initialised: make test-peft PEFT=../peft, a checkout of PEFT's repository
	@test -n "$(PEFT)" || { echo "usage: make test-peft PEFT=/path/to/a/checkout/of/PEFT [OPTIONS='--every 20']"; exit 2; }
	$(INSTALL) '.[dev,peft-tests]'
	$(BIN)/python -W ignore benchmarks/peft_suite $(PEFT) $(OPTIONS)

test-comparison: setup  ## PEFT's method comparison with our start as a row, a smoke run: make test-comparison PEFT=../peft
	@test -n "$(PEFT)" || { echo "usage: make test-comparison PEFT=/path/to/a/checkout/of/PEFT"; exit 2; }
	$(BIN)/python -W ignore -m tests.integrations.method_comparison $(PEFT)

LIBRARY := $(addprefix tests/,linalg methods data model execution files analysis cli test_config.py test_plan.py test_hygiene.py test_errors.py)
OLDEST := build/oldest

TRACKED := build/trackers
test-trackers: setup  ## reporting to TensorBoard, W&B, MLflow and Trackio, offline, with the real libraries, which lie beside .venv and not in it
	test -x $(TRACKED)/bin/python || $(BIN)/python -m venv $(TRACKED)
	$(BIN)/python -c "import sys; print(*(p for p in sys.path if 'site-packages' in p), sep='\n')" > $$(echo $(TRACKED)/lib/python*/site-packages)/zz_project.pth
	grep -v '^pillow' constraints.txt > $(TRACKED)/constraints.txt  # Trackio wants an older one
	$(TRACKED)/bin/python -m pip install --quiet --disable-pip-version-check -c $(TRACKED)/constraints.txt -e '.[trackers]'
	$(TRACKED)/bin/python -c "import mlflow, tensorboard, trackio, wandb"
	$(TRACKED)/bin/python -m pytest tests/lab/test_trackers.py

test-oldest:  ## the tests of the library with the oldest versions that pyproject.toml admits: make test-oldest PYTHON=python3.10
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python tests/oldest.py > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python -m pip install --quiet -c $(OLDEST)/constraints.txt -e '.[diffusion,lab,samples,vlm]' pytest pytest-xdist hypothesis
	$(OLDEST)/bin/python -m pytest $(TESTS) -rs $(LIBRARY)

dist:  ## the archives for a package index, in dist/, checked
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build twine
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/twine check --strict dist/*

test-dist: dist  ## the wheel in an empty environment: alone, with the example of README.md, and the command
	$(BIN)/python -m tests.wheel dist

lint: setup  ## ruff, mypy, and the contract between the rooms of the package
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup  ## cost, scaling, accuracy and memory of the initialisation; an hour on 2 cores (one workload: benchmarks/init_cost.py --workloads minilm)
	$(BIN)/python -W ignore benchmarks/init_cost.py
	$(BIN)/python -W ignore benchmarks/scaling.py
	$(BIN)/python -W ignore benchmarks/accuracy.py
	$(BIN)/python -W ignore benchmarks/memory.py

notebooks: setup  ## run the notebooks and store what they show; one of them: make notebooks NOTEBOOK=quickstart
	$(BIN)/python -W ignore benchmarks/notebooks.py $(NOTEBOOK)

results: setup  ## tables, figures and an interactive page of every study into build/results, and the pages of docs/results
	for table in studies/runs/*.parquet; do \
		$(BIN)/cntlora report $$table --out build/results/$$(basename $$table .parquet) || exit 1; done
	$(BIN)/python -W ignore benchmarks/overview.py
	$(BIN)/python -W ignore benchmarks/study_pages.py

docs: setup  ## the docs as a site, in build/site
	$(BIN)/python -W ignore benchmarks/study_pages.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

clean:
	rm -rf .venv build dist demo-output docs/results
