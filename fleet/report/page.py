"""One HTML page that shows a whole run.

Owns the reading of a run's folder, and the page's headline. The page needs no network and no server.
Imports neither torch nor transformers, so it runs wherever a run's folder was copied to.
"""

import base64
import hashlib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from json import loads
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from fleet.errors import UsageError
from fleet.evaluation.figures import estimate_at
from fleet.progress import duration
from fleet.report import tables
from fleet.report.charts import draw_charts, running_mean_steps
from fleet.report.rollouts import embed
from fleet.rl.rollouts import GroupRecord
from fleet.run_folder import (
    CONFIG_NAME,
    EVALUATIONS_NAME,
    METRICS_NAME,
    REPORT_NAME,
    ROLLOUTS_NAME,
    SEPARATE_EVALUATION_NAME,
    THUMBNAILS_NAME,
    finite,
    read_jsonl,
    write_atomically,
)
from utils.plain_text import printable_lines

TEMPLATE_NAME = "template.html"
LAST_STEPS = 5  # the training figures of the end are means over so many logged steps


@dataclass(frozen=True)
class RunRecords:
    """The records of a run. metrics: one object per logged step; evaluations and groups: ordered by step."""

    run_dir: Path
    config: dict[str, Any]
    metrics: tuple[dict[str, Any], ...]
    evaluations: tuple[tables.Document, ...]
    groups: tuple[GroupRecord, ...]


@dataclass(frozen=True)
class Tile:
    """One headline figure: its name, the figure, and its interval or the like."""

    name: str
    text: str
    detail: str
    is_wide: bool = False


def write_report(run_dir: Path, output: Path | None = None) -> Path:
    """Writes the report of a run's folder to `output`, RUN_DIR/report.html by default, and returns its path.

    Raises UsageError if the folder is no run's, a record in it is broken, or `output` cannot be written; an older
    report then stays as it is.
    """
    path = output or run_dir / REPORT_NAME
    if path.is_dir():
        raise UsageError(f"output {path} is a folder; pass --output with a file")
    page = render_page(read_run(run_dir))
    try:
        write_atomically(path, page.encode("utf-8", "replace"))
    except OSError as error:
        problem = f"output {path} cannot be written ({error.strerror}); pass --output with another file"
        raise UsageError(problem) from error
    return path


def read_run(run_dir: Path) -> RunRecords:
    """The records in a run's folder. Raises UsageError if the folder is no run's, or a record is broken."""
    if not run_dir.is_dir():
        raise UsageError(f"run folder {run_dir} is no folder; pass the --output_dir of a run of training.py")
    missing = [name for name in (CONFIG_NAME, METRICS_NAME) if not (run_dir / name).is_file()]
    if missing:
        raise UsageError(
            f"{run_dir} has no {' and no '.join(missing)}, but a run has both; "
            "pass the --output_dir of a run of training.py"
        )
    try:
        return RunRecords(
            run_dir,
            _read_config(run_dir / CONFIG_NAME),
            tuple(_read_metrics(run_dir / METRICS_NAME)),
            tuple(tables.ordered_evaluations(_read_evaluations(run_dir))),
            tuple(_read_groups(run_dir / ROLLOUTS_NAME)),
        )
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error


def _read_config(path: Path) -> dict[str, Any]:
    config = _read_json(path, "restore the file, or pass another run")
    if not isinstance(config, dict) or not isinstance(config.get("options"), dict):
        raise ValueError(f'{path} has no "options", so it is no run\'s; pass the --output_dir of a run of training.py')
    return config


def _read_json(path: Path, remedy: str) -> Any:
    try:
        return loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); {remedy}") from error


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    metrics = read_jsonl(path)
    for number, line in enumerate(metrics, start=1):
        step = line.get("step")
        if finite(step) is None:
            raise ValueError(f"{path}, line {number} has step={step!r}, but wanted a number; remove that line")
    return metrics


def _read_if_there(path: Path) -> list[dict[str, Any]]:
    return read_jsonl(path) if path.is_file() else []


def _read_evaluations(run_dir: Path) -> list[dict[str, Any]]:
    """The evaluations of training, and the one that evaluate.py wrote into the folder."""
    evaluations = _read_if_there(run_dir / EVALUATIONS_NAME)
    separate = run_dir / SEPARATE_EVALUATION_NAME
    if separate.is_file():
        evaluations.append(_read_json(separate, "write it again with evaluate.py --overwrite"))
    return evaluations


def _read_groups(path: Path) -> list[GroupRecord]:
    """Groups by step and number. Of a group that is there twice, the later record counts."""
    by_place = {}
    for number, line in enumerate(_read_if_there(path), start=1):
        try:
            group = GroupRecord.from_json(line)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number} is no record of a group ({error!r}); remove that line") from error
        by_place[group.step, group.number] = group
    return [by_place[place] for place in sorted(by_place)]


def render_page(records: RunRecords) -> str:
    """The whole page. Jinja2 escapes every value; the rollouts are JSON that the page's script shows as text."""
    template = Path(__file__).with_name(TEMPLATE_NAME).read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_as_plain_text,
    )
    columns = tables.shown_columns(records.evaluations)
    ends = tables.first_and_last(records.evaluations)
    return environment.from_string(template).render(
        name=records.run_dir.resolve().name,
        summary=_summary(records.config["options"]),
        config=records.config,
        comparison=tables.comparison_rows(records.config),
        command=shlex.join(str(word) for word in records.config.get("command") or []),
        script_hash=_script_hash(template),
        tiles=headline(records),
        charts=draw_charts(records.metrics, records.evaluations, levels(records), _right_outcomes(records)),
        running_mean_steps=running_mean_steps(len(_training_lines(records))),
        columns=[(tables.column_title(document), document) for document in columns],
        num_evaluations=len(records.evaluations),
        evaluation_setting=tables.setting(ends[1]) if ends else "",
        evaluation_rows=tables.evaluation_rows(columns),
        by_choice_rows=tables.accuracy_by_choice_rows(columns),
        heat_map=tables.heat_map(ends[1] if ends else None, records.groups),
        choices_left_out=tables.choices_left_out(ends[1] if ends else None, records.groups),
        picks_picture=any(group.episode.correct_index is not None for group in records.groups),
        rollouts=embed(records.groups, records.run_dir / THUMBNAILS_NAME),
    )


def _as_plain_text(value: object) -> object:
    """A value as the page shows it: characters of a text that do not print are spelled out, line breaks stay."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "\u2028".join(printable_lines(line) for line in value.split("\u2028"))


def _script_hash(template: str) -> str:
    """The hash by which the page's policy allows its own script and no other."""
    (script,) = re.findall(r"<script>(.*?)</script>", template, flags=re.DOTALL)
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")


def _right_outcomes(records: RunRecords) -> set[str]:
    """The outcomes that counted as right in the recorded rollouts."""
    rollouts = [rollout for group in records.groups for rollout in group.rollouts]
    return {str(rollout.verdict.outcome) for rollout in rollouts if rollout.verdict.is_right}


def _summary(options: dict[str, Any]) -> str:
    """The model's task in one line."""
    fixed = options.get("fixed_correct_index")
    task = "the target is drawn and named" if fixed is None else f"index {fixed} is always right"
    if options.get("env"):
        task = f"environment {options['env']} {options.get('env_args') or ''}".strip()
    shown = "" if options.get("env") else f", {options.get('candidates_per_episode', '?')} candidates"
    return f"{options.get('num_rollouts', '?')} rollouts per episode{shown}; {task}"


def headline(records: RunRecords) -> list[Tile]:
    """The figures at the top of the page: of the held-out evaluations if there are any, else of training."""
    lines = _training_lines(records)
    last_step = max((int(line["step"]) for line in lines), default=0)
    planned = records.config["options"].get("train_steps")
    return [
        _accuracy_tile(records),
        *(Tile(level.name, tables.percent(level.accuracy), level.detail) for level in levels(records)),
        Tile("Steps", f"{last_step:,}", f"of {planned:,} planned" if isinstance(planned, int) else ""),
        Tile("Training", duration(training_seconds(lines)), "in optimizer steps"),
    ]


def levels(records: RunRecords) -> list[tables.Level]:
    """Chance and the best constant choice: from the last evaluation, else as far as the flags tell."""
    ends, options = tables.first_and_last(records.evaluations), records.config["options"]
    if ends is None:
        num_candidates, fixed = options.get("candidates_per_episode"), options.get("fixed_correct_index")
        if options.get("env") is not None or not isinstance(num_candidates, int):
            return []
        found = [tables.Level("Chance", 1 / num_candidates, f"{num_candidates} candidates")]
        return found + ([] if fixed is None else [tables.Level("Best constant choice", 1.0, f"always {fixed}")])
    last = ends[1]
    chance, constant = estimate_at(last, "chance"), estimate_at(last, "best_constant_choice")
    found = []
    if chance and chance.value is not None:
        num_choices = len(last.get("choices") or ())
        words = f"{num_choices} choices" if num_choices else "without looking"
        found.append(tables.Level("Chance", chance.value, words))
    if constant and constant.value is not None:
        choice = last["best_constant_choice"].get("choice")
        found.append(tables.Level("Best constant choice", constant.value, f"always {choice}"))
    return found


def _accuracy_tile(records: RunRecords) -> Tile:
    ends = tables.first_and_last(records.evaluations)
    if ends:
        first, last = (estimate_at(document, "greedy_accuracy") for document in ends)
        if first and last:
            text = tables.percent(last.value)
            if ends[0] is not ends[1]:
                text = f"{tables.percent(first.value)} → {text}"
            place = " and ".join(dict.fromkeys(tables.column_title(document) for document in ends))
            detail = f"{place}; last {last.interval('–')}, n = {last.n:,}"
            return Tile("Held-out greedy accuracy", text, detail, is_wide=True)
    values = [value for line in records.metrics if (value := finite(line.get("accuracy"))) is not None]
    if not values:
        return Tile("Accuracy", "–", "no step was logged", is_wide=True)
    end = values[-LAST_STEPS:]
    text = f"{tables.percent(values[0])} → {tables.percent(sum(end) / len(end))}"
    return Tile("Training accuracy", text, f"first step, then the mean of the last {len(end)}", is_wide=True)


def _training_lines(records: RunRecords) -> list[dict[str, Any]]:
    """The metrics of optimizer steps, without those of evaluations and of the look curve."""
    held_out = ("eval/", "control/")
    return [line for line in records.metrics if any(name != "step" and not name.startswith(held_out) for name in line)]


def training_seconds(lines: Sequence[dict[str, Any]]) -> float:
    """Time in optimizer steps; a line that stands for several steps holds their mean.

    >>> training_seconds([{"step": 10, "step_time_s": 2.0}, {"step": 20, "step_time_s": 1.0}])
    30.0
    """
    total, previous = 0.0, 0.0
    for line in lines:
        total += (finite(line.get("step_time_s")) or 0) * max(line["step"] - previous, 0)
        previous = line["step"]
    return total
