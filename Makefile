# `make help` lists the commands. Every one sets up what it needs, in .venv, the first time.
PYTHON  ?= python3
MODEL   ?= mistralai/Mistral-7B-Instruct-v0.2
DATA    ?= data
METHODS ?= sft sdft s3ft
LIMIT   ?=
STEPS   ?=
FLAGS   ?=
VENV    := .venv
PY      := $(VENV)/bin/python
BENCH   := .venv-bench
SMOL    := models/SmolLM2-135M-Instruct
.DEFAULT_GOAL := help
.PHONY: help demo test gsm8k mbpp nq bench bench-eval bench-judge bench-memory bench-gpu fuzz study study-report clean

help:
	@echo "make demo    S3FT and SFT on a small real model and 60 own-written passages: about 8 minutes on 2 CPU cores"
	@echo "make test    set up and run the tests: under 10 minutes on 2 CPU cores"
	@echo "make gsm8k   the paper's run: predictions, paraphrases, training, evaluation (also: make mbpp, make nq)"
	@echo "make bench, bench-eval, bench-judge, bench-gpu    speed beside transformers, peft, trl and lm-evaluation-harness"
	@echo "make study   does the claim hold? five methods, three seeds, on XQuAD: about two hours on 2 CPU cores"
	@echo "make fuzz    100,000 random texts into everything that reads what a model or a person wrote"
	@echo ""
	@echo "Variables of gsm8k, mbpp, nq (make gsm8k LIMIT=48 STEPS=6):"
	@echo "  MODEL=$(MODEL)   Hugging Face name or folder"
	@echo "  DATA=$(DATA)   where data sets are and are downloaded to      OUT=runs/TASK   the run folder"
	@echo "  METHODS=\"$(METHODS)\"   of sft sdft ssr s3ft rft      LIMIT=N   first N rows of every split"
	@echo "  STEPS=N   optimizer steps      FLAGS=\"...\"   any further flag of s3ft.py (see: $(PY) s3ft.py --help)"

# The exact versions of constraints.txt. torch comes first and by its exact version, so that nothing else chooses its build.
$(VENV)/ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,plots]'
	@touch $@

$(VENV)/ready-dev: $(VENV)/ready
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

# The peers of the benchmarks, in an environment of their own: lm-eval brings a package that is named evaluate, like our module.
$(BENCH)/ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,bench]'
	@touch $@

$(SMOL)/config.json: | $(VENV)/ready
	$(PY) examples/smollm2.py $(SMOL)

# One epoch of 96 rows is too short for the paper's learning rate of 1e-4.
demo: $(VENV)/ready $(SMOL)/config.json
	for method in sft s3ft; do \
		$(PY) s3ft.py --task reading --method $$method --model $(SMOL) --out runs/demo --limit 96 --lr 1e-3 --share-prefix || exit; done
	$(PY) evaluate.py --out runs/demo

test: $(VENV)/ready-dev $(SMOL)/config.json
	$(PY) -m ruff check .
	$(PY) -m pytest

gsm8k mbpp nq: OUT ?= runs/$@
gsm8k mbpp nq: $(VENV)/ready
	for method in $(METHODS); do \
		$(PY) s3ft.py --task $@ --method $$method --model $(MODEL) --data $(DATA) --out $(OUT) \
			$(if $(LIMIT),--limit $(LIMIT)) $(if $(STEPS),--steps $(STEPS)) $(FLAGS) || exit; done
	$(PY) evaluate.py --out $(OUT) --data $(DATA)

GSM8K := $(DATA)/gsm8k/train.jsonl
bench: $(BENCH)/ready $(SMOL)/config.json
	$(BENCH)/bin/python -m bench.generate --model $(SMOL) $(if $(wildcard $(GSM8K)),--gsm8k $(GSM8K)) --out docs $(FLAGS)
	$(BENCH)/bin/python -m bench.train --model $(SMOL) --out docs $(FLAGS)

# Also a test of our scores against the real harness, which make test skips.
bench-eval: $(BENCH)/ready $(SMOL)/config.json
	PYTHONPATH=. $(BENCH)/bin/python -m pytest tests/test_benchmarks_harness.py
	$(BENCH)/bin/python -m bench.evaluate --model $(SMOL) --data $(DATA) --out docs $(FLAGS)

bench-judge: $(VENV)/ready
	$(PY) -m bench.judge --data $(DATA) --out docs $(FLAGS)

bench-memory: $(VENV)/ready
	$(PY) -m bench.memory --out docs $(FLAGS)

# On a GPU: a Mistral-7B-shaped model with random weights. Without one a tiny shape, and no figure.
bench-gpu: $(VENV)/ready
	$(PY) -m bench.gpu --out docs $(FLAGS)

fuzz: $(VENV)/ready-dev
	$(PY) -m tests.fuzz $(FLAGS)

# Two hours on 2 CPU cores. Smaller: make study FLAGS="--seeds 1 --steps 6 --train 48 --test 48 --documents 10 --out runs/small".
XQUAD := $(DATA)/xquad/xquad.en.json
study: $(VENV)/ready $(SMOL)/config.json
	$(PY) -m bench.study --model $(SMOL) --data $(DATA) --xquad $(XQUAD) $(FLAGS)

study-report: $(VENV)/ready
	$(PY) -m bench.study --report-only

# Not runs/, which took hours.
clean:
	rm -rf $(VENV) $(BENCH)
