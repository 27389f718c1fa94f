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

# A folder that was made half, as happens without ensurepip, would look like an environment at the next `make`.
$(BIN)/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) is not installed; name another: make PYTHON=…" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.version_info >= (3, 11) or \
		sys.exit("MiniLLM needs Python 3.11 or newer and $(PYTHON) is " + v + "; name another: make PYTHON=python3.12")'
	@echo "Making a virtual environment in $(VENV)"
	@made=; [ -e $(VENV) ] || made=$(VENV); $(PYTHON) -m venv $(VENV) || { rm -rf $(BIN)/python* $$made; \
		echo "No virtual environment could be made with $(PYTHON); on Debian and Ubuntu that takes" \
		"the package python3-venv: apt install python3-venv" >&2; exit 1; }

# A stamp is newer than what it was installed from, so a second `make test` installs nothing.
$(VENV)/.run: pyproject.toml scripts/install | $(BIN)/python
	@$(BIN)/python scripts/install
	@touch $@

$(VENV)/.test $(VENV)/.dev: $(VENV)/.%: $(VENV)/.run
	@$(BIN)/python scripts/install $*
	@touch $@
