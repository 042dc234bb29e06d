# Two commands on a fresh clone: `make demo` and `make test`. Everything lives in .venv.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
OUT ?= bench-results
SECONDS ?= 480
PROMPT ?= "The three most important rules for writing a test are"

# The inner loop: tables and tiny models.
QUICK := $(wildcard tests/test_*.py) $(addprefix tests/,schemes models drafters cpu kernels mutants cli/test_cli_options.py \
	laws/test_greedy.py laws/test_exact_law.py planning/test_search.py tune/test_configurations.py)

.PHONY: demo quick test lint slow fuzz laws mutants schemas large triton bench docs ray page speculators gpu clean

demo: $(READY)
	$(BIN)/mcsd pull smollm2-135m
	$(BIN)/mcsd generate $(PROMPT) --target smollm2-135m --max-new-tokens 96 --temperature 0

# Under a minute; no process starts, no network.
quick: $(READY)
	MCSD_LAW_INSTANCES=2 $(BIN)/python -m pytest $(QUICK) -m "not thorough" --numprocesses 2 --dist loadfile --no-loadscope-reorder

test: lint
	$(BIN)/python -m pytest -m "not large and not slow" --numprocesses 2 --dist loadfile --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff format --check src tests benchmarks examples
	$(BIN)/ruff check src tests benchmarks examples
	$(BIN)/mypy

# What takes minutes: same text on all prompts for every tree and batch.
slow: $(READY)
	$(BIN)/python -m pytest -m slow --ignore tests/load

# The server under load: 50,000 requests by schemathesis, faults of every kind, overload, mixed requests on real weights.
fuzz: $(READY)
	MCSD_FUZZ_REQUESTS=50000 $(BIN)/python -m pytest tests/load/test_fuzz.py -rP --numprocesses 2
	MCSD_FAULTS=100 $(BIN)/python -m pytest tests/load -rP --ignore tests/load/test_fuzz.py

# Exact laws of ten thousand random instances, and a million sequences for each statistical case: some hours.
laws: $(READY)
	MCSD_LAW_INSTANCES=130 MCSD_LAW_SEQUENCES=1000000 $(BIN)/python -m pytest tests/laws --numprocesses 2

# Plants faults in copies of the source and writes down which law catches each: docs/mutants.md.
mutants: $(READY)
	PYTHONPATH=tests $(BIN)/python -m mutants.run

# Answers under the schemas of the JSON Schema Test Suite: make schemas ARGS="--suite jsonschema-4.26.0.tar.gz --count 500"
schemas: $(READY)
	PYTHONPATH=tests $(BIN)/python -m schemas.run $(ARGS)

# Published EAGLE-3 heads against speculators' own model, in an environment of its own: it needs an older transformers.
# Both sides have the same torch.
SPECULATORS := "speculators==0.9.0"
speculators: $(READY)
	$(PYTHON) -m venv .speculators
	.speculators/bin/python -m pip install --quiet "transformers==5.19.0" $$(grep ^torch= constraints.txt) numpy safetensors \
		pydantic loguru httpx psutil rich tqdm typer click openai "datasets<=5.1.0" hs-connectors
	.speculators/bin/python -m pip install --quiet --no-deps $(SPECULATORS)
	PYTHONPATH=tests $(BIN)/python -m parity.run

# Needs 1.6 GB of weights and 12 GB of memory.
large: $(READY)
	$(BIN)/python -m pytest -m large

# Replicas by Ray Serve and batches by Ray Data, on a cluster of this machine. Installs ray and pyarrow, some 500 MB.
ray: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[ray]"
	$(BIN)/python -m pytest tests/ray -rP

# The Triton kernels for CUDA cards in triton's interpreter. Installs triton, some 1 GB, into .triton.
triton: $(READY)
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target .triton "triton>=3.4"
	PYTHONPATH=.triton $(BIN)/python -m pytest tests/cuda

# The playground in a browser. Installs playwright; skipped where Chromium is missing (apt-get install chromium).
page: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[page]"
	$(BIN)/python -m pytest tests/page

# Against transformers on the same weights: make bench ARGS="--target qwen2.5-coder-1.5b --prompts alpaca.jsonl"
bench: $(READY)
	$(BIN)/mcsd bench --baselines plain,generate --out $(OUT) $(ARGS)

# The documentation site, in build/site; a broken link, anchor or reference is an error. Pages are built in the places that
# they have here, so that their links lead to the same files on a code host and on the site.
docs: .venv/.docs
	rm -rf build/pages build/site && mkdir -p build/pages
	cp -r *.md LICENSE docs examples build/pages
	$(BIN)/python -m zensical build --strict
	MCSD_SITE=build/site $(BIN)/python -m pytest tests/test_site.py

# Checks and timings on a CUDA card, docs/gpu.md. Needs torch and transformers; nothing is installed or downloaded.
gpu:
	PYTHONPATH=src:benchmarks $(PYTHON) -m gpu --seconds $(SECONDS) --out $(OUT) $(ARGS)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,bench]"
	touch $@

.venv/.docs: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	touch $@

clean:
	rm -rf .venv .triton .speculators .cache build .pytest_cache .mypy_cache .ruff_cache .hypothesis
