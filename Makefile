# Two commands do everything on a fresh machine (Python 3.11+, git, make): `make demo` and `make test`.
VENV   := .venv
BIN    := $(VENV)/bin
PYTHON ?= python3
# On a machine without a GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu spares several GB of CUDA packages.
TORCH_INDEX ?=
# A test file a process, three at a time: many tests wait, for an sshd or a process. One thread each; more would only wait
# for each other. In the order of the folders: by its own choice xdist would begin the longest test, alone in its file,
# last.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: demo test test-fast lint coverage install wheel house screenshots constraints clean

demo: $(VENV)/.installed ## the embedded workspace: in the panel, or headless without a terminal (HEADLESS=1)
	@if [ -t 0 ] && [ -t 1 ] && [ -z "$(HEADLESS)" ]; then \
	  $(BIN)/surgvqa demo demo && exec $(BIN)/surgvqa-tui --workspace demo; \
	else \
	  $(BIN)/surgvqa demo demo --run; \
	fi

test: $(VENV)/.installed $(VENV)/.sshd lint ## everything
	$(PYTEST)

test-fast: $(VENV)/.installed ## what needs no model and no sshd: about a minute
	$(PYTEST) --dist worksteal -m "not model and not slow"

lint: $(VENV)/.installed
	$(BIN)/python -m ruff check --quiet .
	$(BIN)/python -m ruff format --check --quiet .
	$(BIN)/lint-imports --no-cache > $(VENV)/lint-imports.log || { cat $(VENV)/lint-imports.log; exit 1; }
	$(BIN)/python docs/house.py --check
	$(BIN)/python -m mypy --no-error-summary

coverage: $(VENV)/.installed ## which lines the tests run, child processes included; the rooms that are least covered last
	$(PYTEST) --cov --cov-report=term:skip-covered --cov-report=html:build/coverage

install: $(VENV)/.installed

wheel: ## the wheel, installed into an environment of its own outside the checkout, and the demo run from there
	@rm -rf build/wheel && mkdir -p build/wheel
	@$(PYTHON) -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir build/wheel .
	@$(PYTHON) docs/wheel.py build/wheel --python $(PYTHON)

house: $(VENV)/.installed ## docs/house.svg, the rooms and floors as the imports have them
	$(BIN)/python docs/house.py

screenshots: $(VENV)/.installed ## docs/panel*.svg and docs/keys.md, drawn by the program over ./demo
	$(BIN)/python docs/screenshot.py --all

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is older than Python 3.11; use PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { [ "$$(id -u)" = 0 ] && apt-get -qq update && apt-get -qq install -y python3-venv >/dev/null; } || { echo "make: this Python has no venv; run: sudo apt-get install python3-venv"; exit 1; }
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@# torch first and by itself: whatever build is taken here, nothing later replaces it.
	@$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	@$(PIP) --editable '.[train,text-scores,hub,dev]'
	@touch $@

# The remote tests talk to a real sshd. Root installs it; anyone else sees those tests skip with the reason.
$(VENV)/.sshd:
	@mkdir -p $(VENV)
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! { [ -x /usr/sbin/sshd ] && command -v rsync >/dev/null; }; then \
	  apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y openssh-server rsync iproute2 >/dev/null || true; fi
	@touch $@

constraints: ## renew constraints.txt from a fresh resolution
	rm -rf build/fresh && $(PYTHON) -m venv build/fresh
	build/fresh/bin/pip install --quiet torch==2.13.0 && build/fresh/bin/pip install --quiet '.[train,text-scores,hub,dev]'
	(head -1 constraints.txt; build/fresh/bin/pip freeze --exclude surgvqa | sed 's/+cpu//; / @ /d') > build/constraints.txt
	mv build/constraints.txt constraints.txt && rm -rf build/fresh

clean: ## everything that make made
	rm -rf $(VENV) demo
