# make demo   a real model pruned, measured, saved and shown; make test   the tests.
# Both make the virtual environment .venv on first use and need nothing but Python 3.11 or later.
PYTHON ?= python3
VENV ?= .venv
# for example PIP_FLAGS="--extra-index-url <index of CPU wheels>" where pip would fetch torch's CUDA build
PIP_FLAGS ?=
THREADS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) --constraint constraints.txt
SHARED_TEXT := $(wildcard ../shared/data/lm/wikitext2_raw_test.txt ../shared/data/lm/tinystories_test.txt)
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-thorough test-slow test-quantize test-sanitized lint types examples bench clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-all
	OMP_NUM_THREADS=$(THREADS) $(BIN)/secateur demo --out secateur-demo $(SHARED_TEXT:%=--text %)

test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(THREADS) --dist loadfile

# what takes seconds a test and minutes in all: part of .ci/run
test-thorough: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(THREADS) --dist loadfile -m thorough

test-slow: $(VENV)/.installed-dev
	SECATEUR_EXAMPLES=200 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(THREADS) --dist loadfile -m slow

# transformers imports torchao wherever it is installed, slowly and noisily: so it lives in an environment of its own
# that sees the packages of the other one
test-quantize: $(VENV)-quantize/.installed
	OMP_NUM_THREADS=1 $(VENV)-quantize/bin/python -m pytest tests/deploy/test_quantize.py tests/deploy/test_exported.py \
		tests/pipeline/test_quantized.py tests/test_integers.py

# the tests of the native kernels against a library built with AddressSanitizer and UndefinedBehaviorSanitizer, 10,000 altered
# files among them; -s, or what they report is lost
test-sanitized: $(VENV)/.installed-dev
	CXX="g++ -fsanitize=address,undefined -fno-sanitize-recover=undefined -g" SECATEUR_SANITIZED=1 \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s -m 'slow or not slow' \
		tests/deploy/sparse/test_kernels.py tests/deploy/sparse/test_packed.py tests/deploy/sparse/test_semi.py \
		tests/deploy/sparse/test_squares.py tests/deploy/sparse/test_store.py \
		tests/core/test_native.py tests/core/test_eliminate.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev
	$(BIN)/mypy

examples: $(VENV)/.installed-dev
	set -e; for file in examples/*.py; do echo "$$file"; OMP_NUM_THREADS=$(THREADS) $(BIN)/python "$$file" > /dev/null; done
	rm -rf $(VENV)/experiment
	OMP_NUM_THREADS=1 $(BIN)/secateur run examples/experiment.yaml --out $(VENV)/experiment --allow-code --json > /dev/null

# torch first and pinned, so that nothing else chooses a build of it
$(VENV)/.installed-torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	touch $@

# the native kernels are compiled on the way where there is a C++ compiler
$(VENV)/.installed-%: $(VENV)/.installed-torch pyproject.toml hatch_build.py $(wildcard native/*)
	$(PIP) --editable '.[$*]'
	touch $@

$(VENV)-quantize/.installed: $(VENV)/.installed-dev
	$(PYTHON) -m venv $(VENV)-quantize
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > "$$($(VENV)-quantize/bin/python \
		-c 'import site; print(site.getsitepackages()[0])')/beside.pth"
	echo "$(CURDIR)/src" >> "$$($(VENV)-quantize/bin/python -c 'import site; print(site.getsitepackages()[0])')/beside.pth"
	$(VENV)-quantize/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --constraint constraints.txt torchao
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-quantize secateur-demo
