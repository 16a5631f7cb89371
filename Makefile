# Everything a fresh checkout needs. `make demo` and `make test` set themselves up.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
WORKERS ?= 2
TORCH := torch==2.13.0
CPU_INDEX := https://download.pytorch.org/whl/cpu
# one thread per test worker: more would only fight over the cores
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(WORKERS)

.PHONY: demo test test-slow test-all lint peers gallery speed bench papers clean help

help:
	@echo "make demo      set up, explain every row of the wine data, prune and quantize a network, export it; pages in out/"
	@echo "make test      set up, lint, check types, run the fast tests"
	@echo "make test-all  the same, then every slow test"
	@echo "make gallery   draw the pictures of the README (needs the data folder)"
	@echo "make speed     time lrp and its peers against the plain gradient, under two minutes, out/speed/result.md"
	@echo "make bench     every benchmark in its short form, peers included, in one table: out/benchmarks/BENCHMARKS.md"
	@echo "make papers    every experiment in its quick form, under 20 minutes, out/experiments"
	@echo "make clean     remove the virtual environment and all outputs"

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; say make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# A CPU build of torch: PyTorch's own index is tried once, then the configured one.
# Everything later is constrained to this version, so that nothing pulls CUDA in.
$(VENV)/.torch: $(VENV)/.made constraints.txt
	@echo "installing $(TORCH) (CPU)"
	@$(PIP) install -q --no-deps --retries 0 --timeout 5 --index-url $(CPU_INDEX) $(TORCH) 2>/dev/null \
		|| $(PIP) install -q -c constraints.txt $(TORCH)
	@touch $@

$(VENV)/.core: $(VENV)/.torch pyproject.toml
	@echo "installing neuralize"
	@$(PIP) install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.test: $(VENV)/.core
	@echo "installing the test tools and the peers the tests compare with"
	@$(PIP) install -q -c constraints.txt -e '.[test]'
	@$(PIP) install -q --no-deps --ignore-requires-python zennit==1.0.0 torchvision==0.28.0 timm==1.0.20
	@touch $@

peers: $(VENV)/.test

$(VENV)/.onnx: $(VENV)/.core
	@echo "installing onnx and onnxruntime"
	@$(PIP) install -q -c constraints.txt -e '.[onnx]'
	@touch $@

demo: $(VENV)/.onnx
	$(PY) -m neuralize explain sklearn:wine --fit kmeans:3 --scale --seed 0 -o out/wine
	$(PY) -m experiments.digits -o out/digits
	@echo "pages: out/wine/index.html, out/digits/index.html"

lint: $(VENV)/.test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

test: lint
	$(PYTEST) -m "not slow and not gpu"

test-slow: $(VENV)/.test
	$(PYTEST) -m "slow or gpu"

test-all: test test-slow

gallery: $(VENV)/.core
	$(PY) -m experiments.gallery -o docs
	$(PY) -m experiments.customers -o docs

speed: $(VENV)/.test
	$(PY) -m experiments.benchmarks.lrp_speed --quick -o out/speed

bench: $(VENV)/.test
	$(PY) -m experiments.benchmarks --quick -o out/benchmarks

papers: $(VENV)/.test
	$(PY) -m experiments run --all --quick

clean:
	rm -rf $(VENV) out build *.egg-info .pytest_cache .mypy_cache .ruff_cache
