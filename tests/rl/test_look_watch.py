"""The look curve of whole runs: training stays as it is, a resume goes on with it, and a leak is found."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

import training
from environment import Episode, PickImageEnv
from fleet.errors import RunStopped, UsageError
from fleet.evaluation.answering import AnswerSettings
from fleet.evaluation.figures import Answers, Evaluation, EvaluationPlan, evaluate
from fleet.evaluation.held_out import draw_held_out
from fleet.evaluation.looking import LOOK_CONTROLS, LookPoint
from fleet.rl.look_watch import LookPlan, LookWatch
from fleet.rl.trainer import FleetRLOOTrainer
from fleet.run.build import training as run_build
from fleet.run_folder import read_jsonl
from tests.helpers import REPOSITORY, toy_path
from tests.leaking_env import PLACES
from tests.processes import start_ranks
from utils.tool_calls import make_tool_call_str

QUICK = ["--per_device_batch_size", "2", "--sample_steps", "0", "--report_to", "none", "--save_steps", "1"]
LOOK = ["--fixed_correct_index", "none"]
CURVE = [*LOOK, "--control_steps", "2", "--control_episodes", "5"]
LEAK = ["--env", f"{REPOSITORY / 'tests' / 'leaking_env.py'}:LeakingEnv"]


@pytest.fixture(autouse=True)
def toy() -> None:
    toy_path()


def curve_of(folder: Path) -> list[dict[str, Any]]:
    lines = [line for line in read_jsonl(folder / "metrics.jsonl") if "control/true" in line]
    return [{name: line[name] for name in line if name not in ("control/seconds", "epoch")} for line in lines]


def training_lines(folder: Path) -> list[dict[str, Any]]:
    """The figures of training steps, without those of time."""
    lines = [line for line in read_jsonl(folder / "metrics.jsonl") if "reward" in line]
    timed = ("step_time_s", "rollouts_per_s")
    return [{name: value for name, value in line.items() if name not in timed} for line in lines]


def run(folder: Path, *flags: str) -> Path:
    training.main([*QUICK, "--output_dir", str(folder), *flags])
    return folder


def test_a_curve_changes_no_weight_and_goes_on_after_a_resume(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = run(tmp_path / "plain", *LOOK, "--train_steps", "3")
    assert curve_of(plain) == []
    watched = run(tmp_path / "watched", *CURVE, "--train_steps", "3")
    assert "step 2: right on " in capfd.readouterr().err
    weights = [(folder / "final" / "model.safetensors").read_bytes() for folder in (plain, watched)]
    assert weights[0] == weights[1]
    # a step has its own line and rollouts beside its point
    assert [line["step"] for line in training_lines(plain)] == [1, 2, 3]
    assert training_lines(watched) == training_lines(plain)
    assert read_jsonl(watched / "rollouts.jsonl") == read_jsonl(plain / "rollouts.jsonl")
    wanted = curve_of(watched)
    assert [line["step"] for line in wanted] == [0, 2, 3]
    assert all(line["control/episodes"] == 5 and 0 <= line["control/grey"] <= 1 for line in wanted)
    # as a kill behind the save of a step leaves it, with a point at that step and without one
    for step in (1, 2):
        cut = tmp_path / f"cut-{step}"
        shutil.copytree(watched, cut)
        for later in range(step + 1, 4):
            shutil.rmtree(cut / f"checkpoint-{later}", ignore_errors=True)
        run(cut, *CURVE, "--train_steps", "3", "--resume")
        assert curve_of(cut) == wanted
        assert training_lines(cut) == training_lines(plain)
        assert (cut / "final" / "model.safetensors").read_bytes() == weights[0]


def test_an_evaluation_gives_the_points_that_its_answers_hold(tmp_path: Path) -> None:
    evaluated = run(tmp_path / "evaluated", *LOOK, "--eval_steps", "1", "--eval_episodes", "5", "--train_steps", "2")
    lines = read_jsonl(evaluated / "metrics.jsonl")
    points = [line for line in lines if "control/true" in line]
    assert [line["step"] for line in points] == [0, 1, 2] and not any("control/seconds" in line for line in points)
    figures = [line for line in lines if "eval/greedy_accuracy" in line]
    for point, evaluation in zip(points, figures, strict=True):
        names = (("true", "greedy_accuracy"), ("grey", "blank_images"), ("swapped", "swapped_images"))
        assert all(point[f"control/{ours}"] == evaluation[f"eval/{theirs}"] for ours, theirs in names)
    # asked for by itself, the curve has the same points
    alone = run(tmp_path / "alone", *LOOK, "--control_steps", "1", "--control_episodes", "5", "--train_steps", "2")
    assert curve_of(alone) == curve_of(evaluated)


def test_a_run_that_is_resumed_with_a_curve_begins_it_at_its_next_point(tmp_path: Path) -> None:
    folder = run(tmp_path / "run", *LOOK, "--train_steps", "1")
    run(folder, *CURVE, "--train_steps", "3", "--resume")
    assert [line["step"] for line in curve_of(folder)] == [2, 3]


def test_an_evaluation_without_a_curve_has_none(tmp_path: Path) -> None:
    flags = [*LOOK, "--eval_steps", "1", "--eval_episodes", "2", "--control_steps", "0", "--train_steps", "1"]
    assert curve_of(run(tmp_path / "run", *flags)) == []


NO_CONTROLS = '''from environment import PickImageEnv


class Mine(PickImageEnv):
    """An environment without any control."""

    def edited(self, episode, control, call, rng):
        """None, whatever the control."""
        return None
'''


def test_an_environment_without_grey_pictures_has_no_curve(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(NO_CONTROLS)
    env = ["--env", f"{tmp_path / 'mine.py'}:Mine", "--train_steps", "1"]
    evaluated = run(tmp_path / "run", *env, "--eval_steps", "1", "--eval_episodes", "2")
    assert curve_of(evaluated) == [] and capfd.readouterr().err.count("no look curve is taken") == 1
    with pytest.raises(UsageError, match=r"^control_steps=1, but edited\(\) of --env gives no .*; give one, as"):
        run(tmp_path / "asked", *env, "--control_steps", "1")
    with pytest.raises(UsageError, match="^stop_if_blind=stop, but"):
        run(tmp_path / "stop", *env, "--eval_steps", "1", "--eval_episodes", "2", "--stop_if_blind", "stop")


def test_turns_are_taken_for_a_point_as_in_training(tmp_path: Path) -> None:
    env = ["--env", f"{REPOSITORY / 'tests' / 'turning_env.py'}:LookAgainEnv", "--max_turns", "2", *CURVE]
    assert [line["step"] for line in curve_of(run(tmp_path / "run", *env, "--train_steps", "1"))] == [0, 1]


# --- what follows from the points -------------------------------------------------------------------------------------


class ScriptedTrainer:
    """What LookWatch asks of a trainer; the end of a generation is every second step."""

    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []
        self.step = 0

    def apart_from_training(self) -> Any:
        return nullcontext()

    def log(self, figures: dict[str, float]) -> None:
        self.logged.append(figures)

    def is_at_generation_end(self) -> bool:
        return self.step % 2 == 0


class ScriptedWatch(LookWatch):
    """Takes each point from a script: the number right of 32, with true pictures and with grey ones."""

    script: dict[int, tuple[int, int]]

    def _take(self, state: Any) -> None:
        hits = [tuple(place < number for place in range(32)) for number in self.script[state.global_step]]
        self._add(state, LookPoint(state.global_step, hits[0], hits[1], hits[0]))


def watch(if_blind: str, folder: Path, rises: dict[int, tuple[int, int]]) -> ScriptedWatch:
    env = PickImageEnv(folder, 4, None, seed=77)
    plan = EvaluationPlan(env, tuple(draw_held_out(env, 32)[0]), seed=77, controls=LOOK_CONTROLS)
    found = ScriptedWatch(ScriptedTrainer(), LookPlan(plan, AnswerSettings(8, 32), 1, 6, if_blind=if_blind))
    found.script = rises
    return found


def steps_until_stop(watched: ScriptedWatch, first: int, last: int, kept: dict[str, Any] | None = None) -> int | None:
    """The step at which the run is told to end; None if it is not. kept: the state of a checkpoint."""
    state = TrainerState(global_step=first, max_steps=6, is_world_process_zero=True)
    state.stateful_callbacks = {} if kept is None else {"ScriptedWatch": kept}
    watched.on_train_begin(None, state, TrainerControl())
    for step in range(first, last):
        control = TrainerControl()
        state.global_step = watched.trainer.step = step
        watched.on_step_begin(None, state, control)
        state.global_step = watched.trainer.step = step + 1
        watched.on_step_end(None, state, control)
        if control.should_training_stop:
            assert control.should_save
            return step + 1
    return None


LEAKED = {0: (8, 8), 1: (12, 12), 2: (30, 30), 3: (30, 30), 4: (31, 31), 5: (32, 32), 6: (32, 32)}
LOOKED = {0: (8, 8), 1: (12, 8), 2: (30, 9), 3: (30, 10), 4: (31, 8), 5: (32, 7), 6: (32, 9)}
ONCE = LEAKED | {3: (8, 8), 4: (30, 30), 5: (8, 8)}


@pytest.mark.parametrize(
    ("if_blind", "script", "stops", "warnings"),
    [
        # the second blind point is at step 3, in the middle of a generation
        ("stop", LEAKED, 4, 0),
        ("warn", LEAKED, None, 1),
        ("none", LEAKED, None, 0),
        ("stop", LOOKED, None, 0),
        ("warn", LOOKED, None, 0),
        ("stop", ONCE, None, 0),
    ],
)
def test_a_blind_gain_at_two_points_in_a_row_warns_once_or_stops(
    if_blind: str, script: Any, stops: int | None, warnings: int, picture_folder: Path, caplog: Any
) -> None:
    watched = watch(if_blind, picture_folder, script)
    assert steps_until_stop(watched, 0, 6) == stops
    said = [record.getMessage() for record in caplog.records if "gains without looking" in record.getMessage()]
    assert len(said) == warnings and all("accuracy rose from 25% to 94%" in text for text in said)
    assert (watched.stop_reason is not None) is (stops is not None)


def test_points_in_a_row_are_counted_over_a_resume(picture_folder: Path, caplog: Any) -> None:
    before = watch("warn", picture_folder, LEAKED)
    assert steps_until_stop(before, 0, 2) is None and before.num_blind_in_a_row == 1
    resumed = watch("warn", picture_folder, LEAKED)
    steps_until_stop(resumed, 2, 3, before.state())
    assert resumed.start == before.start and resumed.num_blind_in_a_row == 2
    # said once, also over a resume
    again = watch("warn", picture_folder, LEAKED)
    steps_until_stop(again, 3, 6, resumed.state())
    assert sum("gains without looking" in record.getMessage() for record in caplog.records) == 1


def test_a_run_whose_last_point_is_blind_is_done_all_the_same(picture_folder: Path) -> None:
    late = dict.fromkeys(range(5), (8, 8)) | {5: (32, 32), 6: (32, 32)}
    watched = watch("stop", picture_folder, late)
    assert steps_until_stop(watched, 0, 6) is None and watched.stop_reason is None


# --- whole runs that leak, and several processes ----------------------------------------------------------------------


class LeakReader(FleetRLOOTrainer):
    """The real trainer, whose held-out answers are those of a policy that learns to read the leak, word by word."""

    def answer(self, plan: EvaluationPlan, settings: AnswerSettings) -> Evaluation:
        known = PLACES[: 1 + 2 * self.state.global_step]

        def say(episode: Episode) -> str:
            word = episode.messages[-1]["content"][-1]["text"].split()[2]
            return make_tool_call_str(PLACES.index(word) if word in known else 0)

        return evaluate(lambda episodes, num_samples: [Answers(say(episode)) for episode in episodes], plan, "reader")


def test_a_run_that_learns_a_leak_stops_with_a_checkpoint_and_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_build, "FleetRLOOTrainer", LeakReader)
    folder = tmp_path / "run"
    toy = ["--model_id", toy_path(), "--image_max_pixels", "784", "--fixed_correct_index", "none", "--train_steps", "5"]
    flags = [*toy, *LEAK, "--control_steps", "1", "--save_steps", "50"]
    with pytest.raises(RunStopped, match="step 2: the policy gains without looking: on 32 held-out .* to 100%") as stop:
        run(folder, *flags, "--stop_if_blind", "stop")
    assert stop.value.exit_code == 1 and stop.value.can_resume and "--resume" in stop.value.__notes__[0]
    curve = curve_of(folder)
    assert [(line["step"], line["control/gains_blindly"]) for line in curve] == [(0, 0), (1, 1), (2, 1)]
    assert all(line["control/true"] == line["control/grey"] for line in curve)
    assert [line["control/swapped"] for line in curve] == [0, 0, 0]
    assert (folder / "checkpoint-2" / "manifest.json").is_file() and not (folder / "final").exists()
    run(folder, *flags, "--stop_if_blind", "warn", "--resume")
    assert [line["step"] for line in curve_of(folder)] == [0, 1, 2, 3, 4, 5]
    assert "Gained without looking at 5 of 6 points, first at step 1." in (folder / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.exhaustive
def test_a_toy_that_reads_learns_a_leak_by_rloo_and_is_stopped(tmp_path: Path) -> None:
    flags = ["--model_id", toy_path(), *LOOK, *LEAK, "--stop_if_blind", "stop"]
    rloo = {
        "control_steps": 10,
        "control_episodes": 96,
        "train_steps": 100,
        "per_device_batch_size": 16,
        "num_rollouts": 8,
        "learning_rate": 2e-4,
        "max_completion_length": 32,
        "image_max_pixels": 3136,
    }
    flags += [word for name, value in rloo.items() for word in (f"--{name}", str(value))]
    num_stopped = 0
    for seed in range(3):
        folder = tmp_path / str(seed)
        try:
            run(folder, *flags, "--seed", str(seed))
        except RunStopped as stop:
            assert "the policy gains without looking" in str(stop)
            num_stopped += 1
        curve = curve_of(folder)
        # it answers alike whatever is shown, and follows no picture
        assert all(abs(line["control/true"] - line["control/grey"]) <= 0.1 for line in curve)
        assert curve[-1]["control/true"] > curve[0]["control/true"] and curve[-1]["control/swapped"] <= 0.25
    # some soon tell two of the four words apart and stay there, a gain of 18 points that luck may bring
    assert num_stopped >= 1


@pytest.mark.slow
@pytest.mark.parametrize("zero3", [False, True])
def test_two_processes_come_to_the_same_points(zero3: bool, tmp_path: Path) -> None:
    flags = [*QUICK, *CURVE, "--control_steps", "1", "--train_steps", "2"]
    ranks = start_ranks(tmp_path, [*flags, "--output_dir", str(tmp_path / "two")], 2, zero3=zero3)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].output[-3000:]
    two = curve_of(tmp_path / "two")
    assert [(line["step"], line["control/episodes"]) for line in two] == [(0, 5), (1, 5), (2, 5)]
    # before training the weights are those of one process
    alone = curve_of(run(tmp_path / "one", *CURVE, "--control_steps", "1", "--train_steps", "4"))
    assert two[0] == alone[0]
