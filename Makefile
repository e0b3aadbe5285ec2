# The order of things. `make help` lists every target; PROFILE= chooses a run, DATA= a directory with real data sets.

PROFILE ?= embedded
DATA ?=
# Another seed for all of it, in a folder of its own; the profile's report shows all of its seeds together.
SEED ?=
# Options for pip, such as a CPU-only index for torch: PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_ARGS ?=
PYTHON ?= $(shell command -v python3.11 || command -v python3)

# Two notebooks at a time, each on half of the cores, do half as much again as one at a time on all of them.
# JOBS=1 needs less memory (and is right for a model that fills a GPU).
JOBS ?= 2
MAKEFLAGS += --jobs=$(JOBS)
CORES := $(shell getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS ?= $(shell echo $$(( $(CORES) > $(JOBS) ? $(CORES) / $(JOBS) : 1 )))

# Large tensors in huge pages (Linux, glibc): where memory is slow to look up, several times faster; elsewhere no difference.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

SHELL := /bin/bash
.SHELLFLAGS := -eo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

BIN := .venv/bin
INSTALLED := .venv/.installed
RUN := $(PROFILE)$(if $(SEED),-seed$(SEED))
BUILD := build/$(RUN)
N := $(BUILD)/notebooks
STAGES := $(sort $(basename $(notdir $(wildcard notebooks/[0-9][0-9]-*.ipynb))))
LAUNCH := $(BIN)/python -m rlhf_trust.run
OF_RUN := --profile $(PROFILE) --data "$(DATA)" --seed "$(SEED)"

# Read by the hub's libraries when they are imported: no usage reports.
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help setup reproduce flagship report params appendix lab test compare parity bench clean resolve

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20
	@echo "  variables: PROFILE=$(PROFILE) (of: embedded $(sort $(basename $(notdir $(wildcard params/*.yaml))))), DATA=<directory>, SEED=<number>, JOBS=$(JOBS), PIP_ARGS="

setup: $(INSTALLED) ## install everything into .venv

$(INSTALLED): lib/pyproject.toml lib/constraints.txt
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info[:2] <= (3, 12), "Python 3.11 or 3.12 is needed, this is " + sys.version'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_ARGS) --quiet --constraint lib/constraints.txt --editable lib
	touch $@

# The chapters that the report waits for. The long ones are started first, so that no core waits for them at the end.
LONG := 05-inpo 30-reward-models 40-rag-trust 22-pruning 21-attribution-validation
CHAPTERS = $(filter-out 90-report,$(if $(filter flagship,$(MAKECMDGOALS)),$(filter 0% 1% 2%,$(ORDER)),$(ORDER)))
ORDER := $(filter $(STAGES),$(LONG)) $(filter-out $(LONG),$(STAGES))

reproduce: $(N)/90-report.ipynb report appendix ## run the whole study, then its report
	@echo "report: $(BUILD)/report.html"

flagship: $(N)/90-report.ipynb report appendix ## the same without the companion chapters (30 on)
	@echo "report: $(BUILD)/report.html"

report: $(BUILD)/report.html ## render the report as one HTML file

$(BUILD)/report.html: $(N)/90-report.ipynb
	$(BIN)/python -m rlhf_trust.render report $(RUN)

appendix: $(BUILD)/appendix/index.html ## render all executed notebooks as linked HTML pages

$(BUILD)/appendix/index.html: $(N)/90-report.ipynb
	$(BIN)/python -m rlhf_trust.render appendix $(RUN)

params: $(INSTALLED) ## print what every notebook would run with (* = changed by the profile)
	@$(LAUNCH) params $(OF_RUN)

lab: $(INSTALLED) ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab --notebook-dir notebooks

test: $(INSTALLED) ## unit tests, the smoke profile end to end, nbval on its notebooks
	$(BIN)/python -m pytest tests --ignore tests/benchmarks -q
	$(MAKE) reproduce PROFILE=smoke DATA= SEED=
	$(BIN)/python tests/rerun.py smoke

compare: $(INSTALLED) ## hold a run against the reference tables of its profile
	$(BIN)/python -m rlhf_trust.report $(PROFILE)

parity: .parity/.installed ## hold DataInf against dattri, MC1 and MC2 against lm-evaluation-harness (also seconds)
	.parity/bin/python tests/parity/dattri_datainf.py
	.parity/bin/python tests/parity/truthfulqa.py --data "$(or $(DATA),shipped)"

bench: $(INSTALLED) .trl-ppo/.installed parity ## sampling, training, PPO, attribution and lineage as ratios against the plain way or TRL's
	$(BIN)/python tests/benchmarks/throughput.py
	$(BIN)/python tests/benchmarks/reading.py
	$(BIN)/python tests/benchmarks/ppo.py --preferences "$(if $(DATA),path:$(DATA),shipped)"
	$(BIN)/python tests/benchmarks/gradients.py
	$(BIN)/python tests/benchmarks/scoring.py
	$(BIN)/python tests/benchmarks/lineage.py

# Environments of their own that see .venv's packages and add to them.
.parity/.installed: ADDED := --constraint lib/constraints.txt --requirement tests/parity/requirements.txt
.parity/.installed: tests/parity/requirements.txt
.trl-ppo/.installed: ADDED := --no-deps trl==1.12.0
.parity/.installed .trl-ppo/.installed: $(INSTALLED)
	$(PYTHON) -m venv $(@D)
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
	    > $$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/study.pth
	$(@D)/bin/python -m pip install $(PIP_ARGS) --quiet $(ADDED)
	touch $@

clean: ## remove what PROFILE made (the model and .venv stay)
	rm -rf $(BUILD)

# --- stages ------------------------------------------------------------------------------------------------------
# Each stage's parameters are checked and written to a file that changes only when they do; make does the rest.

resolve: $(INSTALLED)
	@$(LAUNCH) resolve $(OF_RUN)

$(STAGES:%=$(BUILD)/params/%.yaml): resolve ;

$(N)/%.ipynb: notebooks/%.ipynb $(BUILD)/params/%.yaml
	$(LAUNCH) stage $* $(OF_RUN)

TRAINED := $(addprefix $(N)/,01-sft.ipynb 03-ppo.ipynb 04-dpo.ipynb 05-inpo.ipynb)
VERTICALS := $(filter $(N)/1%,$(STAGES:%=$(N)/%.ipynb))

$(N)/03-ppo.ipynb $(N)/05-inpo.ipynb: $(N)/01-sft.ipynb $(N)/02-reward.ipynb
$(N)/04-dpo.ipynb: $(N)/01-sft.ipynb
$(VERTICALS): $(TRAINED)
$(N)/20-attribution.ipynb: $(N)/02-reward.ipynb $(VERTICALS)
# These train models of their own; of the verticals they only read the toxic continuations.
$(N)/21-attribution-validation.ipynb $(N)/22-pruning.ipynb: $(N)/10-toxicity.ipynb
$(N)/30-reward-models.ipynb: $(addprefix $(N)/,02-reward.ipynb 04-dpo.ipynb 05-inpo.ipynb)
$(N)/40-rag-trust.ipynb: $(TRAINED)
$(N)/50-lineage.ipynb: $(TRAINED) $(N)/40-rag-trust.ipynb
$(N)/90-report.ipynb: $(CHAPTERS:%=$(N)/%.ipynb)
ifndef SEED
$(N)/90-report.ipynb: $(wildcard $(BUILD)-seed*/tables/trust_change.csv)
endif
