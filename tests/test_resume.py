"""A resumed run is the run that it resumes: entire final checkpoints are compared with an uninterrupted run's."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import training
from fleet.errors import UsageError
from fleet.rl.checkpoints import describe_file, list_checkpoints
from fleet.run_folder import read_jsonl
from tests.helpers import REPOSITORY
from tests.processes import run_ranks, start_ranks

pytestmark = pytest.mark.slow

QUICK = ["--per_device_batch_size", "2", "--sample_steps", "0", "--report_to", "none", "--save_steps", "1",
         "--save_total_limit", "9"]  # fmt: skip
TURNS = ["--env", str(REPOSITORY / "tests" / "turning_env.py") + ":LookAgainEnv", "--max_turns", "2", "--reward",
         str(REPOSITORY / "tests" / "length_reward.py") + ":score"]  # fmt: skip
EVERY_PART = ["--use_lora", "--lora_targets", "language,vision,merger"]
KINDS = {
    "full": (1, False, []),
    "lora": (1, False, ["--use_lora"]),
    "two-full": (2, False, []),
    "frozen": (1, False, ["--freeze", "tower,merger"]),
    "vision-rate": (1, False, ["--freeze", "merger", "--vision_learning_rate", "1e-5"]),
    "zero3-vision-rate": (2, True, [*EVERY_PART, "--vision_learning_rate", "1e-5"]),
    "lora-everywhere": (1, False, EVERY_PART),
    "turns": (1, False, TURNS),
    "dynamic": (1, False, ["--dynamic_sampling", "3", "--num_rollouts", "2"]),
    "two-dynamic": (2, False, ["--dynamic_sampling", "2", "--num_rollouts", "2"]),
    "zero3-turns": (2, True, [*TURNS, "--use_lora"]),
    "4-bit": (1, False, ["--use_lora", "--load_in_4bit"]),
    "zero3-full": (2, True, []),
    "zero3-shards": (2, True, ["--ds3_gather_for_generation", "false"]),
    "zero3-lora": (2, True, ["--use_lora"]),
}
FURTHER = pytest.mark.exhaustive
# what differs between two equal runs: paths, the command, seconds, and how warm a cache is
OTHER_IN_EACH_RUN = {"training_args.bin", "run_config.json", "manifest.json", "trainer_state.json"}
OF_THE_MACHINE = ("step_time_s", "rollouts_per_s", "eval_seconds", "epoch", "vision_cache/hit_rate")


def entire(checkpoint: Path) -> dict[str, Any]:
    """The SHA-256 of each file of a checkpoint, and the trainer's state without what the machine decides."""
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name not in OTHER_IN_EACH_RUN]
    hashes = {str(path.relative_to(checkpoint)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    for line in state["log_history"]:
        for name in OF_THE_MACHINE:
            line.pop(name, None)
    del state["epoch"], state["max_steps"]
    return hashes | {"trainer_state.json": state}


def cut_off_after(run: Path, step: int, to: Path) -> Path:
    """A copy of a run as a kill after its checkpoint at `step` leaves it."""
    shutil.copytree(run, to)
    for checkpoint in list_checkpoints(to):
        if int(checkpoint.name.split("-")[1]) > step:
            shutil.rmtree(checkpoint)
    shutil.rmtree(to / "final")
    return to


def seal(checkpoint: Path) -> None:
    """Gives a changed checkpoint a manifest that fits it, as somebody would who does it on purpose."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"] = {name: describe_file(checkpoint / name) for name in manifest["files"]}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("kind", "temperature"),
    [
        ("full", "1"),
        ("lora", "1.4"),
        ("zero3-full", "1"),
        ("zero3-shards", "1.4"),
        ("vision-rate", "1.4"),
        ("turns", "1.4"),
        ("dynamic", "1.4"),
        *(
            pytest.param(kind, "1.4", marks=FURTHER)
            for kind in (
                "zero3-vision-rate",
                "lora-everywhere",
                "zero3-turns",
                "two-dynamic",
                "full",
                "frozen",
                "4-bit",
                "two-full",
                "zero3-full",
                "zero3-lora",
            )
        ),
    ],
)
def test_a_resumed_run_ends_in_the_same_bits(kind: str, temperature: str, tmp_path: Path) -> None:
    num_processes, zero3, flags = KINDS[kind]
    flags = [*flags, "--temperature", temperature]

    def run(name: str, *more: str) -> Path:
        arguments = [*QUICK, *flags, "--output_dir", str(tmp_path / name), *more]
        run_ranks(tmp_path, arguments, num_processes, zero3=zero3)
        return tmp_path / name

    last = 4
    whole = run("whole", "--train_steps", str(last))
    wanted = entire(whole / f"checkpoint-{last}")
    assert len(wanted) > 10 and any("optim" in name for name in wanted) and any("rng" in name for name in wanted)
    assert entire(whole / f"checkpoint-{last - 1}") != wanted
    lines = read_jsonl(whole / "metrics.jsonl")
    if temperature == "1":
        assert any(line["sampling/passes"] == 1 for line in lines)
    else:
        # much of what is said stands in no draft
        assert all(line["sampling/passes"] > 5 and line["sampling/ended_in_first_pass"] < 1 for line in lines)

    if "dynamic" in kind:
        assert all(line["dynamic_sampling/replaced"] > 0 for line in lines)

    # in the middle of its one epoch, early and late
    for step in (1, 3):
        cut = cut_off_after(whole, step, tmp_path / f"cut-{step}")
        run(cut.name, "--train_steps", str(last), "--resume")
        assert entire(cut / f"checkpoint-{last}") == wanted
    # over the end of its epoch: the run was to have 3 steps, and is made longer
    longer = cut_off_after(run("longer", "--train_steps", "3"), 3, tmp_path / "made-longer")
    run(longer.name, "--train_steps", str(last), "--resume")
    assert entire(longer / f"checkpoint-{last}") == wanted
    assert read_jsonl(longer / "rollouts.jsonl") == read_jsonl(whole / "rollouts.jsonl")


def test_two_processes_that_resume_nothing_or_another_run_say_what_one_says(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = [*QUICK, "--output_dir", str(folder), "--resume"]

    def refusals() -> list[str]:
        """The last lines of a run of one process and of the first of two."""
        lines = []
        for num_processes in (1, 2):
            ranks = start_ranks(tmp_path / "logs", arguments, num_processes)
            assert [rank.wait() for rank in ranks] == [2] * num_processes, ranks[0].output[-3000:]
            lines.append(ranks[0].output.strip().splitlines()[-1].replace("error: process 0: ", "error: "))
        return lines

    assert refusals() == [
        f"error: resume: {folder} has no config.json of a run; pass the output_dir of one, or --resume auto to begin "
        "one where there is none"
    ] * 2  # fmt: skip
    folder.mkdir()
    (folder / "config.json").write_text('{"options": {"seed": 7}}')
    assert refusals() == [
        f"error: resume: the run in {folder} had other flags: seed (was 7, now 0); pass the same ones, or start a new "
        "run"
    ] * 2  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "cycle"),
    [
        pytest.param(["--num_iterations", "2"], 2, marks=FURTHER),
        pytest.param(
            ["--steps_per_generation", "2", "--num_iterations", "2", "--gradient_accumulation_steps", "2"],
            2,
            marks=FURTHER,
        ),
        (["--steps_per_generation", "4", "--gradient_accumulation_steps", "2", "--beta", "0.05"], 2),
    ],
)
def test_saves_wait_for_the_end_of_a_generation(flags: list[str], cycle: int, tmp_path: Path) -> None:
    arguments = [*QUICK, *flags, "--train_steps", "5"]
    run_ranks(tmp_path, [*arguments, "--output_dir", str(tmp_path / "whole")])
    # step 1, 3 and 5 are in the middle of a generation
    saved = [path.name for path in list_checkpoints(tmp_path / "whole")]
    assert saved == ["checkpoint-4", "checkpoint-2"]
    cut = cut_off_after(tmp_path / "whole", 2, tmp_path / "cut")
    run_ranks(tmp_path, [*arguments, "--output_dir", str(cut), "--resume"])
    assert entire(cut / "checkpoint-4") == entire(tmp_path / "whole" / "checkpoint-4")
    assert read_jsonl(cut / "rollouts.jsonl") == read_jsonl(tmp_path / "whole" / "rollouts.jsonl")
    first, second = (load_file(run / "final" / "model.safetensors") for run in (cut, tmp_path / "whole"))
    assert all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.parametrize(
    "kind",
    [pytest.param("full", marks=FURTHER), "lora", "zero3-full", pytest.param("zero3-lora", marks=FURTHER)],
)
def test_weights_that_are_missing_or_unknown_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    num_processes, zero3, flags = KINDS[kind]
    arguments = [*QUICK, *flags, "--output_dir", str(tmp_path / "run"), "--resume", "auto", "--train_steps"]
    run_ranks(tmp_path, [*arguments, "1"], num_processes, zero3=zero3)
    checkpoint = tmp_path / "run" / "checkpoint-1"
    if zero3:
        (path,) = checkpoint.glob("global_step1/*rank_1_mp_rank_00_model_states.pt")
        states = torch.load(path, weights_only=True)
        groups = states["param_shapes"]
        first = next(iter(groups[0]))
        groups[0] = {"planted" if name == first else name: shape for name, shape in groups[0].items()}
        torch.save(states, path)
    else:
        (path,) = checkpoint.glob("*model.safetensors")
        weights = load_file(path)
        first = sorted(weights)[0]
        weights["planted"] = weights.pop(first)
        save_file(weights, path, {"format": "pt"})
    seal(checkpoint)

    ranks = start_ranks(tmp_path, [*arguments, "2"], num_processes, zero3=zero3)
    assert [rank.wait() for rank in ranks] == [2] * num_processes
    said = ranks[0].output
    assert (
        "does not fit the model: it lacks 1 weights, " in said and "has unknown 1 weights, planted among them" in said
    )
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "checkpoint-2").exists()


def test_resume_from_the_start_when_killed_before_the_first_checkpoint(tmp_path: Path) -> None:
    arguments = [*QUICK, "--eval_steps", "1", "--eval_episodes", "4", "--train_steps", "1", "--resume", "auto"]
    run_ranks(tmp_path, [*arguments, "--output_dir", str(tmp_path / "whole")])
    cut = cut_off_after(tmp_path / "whole", 0, tmp_path / "cut")
    (rank,) = run_ranks(tmp_path, [*arguments, "--output_dir", str(cut)])
    assert "has no checkpoint yet, so the run begins at step 0" in rank.output
    assert entire(cut / "checkpoint-1") == entire(tmp_path / "whole" / "checkpoint-1")
    assert [line["step"] for line in read_jsonl(cut / "evaluations.jsonl")] == [0, 1]


def test_other_images_are_refused_and_other_code_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    images = shutil.copytree(REPOSITORY / "toy_images", tmp_path / "images")
    (tmp_path / "env.py").write_text("from environment import PickImageEnv\n\n\nclass Mine(PickImageEnv):\n    pass\n")
    arguments = [*QUICK, "--data_root", str(images), "--env", f"{tmp_path / 'env.py'}:Mine", "--output_dir",
                 str(tmp_path / "run"), "--train_steps"]  # fmt: skip
    training.main([*arguments, "1"])
    with (tmp_path / "env.py").open("a") as file:
        file.write("# mended\n")
    training.main([*arguments, "2", "--resume"])
    assert "resume: since the run began, changed: the file of --env; its bits may differ" in capfd.readouterr().err
    changed = sorted(images.glob("*.png"))[0]
    shutil.copyfile(sorted(images.glob("*.png"))[1], changed)
    with pytest.raises(
        UsageError, match=f"the images are not those that the run began with .changed: {changed.name}.,"
    ):
        training.main([*arguments, "3", "--resume"])
