"""The flags that training and evaluation share, and what a flag is: name, meaning, unit, default, and why that default.

Owns the parser's kind, its errors and the YAML form. What only training asks is in training_flags.py, what only
evaluation asks in evaluate_options.py; options.py resolves and checks what was given.
"""

import argparse
import difflib
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from fleet.errors import UsageError
from utils.file_kinds import kind_of

TOY_MODEL_ID = "toy"
MAX_VALUE_LENGTH = 4096  # Linux takes no longer path
MAX_HELP_WIDTH = 110
MAX_REASON_LENGTH = 300
# Flags that name a file or a folder of the user's own.
PATH_FLAGS = ("data_root", "env", "reward")


def make_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """An empty parser of Fleet's kind: with --config, and errors as UsageError."""
    parser = _Parser(
        prog=prog,
        usage=f"{prog} [--FLAG VALUE ...]",
        description=description,
        formatter_class=_help_formatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config",
        type=user_path,
        metavar="FILE",
        help="YAML file that sets any flag; the command line wins over it (default: none)",
    )
    return parser


@dataclass(frozen=True)
class ParsedFlags:
    """The value of every flag of a parser, and which of them the user gave, on the command line or in a file."""

    values: dict[str, Any]
    given: frozenset[str]


def parse_flags(parser: argparse.ArgumentParser, argv: Sequence[str], inherited: Sequence[str] = ()) -> ParsedFlags:
    """What `argv` says: values are from defaults, `inherited` flags, the `--config` file and the command line.

    Later ones win. Raises UsageError as parse_options does.
    """
    own_flags = list(argv)
    config_path = _parse_known(parser, own_flags).config
    if config_path is not None:
        own_flags = [*_read_config_file(parser, Path(config_path)), *own_flags]
    values = vars(_parse_known(parser, [*inherited, *own_flags]))
    del values["config"]
    return ParsedFlags(values, _flags_in(parser, own_flags))


def _help_formatter(prog: str) -> argparse.HelpFormatter:
    # two columns less than the terminal has, as argparse does: some wrap a full line
    width = min(shutil.get_terminal_size().columns - 2, MAX_HELP_WIDTH)
    return argparse.HelpFormatter(prog, max_help_position=min(36, width // 3), width=width)


def _flags_in(parser: argparse.ArgumentParser, argv: Sequence[str]) -> frozenset[str]:
    """The flags that a command line names, whatever their values."""
    nothing = object()
    # a parser leaves alone what its namespace has, and sets what the command line names
    blank = argparse.Namespace(**{action.dest: nothing for action in parser._actions})
    return frozenset(name for name, value in vars(parser.parse_args(argv, blank)).items() if value is not nothing)


def add_model_flags(add: Callable[..., Any]) -> None:
    """Which model, and how it is held and computed."""
    add(
        "--model_id",
        type=user_path,
        default=TOY_MODEL_ID,
        metavar="ID",
        help="hub id or folder of a Qwen2.5-VL (default: toy, the built-in tiny one)",
    )
    add("--revision", metavar="REV", help="branch, tag or commit of a hub model (default: its main branch)")
    add(
        "--dtype",
        choices=["bfloat16", "float32"],
        help="what is computed in (default: bfloat16 on a GPU that has it, else float32)",
    )
    add(
        "--attn_implementation",
        default="sdpa",
        choices=["sdpa", "eager", "flash_attention_2"],
        help="attention of the language model; flash_attention_2 cannot train on shared prefixes; the vision tower "
        "uses flash attention where it is installed (default: sdpa, which is everywhere)",
    )
    add_switch(add, "--load_in_4bit", False, "QLoRA: hold the base weights in 4 bits; needs bitsandbytes")


def add_task_flags(add: Callable[..., Any]) -> None:
    """What is shown and asked, and what counts as an answer."""
    add(
        "--data_root",
        type=user_path,
        default="./toy_images",
        metavar="DIR",
        help="folder of candidate images: named files, a folder per class, or metadata.csv/.jsonl; of folders train/, "
        "val/, test/ above those, train/ is drawn from (default: ./toy_images)",
    )
    add(
        "--bad_images",
        default="stop",
        choices=["stop", "skip"],
        help="what an image that cannot be used does: stop the run, or be left out, and where it goes bad during the "
        "run, have its episode replaced (default: stop, as nothing is left out unasked)",
    )
    add(
        "--env",
        type=user_path,
        metavar="FILE:CLASS",
        help="another environment, as path/to/file.py:ClassName (default: PickImageEnv)",
    )
    add("--candidates_per_episode", type=int, default=4, metavar="N", help="images per episode (default: 4)")
    add(
        "--fixed_correct_index",
        type=_index_or_none,
        default=0,
        metavar="INDEX|none",
        help="the index that is always right, or none: drawn per episode and named in the instruction (default: 0)",
    )
    add_switch(add, "--allow_reasoning", False, "accept text before the call, and ask for it")
    add(
        "--image_max_pixels",
        type=int,
        metavar="N",
        help="width times height an image is shrunk to, in pixels "
        "(default: 3136 = 56x56 for the toy, else 200704 = 448x448)",
    )


def add_sampling_flags(add: Callable[..., Any]) -> None:
    """How completions are drawn."""
    add(
        "--temperature",
        type=float,
        default=1.0,
        metavar="X",
        help="of sampling, above 0 (default: 1, the policy itself)",
    )
    add("--top_p", type=float, default=1.0, metavar="P", help="nucleus of sampling, above 0 to 1 (default: 1, all)")
    add(
        "--max_completion_length",
        type=int,
        metavar="N",
        help="tokens a completion may have (default: 32 for the toy, else 64, or 512 with reasoning)",
    )
    add_switch(
        add,
        "--ds3_gather_for_generation",
        False,
        "under ZeRO-3 alone: hold the whole model on every GPU while generating: faster if it fits, impossible for 32B "
        "in 80 GB",
    )


def add_held_out_flags(add: Callable[..., Any], num_episodes: int, seed: int) -> None:
    """Which episodes are held out."""
    add(
        "--eval_episodes",
        type=int,
        default=num_episodes,
        metavar="N",
        help=f"held-out episodes, the same each time (default: {num_episodes})",
    )
    add(
        "--eval_seed",
        type=int,
        default=seed,
        metavar="N",
        help=f"seed of the held-out episodes, which must not be the run's (default: {seed})",
    )


def add_switch(add: Callable[..., Any], flag: str, default: bool, meaning: str) -> None:
    """A flag that is true or false, and true if given without a value."""
    text = f"{meaning} (default: {str(default).lower()})"
    add(flag, type=true_or_false, nargs="?", const=True, default=default, metavar="true|false", help=text)


def user_path(text: str) -> str:
    """A path, or what may be one, with `~` as the shell would have it: files of settings know no shell."""
    return os.path.expanduser(text)


def as_seen_from(directory: str, value: str) -> str:
    """The absolute path of a flag that names a file or folder from `directory`, with any `:name` behind it.

    >>> as_seen_from("/home/me", "mine/my_env.py:MyEnv")
    '/home/me/mine/my_env.py:MyEnv'
    """
    return os.path.normpath(os.path.join(directory, value))


def true_or_false(text: str) -> bool:
    """The value of a switch."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted true or false")
    return text.lower() == "true"


def true_false_or_auto(text: str) -> bool | str:
    """The value of a switch that may be left to what is found."""
    if text.lower() not in ("true", "false", "auto"):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted true, false or auto")
    return "auto" if text.lower() == "auto" else true_or_false(text)


def _index_or_none(text: str) -> int | None:
    if text.lower() == "none":
        return None
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted an index from 0 up, or none")
    return int(text)


def _parse_known(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    _refuse_long_words(argv)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        flag = unknown[0].split("=")[0]
        raise UsageError(f"unknown flag {flag}{_nearest(flag, [f'--{name}' for name in vars(namespace)])}; see --help")
    return namespace


def _refuse_long_words(argv: Sequence[str]) -> None:
    for word in argv:
        if len(word) > MAX_VALUE_LENGTH:
            raise UsageError(
                f"{word[:20]}... has {len(word):,} characters, but wanted at most {MAX_VALUE_LENGTH:,}; shorten it"
            )


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else ""


def _read_config_file(parser: argparse.ArgumentParser, path: Path) -> list[str]:
    """The file's settings as command-line flags, so that they meet the same checks."""
    try:
        kind = kind_of(path)
    except OSError as error:
        raise UsageError(f"config file {path} cannot be read ({error.strerror}); correct --config") from error
    if kind is None:
        raise UsageError(f"config file {path} does not exist; correct --config")
    if kind != "a file":
        # every process and every restart reads it, and a pipe gives its content once
        raise UsageError(f"config file {path} is {kind}; pass a file that can be read more than once")
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=_ConfigLoader)
    except OSError as error:
        raise UsageError(f"config file {path} cannot be read ({error.strerror}); correct --config") from error
    except RecursionError as error:
        raise UsageError(f"config file {path} is nested too deep, wanted lines of 'flag: value'; correct it") from error
    # besides its own errors yaml lets through those of int, float and datetime
    except (yaml.YAMLError, ValueError, ArithmeticError) as error:
        reason = " ".join(str(error).split())[:MAX_REASON_LENGTH]
        raise UsageError(f"config file {path} is not YAML: {reason}; wanted lines of 'flag: value'") from error
    if not isinstance(settings, dict):
        raise UsageError(f"config file {path} holds a {type(settings).__name__}, wanted lines of 'flag: value'")
    known = [action.dest for action in parser._actions if action.dest not in ("help", "config")]
    flags: list[str] = []
    for key, value in settings.items():
        if key not in known:
            raise UsageError(f"config file {path}: unknown key {key!r}{_nearest(str(key), known)}; see --help")
        if isinstance(value, (dict, list)):
            raise UsageError(f"config file {path}: {key} is a {type(value).__name__}, wanted one value")
        if value is not None or key == "fixed_correct_index":
            flags.append(f"--{key}={as_flag_value(value)}")
    try:
        _refuse_long_words(flags)
        parser.parse_args(flags)
    except UsageError as error:
        raise UsageError(f"config file {path}: {error}") from error
    return flags


class _ConfigLoader(yaml.SafeLoader):
    """YAML's safe loader, except that a key given twice is an error, not the last one's win, and numbers stay text.

    A flag's own type reads them, as on the command line: 010 is ten there, and a folder 1.10 keeps its zero.
    """

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in known if tag.rpartition(":")[2] not in ("int", "float", "timestamp")]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise yaml.YAMLError(f"key {twice[0]!r} is given twice; keep one")
        return super().construct_mapping(node, deep)


def as_flag_value(value: Any) -> str:
    """A value as the command line takes it."""
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")
