"""The arguments of a user's constructor: those that Fleet offers by name, and those of --env_args. Imports no torch."""

import difflib
import inspect
import json
from collections.abc import Mapping
from typing import Any

from fleet.episodes import BrokenEpisode


def constructor_arguments(env_class: type[Any], offered: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments to construct an environment with.

    offered: what Fleet's flags say, each taken if there is a parameter of that name. own: of --env_args. Raises
    BrokenEpisode, which names the parameters, if one of `own` is not known, or another one is wanting.
    """
    require_known(env_class, offered, own)
    known, takes_all = _parameters(env_class)
    by_name = {name for name, one in known.items() if one.kind is not inspect.Parameter.POSITIONAL_ONLY}
    accepted = {name: value for name, value in offered.items() if name in by_name or takes_all} | dict(own)
    wanting = [name for name, parameter in known.items() if _is_wanting(parameter, accepted)]
    if wanting:
        raise BrokenEpisode(
            f"its constructor needs {', '.join(wanting)}, but is given {', '.join([*offered, *own])} by name, each if "
            "it takes it; give the other parameters defaults, or pass them by --env_args"
        )
    return accepted


def require_known(
    env_class: type[Any], offered: Mapping[str, Any], own: Mapping[str, Any], source: str = "env_args"
) -> None:
    """Raises BrokenEpisode, with the nearest name, for one of `own` that the constructor does not take by name.

    source: of these, for errors.
    """
    known, takes_all = _parameters(env_class)
    for name in own:
        if name in offered:
            raise BrokenEpisode(f"{source} gives {name}, which has a flag of its own; pass --{name}")
        if name not in known and not takes_all:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"correct {source}"
            raise BrokenEpisode(
                f"{source} gives {name}, but the constructor has {described_parameters(env_class, offered)}; {hint}"
            )


def _parameters(env_class: type[Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """(parameters by name, True if any other name is taken too)."""
    parameters = inspect.signature(env_class).parameters
    several = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name: one for name, one in parameters.items() if one.kind not in several}, takes_all


def _is_wanting(parameter: inspect.Parameter, accepted: Mapping[str, Any]) -> bool:
    is_required = parameter.default is parameter.empty
    return is_required and (parameter.kind is parameter.POSITIONAL_ONLY or parameter.name not in accepted)


def described_parameters(env_class: type[Any], offered: Mapping[str, Any]) -> str:
    """The parameters that --env_args may give, with their defaults; "none of its own" without any."""
    own = []
    for name, parameter in _parameters(env_class)[0].items():
        if name not in offered:
            own.append(name if parameter.default is parameter.empty else f"{name}={parameter.default!r}")
    return ", ".join(own) or "no parameters of its own"


def arguments_of(env_args: str | None) -> dict[str, Any]:
    """The arguments that --env_args, an object in JSON, gives by name."""
    return {} if env_args is None else dict(json.loads(env_args))
