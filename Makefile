PYTHON ?= python3
BIN := .venv/bin

.PHONY: serve test coverage matrix check install openapi bench soak clean

serve: .venv/installed
	$(BIN)/heatmap-service serve $(if $(PORT),--port $(PORT))

# In several processes of one thread each; then, one after the other, what looks at load, times and processes.
test: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 4 --dist loadfile -m 'not alone and not matrix'
	$(BIN)/pytest -m alone

# The lines and branches that the tests run, tests included, except those that run alone.
coverage: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n logical --maxprocesses 4 --dist loadfile -m 'not alone and not matrix' --cov

# Every target layer of sixty networks judged by gradients, as a table, in half an hour; ARGS='convnext vit' for some.
matrix: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.models.matrix $(ARGS)

check: .venv/dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/heatmap-service openapi | diff openapi/openapi.json -

install: .venv/dev

# The committed copy of the OpenAPI document, after a change of the API.
openapi: .venv/dev
	$(BIN)/heatmap-service openapi > openapi/openapi.json

# Ours beside its peers, which come with an extra of their own; ARGS='--quick' and others: benchmarks/README.md.
bench: .venv/bench
	$(BIN)/python -m benchmarks $(ARGS)

# A real server under load and in trouble for ten minutes; ARGS='--minutes 2 --tiny' and others: benchmarks/README.md.
soak: .venv/test
	$(BIN)/python -m tests.soak $(ARGS)

clean:
	rm -rf .venv

INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --quiet --editable

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: PYTHON=python3.12 make")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo 'Installing into .venv; the first time brings PyTorch and takes some minutes.'
	$(INSTALL) .
	touch $@

# The extras of pyproject.toml: what tests, checks and benchmarks need beside the service.
.venv/test .venv/dev .venv/bench: .venv/%: .venv/installed
	$(INSTALL) '.[$*]'
	touch $@
