"""The commands that a run prints are whole: they go on with this run, and name what it left."""

import shlex
import shutil
from pathlib import Path

import pytest

from environment import PickImageEnv, load_environment_class
from fleet.ask import parse_question
from fleet.command.options import parse_options
from fleet.run import commands
from fleet.run.commands import launched_command, next_commands, resume_command

REPOSITORY = Path(__file__).resolve().parents[2]
TOY_IMAGES = REPOSITORY / "toy_images"
ACCELERATE = ["/venv/bin/python", "/venv/bin/accelerate", "launch", "--num_processes", "2"]


@pytest.mark.parametrize(
    ("argv", "parent", "wanted"),
    [
        ("training.py --seed 1", ["-bash"], "python training.py --seed 1"),
        (
            "training.py --seed 1",
            [*ACCELERATE, "training.py", "--seed", "1"],
            "accelerate launch --num_processes 2 training.py --seed 1",
        ),
        (
            "/code/training.py",
            ["/venv/bin/torchrun", "--nproc_per_node=2", "/code/training.py"],
            "torchrun --nproc_per_node=2 /code/training.py",
        ),
        # a launcher of something else, such as a job script's
        ("training.py --seed 1", [*ACCELERATE, "job.py"], "python training.py --seed 1"),
        ("training.py", [], "python training.py"),
    ],
)
def test_the_launcher_is_named_as_it_was_started(argv: str, parent: list[str], wanted: str) -> None:
    assert shlex.join(launched_command(argv.split(), parent)) == wanted


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("", "--output_dir runs/x --resume true"),
        ("--seed 1", "--seed 1 --output_dir runs/x --resume true"),
        ("--output_dir elsewhere --seed 1", "--seed 1 --output_dir runs/x --resume true"),
        ("--output_dir=elsewhere --overwrite --seed 1", "--seed 1 --output_dir runs/x --resume true"),
        ("--overwrite true --use_lora", "--use_lora --output_dir runs/x --resume true"),
        ("--resume auto --output_dir runs/x", "--output_dir runs/x --resume true"),
        ("--resume", "--output_dir runs/x --resume true"),
    ],
)
def test_the_resume_command_is_whole_and_can_be_parsed(
    flags: str, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands.sys, "argv", ["training.py", *flags.split()])
    monkeypatch.setattr(commands, "_words_of", lambda process_id: [])
    command = resume_command("runs/x")
    assert command == f"python training.py {wanted}"
    resumed = parse_options(shlex.split(command)[2:])
    assert (resumed.output_dir, resumed.resume) == ("runs/x", True)


def test_a_finished_run_names_what_to_do_next() -> None:
    env = PickImageEnv(TOY_IMAGES, 4, fixed_correct_index=None)
    commands = [
        line.strip()
        for line in next_commands(Path("runs/x"), parse_options([]), env).splitlines()
        if line.startswith(" ")
    ]
    assert commands[:2] == [
        "python evaluate.py --model_id runs/x/final --baseline toy --output runs/x/evaluation.json",
        "python report.py runs/x",
    ]
    episode = env.episode(0)
    wanted = ["--images", *map(str, episode.images), "--instruction", f"Pick the {episode.target}."]
    assert shlex.split(commands[2]) == ["python", "-m", "fleet.ask", "--model_id", "runs/x/final", *wanted]
    (question,) = [question for _, question, _ in [parse_question([*wanted])]]
    assert question.images == tuple(Path(str(image)) for image in episode.images)


def test_a_run_on_pictures_in_memory_has_no_command_that_asks_of_files() -> None:
    env = load_environment_class(f"{REPOSITORY}/examples/most_dots.py:MostDotsEnv")(seed=0)
    assert "fleet.ask" not in next_commands(Path("runs/x"), parse_options([]), env)


def test_pictures_that_broke_meanwhile_are_in_no_command(tmp_path: Path) -> None:
    data = shutil.copytree(TOY_IMAGES, tmp_path / "data")
    env = PickImageEnv(data, 4, fixed_correct_index=None)
    gone, broken = env.episode(0).images[0], env.episode(0).images[1]
    assert isinstance(gone, Path) and isinstance(broken, Path)
    gone.unlink()
    broken.write_bytes(b"")
    words = shlex.split(next_commands(Path("runs/x"), parse_options([]), env).splitlines()[-1])
    shown = words[words.index("--images") + 1 : words.index("--instruction")]
    first = next(index for index in range(1, 20) if not {gone, broken} & set(env.episode(index).images))
    assert shown == [str(image) for image in env.episode(first).images]
    for path in data.glob("*.png"):
        path.unlink()
    assert "fleet.ask" not in next_commands(Path("runs/x"), parse_options([]), env)
