"""A dataclass of flags becomes a parser, and argv and a YAML file become its values.

A flag is a field of a dataclass, as in flags.py, and `flag(...)` holds all that is known of it. Imports no torch.
"""

import argparse
import difflib
import inspect
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

import yaml

from fleet.errors import UsageError, one_line, refused
from utils.file_kinds import kind_of
from utils.tool_calls import object_with_unique_keys

MAX_VALUE_LENGTH = 4096  # Linux takes no longer path
MAX_HELP_WIDTH = 110
MAX_REASON_LENGTH = 300
# a flag that is no more: the flag and the value that do what it did
SUCCESSORS = {"freeze_vision": ("freeze", "tower,merger")}


@dataclass(frozen=True)
class Bound:
    """A condition on a number. words: follow "must be" in an error."""

    words: str
    holds: Callable[[float], bool]


@dataclass(frozen=True)
class Flag:
    """All that is known of a flag besides its name, type and default, which the dataclass field has.

    meaning: for --help, with its unit. why: the reason for the default in --help, or the words for a default of None.
    metavar: of the value in --help. parse: from text, where the field's type is not enough. bounds: on a number.
    default_of: (value, reason) of a default that depends on the Case (flags.py). trl: its name in TRL's RLOOConfig,
    True for the same one. needs: (package, how to install it) by the value that needs it. is_file: it names a file or
    folder of the user's own. takes_several: its value is a list. may_change: a resumed run may have another value.
    """

    meaning: str
    why: str
    metavar: str | None = None
    choices: tuple[str, ...] | None = None
    parse: Callable[[str], Any] | None = None
    bounds: tuple[Bound, ...] = ()
    default_of: Callable[[Any], tuple[Any, str]] | None = None
    trl: str | bool = False
    needs: Mapping[Any, tuple[str, str]] | None = None
    is_file: bool = False
    takes_several: bool = False
    may_change: bool = False


def flag(default: Any, meaning: str, why: str = "", **others: Any) -> Any:
    """A dataclass field that is a flag. others: of Flag."""
    return field(default=default, metadata={"flag": Flag(meaning, why, **others)})


def replace_default(options_class: type[Any], name: str, default: Any) -> Any:
    """The field of this name with another default, for a class that inherits it."""
    declared = next(declared for declared in fields(options_class) if declared.name == name)
    return field(default=default, metadata=declared.metadata)


def flag_of(name_and_default: Field[Any]) -> Flag:
    """The flag that a field declares."""
    return name_and_default.metadata["flag"]


def make_parser(
    prog: str, description: str, groups: Mapping[str, Sequence[type[Any]]], options_class: type[Any]
) -> argparse.ArgumentParser:
    """The parser of a command, with --config; it raises UsageError.

    groups: the dataclasses of flags under each heading of --help. options_class: has them all, and decides defaults.
    """
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
    by_name, types = {field.name: field for field in fields(options_class)}, get_type_hints(options_class)
    for heading, classes in groups.items():
        group = parser.add_argument_group(heading)
        for name in [name for flags_class in classes for name in inspect.get_annotations(flags_class)]:
            group.add_argument(f"--{name}", **_argument(by_name[name], types[name]))
    return parser


def _argument(declared: Field[Any], kind: Any) -> dict[str, Any]:
    """The keywords of argparse for a field. kind: its type, such as int | None."""
    known, default = flag_of(declared), declared.default
    value_type = next((part for part in get_args(kind) if part is not type(None)), kind)
    is_switch = value_type is bool or known.parse is true_false_or_auto
    metavar = "true|false" if is_switch else {int: "N", float: "X"}.get(value_type)
    shown = ", ".join(filter(None, ["" if default is None else _shown(default), known.why]))
    argument: dict[str, Any] = {
        "type": known.parse or (true_or_false if is_switch else value_type),
        "default": default,
        "help": f"{known.meaning} (default: {shown})",
        # without a metavar --help lists the choices
        "metavar": known.metavar or (None if known.choices else metavar),
        "choices": known.choices,
    }
    if known.takes_several:
        argument["nargs"] = "+"
    return argument | ({"nargs": "?", "const": True} if is_switch else {})


def _shown(default: Any) -> str:
    return f"{default:g}" if isinstance(default, float) else as_flag_value(default)


def parse_flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """The values of the flags that `argv` or its --config file gives; `argv` wins. Raises UsageError."""
    given = _flags_in(parser, argv)
    if (config_path := given.pop("config", None)) is not None:
        given = _flags_in_file(parser, Path(config_path)) | given
    return given


def user_path(text: str) -> str:
    """A value that may be a path, with `~` replaced as a shell does: a file of settings has no shell."""
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
    """The value of a switch that may also be auto."""
    if text.lower() not in ("true", "false", "auto"):
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted true, false or auto")
    return "auto" if text.lower() == "auto" else true_or_false(text)


def assumed_gpus(text: str) -> str:
    """Text such as 8x80 or 8x80:H100: how many GPUs, GiB of each, and a name. Raises ArgumentTypeError for other."""
    if re.fullmatch(r"[1-9][0-9]{0,4}x[1-9][0-9]{0,3}(\.[0-9]{1,3})?(:[A-Za-z0-9 ._-]{1,40})?", text) is None:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, wanted the number of GPUs and GiB of each, as 8x80, or 8x80:H100 with a name"
        )
    return text


def index_or_none(text: str) -> int | None:
    """An index from 0 up, or None for the word none."""
    if text.lower() == "none":
        return None
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"got {text!r}, wanted an index from 0 up, or none")
    return int(text)


def json_object(text: str) -> str:
    """An object in JSON, written in one way, so that equal objects are equal texts.

    >>> json_object('{"side":3, "hard": true}')
    '{"hard": true, "side": 3}'
    """
    try:
        value = json.loads(text, object_pairs_hook=object_with_unique_keys)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(
            f"got {text[:60]!r}, which is no JSON ({error}); pass '{{\"side\": 3}}'"
        ) from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"got a {type(value).__name__}, wanted an object; pass '{{\"side\": 3}}'")
    return json.dumps(value, sort_keys=True)


@dataclass(frozen=True)
class SomeOf:
    """The text of a set of these words, with commas between them and in this order. or_none: none is a value, None.

    >>> SomeOf(("tower", "merger"))("merger,tower")
    'tower,merger'
    """

    words: tuple[str, ...]
    or_none: bool = False

    def __call__(self, text: str) -> str | None:
        """The value of the flag. Raises ArgumentTypeError for another word."""
        if self.or_none and text.lower() == "none":
            return None
        given = {word.strip() for word in text.split(",")}
        if not given <= set(self.words):
            wanted = f"{','.join(self.words)}{', or none' * self.or_none}"
            raise argparse.ArgumentTypeError(f"got {text[:60]!r}, wanted some of {wanted}")
        return ",".join(word for word in self.words if word in given)


def as_flag_value(value: Any) -> str:
    """A value as the command line takes it."""
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


def as_arguments(settings: Mapping[str, Any]) -> list[str]:
    """Flags as the command line takes them, without those that are None, which is a value of one flag alone."""
    return [
        f"--{name}={as_flag_value(value)}"
        for name, value in settings.items()
        if value is not None or name == "fixed_correct_index"
    ]


def _help_formatter(prog: str) -> argparse.HelpFormatter:
    # two columns less than the terminal has, as argparse does: some wrap a full line
    width = min(shutil.get_terminal_size().columns - 2, MAX_HELP_WIDTH)
    return argparse.HelpFormatter(prog, max_help_position=min(36, width // 3), width=width)


def _flags_in(parser: argparse.ArgumentParser, argv: Sequence[str]) -> dict[str, Any]:
    """The values of the flags that a command line names."""
    if word := next((word for word in argv if len(word) > MAX_VALUE_LENGTH), None):
        raise UsageError(
            f"{word[:20]}... has {len(word):,} characters, but wanted at most {MAX_VALUE_LENGTH:,}; shorten it"
        )
    known = [action.dest for action in parser._actions if action.dest != "help"]
    # a parser keeps the values of its namespace, except those that the command line sets
    nothing = object()
    namespace, unknown = parser.parse_known_args(argv, argparse.Namespace(**dict.fromkeys(known, nothing)))
    if unknown:
        flag = unknown[0].split("=")[0]
        raise UsageError(f"unknown flag {flag}{_nearest(flag, [f'--{name}' for name in known])}; see --help")
    return {name: value for name, value in vars(namespace).items() if value is not nothing}


def _nearest(name: str, known: list[str]) -> str:
    successor, value = SUCCESSORS.get(name.lstrip("-"), ("", ""))
    if successor in [flag.lstrip("-") for flag in known]:
        return f": pass --{successor} {value}"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else ""


def _flags_in_file(parser: argparse.ArgumentParser, path: Path) -> dict[str, Any]:
    """The values of the flags that a YAML file sets, by the same checks as on the command line."""
    try:
        kind = kind_of(path)
        content = path.read_bytes() if kind == "a file" else b""
    except OSError as error:
        raise UsageError(f"config file {path} cannot be read ({error.strerror}); correct --config") from error
    if kind is None:
        raise UsageError(f"config file {path} does not exist; correct --config")
    if kind != "a file":
        # every process and every restart reads it, and a pipe gives its content once
        raise UsageError(f"config file {path} is {kind}; pass a file that can be read more than once")
    try:
        settings = yaml.load(content.decode("utf-8"), Loader=_ConfigLoader)
    except RecursionError as error:
        raise UsageError(f"config file {path} is nested too deep, wanted lines of 'flag: value'; correct it") from error
    # besides its own errors yaml lets through those of int, float and datetime
    except (yaml.YAMLError, ValueError, ArithmeticError) as error:
        reason = one_line(error)[:MAX_REASON_LENGTH]
        raise UsageError(f"config file {path} is not YAML: {reason}; wanted lines of 'flag: value'") from error
    if not isinstance(settings, dict):
        raise UsageError(f"config file {path} holds a {type(settings).__name__}, wanted lines of 'flag: value'")
    by_dest = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    known = list(by_dest)
    for key, value in settings.items():
        if key not in known:
            raise UsageError(f"config file {path}: unknown key {key!r}{_nearest(str(key), known)}; see --help")
        if isinstance(value, dict) and by_dest[key].type is json_object:
            # numbers are numbers there
            settings[key] = json.dumps(yaml.safe_load(content)[key])
        elif isinstance(value, list) and isinstance(by_dest[key].type, SomeOf):
            settings[key] = ",".join(map(str, value))
        elif isinstance(value, (dict, list)):
            raise UsageError(f"config file {path}: {key} is a {type(value).__name__}, wanted one value")
    with refused(UsageError, before=f"config file {path}: "):
        return _flags_in(parser, as_arguments(settings))


class _ConfigLoader(yaml.SafeLoader):
    """YAML's safe loader, but a key given twice is an error, and numbers stay text: a folder 1.10 keeps its zero."""

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in known if tag.rpartition(":")[2] not in ("int", "float", "timestamp")]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"key {twice[0]!r} is given twice; keep one")
        return super().construct_mapping(node, deep)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see --help")
