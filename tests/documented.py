"""Every command that README.md, CONTRIBUTING.md and docs/*.md show, and how CI runs it.

Owns the table and how commands are found. run_documented.py runs the table; test_documented.py fails for a command that
is not in it, so that a new one cannot be forgotten.
"""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = tuple(path for name in ("README.md", "CONTRIBUTING.md", "docs/*.md") for path in sorted(REPOSITORY.glob(name)))
VERBS = ("make", "python", "accelerate", "pip", "pytest", "torchrun", "git clone", "source", "bash")
FREE_PORT = "<a free port>"
LAST_STAGE = 3
TRAINED = ("{run}/config.json", "{run}/metrics.jsonl", "{run}/rollouts.jsonl", "{run}/curve.png", "{run}/report.html",
           "{run}/final/*.safetensors")  # fmt: skip


@dataclass(frozen=True)
class Runs:
    """A command that is run: as it stands, but for the values of flags that it has and for flags added to its end.

    beside: further changes, with which the same command is started a second time at the same moment. leaves: patterns
    of files that the run must have written; {run} is the folder that training.py names at its end. says: words of its
    output. stage: those of one stage run beside each other, a core each, before those of the next; those of the last,
    which start two processes or rewrite what others read, one by one.
    """

    command: str
    changed: Mapping[str, str] = field(default_factory=dict)
    added: str = ""
    beside: Mapping[str, str] = field(default_factory=dict)
    leaves: tuple[str, ...] = ()
    says: str = ""
    stage: int = 1

    def as_run(self, further: Mapping[str, str] | None = None) -> str:
        """The command with its changes, and with `further` ones. Raises ValueError for a flag that it does not have.

        >>> Runs("python train.py --steps 200 --seed 1", {"--steps": "2"}, "--quiet").as_run()
        'python train.py --steps 2 --seed 1 --quiet'
        """
        words = shlex.split(self.command)
        for flag, value in {**self.changed, **(further or {})}.items():
            words[words.index(flag) + 1] = value
        return shlex.join([*words, *shlex.split(self.added)])


@dataclass(frozen=True)
class RunBy:
    """A command that runs as part of something else: the file `where` has the text `line`, which holds the command."""

    command: str
    where: str
    line: str


@dataclass(frozen=True)
class NotRun:
    """A command that cannot run in CI, or is none, with the reason."""

    command: str
    reason: str


LOOKED = "runs/look/final"  # what make demo-look leaves; stands in for a model of the hub
CLICKS = "--train_steps 2 --model_id runs/click/final"  # which has been taught the calls, as a toy of its own would be
SMALL_STEP = "--model_size 2m --image_side_px 56 --num_episodes 1 --completion_tokens 4"
ONE_STEP = f"{SMALL_STEP} --num_steps 1 --measure_memory false"

TABLE: tuple[Runs | RunBy | NotRun, ...] = (
    NotRun("git clone <this repository> fleet && cd fleet", "CI begins in a clone of its own"),
    NotRun("pip install flash-attn --no-build-isolation", "compiles for an hour, and needs CUDA"),
    NotRun("accelerate launch", "names the launcher of the commands below"),
    RunBy("make test", ".ci/run", "make test"),
    RunBy("make documented", ".ci/run", "make documented"),
    RunBy("make test-slow", ".ci/run", 'FLEET_KILLS=2 make test-slow SLOW="slow and not exhaustive"'),
    RunBy("make test-vllm", ".ci/run", 'make test-vllm VLLM="vllm and not exhaustive"'),
    RunBy(
        "VLLM_SERVER_DEV_MODE=1 vllm serve Qwen/Qwen2.5-VL-7B-Instruct --enable-scale-out --logprobs-mode "
        """processed_logprobs --weight-transfer-config '{"backend": "nccl"}'""",
        "tests/rl/test_vllm.py",
        '(documented,) = [line for line in all_documented_commands() if "vllm serve" in line]',
    ),
    RunBy(
        "python -m pytest tests/rl/test_rloo_trainer.py -k stock",
        "Makefile",
        'OMP_NUM_THREADS=1 python -m pytest -m "not slow and not vllm" $(ON_EVERY_CORE)',
    ),
    Runs("accelerate launch training.py --fixed_correct_index 0", added="--train_steps 2", leaves=TRAINED),
    Runs(
        "accelerate launch training.py --fixed_correct_index none --eval_steps 25 --output_dir runs/look",
        changed={"--eval_steps": "2", "--output_dir": "runs/look_small"},
        added="--train_steps 2 --eval_episodes 16",
        leaves=("runs/look_small/evaluations.jsonl", *TRAINED),
    ),
    Runs("make demo-look", leaves=("runs/look/evaluation.json", "runs/look/report.html", *TRAINED)),
    Runs("make demo", leaves=TRAINED),
    Runs("source .venv/bin/activate"),
    Runs("python training.py --help", says="--fixed_correct_index"),
    Runs("python -m fleet.toy.draw_images", leaves=("toy_images/red_circle.png",), stage=LAST_STAGE),
    Runs("python training.py", added="--train_steps 2", leaves=TRAINED),
    Runs("accelerate launch training.py --config run.yaml --seed 1", added="--train_steps 2", leaves=TRAINED),
    Runs(
        "accelerate launch training.py --env examples/odd_one_out.py:OddOneOutEnv --config examples/odd_one_out.yaml "
        "--output_dir runs/odd",
        added="--train_steps 2 --warmup_steps 1 --per_device_batch_size 8",
        leaves=TRAINED,
    ),
    Runs("python evaluate.py --model_id runs/odd/final", added="--eval_episodes 16", says="redrawn images", stage=2),
    Runs(
        "accelerate launch training.py --env examples/most_dots.py:MostDotsEnv",
        added="--train_steps 2",
        leaves=TRAINED,
    ),
    Runs("cp -r toy_images photos", leaves=("photos/red_circle.png",)),
    Runs(
        "accelerate launch training.py --fixed_correct_index none --control_steps 25 --stop_if_blind stop",
        changed={"--control_steps": "1"},
        added="--train_steps 2 --control_episodes 8",
        leaves=TRAINED,
        says="with every picture grey",
    ),
    Runs(
        "accelerate launch training.py --data_root photos --fixed_correct_index none",
        added="--train_steps 2",
        leaves=TRAINED,
        stage=2,
    ),
    Runs(
        "accelerate launch training.py --data_root photos.parquet --image_column photo --label_column kind",
        added="--train_steps 2",
        leaves=TRAINED,
    ),
    Runs("cp examples/click.py my_env.py", leaves=("my_env.py",)),
    Runs("python -m fleet.check_env my_env.py:ClickEnv", says="my_env.py:ClickEnv is sound", stage=2),
    Runs(
        """accelerate launch training.py --env my_env.py:ClickEnv --env_args '{"num_shapes": 3}'""",
        added=CLICKS,
        leaves=TRAINED,
        stage=2,
    ),
    Runs(
        "accelerate launch training.py --env my_env.py:ClickEnv --reward my_reward.py:score",
        added=CLICKS,
        leaves=TRAINED,
        stage=2,
    ),
    Runs(
        "accelerate launch training.py --env examples/click.py:ClickEnv --config examples/click.yaml "
        "--output_dir runs/click",
        added="--train_steps 2 --warmup_steps 1",
        leaves=TRAINED,
    ),
    Runs(
        "python evaluate.py --model_id runs/click/final",
        added="--eval_episodes 16",
        says="no such control for this environment",
        stage=2,
    ),
    Runs("python -m fleet.check_env examples/counting.py:CountingEnv --train", says="it learns"),
    Runs("python -m fleet.check_env examples/zoom.py:ZoomEnv --max_turns 2", says="examples/zoom.py:ZoomEnv is sound"),
    Runs(
        "accelerate launch training.py --env examples/zoom.py:ZoomEnv --config examples/zoom.yaml "
        "--output_dir runs/zoom",
        added="--train_steps 2 --warmup_steps 1",
        leaves=TRAINED,
    ),
    Runs(
        "python evaluate.py --model_id runs/zoom/final",
        added="--eval_episodes 16",
        says="no such control for this environment",
        stage=2,
    ),
    Runs(
        "accelerate launch training.py --env examples/counting.py:CountingEnv --config examples/counting.yaml "
        "--output_dir runs/counting",
        added="--train_steps 2 --warmup_steps 1",
        leaves=TRAINED,
    ),
    Runs(
        "python evaluate.py --model_id runs/counting/final",
        added="--eval_episodes 16",
        says="no such control for this environment",
        stage=2,
    ),
    Runs("accelerate launch training.py --reward my_reward.py:score", added="--train_steps 2", leaves=TRAINED),
    Runs(
        "accelerate launch training.py --output_dir runs/long --resume auto",
        added="--train_steps 2",
        leaves=("runs/long/checkpoint-2/manifest.json", *TRAINED),
    ),
    Runs(
        "python evaluate.py --fixed_correct_index none --eval_episodes 1000",
        changed={"--eval_episodes": "16"},
        says="greedy accuracy",
    ),
    Runs(
        "python benchmarks/toy_seeds.py --num_seeds 5",
        changed={"--num_seeds": "1"},
        added="--train_steps 5",
        leaves=("benchmarks/results/toy_seeds.json", "docs/toy_curve.png"),
    ),
    Runs(
        "python benchmarks/look_seeds.py --num_seeds 3",
        changed={"--num_seeds": "1"},
        added="--train_steps 2 --eval_episodes 16",
        leaves=("benchmarks/results/look_seeds.json", "docs/look_curve.png"),
    ),
    Runs(
        "python benchmarks/example_seeds.py --num_seeds 3",
        changed={"--num_seeds": "1"},
        added="--only counting --train_steps 2 --eval_episodes 16",
        leaves=("benchmarks/results/example_seeds.json", "docs/examples_curves.png"),
    ),
    Runs(
        "python benchmarks/zoom_seeds.py --num_seeds 3",
        changed={"--num_seeds": "1"},
        added="--train_steps 2 --eval_episodes 16",
        leaves=("benchmarks/results/zoom_seeds.json", "docs/zoom_curve.png"),
    ),
    Runs(
        "python benchmarks/dynamic_sampling_seeds.py --num_seeds 3",
        changed={"--num_seeds": "1"},
        added="--train_steps 5 --only 'a fixed index'",
        leaves=("benchmarks/results/dynamic_sampling.json",),
    ),
    Runs("python benchmarks/turns_parity.py", added="--max_turns 2 --num_pictures 1", says="| 2 | 1 |"),
    Runs("accelerate launch training.py --dynamic_sampling 4", added="--train_steps 2", leaves=TRAINED),
    Runs(
        "python benchmarks/step_time_table.py",
        added=f"--only calls_g16 {ONE_STEP}",
        leaves=("benchmarks/results/step_time/calls_g16.json", "docs/step_time.png"),
    ),
    Runs("python benchmarks/step_time.py --num_rollouts 8", added=ONE_STEP, says="parity: log-probabilities within"),
    Runs(
        "python benchmarks/step_profile.py --num_rollouts 8",
        added=SMALL_STEP,
        leaves=("docs/step_profile.md",),
    ),
    Runs(
        "python benchmarks/encode_time.py --model_size 3b --image_side_px 448",
        changed={"--model_size": "2m", "--image_side_px": "56"},
        added="--repeats 1",
        says="ratio",
    ),
    Runs(
        "python evaluate.py --replay runs/look --step 51 --group 3",
        changed={"--step": "1"},
        says="drawn again: 4 of 4 rollouts token for token",
        stage=2,
    ),
    Runs(
        "python benchmarks/gpu_check.py",
        added="--model_size 2m --image_side_px 56 --dtype float32 --sections toy --json check.json",
        leaves=("check.json",),
    ),
    Runs(
        "python training.py --dry_run --config recipes/7b_8gpus.yaml --data_root ./toy_images --assume_gpus 8x80:H100 "
        "--assume_accelerate recipes/zero3.yaml",
        says="dry run: OK",
    ),
    Runs("python training.py --dry_run --json", says='"fits": true'),
    Runs("python benchmarks/scaling.py", says="1,024"),
    Runs(
        "python benchmarks/memory_model.py --json benchmarks/results/memory_model.json",
        added="--only lora --model_size 2m",
        says="lora ",
    ),
    Runs("python benchmarks/stock_faults.py", says="one gradient is NaN"),
    Runs("python benchmarks/reading.py", says="lines to follow one RLOO step"),
    Runs("python benchmarks/save_time.py", added="--num_pairs 2", says="longer_by"),
    Runs("python report.py runs/look", leaves=("runs/look/report.html",), stage=2),
    Runs(
        "python export.py runs/look", leaves=("runs/look/export/README.md", "runs/look/export/*.safetensors"), stage=2
    ),
    Runs(
        "python export.py runs/look --checkpoint checkpoint-50 --output look-model",
        leaves=("look-model/README.md", "look-model/*.safetensors"),
        stage=2,
    ),
    Runs(
        "python evaluate.py --model_id runs/look/export",
        added="--eval_episodes 16",
        says="greedy accuracy",
        stage=LAST_STAGE,
    ),
    RunBy(
        "python evaluate.py --model_id runs/look/final --baseline toy --output runs/look/evaluation.json",
        "Makefile",
        "python evaluate.py --model_id runs/look/final --baseline toy --output runs/look/evaluation.json",
    ),
    Runs(
        'python -m fleet.ask --model_id runs/look/final --instruction "Pick the red circle." --images '
        "toy_images/red_circle.png toy_images/blue_square.png toy_images/cyan_ring.png toy_images/pink_flower.png",
        says="picked",
        stage=2,
    ),
    Runs(
        "accelerate launch training.py --model_id Qwen/Qwen2.5-VL-3B-Instruct --use_lora true "
        "--fixed_correct_index none",
        changed={"--model_id": LOOKED},
        added="--train_steps 2",
        leaves=TRAINED,
        stage=2,
    ),
    Runs(
        "python -m fleet.toy.model ship --kind plain",
        added="--lesson_steps 2",
        leaves=("fleet/toy/plain.safetensors",),
        stage=LAST_STAGE,
    ),
    Runs(
        "python -m fleet.toy.model ship --kind reading",
        added="--lesson_steps 2",
        leaves=("fleet/toy/reading.safetensors",),
        stage=LAST_STAGE,
    ),
    Runs(
        "python -m fleet.toy.model ship",
        added="--lesson_steps 2",
        leaves=("fleet/toy/sighted.safetensors",),
        stage=LAST_STAGE,
    ),
    Runs(
        "accelerate launch --config_file accelerate_config.yaml training.py --model_id Qwen/Qwen2.5-VL-32B-Instruct "
        "--data_root ./toy_images --train_steps 200 --per_device_batch_size 1 --num_rollouts 4 --use_lora false "
        "--fixed_correct_index 0",
        changed={"--config_file": "tests/zero3_cpu.yaml", "--model_id": LOOKED, "--train_steps": "2"},
        leaves=TRAINED,
        stage=LAST_STAGE,
    ),
    Runs(
        "accelerate launch --config_file accelerate_config.yaml --num_machines 2 --num_processes 16 --machine_rank 0 "
        "--main_process_ip 10.0.0.1 --main_process_port 29500 training.py --model_id Qwen/Qwen2.5-VL-32B-Instruct "
        "--output_dir /shared/runs/first",
        changed={
            "--config_file": "tests/zero3_cpu.yaml",
            "--num_processes": "2",
            "--main_process_ip": "127.0.0.1",
            "--main_process_port": FREE_PORT,
            "--model_id": LOOKED,
            "--output_dir": "runs/first",
        },
        added="--train_steps 2",
        beside={"--machine_rank": "1"},
        leaves=("runs/first/report.html", *TRAINED),
        stage=LAST_STAGE,
    ),
)


def documented_commands(page: str) -> list[str]:
    """The commands of a Markdown page in order, each on one line and once.

    Every line of a `bash` block is one, whatever it begins with. In other blocks, in indented lines and in inline
    code, what begins with one of VERBS is.
    """
    found: list[str] = []
    blocks = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
    for language, block in blocks.findall(page):
        found += [line for line in _joined_lines(block) if language == "bash" or _begins_with_verb(line)]
    rest = blocks.sub("", page)
    found += [line for line in _joined_lines("\n".join(re.findall(r"^ {4}(.*)$", rest, re.MULTILINE)))
              if _begins_with_verb(line)]  # fmt: skip
    inline = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", rest)]
    found += [code for code in inline if _begins_with_verb(code) and code not in VERBS]
    return list(dict.fromkeys(found))


def _joined_lines(block: str) -> list[str]:
    lines = [" ".join(line.split()) for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def _begins_with_verb(line: str) -> bool:
    without_variables = re.sub(r"^(\w+=\S* +)+", "", line)
    return any(without_variables == verb or without_variables.startswith(f"{verb} ") for verb in VERBS)


def all_documented_commands() -> list[str]:
    """Those of every page, each once."""
    found = [command for page in PAGES for command in documented_commands(page.read_text(encoding="utf-8"))]
    return list(dict.fromkeys(found))
