# prunebook: environment, demo, tests and docs. Needs Python 3.10+ with pip, and GNU make; `make help` lists the targets.

PYTHON ?= python3

# The one place where PyTorch is pinned. This release is served quickly to machines without a GPU;
# on a CUDA machine you may prefer `make TORCH=torch`, or to install the build you need into .venv yourself.
TORCH ?= torch==2.13.0

# Notebooks for `make test-notebooks`: all if empty, or for instance NB="15_repair 20_fasp"; the modes they run in, for instance
# MODE="float32 gpu"; and the quarter (0 to 3) that runs in the other modes, too: by the number of commits if empty.
NB ?=
MODE ?= default
QUARTER ?=

VENV := .venv
PY   := $(VENV)/bin/python
PIP  := $(PY) -m pip install --disable-pip-version-check
DEMO := demo/smollm2-135m-fasp-0.2
say   = @printf '\n==> %s\n' "$(1)"

.DEFAULT_GOAL := help
.PHONY: help install install-dev demo test check-sync docs-check bench-check \
        test-notebooks test-unit selfcheck gpu site-tools sync docs clean distclean

help:  ## this list
	@echo 'make TARGET, where TARGET is one of'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# ---- environment: a stamp file is written only when its step has succeeded, and a second run installs nothing ----------

install: $(VENV)/.ready  ## the library in .venv
install-dev: $(VENV)/.ready-dev  ## the library and what tests and docs need, in .venv

$(VENV)/.created:
	$(call say,Making the environment $(VENV) (10 s))
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo '$(PYTHON) is not Python 3.10 or later: name one that is, as in make PYTHON=python3.12'; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || { rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); }
	@touch $@

$(VENV)/.ready: $(VENV)/.created settings.ini setup.py
	$(call say,Installing $(TORCH) (1 to 5 min: about 200 MB without CUDA and several GB with it))
	@$(PIP) '$(TORCH)'
	$(call say,Installing prunebook and what it needs (about 1 min))
	@$(PIP) -q -e .
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(call say,Installing what tests and docs need (about 1 min))
	@$(PIP) -q -e '.[dev]'
	@touch $@

# ---- use --------------------------------------------------------------------------------------------------------------

demo: $(VENV)/.ready  ## prune SmolLM2-135M by 20 % with FASP and report what it cost
	$(call say,Pruning SmolLM2-135M by 20 % with FASP into $(DEMO) (about 1 min on two cores))
	@$(VENV)/bin/prunebook prune smollm2-135m --method fasp --sparsity 0.2 --out $(DEMO) \
	  --text passages --n 16 --report --force

# ---- tests: `make test` runs the steps below in this order and stops at the first that fails ----------------------------

STEPS := check-sync docs-check bench-check test-notebooks test-unit

test: $(VENV)/.ready-dev  ## every check below; stops at the first that fails
	@for step in $(STEPS); do $(MAKE) --no-print-directory $$step || { printf '\n==> FAILED: %s\n' $$step; exit 1; }; done
	$(call say,All checks passed)

check-sync: $(VENV)/.ready-dev  ## is prunebook/ what the notebooks export, and are they clean?
	$(call say,Step check-sync: are the notebooks clean and prunebook/ in step with them? (5 s))
	@PATH="$(abspath $(VENV)/bin):$$PATH" scripts/check_sync.sh

docs-check: $(VENV)/.ready-dev site-tools  ## the docs without Quarto: links, TeX, outputs, and every page in a browser
	$(call say,Step docs-check: links and labels and citations and TeX and alt texts and saved outputs (1 min))
	@$(PY) scripts/check_docs.py
	$(call say,Step docs-check: every page in a browser; skipped without Chromium (2 min on two cores))
	@SITE=_smoke $(PY) -m pytest tests/test_site.py -q -rs -n auto --dist worksteal

site-tools:  ## axe-core and MathJax from npm for the browser checks, in .site-tools
	@if [ -d .site-tools/node_modules/axe-core ] && [ -d .site-tools/node_modules/mathjax ]; then :; \
	elif command -v npm >/dev/null; then printf '\n==> Installing axe-core and MathJax from npm into .site-tools (10 s)\n' && \
	  npm install --prefix .site-tools --no-audit --no-fund --silent axe-core@4 mathjax@3 || echo 'npm could not install them: formulas and accessibility will not be checked'; \
	else echo 'npm is not installed: formulas and accessibility will not be checked'; fi

bench-check: $(VENV)/.ready-dev  ## measure the smallest cell of each method again and compare with results/smoke
	$(call say,Step bench-check: are the committed results of the smallest cells still true? (4 min on two cores))
	@OMP_NUM_THREADS=1 $(VENV)/bin/prunebook bench results/smoke.yml --out results/smoke --check --jobs 2

test-notebooks: $(VENV)/.ready-dev  ## run every notebook, or those in NB="..."; a quarter in the other modes, too
	$(call say,Step test-notebooks: every notebook from top to bottom (about 16 min on two cores; the time of each below))
	@PYTHONUNBUFFERED=1 $(PY) scripts/test_notebooks.py $(NB) --mode $(MODE) $(if $(NB),,--others) $(if $(QUARTER),--quarter $(QUARTER))

test-unit: $(VENV)/.ready-dev  ## run tests/
	$(call say,Step test-unit: the tests in tests/ (about 8 min on two cores; the slowest are listed at the end))
	@OMP_NUM_THREADS=1 $(PY) -m pytest tests -q -n auto --dist loadfile --durations=15 --ignore=tests/test_site.py

selfcheck: $(VENV)/.ready-dev  ## kill every command at every file operation, fill the disk, lay traps (test-unit does so too)
	$(call say,Step selfcheck: faults and what is left after them (about 2 min))
	@OMP_NUM_THREADS=1 $(PY) -m pytest tests/test_faults.py -q -rs --durations=5

# ---- measuring --------------------------------------------------------------------------------------------------------

gpu: $(VENV)/.ready  ## measure on a CUDA GPU into results/gpu, at most 8 min a time; goes on where it stopped
	$(call say,Measuring on the GPU (at most 8 min; needs a CUDA build: make TORCH=torch))
	@$(PY) scripts/gpu_day.py

# ---- writing ------------------------------------------------------------------------------------------------------------

sync: $(VENV)/.ready-dev  ## export and clean the notebooks
	$(call say,Exporting and cleaning the notebooks (5 s))
	@$(VENV)/bin/nbdev_export
	@$(VENV)/bin/nbdev_clean

docs: $(VENV)/.ready-dev  ## build the site into _docs/ (needs Quarto 1.9+)
	$(call say,Building the site with Quarto (a few minutes))
	@PATH="$(abspath $(VENV)/bin):$$PATH" scripts/build_docs.sh

clean:  ## delete what builds, tests and the demo leave behind
	$(call say,Deleting generated files (not $(VENV): make distclean))
	@rm -rf _proc _docs _smoke build dist demo .pytest_cache .hypothesis nbs/nbdev.yml nbs/api.ipynb nbs/.last_checked
	@find . -path ./$(VENV) -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -print0 | xargs -0 rm -rf

distclean: clean  ## clean, and delete .venv and .site-tools
	@rm -rf $(VENV) .site-tools *.egg-info
