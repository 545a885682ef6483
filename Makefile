# Works on a machine with only Python 3.11 to 3.13 and make: uv comes into .uv where there is none.
UV := $(or $(shell command -v uv 2>/dev/null),.uv/bin/uv)
RUN := .venv/bin/
export OMP_NUM_THREADS ?= 1

.PHONY: demo env test test-slow check format constraints bench

demo: env  ## fresh machine -> environment -> a registered champion, a latent table and samples
	OMP_NUM_THREADS=2 $(RUN)vae-flows retrain

env: .venv/.ready  ## the environment, at the versions of constraints.txt

.venv/.ready: pyproject.toml constraints.txt $(filter .uv/%,$(UV))
	$(UV) venv --quiet --allow-existing .venv
	$(UV) pip install --quiet --python .venv -c constraints.txt -e '.[torchvision]' --group dev
	touch $@

.uv/bin/uv:
	python3 -m venv .uv
	.uv/bin/pip install --quiet uv

test: env  ## everything but what is marked slow
	$(RUN)pytest -q -m "not slow"

test-slow: env  ## what takes longer than CI gives
	$(RUN)pytest -q -m slow

check: env  ## lint, format, types, the import rule
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)mypy
	$(RUN)pytest -q tests/test_house.py

format: env
	$(RUN)ruff check --fix .
	$(RUN)ruff format .

constraints: $(filter .uv/%,$(UV))  ## resolve anew, within pyproject.toml's bounds
	$(UV) pip compile --quiet --upgrade --universal --no-header --no-annotate --no-emit-index-url \
	    --all-extras --group dev pyproject.toml -o constraints.txt
