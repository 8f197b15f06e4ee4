# Two commands on a fresh machine: `make demo` and `make test`. Each makes its own virtual environment first.
# GPUs: `CUDA=1 make demo` uses the CUDA build of torch, in an environment of its own.

PYTHON ?= python3
VENV   ?= .venv$(if $(CUDA),-cuda)
BIN    := $(VENV)/bin
DEMO   ?= demo

# uv where it is present (with pip's wheel folder, if one is set), else pip.
UV     := $(shell command -v uv 2>/dev/null)
LINKS  := $(if $(CUDA),,$(PIP_FIND_LINKS))
TORCH  := $(if $(CUDA),--torch-backend=auto,$(if $(LINKS),,--torch-backend=cpu))
ifdef UV
MAKE_VENV = "$(UV)" venv --quiet --python "$(PYTHON)" "$(VENV)"
INSTALL   = UV_FIND_LINKS="$(LINKS)" "$(UV)" pip install --python "$(BIN)/python" $(TORCH) $(if $(LINKS),--index-strategy unsafe-best-match)
else
MAKE_VENV = "$(PYTHON)" -m venv "$(VENV)"
INSTALL   = PIP_FIND_LINKS="$(LINKS)" "$(BIN)/python" -m pip install --quiet --disable-pip-version-check
endif

export MLFLOW_DISABLE_TELEMETRY = true
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: help install demo test test-slow lint docs clean

help:
	@echo "make demo       the whole way on embedded phantoms; ends by saying where the report and the release are"
	@echo "make test       the test suite"
	@echo "make test-slow  the proofs and whole runs that take minutes"
	@echo "make lint       ruff, mypy, import rules"
	@echo "make docs       the documentation, into site/"
	@echo "make clean      remove the virtual environment and what the demo made"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "installing into $(VENV): a few minutes the first time"
	test -x "$(BIN)/python" || $(MAKE_VENV)
	$(INSTALL) -e '.[test]' -c constraints.txt
	@touch "$@"

$(VENV)/.installed-docs: $(VENV)/.installed
	$(INSTALL) -e '.[docs]' -c constraints.txt
	@touch "$@"

demo: $(VENV)/.installed
	rm -rf "$(DEMO)"
	"$(BIN)/medvae" demo -o "$(DEMO)"

test: $(VENV)/.installed
	"$(BIN)/python" -m pytest -n 2

test-slow: $(VENV)/.installed
	"$(BIN)/python" -m pytest -m slow

lint: $(VENV)/.installed
	"$(BIN)/ruff" check .
	"$(BIN)/ruff" format --check .
	"$(BIN)/mypy"
	"$(BIN)/lint-imports"

docs: $(VENV)/.installed-docs
	"$(BIN)/mkdocs" build --strict

clean:
	rm -rf "$(VENV)" "$(DEMO)" site
