"""The checks of an environment before anything trains on it: every kind of mistake that can be found without a model.

Owns the order of the checks and those of what is shown; answer_checks.py has those of what is answered. One mistake
hides another only where nothing more can be asked. Imports no torch.
"""

import inspect
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jsonschema.exceptions import SchemaError

from fleet.episodes import BrokenEpisode, Episode, EpisodeSource, asked, checked_fields, checked_messages
from fleet.own_code import environment_trial as trial
from fleet.own_code.answer_checks import AnswerChecks
from fleet.own_code.chance_checks import NUM_PAIRS, Sample, draw_sample
from fleet.own_code.constructor import constructor_arguments
from fleet.own_code.findings import Finding, Kind, Ledger
from fleet.own_code.last_turn import LastTurn
from fleet.verdicts import outcome_names, require_sound_task
from utils.images import BadImage, open_image
from utils.plain_text import QWEN_ADDED_TOKENS, first_literal, require_plain_messages, require_plain_text
from utils.tool_calls import ToolCall, make_call_str

NUM_EPISODES = 32
FAR = (10**6, 2**31 + 7)  # a run of many processes and steps gets there
NUM_SEEDED = 4
NO_TOOLS = "[]"


@dataclass
class Examination:
    """The result of checking an environment.

    tools, outcomes: of the environment, and how often each came up. first: an episode and its gold answer.
    """

    env: Any
    ledger: Ledger = field(default_factory=Ledger)
    tools: Sequence[Any] = ()
    outcomes: Mapping[str, int] = field(default_factory=dict)
    sample: Sample = field(default_factory=Sample)
    first: tuple[Episode, ToolCall] | None = None

    @property
    def findings(self) -> list[Finding]:
        """All findings, mistakes first."""
        return self.ledger.findings

    @property
    def is_sound(self) -> bool:
        """True if nothing but notes was found."""
        return not any(finding.kind.is_mistake for finding in self.findings)


def examine(
    env: Any,
    arguments: Mapping[str, Any] | None = None,
    *,
    spec: str | None = None,
    num_episodes: int = NUM_EPISODES,
    num_pairs: int = NUM_PAIRS,
    max_pixels: int | None = None,
    max_tokens: int = 64,
    max_turns: int = 1,
    literals: Collection[str] = QWEN_ADDED_TOKENS,
) -> Examination:
    """Everything that was found in an environment.

    env: an environment, or its class, which is built twice from those of `arguments` that it takes, so that two
    instances are compared. spec: path/to/file.py:ClassName of that class, whose episodes another process draws too.
    num_episodes: from 0 on, beside a few far ones. num_pairs: of episodes on which chance is measured. max_pixels,
    max_tokens: budgets of an image and of a completion. max_turns: of a rollout; from 2 on, what ends it is checked,
    behind the gold answers of the turns before.
    """
    given, ledger = dict(arguments or {}), Ledger()
    first = another = env
    if isinstance(env, type):
        first = _constructed(env, given, ledger)
        another = None if first is None else _constructed(env, given, ledger)
        if first is None or another is None:
            return Examination(env, ledger)
    asked_env = first if max_turns == 1 else LastTurn(first, max_turns)
    asked_too = asked_env if another is first else another if max_turns == 1 else LastTurn(another, max_turns)
    checks = _Checks(asked_env, asked_too, ledger, given, spec, num_pairs, max_pixels, max_tokens, frozenset(literals))
    return replace(checks.run((*range(num_episodes), *FAR)), env=first)


@dataclass
class _Checks:
    """The checks of one environment, built once more as `another`, or the same object."""

    env: EpisodeSource
    another: EpisodeSource
    ledger: Ledger
    arguments: dict[str, Any]
    spec: str | None
    num_pairs: int
    max_pixels: int | None
    max_tokens: int
    literals: frozenset[str]
    tools: str = NO_TOOLS
    fields: dict[int, dict[str, Sequence[Any]]] = field(default_factory=dict)
    golds: dict[int, ToolCall] = field(default_factory=dict)

    def run(self, indices: Sequence[int]) -> Examination:
        """All checks, in order."""
        done = Examination(self.env, self.ledger)
        if not self._have_signatures():
            return done
        is_sound_task = self._have_sound_task()
        allow_reasoning = bool(self.arguments.get("allow_reasoning", getattr(self.env, "allow_reasoning", False)))
        answers = AnswerChecks(self.env, self.ledger, json.loads(self.tools), self.literals, allow_reasoning,
                               self.max_tokens)  # fmt: skip
        for index in indices:
            self._look_at(index, answers, done, has_tools=bool(answers.tools))
        # in another order than the first time, the first ahead, as findings name the first
        for index in drawn[:1] + drawn[:0:-1] if (drawn := list(self.fields)) else ():
            self._ask_again(index, answers if is_sound_task else None)
        self._compare_instances()
        self._compare_seeds()
        done.sample = draw_sample(
            lambda index: self._episode(self.env, index),
            answers if self.golds and is_sound_task else None,
            self.ledger,
            self.num_pairs,
        )
        answers.conclude()
        names = outcome_names(self.env) if is_sound_task else []
        return replace(done, tools=answers.tools, outcomes={name: answers.outcomes[name] for name in names})

    def _have_signatures(self) -> bool:
        for name, parameters in trial.METHODS.items():
            if not callable(getattr(self.env, name, None)):
                self.ledger.add(
                    Kind.SIGNATURE,
                    f"{type(self.env).__name__} has no method {name}({', '.join(parameters)}); extend "
                    "environment.Environment, or environment.PickImageTask where an image is picked",
                    name,
                )
                continue
            with self.ledger.catching(Kind.SIGNATURE, subject=name):
                trial.require_methods(self.env, {name: parameters})
        return not self.ledger.has(Kind.SIGNATURE)

    def _have_sound_task(self) -> bool:
        """True if the tools and the outcomes can be used; the tools are then kept as text."""
        with self.ledger.catching(Kind.TOOL_UNFIT):
            tools = asked(lambda: self.env.tools, lambda given: given, "tools", "tools")
            if isinstance(tools, Sequence) and not tools:
                self.ledger.add(Kind.NO_TOOLS, "tools is empty, but wanted at least one; give name, description and "
                                "parameters of each")  # fmt: skip
                return False
            self._require_tools(tools)
        if self.ledger.has(Kind.TOOL_UNFIT, Kind.SCHEMA_INVALID, Kind.LITERAL):
            return False
        self.tools = json.dumps([dict(tool) for tool in tools])
        self._require_same_tools()
        with self.ledger.catching(Kind.OUTCOMES):
            asked(lambda: require_sound_task(self.env), lambda nothing: nothing, "outcomes", "outcomes")
        return not self.ledger.has(Kind.OUTCOMES)

    def _require_tools(self, tools: Any) -> None:
        class Named:  # outcomes are another finding
            tools: Any
            outcomes = Kind

        Named.tools = tools
        try:
            require_sound_task(Named)  # type: ignore[arg-type]
        except BrokenEpisode as error:
            is_schema = isinstance(getattr(error.__cause__, "__cause__", None), SchemaError)
            has_literal = first_literal(json.dumps(tools, default=str), self.literals) is not None
            kind = Kind.SCHEMA_INVALID if is_schema else Kind.LITERAL if has_literal else Kind.TOOL_UNFIT
            self.ledger.add(kind, str(error))

    def _require_same_tools(self) -> None:
        try:
            now = json.dumps([dict(tool) for tool in self.env.tools])
        # a property may do anything
        except (Exception, SystemExit) as error:
            now = f"{type(error).__name__}: {error}"
        if now != self.tools:
            self.ledger.add(
                Kind.TOOLS_CHANGE,
                f"tools was {self.tools[:80]}, and is now {now[:80]}; it is shown to the model once: keep it as it is",
            )

    def _episode(self, env: EpisodeSource, index: int, *, is_quiet: bool = False) -> Episode | None:
        """Episode `index` with its messages; None, and a finding unless quiet, where there is none."""
        ledger, drawn = Ledger() if is_quiet else self.ledger, None
        with ledger.catching(Kind.EPISODE_FIELD, raised=Kind.EPISODE_RAISES):
            drawn = checked_fields(env, index)
        if drawn is None:
            return None
        # the prompt may show the tools, and fail for their sake
        has_tools = self.tools != NO_TOOLS
        with (ledger if has_tools else Ledger()).catching(Kind.MESSAGES, raised=Kind.PROMPT_RAISES):
            return replace(drawn, messages=checked_messages(env, drawn, f"episode {index}"))
        return None if has_tools else replace(drawn, messages=())

    def _look_at(self, index: int, answers: AnswerChecks, done: Examination, *, has_tools: bool) -> None:
        """Findings about all that an episode shows and asks; keeps its gold answer."""
        episode = self._episode(self.env, index)
        if episode is None:
            return
        self.fields[index] = trial.comparable_fields(episode)
        for image in episode.images:
            with self.ledger.catching(Kind.BAD_IMAGE, where=f"episode {index}: "):
                open_image(image, self.max_pixels)
        with self.ledger.catching(Kind.LITERAL):
            require_plain_messages(episode.messages, f"episode {index}", self.literals)
        texts = {f"labels[{place}]": label for place, label in enumerate(episode.labels)}
        texts |= {"target": episode.target or "", "answer": json.dumps(dict(episode.answer), ensure_ascii=False)}
        for name, text in texts.items():
            with self.ledger.catching(Kind.LITERAL, subject=name.partition("[")[0]):
                require_plain_text(text, f"episode {index}: {name}", self.literals)
        if not has_tools:
            return
        said = json.dumps(episode.messages, ensure_ascii=False)
        if unnamed := [tool["name"] for tool in answers.tools if tool["name"] not in said]:
            self.ledger.add(
                Kind.TOOL_UNNAMED,
                f"episode {index}: no message names the tool {unnamed[0]}, so the model cannot know it; show "
                "utils.tool_calls.system_text(tools), as Environment's own prompt_messages does",
            )
        gold = answers.gold(index, episode)
        if gold is not None:
            self.golds[index] = gold
            done.first = done.first or (episode, gold)
        self._require_same_tools()

    def _ask_again(self, index: int, answers: AnswerChecks | None) -> None:
        """The same episode once more, in another order; and all about its answers."""
        episode = self._episode(self.env, index)
        with self.ledger.catching(Kind.EPISODE_IMPURE):
            if episode is not None:
                now = trial.comparable_fields(episode)
                trial.require_same(index, self.fields[index], now, "asked for again")
        if episode is not None and answers is not None and index in self.golds:
            others = {make_call_str(gold): gold for other, gold in self.golds.items() if other != index}
            answers.check(index, episode, list(others.values()))
            self._require_same_tools()

    def _compare_instances(self) -> None:
        """Another instance, and another process; an episode that is impure anyway is not worth the comparison."""
        if self.ledger.has(Kind.EPISODE_IMPURE):
            return
        for index in self.fields if self.another is not self.env else ():
            with self.ledger.catching(Kind.OTHER_INSTANCE):
                if (episode := self._episode(self.another, index)) is not None:
                    now = trial.comparable_fields(episode)
                    trial.require_same(index, self.fields[index], now, "asked of another instance, built alike")
        if self.spec is not None and not self.ledger.has(Kind.OTHER_INSTANCE) and set(trial.TRIED) <= set(self.fields):
            with self.ledger.catching(Kind.OTHER_PROCESS):
                trial.require_same_in_another_process(self.env, self.spec, self.arguments, {})

    def _compare_seeds(self) -> None:
        """Notes about a seed that is not taken, or changes nothing."""
        env_class = type(self.env.env if isinstance(self.env, LastTurn) else self.env)
        parameters = inspect.signature(env_class).parameters
        takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
        if "seed" not in parameters and not takes_any:
            self.ledger.add(
                Kind.NO_SEED,
                f"the constructor of {env_class.__name__} takes no seed, so held-out episodes are the training's; "
                "add a parameter seed, and draw from it",
            )
        elif self.another is not self.env:
            seed = self.arguments.get("seed", getattr(self.env, "seed", 0))
            other = {"seed": seed + 1 if isinstance(seed, int) else 1}
            seeded = _constructed(env_class, self.arguments | other, Ledger())
            indices = list(self.fields)[:NUM_SEEDED] if seeded is not None else []
            episodes = {index: self._episode(seeded, index, is_quiet=True) for index in indices}
            now = {index: trial.comparable_fields(episode) for index, episode in episodes.items() if episode}
            if now and all(_without_seed(now[index]) == _without_seed(self.fields[index]) for index in now):
                self.ledger.add(
                    Kind.SEED_IGNORED,
                    f"the first {len(now)} episodes are the same for another seed, so held-out episodes are the "
                    "training's; draw from the seed",
                )


def _constructed(env_class: type[Any], arguments: Mapping[str, Any], ledger: Ledger) -> Any:
    """The class built from those arguments that it takes; None, and a finding, where it cannot be."""
    try:
        return asked(
            lambda: env_class(**constructor_arguments(env_class, arguments, {})), lambda env: env, "the environment",
            "the constructor",
        )  # fmt: skip
    except (BrokenEpisode, BadImage, OSError) as error:
        ledger.add(Kind.CONSTRUCTOR, str(error))
        return None


def _without_seed(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "seed"}
