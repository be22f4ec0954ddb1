"""Checks an environment of your own before anything trains on it, and says each mistake with its remedy.

    python -m fleet.check_env examples/odd_one_out.py:OddOneOutEnv --fixed_correct_index none

From Python: `check_env(MyEnv(seed=0))` returns the findings. Owns the command and its words; the checks are in
fleet/own_code/environment_checks.py. Importing this file starts nothing, and no check imports torch.
"""

import argparse
import inspect
import json
import random
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from environment import load_environment_class
from fleet.command import command_line
from fleet.command.data_sets import image_root
from fleet.command.flags import A_SEED, AT_LEAST_0, AT_LEAST_1, Case, SamplingFlags, TaskFlags
from fleet.command.options import refuse_numbers
from fleet.command.parser import flag, flag_of, make_parser, parse_flags, replace_default, user_path
from fleet.controls import Control, checked_edit
from fleet.episodes import BrokenEpisode, Episode
from fleet.errors import UsageError, refused
from fleet.known_answers import choices_of
from fleet.own_code.chance_checks import NUM_DISTINCT
from fleet.own_code.constructor import arguments_of, require_known
from fleet.own_code.environment_checks import NUM_EPISODES, Examination, examine
from fleet.own_code.findings import Finding as Finding
from fleet.own_code.findings import Kind as Kind
from fleet.toy.trial_run import NUM_STEPS, train_briefly
from utils.plain_text import printable, printable_lines
from utils.tool_calls import ToolCall, make_call_str
from utils.user_files import folder_kept

# of the flags below, those that an environment's constructor is offered
OFFERED = ("data_root", "candidates_per_episode", "fixed_correct_index", "seed", "allow_reasoning")
WIDTH, INDENT = 110, "    "
DEFAULTS = TaskFlags()


# fmt: off
@dataclass(frozen=True)
class CheckFlags:
    """An environment, and what its constructor is given."""

    env: str | None = flag(None, "the environment, as path/to/file.py:ClassName; its flag may be left out", "required",
        metavar="FILE:CLASS", parse=user_path, is_file=True)
    env_args: str | None = replace_default(TaskFlags, "env_args", None)
    data_root: str = replace_default(TaskFlags, "data_root", DEFAULTS.data_root)
    image_column: str | None = replace_default(TaskFlags, "image_column", None)
    label_column: str | None = replace_default(TaskFlags, "label_column", None)
    split: str | None = replace_default(TaskFlags, "split", None)
    candidates_per_episode: int = replace_default(TaskFlags, "candidates_per_episode", DEFAULTS.candidates_per_episode)
    fixed_correct_index: int | None = replace_default(TaskFlags, "fixed_correct_index", DEFAULTS.fixed_correct_index)
    seed: int = flag(0, "of episodes", bounds=(AT_LEAST_0, A_SEED))
    allow_reasoning: bool = replace_default(TaskFlags, "allow_reasoning", DEFAULTS.allow_reasoning)
    max_turns: int = replace_default(TaskFlags, "max_turns", DEFAULTS.max_turns)
    image_max_pixels: int | None = flag(None, "width times height an image is shrunk to, in pixels", "none",
        bounds=flag_of(next(one for one in fields(TaskFlags) if one.name == "image_max_pixels")).bounds)
    episodes: int = flag(NUM_EPISODES, "episodes that are looked at in full, from 0 on", bounds=(AT_LEAST_1,))
    train: bool = flag(False, "also train a throw-away toy on it for 20 steps, whose reward must rise; takes a minute "
        "or two")
    # fmt: on


def check_env(
    env: Any, arguments: Mapping[str, Any] | None = None, *, episodes: int = NUM_EPISODES, max_turns: int = 1
) -> list[Finding]:
    """The mistakes in an environment, and then the notes on it; none for a sound one.

    env: an environment; or its class, which is built twice, from `arguments`, so that instances are compared too.
    episodes: that are looked at in full. max_turns: that a rollout may have. Raises UsageError, a ValueError, for
    arguments not taken.
    """
    if isinstance(env, type):
        with refused(BrokenEpisode):
            require_known(env, {}, arguments or {}, "arguments")
    return examine(env, arguments, num_episodes=episodes, max_turns=max_turns).findings


def main(argv: Sequence[str] | None = None) -> None:
    """Prints what was found. Raises UsageError for an environment with mistakes, or flags that make none."""
    command_line.set_up_logging()
    options = parse_check(sys.argv[1:] if argv is None else argv)
    spec = str(options.env)
    with refused(ValueError), folder_kept():
        env_class = load_environment_class(spec)
    offered = {name: getattr(options, name) for name in OFFERED} | {"data_root": image_root(options)}
    own = arguments_of(options.env_args)
    with refused(BrokenEpisode):
        require_known(env_class, offered, own)
    case = Case(options, has_bf16_gpu=False, models=("reasoning", "real") if options.allow_reasoning else ("real",))
    default_of = flag_of(next(one for one in fields(SamplingFlags) if one.name == "max_completion_length")).default_of
    done = examine(
        env_class,
        offered | own,
        spec=spec,
        num_episodes=options.episodes,
        max_pixels=options.image_max_pixels,
        max_turns=options.max_turns,
        max_tokens=default_of(case)[0] if default_of is not None else 64,
    )
    print("\n\n".join(_shown(finding) for finding in done.findings), end="\n\n" if done.findings else "")
    mistakes = [finding for finding in done.findings if finding.kind.is_mistake]
    if mistakes:
        raise UsageError(f"env={spec} has {_counted(len(mistakes), 'mistake')}; correct, and check again")
    print("\n".join([*describe(done), "", f"{printable(spec)} is sound"]), flush=True)
    if options.train:
        print(learn(options))


def learn(options: CheckFlags) -> str:
    """The words on a short run of RLOO. Raises UsageError if it fails, or the reward does not rise."""
    given = {field.name: getattr(options, field.name) for field in fields(TaskFlags) if hasattr(options, field.name)}
    trend = train_briefly(TaskFlags(**given), options.seed)
    words = f"reward {trend.before:.2f} at first, {trend.after:.2f} after {NUM_STEPS} steps of RLOO"
    if not trend.is_rising:
        raise UsageError(
            f"env={options.env}: {words}, so a toy that calls no tool in two of three answers does not learn to "
            "call it; let any call of the right form earn a little (the component valid_call), and no refused one more"
        )
    return f"{words}: it learns"


def build_check_parser() -> argparse.ArgumentParser:
    """The parser of this command."""
    description = "Check an environment: its episodes, tools, verdicts, gold answers, chance and controls."
    return make_parser("python -m fleet.check_env FILE.py:CLASS", description, {"check": (CheckFlags,)}, CheckFlags)


def parse_check(argv: Sequence[str]) -> CheckFlags:
    """The flags of a command line, whose first word may be the environment. Raises UsageError."""
    words = list(argv)
    if words and not words[0].startswith("-"):
        words[0] = f"--env={words[0]}"
    options = CheckFlags(**parse_flags(build_check_parser(), words))
    refuse_numbers(options)
    if options.env is None:
        raise UsageError("env is missing; pass the environment as path/to/file.py:ClassName")
    if options.train and options.max_turns > 1:
        raise UsageError(
            f"train=true with max_turns={options.max_turns}, but the throw-away toy is taught one turn; drop --train"
        )
    return options


def describe(done: Examination) -> list[str]:
    """The lines that say what was seen of a sound environment."""
    lines = [f"tool {tool['name']}: {tool.get('description') or 'no description'}" for tool in done.tools]
    lines += [f"{INDENT}{json.dumps(tool['parameters'], ensure_ascii=False)}" for tool in done.tools]
    lines.append("outcomes seen: " + ", ".join(f"{name} {count:,}" for name, count in done.outcomes.items()))
    sample = done.sample
    said = "not said" if sample.said is None else f"{sample.said:.1%}"
    if sample.measured is not None:
        said += f"; of {sample.num_pairs} gold answers to other episodes {sample.measured:.1%} are right"
    lines.append(f"chance: {said}")
    if sample.num_distinct is not None:
        lines.append(f"episodes: {sample.num_distinct} of the first {NUM_DISTINCT} are distinct")
    if done.first is not None:
        lines += _described(done.env, *done.first)
    parameters = inspect.signature(type(done.env)).parameters.values()
    lines.append(f"constructor: {', '.join(map(str, parameters)) or 'takes nothing'}")
    return [printable_lines(line) for line in lines]


def _described(env: Any, episode: Episode, gold: ToolCall) -> list[str]:
    """The lines about one episode."""
    choices = choices_of(env, episode)
    controls = [
        control for control in Control if checked_edit(env, episode, control, gold, random.Random(0)) is not None
    ]
    lines = [f"choices: {', '.join(choices) or 'none, an answer is not one of a few'}"]
    lines += [f"controls: {', '.join(controls) or 'none'}", "an episode's prompt:"]
    for message in episode.messages:
        text = "".join(part["text"] if part["type"] == "text" else "[image]" for part in message["content"])
        lines += [f"{INDENT}{message['role']}:", textwrap.indent(text, 2 * INDENT)]
    return [*lines, "its gold answer:", textwrap.indent(make_call_str(gold), INDENT)]


def _shown(finding: Finding) -> str:
    return textwrap.fill(
        printable(finding), WIDTH, subsequent_indent=INDENT, break_long_words=False, break_on_hyphens=False
    )


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count != 1 else ''}"


if __name__ == "__main__":
    sys.exit(command_line.run(main))
