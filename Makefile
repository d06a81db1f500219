# `make help` lists the commands. Every one sets up what it needs, in .venv, the first time.
PYTHON     ?= python3
DEFAULT    := mistralai/Mistral-7B-Instruct-v0.2
MODEL      ?= $(DEFAULT)
DATA       ?= data
METHODS    ?= sft sdft s3ft
BENCHMARKS ?= mmlu,truthfulqa,hellaswag,winogrande
LIMIT      ?=
STEPS      ?=
FLAGS      ?=
EVAL_FLAGS ?=
VENV  := .venv
PY    := $(VENV)/bin/python
BENCH := .venv-bench
OLDEST := .venv-oldest
SMOL  := models/SmolLM2-135M-Instruct
PIP   := -m pip install --quiet --disable-pip-version-check
.DEFAULT_GOAL := help
.PHONY: help demo lesson test test-oldest gsm8k mbpp nq tables gpu-smoke bench bench-eval bench-judge bench-memory bench-gpu \
	sweep fuzz study study-report clean

help:
	@echo "make demo    S3FT and SFT on a small real model and 60 own-written passages: about 8 minutes on 2 CPU cores"
	@echo "make lesson  examples/s3ft_in_an_hour.ipynb, executed into runs/lesson: under 10 minutes on 2 CPU cores"
	@echo "make test    set up and run the tests: some 10 minutes on 2 CPU cores"
	@echo "make gsm8k   the paper's run: D', training, evaluation, Table 4 (also: make mbpp, make nq)"
	@echo "make tables  the runs of gsm8k, mbpp and nq in one page: Tables 2 to 4"
	@echo "make gpu-smoke   before make gsm8k: every stage and method with a small model, 5 minutes"
	@echo "make bench, bench-eval, bench-judge, bench-memory, bench-gpu   speed and memory beside what others use"
	@echo "make sweep   the causal models of transformers, tiny: which ways work on each"
	@echo "make study   does the claim hold? six methods, three seeds: many hours on 2 CPU cores, goes on where it was"
	@echo "make fuzz    100,000 random texts into everything that reads what a model or a person wrote"
	@echo ""
	@echo "Variables of gsm8k, mbpp, nq (make gsm8k LIMIT=48 STEPS=6):"
	@echo "  MODEL=$(MODEL)   a name on the hub or a folder"
	@echo "  DATA=$(DATA)   where data sets are and are downloaded to      OUT=...   the run folder (default: runs/...)"
	@echo "  METHODS=\"$(METHODS)\"   of sft sdft ssr s3ft rft      LIMIT=N   first N rows of every split"
	@echo "  BENCHMARKS=$(BENCHMARKS)   or none"
	@echo "  STEPS=N   optimizer steps      FLAGS=\"...\" for s3ft.py, EVAL_FLAGS=\"...\" for evaluate.py (see --help)"

# The exact versions of constraints.txt. torch comes first and by its exact version, so that nothing else chooses its build.
$(VENV)/ready: constraints.txt pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'Python 3.11 or later is needed: make PYTHON=python3.11 ...')"
	$(PYTHON) -m venv $(VENV)
	$(PY) $(PIP) "$$(grep '^torch==' constraints.txt)"
	$(PY) $(PIP) -c constraints.txt -e '.[demo,plots]'
	@touch $@

$(VENV)/ready-dev: $(VENV)/ready
	$(PY) $(PIP) -c constraints.txt -e '.[dev]'
	@touch $@

$(VENV)/ready-lesson: $(VENV)/ready
	$(PY) $(PIP) -c constraints.txt -e '.[lesson]'
	@touch $@

# The peers of the benchmarks, in an environment of their own: lm-eval brings a package that is named evaluate, like our module.
$(BENCH)/ready: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python $(PIP) "$$(grep '^torch==' constraints.txt)"
	$(BENCH)/bin/python $(PIP) -c constraints.txt -e '.[demo,plots,bench]'
	@touch $@

$(SMOL)/config.json: | $(VENV)/ready
	$(PY) examples/smollm2.py $(SMOL)

# One epoch of 96 rows is too short for the paper's learning rate of 1e-4.
demo: $(VENV)/ready $(SMOL)/config.json
	for method in sft s3ft; do \
		$(PY) s3ft.py --task reading --method $$method --model $(SMOL) --out runs/demo --limit 96 --lr 1e-3 --share-prefix || exit; done
	$(PY) evaluate.py --out runs/demo

LESSON := s3ft_in_an_hour.ipynb
lesson: $(VENV)/ready-lesson $(SMOL)/config.json
	$(PY) -m nbconvert --execute --to notebook --output-dir runs/lesson examples/$(LESSON)
	$(PY) -m nbconvert --to html runs/lesson/$(LESSON)

test: $(VENV)/ready-dev $(SMOL)/config.json
	$(PY) -m ruff check .
	$(PY) -m pytest

# The paper's run. Another model, or fewer rows, has a run folder of its own.
run_name = $(1)$(if $(filter-out $(DEFAULT),$(MODEL)),-$(notdir $(patsubst %/,%,$(MODEL))))$(if $(LIMIT),-$(LIMIT)-rows)
# Table 4, with LIMIT on a sample. MMLU's limit is of each of its 57 subjects, so it then has a call of its own.
comma := ,
names = $(filter-out none $(if $(2),mmlu),$(subst $(comma), ,$(1)))
table_4 = $(if $(names),--benchmarks $(subst $() ,$(comma),$(strip $(names))) $(if $(2),--limit $(2) --sampled))
gsm8k mbpp nq: OUT ?= runs/$(call run_name,$@)
gsm8k mbpp nq: $(VENV)/ready
	for method in $(METHODS); do \
		$(PY) s3ft.py --task $@ --method $$method --model $(MODEL) --data $(DATA) --out $(OUT) \
			$(if $(LIMIT),--limit $(LIMIT)) $(if $(STEPS),--steps $(STEPS)) $(FLAGS) || exit; done
	$(PY) evaluate.py --out $(OUT) --data $(DATA) $(EVAL_FLAGS) $(call table_4,$(BENCHMARKS),$(LIMIT))
	$(if $(and $(LIMIT),$(findstring mmlu,$(BENCHMARKS))),$(PY) evaluate.py --out $(OUT) --data $(DATA) $(EVAL_FLAGS) \
		--benchmarks mmlu --limit $(shell expr \( $(LIMIT) + 56 \) / 57) --sampled)

tables: $(VENV)/ready
	$(PY) -m results.tables $(foreach task,gsm8k mbpp nq,runs/$(call run_name,$(task))) --out runs/tables.md

gpu-smoke: $(VENV)/ready $(SMOL)/config.json
	$(PY) -m bench.smoke --model $(SMOL) --data $(DATA) --out runs/gpu-smoke

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
	$(PY) -m bench.shapes --out docs $(FLAGS)

# On a GPU: a Mistral-7B-shaped model with random weights. Without one a tiny shape, and no figure.
bench-gpu: $(VENV)/ready
	$(PY) -m bench.generate --shape mistral-7b --out docs $(FLAGS)
	$(PY) -m bench.train --shape mistral-7b --out docs $(FLAGS)

sweep: $(VENV)/ready-dev
	$(PY) -m bench.sweep $(FLAGS)

# The oldest versions that pyproject.toml allows. They are large downloads.
test-oldest: $(SMOL)/config.json
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(PIP) $$(grep -oE '(torch|transformers)>=[0-9.]+' pyproject.toml | sed 's/>=/==/')
	$(OLDEST)/bin/python $(PIP) -e '.[demo,plots,dev]'
	$(OLDEST)/bin/python -m pytest

fuzz: $(VENV)/ready-dev
	$(PY) -m tests.fuzz $(FLAGS)

# With IFEval's checkers, which come with lm-eval. A small one:
# make study FLAGS="--seeds 1 --methods sft,s3ft --steps 6 --train 48 --val 16 --test 48 --documents 10 --out runs/small --docs runs/small"
XQUAD := $(DATA)/xquad/xquad.en.json
study: $(BENCH)/ready $(SMOL)/config.json
	$(BENCH)/bin/python -m bench.study --model $(SMOL) --data $(DATA) --xquad $(XQUAD) $(FLAGS)

study-report: $(BENCH)/ready
	$(BENCH)/bin/python -m bench.study --report-only

# Not runs/, which took hours.
clean:
	rm -rf $(VENV) $(BENCH) $(OLDEST)
