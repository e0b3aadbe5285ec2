# The order of things. `make help` lists the targets.

# PROFILE is a file in params/, DATA a directory with real data sets, SEED a number: a run of its own, under that seed.
# SET changes parameters: "01-sft.learning_rate=1e-4 all.max_length=160".
PROFILE ?= embedded
DATA ?=
SEED ?=
SET ?=
# Where notebooks run, and what pieces of them can: none (here), local (child processes) or slurm, with sbatch's options.
EXECUTOR ?=
SLURM_ARGS ?=
# For `make evaluate`: a model, those compared with it (<name>=<model>,…), and what is measured.
BEFORE ?=
AFTER ?=
CHAPTERS ?= toxicity,stereotype,ethics,truthfulness,privacy
# For `make pdf`: full prints the harsh texts that pages fold away.
APPENDIX_TEXT ?=
# For `make soak`: 0.1 is a tenth of the trials.
SHARE ?=
# The launcher reads them from the environment, as they were written: neither make nor a shell runs what is in them.
$(foreach name,PROFILE DATA SEED SET EXECUTOR SLURM_ARGS BEFORE AFTER CHAPTERS APPENDIX_TEXT A B SHARE,$(eval override $(name) := $$(value $(name))))
export DATA SEED SET EXECUTOR SLURM_ARGS BEFORE AFTER
# Those that name folders, or stand in a recipe, are names.
LETTERS := a b c d e f g h i j k l m n o p q r s t u v w x y z A B C D E F G H I J K L M N O P Q R S T U V W X Y Z
LETTERS += 0 1 2 3 4 5 6 7 8 9 _ . - ,
without = $(if $(1),$(call without,$(wordlist 2,99,$(1)),$(subst $(firstword $(1)),,$(2))),$(2))
named = $(and $(filter 1,$(words $(1))),$(filter-out .% -%,$(1)),$(if $(call without,$(LETTERS),$(1)),,yes))
$(foreach name,PROFILE SEED CHAPTERS APPENDIX_TEXT A B SHARE,$(if $(filter PROFILE,$(name))$(strip $($(name))),$(if $(call named,$($(name))),,$(error $(name) must be \
  a name of letters, digits, "_", "." and "-", got "$($(name))"))))
# Two notebooks at a time, each on half of the cores, are half as fast again as one on all of them.
# JOBS=1 needs less memory, and suits a model that fills a GPU.
JOBS ?= 2
# Of the launcher too, since `make -j8` is not held by the line with MAKEFLAGS.
export JOBS
# Options for pip, such as a CPU-only index for torch: --extra-index-url https://download.pytorch.org/whl/cpu
PIP_ARGS ?=
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# PYTHON_ENV=active runs in the conda or virtual environment that is active, as it is, instead of making .venv.
PYTHON_ENV ?=

SHELL := /bin/bash
.SHELLFLAGS := -eo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
MAKEFLAGS += --jobs=$(JOBS)
CORES := $(shell getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS ?= $(shell echo $$(( $(CORES) > $(JOBS) ? $(CORES) / $(JOBS) : 1 )))
# Linux, glibc. Large tensors in huge pages: several times faster where memory is slow to look up. And what is
# freed is kept for the next tensor: to map it anew takes a quarter of a DPO step, to keep it a fifth more memory.
KEEP_FREED := glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184:glibc.malloc.top_pad=268435456
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1:$(KEEP_FREED)
# Read by the hub's libraries when they are imported: no usage reports.
export HF_HUB_DISABLE_TELEMETRY := 1
# Text is UTF-8 whatever the terminal's locale.
export PYTHONUTF8 := 1

ENVIRONMENT := .venv
INSTALLED := .venv/.installed
ifneq ($(PYTHON_ENV),)
ENVIRONMENT := $(if $(filter active,$(PYTHON_ENV)),$(or $(VIRTUAL_ENV),$(CONDA_PREFIX)),$(error PYTHON_ENV must be active, or empty))
$(if $(ENVIRONMENT),,$(error PYTHON_ENV=active: no conda or virtual environment is active; activate one, or leave it out))
override PYTHON := $(ENVIRONMENT)/bin/python
INSTALLED := build/.installed-$(firstword $(shell cksum <<< "$(ENVIRONMENT)"))
endif
BIN := $(ENVIRONMENT)/bin
RUN := $(PROFILE)$(if $(SEED),-seed$(SEED))
BUILD := build/$(RUN)
NOTEBOOKS := $(sort $(basename $(notdir $(wildcard notebooks/[0-9][0-9]-*.ipynb))))
# Those from 60 on have targets of their own. They belong to a run in which they are done, and to the tests'.
DONE := $(basename $(notdir $(wildcard $(BUILD)/notebooks/6[0-9]-*.ipynb)))
STAGES := $(filter-out $(if $(filter smoke,$(PROFILE)$(DATA)),,$(filter-out $(DONE),$(filter 6%,$(NOTEBOOKS)))),$(NOTEBOOKS))
LAUNCH := $(BIN)/python -m rlhf_trust.run
OPTIONS := --profile $(PROFILE)
PYTEST := $(BIN)/python -m pytest -q --strict-markers --numprocesses $(JOBS) --dist worksteal
RUFF := $(BIN)/ruff --config lib/pyproject.toml

COMMA := ,
MEASURE := toxicity stereotype ethics truthfulness privacy sycophancy refusal rag-trust lineage
chapter = $(or $(filter %-$(filter $(1),$(MEASURE)),$(NOTEBOOKS)),$(error CHAPTERS: no $(1); there are $(MEASURE)))
EVALUATED = $(foreach name,$(patsubst rag,rag-trust,$(subst $(COMMA), ,$(CHAPTERS))),$(call chapter,$(name)))

.PHONY: help setup fetch reproduce flagship dose methods quick evaluate card report params status appendix pdf latex crate lock lab lint format unit test verify compare parity soak bench clean resolve

help: ## list the targets
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20
	@echo "  variables: PROFILE=$(PROFILE) (of: embedded $(sort $(basename $(notdir $(wildcard params/*.yaml))))), DATA=<directory>, SEED=<number>, SET=\"<notebook>.<parameter>=<value> …\", JOBS=$(JOBS), EXECUTOR=<none, local or slurm>, SLURM_ARGS=, PIP_ARGS="

setup: $(INSTALLED) fetch ## install everything into .venv, and fetch what PROFILE needs: it then runs without a network
fetch: $(INSTALLED) ## fetch the models and data that PROFILE needs, which `make setup` does too
	$(LAUNCH) fetch $(OPTIONS)
.venv/.installed: lib/pyproject.toml lib/constraints.txt
	$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info[:2] <= (3, 12) or sys.exit("error: Python 3.11 or 3.12 is needed, this is " + sys.version.split()[0] + "; name another by PYTHON=")'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install $(PIP_ARGS) --quiet --constraint lib/constraints.txt --editable "lib[dev]"
	touch $@
build/.installed-%: lib/pyproject.toml lib/constraints.txt
	@cd / && $(PYTHON) -c 'import rlhf_trust as r; r.ROOT.samefile("$(CURDIR)") or r.missing' 2> /dev/null || { echo >&2 \
	  'error: PYTHON_ENV=active: $(ENVIRONMENT) lacks this study; there, run: pip install --constraint lib/constraints.txt --editable "lib[dev]"'; exit 2; }
	@mkdir -p build && touch $@

# --- the study --------------------------------------------------------------------------------------------------

reproduce: ## run the whole study, then its report
flagship: ## the same without the companion chapters (30 on)
reproduce flagship: $(BUILD)/report.html $(BUILD)/appendix/index.html
	@echo "report: $(BUILD)/report.html"

quick: ## a first answer: SFT, DPO and its placebo, five verticals without written answers, report
	$(MAKE) build/quick/report.html PROFILE=quick JOBS=1 OMP_NUM_THREADS=$(CORES) STAGES="01-sft 04-dpo 16-headline 90-report"
	@echo "report: build/quick/report.html"

dose: ## how do effects grow with the amount of preference pairs? Beside the whole study (then in its report), or alone
	$(MAKE) $(BUILD)/notebooks/60-dose.ipynb JOBS=1 OMP_NUM_THREADS=$(CORES) STAGES="01-sft 04-dpo 60-dose"
	[ ! -e $(BUILD)/report.html ] || $(MAKE) report
	$(BIN)/python -m rlhf_trust.render appendix $(RUN)
	@echo "chapter: $(BUILD)/appendix/60-dose.html"

methods: ## the whole study, and which method gains most: reward against KL, win rates by another judge
	$(MAKE) reproduce STAGES="$(sort $(STAGES) 61-methods)"

evaluate: ## measure models as they are: BEFORE=<model> AFTER=<name>=<model>,… CHAPTERS=toxicity,…,sycophancy,refusal,rag,lineage
	$(MAKE) card PROFILE=$(if $(filter embedded,$(PROFILE)),evaluate,$(PROFILE)) STAGES="$(EVALUATED) 90-report"

card: $(BUILD)/report.html ## what the report found, on one page for a model card
	$(BIN)/python -m rlhf_trust.card $(RUN)

report: $(INSTALLED) ## make the report anew, of what a run has so far
	$(LAUNCH) stage 90-report $(OPTIONS)
	$(BIN)/python -m rlhf_trust.render report $(RUN)

appendix: $(BUILD)/appendix/index.html ## render all executed notebooks as linked HTML pages
$(BUILD)/report.html $(BUILD)/appendix/index.html: lib/rlhf_trust/render.css
$(BUILD)/report.html: $(BUILD)/notebooks/90-report.ipynb
	$(BIN)/python -m rlhf_trust.render report $(RUN)
$(BUILD)/appendix/index.html: $(BUILD)/notebooks/90-report.ipynb
	$(BIN)/python -m rlhf_trust.render appendix $(RUN)

pdf: $(BUILD)/notebooks/90-report.ipynb ## the report and all executed notebooks as two PDFs (APPENDIX_TEXT=full: with harsh texts)
	$(BIN)/python -m rlhf_trust.pdf $(RUN) $(if $(APPENDIX_TEXT),--text $(APPENDIX_TEXT))

latex: $(BUILD)/notebooks/90-report.ipynb ## the main tables, headline numbers (as macros) and figures for a paper in LaTeX
	$(BIN)/python -m rlhf_trust.latex $(RUN)

crate: $(BUILD)/notebooks/90-report.ipynb ## describe a run's files, data and packages (RO-Crate, Croissant, SBOM), to publish with them
	$(BIN)/python -m rlhf_trust.crate $(RUN)

lock: .lock/.installed ## after a change of lib/constraints.txt: lib/hashes.txt anew, to install by hash
	.lock/bin/uv pip compile --quiet --universal --python-version 3.11.2 --extra dev --constraint lib/constraints.txt \
	  --generate-hashes --no-annotate --no-emit-index-url --custom-compile-command "make lock" --output-file lib/hashes.txt lib/pyproject.toml

params: $(INSTALLED) ## print what every notebook would run with (* = changed by the profile)
	@$(LAUNCH) params $(OPTIONS)

params status: export FETCH = $(STAGES)
status: $(INSTALLED) ## which notebooks of a run are done, and about how many minutes the others will take
	@$(LAUNCH) status $(OPTIONS)

lab: $(INSTALLED) ## open the notebooks in JupyterLab, with the parameters of PROFILE
	$(BIN)/jupyter lab --notebook-dir . --KernelSpecManager.kernel_dirs="[]" --LabApp.default_url="/lab/tree/$$($(LAUNCH) lab $(OPTIONS))"

verify: $(INSTALLED) ## does what was published hold in a run (A=<run>), and are its tables as its notebooks wrote them?
	$(BIN)/python -m rlhf_trust.reference $(or $(A),$(RUN)) --verify

compare: $(INSTALLED) ## list where a run's figures differ from its profile's reference, or A=<run> from B=<run>
	$(BIN)/python -m rlhf_trust.reference $(or $(A),$(RUN)) $(if $(B),--with $(B))

clean: ## remove what PROFILE made (the model and .venv stay)
	rm -rf $(BUILD)

# What the run needs from elsewhere is fetched. Parameters are checked, and written with a hash of the notebook's cells to
# a file that changes only when they do: make then knows what to run again.
resolve: export FETCH = $(READ) $(filter 90-%,$(STAGES))
resolve: $(INSTALLED)
	@$(LAUNCH) resolve $(OPTIONS)
$(STAGES:%=$(BUILD)/params/%.yaml): resolve ;

$(BUILD)/notebooks/%.ipynb: $(BUILD)/params/%.yaml
	$(LAUNCH) stage $* $(OPTIONS)

# Which notebooks each one needs. 21 to 23 train models of their own; of the verticals they read the toxic continuations.
nb = $(patsubst %,$(BUILD)/notebooks/%.ipynb,$(filter $(1),$(STAGES)))
$(call nb,03-% 05-%): $(call nb,01-% 02-%)
$(call nb,04-%): $(call nb,01-%)
$(call nb,1% 61-% 62-% 63-%): $(call nb,01-% 03-% 04-% 05-%)
$(call nb,16-% 61-%): $(call nb,02-%)
$(call nb,61-%): $(call nb,16-%)
$(call nb,20-%): $(call nb,02-% 10-% 11-% 12-% 13-% 14-%)
$(call nb,21-% 22-% 23-%): $(call nb,10-%)
$(call nb,30-%): $(call nb,02-% 04-% 05-%)
$(call nb,40-%): $(call nb,01-% 03-% 04-% 05-%)
$(call nb,50-%): $(call nb,01-% 03-% 04-% 05-% 40-%)
$(call nb,60-%): $(call nb,01-% 04-%)
# The long ones are started first, so that no core waits for them at the end.
READ := $(filter $(if $(filter flagship,$(MAKECMDGOALS)),0% 1% 2%,%),$(filter-out 90-%,$(STAGES)))
$(call nb,90-%): $(foreach some,05-% 16-% 60-% 61-% 30-% 40-% 22-% 21-% 23-% %,$(call nb,$(filter $(some),$(READ))))
$(call nb,90-%): $(if $(SEED),,$(wildcard $(BUILD)-seed*/tables/trust_change.csv))

# --- checks -----------------------------------------------------------------------------------------------------

lint: $(INSTALLED) ## check the code's rules and format (ruff)
	$(RUFF) check lib tests notebooks
	$(RUFF) format --check lib tests notebooks

format: $(INSTALLED) ## apply them
	$(RUFF) check --fix lib tests notebooks
	$(RUFF) format lib tests notebooks

unit: $(INSTALLED) ## unit tests alone, without the slow ones and without any notebook
	$(PYTEST) -m "not slow" tests

test: lint ## lint, all unit tests, the smoke profile end to end, nbval on its notebooks
	$(PYTEST) tests
	$(MAKE) reproduce PROFILE=smoke DATA= SEED= SET= EXECUTOR= BEFORE= AFTER=
	$(BIN)/python tests/rerun.py smoke

parity: .parity/.installed .bergson/.installed ## compare DataInf with dattri, gradients of DPO with dattri-llm, scores through training with bergson, MC1 and MC2 with lm-evaluation-harness, win rates with AlpacaEval
	.parity/bin/python tests/parity/dattri_datainf.py
	PYTHONPATH=tests .parity/bin/python -m parity.dattri_llm_dpo
	.parity/bin/python tests/parity/alpaca_eval_lc.py
	.parity/bin/python tests/parity/truthfulqa.py --data "$(or $(DATA),shipped)"
	.bergson/bin/python tests/parity/bergson_magic.py

soak: $(INSTALLED) ## break a small study on purpose (kills, power cuts, full disks, flipped bits): hours; some of it as root
	$(BIN)/python tests/soak.py $(if $(SHARE),--share $(SHARE))

bench: .trl-ppo/.installed .yardsticks/.installed parity ## speed of sampling, training, PPO, attribution, lineage, as ratios to the plain way, TRL, ctranslate2; coverage of the intervals
	for each in throughput reading gradients scoring lineage; do $(BIN)/python tests/benchmarks/$$each.py; done
	$(BIN)/python tests/benchmarks/ppo.py --preferences "$(if $(DATA),path:$(DATA),shipped)"
	.yardsticks/bin/python tests/benchmarks/yardsticks.py
	$(BIN)/python tests/benchmarks/coverage.py

# Environments of their own, which see the study's packages and add to them.
.parity/.installed: ADDED := --constraint lib/constraints.txt --requirement tests/parity/requirements.txt
.parity/.installed: tests/parity/requirements.txt
.trl-ppo/.installed: ADDED := --no-deps trl==1.12.0
.yardsticks/.installed: ADDED := --no-deps ctranslate2==4.8.5
.lock/.installed: ADDED := --no-deps uv==0.13.9
# bergson asks for torchvision, torchaudio and bitsandbytes as well, which its MAGIC does not need.
.bergson/.installed: ADDED := --no-deps bergson==2.5.1 torchopt==0.7.3 optree==0.20.0 graphviz==0.21 jaxtyping==0.3.11 wadler-lindig==0.1.8 simple-parsing==0.1.9 docstring-parser==0.18.0 petname==2.9 natsort==8.4.0 ml_dtypes==0.6.0
.parity/.installed .trl-ppo/.installed .yardsticks/.installed .lock/.installed .bergson/.installed: $(INSTALLED)
	$(PYTHON) -m venv $(@D)
	packages() { $$1/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'; }; \
	echo "import site; site.addsitedir('$$(packages $(abspath $(ENVIRONMENT)))')" > $$(packages $(@D))/study.pth
	$(@D)/bin/python -m pip install $(PIP_ARGS) --quiet $(ADDED)
	touch $@
