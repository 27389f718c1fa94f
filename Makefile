# `make demo` and `make test` are all that a newcomer needs; both install what they use into $(VENV).
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test check soak clean

demo: $(VENV)/.run
	@$(BIN)/minillm generate "What is the capital of France?"

test: $(VENV)/.test
	@PATH="$(abspath $(BIN)):$$PATH" scripts/test

soak: $(VENV)/.test
	@PATH="$(abspath $(BIN)):$$PATH" scripts/test -m soak

check: $(VENV)/.dev
	@PATH="$(abspath $(BIN)):$$PATH" scripts/check

clean:
	rm -rf $(VENV) build dist *.egg-info

$(BIN)/python:
	@echo "Making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# A stamp is newer than what it was installed from, so a second `make test` installs nothing.
$(VENV)/.run: pyproject.toml scripts/install | $(BIN)/python
	@$(BIN)/python scripts/install
	@touch $@

$(VENV)/.test $(VENV)/.dev: $(VENV)/.%: $(VENV)/.run
	@$(BIN)/python scripts/install $*
	@touch $@
