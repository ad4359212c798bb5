# `make course` and `make test` set everything up themselves; `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
VENV_FLAGS ?=
PORT ?= 8000
WORKERS ?= 2
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
HERE := $(shell pwd -P)
# Lessons side by side, one thread each: on a small model this is faster than one lesson on all cores.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS)

.DEFAULT_GOAL := help
.PHONY: help course test test-slow times bench bench-gpu site serve lab save lock clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# An environment knows the folder that it was made for: after that was moved, it is made again.
ifneq "$(HERE)" "$(shell cat $(READY) 2>/dev/null)"
.PHONY: $(READY)
endif
$(READY): lock.txt settings.ini setup.py pyproject.toml tools/setup_env.py
	@command -v $(PYTHON) >/dev/null || { echo "set-up: $(PYTHON) is not there: install Python, or name yours with PYTHON=..."; exit 1; }
	@$(PYTHON) tools/setup_env.py $(VENV) $(VENV_FLAGS)
	@echo "$(HERE)" > $@

course: $(READY)  ## run every lesson on the embedded model, then build the site
	@echo "Running every lesson on the embedded model"
	@$(PYTEST) -v --no-header --durations=0 --durations-min=1 tests/test_notebooks.py
	@$(PY) tools/build_docs.py
	@echo "Done: the site is in $(CURDIR)/_docs; 'make serve' shows it"

test: $(READY)  ## run all tests: lessons, package, site
	@$(PYTEST)

test-slow: $(READY)  ## the lessons whose slow cells build Stable Diffusion's full size, one after the other
	@NB_FLAGS=slow $(PYTEST) -n 0 tests/test_notebooks.py -k "10_ or 13_ or 14_ or 15_ or 17_"

times: $(READY)  ## measure how long each lesson runs, which the site shows: 12 min
	@trap 'rm -f _report.xml' EXIT INT; $(PYTEST) --junitxml=_report.xml tests/test_notebooks.py && $(PY) tools/time_lessons.py _report.xml

bench: $(READY)  ## how fast the networks by hand are beside the library's: 15 min on an idle machine
	@$(PY) bench/by_hand.py $(ARGS)

bench-gpu: $(READY)  ## guided steps a second on a GPU, in Stable Diffusion's shape: under 10 min (ARGS=--small: without one)
	@$(PY) bench/on_a_gpu.py $(ARGS)

site: $(READY)  ## build the site from the saved notebooks, running none
	@$(PY) tools/build_docs.py

serve:  ## show the site at http://localhost:8000 (another port: PORT=...)
	@$(PYTHON) -c "import socket; socket.create_server(('127.0.0.1', $(PORT)))" 2>/dev/null || { echo "Port $(PORT) is taken, or none. Try make serve PORT=8001"; exit 1; }
	@test -f _docs/index.html || $(MAKE) --no-print-directory site
	@echo "http://localhost:$(PORT) (Ctrl-C ends it)"
	@$(PYTHON) -m http.server $(PORT) --bind 127.0.0.1 --directory _docs

lab: $(READY)  ## open the lessons in JupyterLab, which is installed first
	@$(PY) -m pip install -q jupyterlab
	@$(PY) -m jupyter lab nbs

save: $(READY)  ## after editing notebooks: export code, run them keeping outputs, clean them, write README.md
	@$(VENV)/bin/nbdev-export
	@OMP_NUM_THREADS=1 $(VENV)/bin/nbdev-test --save --n-workers 0 --do-print
	@$(PY) tools/trim_outputs.py
	@$(VENV)/bin/nbdev-clean
	@$(PY) tools/build_readme.py

lock: $(READY)  ## write lock.txt from the versions in the environment
	@! $(PY) -m pip show -q jupyterlab 2>/dev/null || { echo "JupyterLab of 'make lab' is in $(VENV) and would get into lock.txt: remove $(VENV) first"; exit 1; }
	@$(PY) -m pip freeze --all --local --exclude-editable | sed 's/+[a-z0-9.]*$$//' | grep -vE '^(pip=|nvidia|cuda|triton)' > lock.txt.part
	@grep -q '^torch==' lock.txt.part || { rm -f lock.txt.part; echo "torch is not in $(VENV) itself, so there is no lock: remove $(VENV) first"; exit 1; }
	@mv lock.txt.part lock.txt
	@touch $(READY)

clean:  ## remove the site and what building left
	@rm -rf _docs _docs.* _proc build dist *.egg-info nbs/nbdev.yml

# Training, one command a step: make data, train-autoencoder, train-text, train-diffusion, quality
-include tools/training/train.mk
