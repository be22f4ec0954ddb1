"""The forms of what a run shows and leaves: sample tables, lines of rollouts, config.json and curve.png.

Owns no moment: recorder.py decides when they are shown and written. The figures in them come from the trainer.
"""

import hashlib
import io
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from environment import Outcome
from fleet.command.idle_flags import idle_flags, options_in_force
from fleet.command.image_check import RunData
from fleet.command.options import Options, ResolvedDefault
from fleet.rl.rollouts import RolloutRecord
from fleet.run_folder import write_bytes_atomically
from utils.plain_text import printable
from utils.user_files import files_beside, folder_of

RECORDED_PACKAGES = (
    "torch", "torchvision", "transformers", "trl", "accelerate", "deepspeed", "peft", "datasets", "pillow",
    "flash-attn", "bitsandbytes", "vllm",
)  # fmt: skip
OUTCOME_STYLES = {Outcome.CORRECT: "green", Outcome.WRONG_INDEX: "yellow"}


def distinct_rollouts(rollouts: Sequence[RolloutRecord], max_rows: int = 4) -> list[RolloutRecord]:
    """A few different completions: one of each outcome first."""
    distinct = {(rollout.episode, rollout.completion): rollout for rollout in reversed(rollouts)}
    first_of_outcome = {rollout.judgement.outcome: rollout for rollout in distinct.values()}
    others = [rollout for rollout in distinct.values() if rollout not in first_of_outcome.values()]
    return [*first_of_outcome.values(), *others][:max_rows]


def sample_table(rollouts: Sequence[RolloutRecord], step: int) -> str:
    """Completions as a table for the terminal."""
    table = Table(title=f"step {step}: sample completions", title_justify="left", show_edge=False, pad_edge=False)
    for name in ("wanted", "completion", "outcome"):
        table.add_column(name, overflow="fold")
    for name in ("reward", "advantage"):
        table.add_column(name, justify="right")
    for rollout in rollouts:
        outcome, status = rollout.judgement.outcome, rollout.judgement.parse_status
        target = rollout.episode.target
        verdict = outcome.value if outcome is not Outcome.UNPARSABLE else f"{outcome.value}: {status.value}"
        table.add_row(
            Text(_cut(f"{rollout.episode.correct_index} ({target})" if target else str(rollout.episode.correct_index))),
            Text(_cut(rollout.completion)),
            Text(verdict, style=OUTCOME_STYLES.get(outcome, "red")),
            f"{rollout.reward:.2f}",
            f"{rollout.advantage:+.2f}",
        )
    return _rendered(table)


def group_lines(rollouts: Sequence[RolloutRecord], group_size: int, step: int) -> list[dict[str, Any]]:
    """The lines of rollouts.jsonl for whole groups of rollouts: what was shown and asked, and every completion."""
    lines = []
    for number, start in enumerate(range(0, len(rollouts), group_size)):
        group = rollouts[start : start + group_size]
        episode = group[0].episode
        lines.append(
            {
                "step": step,
                "group": number,
                "instruction": episode.instruction,
                "target": episode.target,
                "correct_index": episode.correct_index,
                "labels": list(episode.labels),
                "images": list(episode.image_names),
                "rollouts": [
                    {
                        "completion": rollout.completion,
                        "outcome": rollout.judgement.outcome.value,
                        "parse_status": rollout.judgement.parse_status.value,
                        "index": rollout.judgement.index,
                        # JSON has no NaN, the reward of a rollout that could not be scored
                        "reward": rollout.reward if math.isfinite(rollout.reward) else None,
                        "advantage": rollout.advantage,
                    }
                    for rollout in group
                ],
            }
        )
    return lines


def resolved_table(filled: Sequence[ResolvedDefault]) -> str:
    """What was decided for the user, and why, as a table for the terminal."""
    table = Table(title="defaults for this case", title_justify="left", show_edge=False, pad_edge=False)
    for name in ("flag", "value", "why"):
        table.add_column(name)
    for default in filled:
        table.add_row(f"--{default.flag}", Text(printable(default.value)), default.reason)
    return _rendered(table)


def config_text(options: Options, data: RunData, num_episodes: int, num_processes: int, run_id: str) -> str:
    """What config.json holds: the resolved flags, what is drawn from, processes, command, commit and versions.

    run_id: drawn as the run begins and kept when it is resumed, by which its checkpoints are told from other runs'.
    A flag that has no part in the run is null, and listed.
    """
    config = {
        "run_id": run_id,
        "options": options_in_force(options),
        "idle_flags": idle_flags(options),
        "num_episodes": num_episodes,
        "num_processes": num_processes,
        "data_digest": data.data_digest,
        "skipped_images": list(data.skipped_images),
        "user_files": sha256_of_user_files(options),
        "imported_files": sha256_of_imported_files(options),
        "model_files": sizes_of_model_files(options.model_id),
        "command": sys.argv,
        "directory": os.getcwd(),
        "commit": git_commit(),
        "versions": {"python": platform.python_version(), **installed_versions()},
    }
    return json.dumps(config, indent=2) + "\n"


def sha256_of_user_files(options: Options) -> dict[str, str]:
    """Of the files that --env and --reward name, by their flag."""
    return {
        flag: hashlib.sha256(Path(spec.rpartition(":")[0]).read_bytes()).hexdigest()
        for flag, spec in user_specs(options).items()
    }


def sha256_of_imported_files(options: Options) -> dict[str, dict[str, str | None]]:
    """Of the files beside those of --env and --reward that they have imported, by the flag and their place there."""
    return {
        flag: {place: sha256_of(folder_of(spec) / place) for place in files_beside(spec)}
        for flag, spec in user_specs(options).items()
    }


def user_specs(options: Options) -> dict[str, str]:
    """What --env and --reward name, by their flag, as far as they are given."""
    return {flag: spec for flag, spec in (("env", options.env), ("reward", options.reward)) if spec is not None}


def sha256_of(path: Path) -> str | None:
    """Hex of a file's SHA-256; None where there is no such file."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def what_changed_since(recorded: Mapping[str, Any], options: Options) -> list[str]:
    """What is not as a run's config.json has it and may change a result: versions, and the user's own files."""
    before, now = recorded.get("versions", {}), installed_versions()
    changed = [
        f"{name} (was {before[name]}, now {now.get(name, 'gone')})"
        for name in sorted(before.keys() - {"python"})
        if before[name] != now.get(name)
    ]
    files_before, files_now = recorded.get("user_files", {}), sha256_of_user_files(options)
    changed += [f"the file of --{flag}" for flag, digest in files_now.items() if files_before.get(flag) != digest]
    specs = user_specs(options)
    changed += [
        f"{place} beside the file of --{flag}"
        for flag, digests in recorded.get("imported_files", {}).items()
        for place, digest in digests.items()
        # a file that is imported late is not yet imported now
        if flag in specs and sha256_of(folder_of(specs[flag]) / place) != digest
    ]
    model_before, model_now = recorded.get("model_files"), sizes_of_model_files(options.model_id)
    return changed + ([f"the files in --model_id {options.model_id}"] if model_before not in (None, model_now) else [])


def sizes_of_model_files(model_id: str) -> dict[str, int]:
    """Bytes of each file of weights or configuration in a model's folder; nothing for a hub model, whose name is one.

    Of an adapter its own files; sizes and not contents, as a model's take minutes to read.
    """
    folder = Path(model_id)
    paths = (
        [path for pattern in ("*.safetensors", "*.json") for path in folder.glob(pattern)] if folder.is_dir() else []
    )
    return {path.name: path.stat().st_size for path in sorted(paths)}


def installed_versions() -> dict[str, str]:
    """Versions of the packages that can change a result, as far as they are installed."""
    versions = {}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def git_commit() -> str | None:
    """The commit of this code, with "-dirty" if files were changed since; None outside a git checkout."""
    here = Path(__file__).resolve().parents[2]
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def draw_curve(metrics: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draws reward and accuracy over steps as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6), dpi=150)
    metrics = [line for line in metrics if "reward" in line]
    steps = [line["step"] for line in metrics]
    marker = "o" if len(steps) == 1 else ""  # a line needs two
    for name, colour in (("reward", "#d1495b"), ("accuracy", "#00798c")):
        values = [line.get(name) for line in metrics]
        axes.plot(steps, values, color=colour, linewidth=1.8, marker=marker, label=f"mean {name}")
    axes.set(xlabel="optimizer step", title=title, ylim=(-0.02, 1.04))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    png = io.BytesIO()
    figure.savefig(png, format="png")
    pyplot.close(figure)
    write_bytes_atomically(path, png.getvalue())


def _cut(text: str, max_chars: int = 160) -> str:
    """The text in one line of so many characters at most."""
    flat = printable(text)
    return flat if len(flat) <= max_chars else flat[: max_chars - 1] + "…"


def _rendered(table: Table) -> str:
    is_terminal = sys.stderr.isatty()
    target = io.StringIO()
    Console(file=target, width=None if is_terminal else 110, force_terminal=is_terminal).print(table)
    return target.getvalue()
