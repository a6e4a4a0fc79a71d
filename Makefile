PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
UV := uv==0.13.9

.PHONY: demo test lint types unit lock clean bench latency crash simulate

demo: $(INSTALLED)  ## show it all: make demo, or make demo ONCE=1
	@$(BIN)/afterlog demo $(if $(ONCE),--once)

test: lint  ## everything that CI runs
	@$(MAKE) --no-print-directory -j 2 types unit

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

# Tests start hundreds of interpreters: each would compile Afterlog anew where the environment forbids to keep bytecode.
# They wait for a disk a fifth of their time, and none of them pulls its power: memory does where there is enough of it.
MEMORY := $(shell [ "$$(df --output=avail -k /dev/shm 2> /dev/null | tail -1)" -gt 4000000 ] && echo /dev/shm)
unit: $(INSTALLED)
	PYTHONDONTWRITEBYTECODE= TMPDIR=$${TMPDIR:-$(MEMORY)} $(BIN)/pytest -n auto

bench: $(INSTALLED)  ## figures against the comparison work, where it is there
	$(BIN)/python -m benchmarks.bench

latency: $(INSTALLED)  ## append to derived event, append to mail, over hand-overs
	$(BIN)/python -m benchmarks.latency

crash: $(INSTALLED)  ## kill -9 at N random moments (100) over all verbs, and hold what is left against the promises
	$(BIN)/python -m benchmarks.crash $(or $(N),100)

simulate: $(INSTALLED)  ## live through one seed, or SEEDS of them from it on: make simulate SEED=7 STEPS=20 SEEDS=1
	@$(BIN)/python -m tests.simulator $(or $(SEED),1) $(or $(STEPS),20) $(or $(SEEDS),1)

lock: $(INSTALLED)  ## pin every dependency again
	$(BIN)/uv pip compile --quiet --system-certs --universal --python-version 3.11 --generate-hashes --no-annotate --no-emit-index-url \
		--no-header --group dev pyproject.toml -o requirements.lock

# uv takes a third of pip's time, but knows nothing of an index that stands in pip's own settings.
$(INSTALLED): requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	@echo "Installing pinned versions ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(UV)
	@$(BIN)/uv pip install --quiet --system-certs --python $(BIN)/python --compile-bytecode --require-hashes -r requirements.lock \
		|| $(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

clean:
	rm -rf .venv demo build *.egg-info .mypy_cache .ruff_cache .pytest_cache
