"""The checks of an environment's answers: its solution, verdicts, choices, drafts, chance, controls, and exploits.

environment_checks.py checks what is shown and asked, and calls these for each episode. Imports no torch.
"""

import inspect
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fleet.episodes import BrokenEpisode, Episode, EpisodeSource, asked, shown
from fleet.known_answers import chance_of, choices_of, solution_of
from fleet.own_code.control_checks import check_controls
from fleet.own_code.environment_trial import comparable_fields, require_same
from fleet.own_code.findings import Kind, Ledger, is_raised, root_of
from fleet.own_code.probes import edge_calls, exploits, is_taken
from fleet.verdicts import Observation, Verdict, verdict_on, verdict_on_call
from reward import reward_of
from utils.images import BadImage
from utils.plain_text import NotPlainText, require_plain_text
from utils.tool_calls import ToolCall, make_call_str, parse_call_str
from utils.tool_schemas import refusal_of

MAX_OTHERS, NUM_EXPLOITED = 8, 4
LEAST_BLIND = 16  # episodes: in fewer, one call may be right in all by luck
CHARS_A_TOKEN = 3  # fewer than a tokenizer takes of JSON, so that the estimate is high
EPSILON = 1e-9
LEAVE_IT = "change no episode: make a copy"


@dataclass
class AnswerChecks:
    """The checks of the answers to an environment's episodes, and what was seen on the way.

    tools: as the environment had them first. rights: by the text of a call, in how many episodes it was right, and
    asked. max_tokens: that a completion has by default.
    """

    env: EpisodeSource
    ledger: Ledger
    tools: Sequence[Any]
    literals: frozenset[str]
    allow_reasoning: bool = False
    max_tokens: int = 64
    rights: Counter[str] = field(default_factory=Counter)
    asked: Counter[str] = field(default_factory=Counter)
    golds: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    right_outcomes: dict[str, bool] = field(default_factory=dict)
    num_exploited: int = 0
    num_checked: int = 0

    def gold(self, index: int, episode: Episode) -> ToolCall | None:
        """The gold answer to an episode; None, and a finding, for one that is no answer."""
        try:
            gold = solution_of(self.env, episode)
        except (BrokenEpisode, BadImage, OSError) as error:
            has_literal = isinstance(root_of(error), NotPlainText)
            kind = Kind.LITERAL if has_literal else self._kind_of_solution(episode, error)
            self.ledger.add(kind, f"episode {index}: {error}")
            return None
        text = json.dumps(dict(gold.arguments), ensure_ascii=False)
        with self.ledger.catching(Kind.LITERAL):
            require_plain_text(text, f"episode {index}: its gold answer", self.literals)
        return gold

    def check(self, index: int, episode: Episode, others: Sequence[ToolCall]) -> None:
        """Everything about the answers to one episode. others: gold answers to other episodes."""
        before = comparable_fields(episode)
        gold = self.gold(index, episode)
        if gold is None or not self._is_unchanged(index, episode, before, "solution"):
            return
        self.num_checked += 1
        self.golds[make_call_str(gold)] += 1
        if self.gold(index, episode) != gold:
            self.ledger.add(
                Kind.SOLUTION_IMPURE,
                f"episode {index}: its solution is {gold}, and another call when asked again; derive it from the "
                "episode alone",
            )
        choices = self._choices(index, episode, gold)
        self._require_drafts(index, episode)
        with self.ledger.catching(Kind.CHANCE, where=f"episode {index}: "):
            chance_of(self.env, episode)
        if not self._is_unchanged(index, episode, before, "choices, drafts or chance"):
            return
        probed = [*choices, *others[:MAX_OTHERS], *edge_calls(self.tools, gold)]
        is_right = self._judge(index, episode, gold, probed, before)
        if not self._is_unchanged(index, episode, before, "respond"):
            return
        other = next((call for call in choices if call != gold), None)
        calls = [gold] if other is None else [gold, other]
        check_controls(self.env, self.ledger, index, episode, calls, is_right=is_right)
        self._is_unchanged(index, episode, before, "edited")
        if len(text := make_call_str(gold)) / CHARS_A_TOKEN > self.max_tokens:
            self.ledger.add(
                Kind.LONG_CALL,
                f"episode {index}: its gold call has {len(text)} characters, about {len(text) // CHARS_A_TOKEN} "
                f"tokens, but a completion has {self.max_tokens} by default; raise --max_completion_length",
            )

    def verdict(self, name: str, episode: Episode, call: ToolCall) -> Verdict | None:
        """The verdict on a call; None, and a finding, where there is none. name: of the episode."""
        try:
            verdict = verdict_on_call(self.env, episode, call)
        except (BrokenEpisode, BadImage, OSError) as error:
            self.ledger.add(self._kind_of_verdict(episode, call, error), f"{name}: {error}")
            return None
        self.outcomes[str(verdict.outcome)] += 1
        if self.right_outcomes.setdefault(str(verdict.outcome), verdict.is_right) != verdict.is_right:
            self.ledger.add(
                Kind.OUTCOME_UNCLEAR,
                f"{name}: the call {call} ends as {verdict.outcome} and is {'right' if verdict.is_right else 'wrong'}, "
                "where another was not; give right answers outcomes of their own",
            )
        return verdict

    def best_blind_share(self) -> float:
        """The share of episodes in which the best call of those tried in each is right."""
        counts = [count for text, count in self.rights.items() if self.asked[text] == self.num_checked]
        return max(counts, default=0) / max(self.num_checked, 1)

    def conclude(self) -> None:
        """The findings about calls that were right in every episode."""
        blind = [text for text, count in self.rights.items() if count == self.asked[text] == self.num_checked]
        if blind and len(self.golds) > 1 and self.num_checked >= LEAST_BLIND and not self.ledger.has(Kind.ALL_RIGHT):
            self.ledger.add(
                Kind.BLIND_CALL,
                f"the call {blind[0].splitlines()[1]} is right in each of {self.num_checked} episodes, though their "
                "gold answers differ; make respond() stricter, so that only looking pays",
            )

    def _judge(
        self, index: int, episode: Episode, gold: ToolCall, probed: Sequence[ToolCall], before: dict[str, Any]
    ) -> bool:
        """Findings about the verdicts on calls. True if the gold answer's is right, and the same when asked again."""
        calls = {make_call_str(call): call for call in (gold, *probed) if is_taken(call, self.tools)}
        name = f"episode {index}"
        verdicts = {text: self.verdict(name, episode, call) for text, call in calls.items()}
        # a changed episode would be judged otherwise for that reason alone
        is_same = comparable_fields(episode) == before
        for text, call in reversed(calls.items()) if is_same else ():
            if verdicts[text] is not None and (now := self.verdict(name, episode, call)) != verdicts[text]:
                outcome = None if now is None else now.outcome
                self.ledger.add(
                    Kind.RESPOND_IMPURE,
                    f"{name}: the verdict on {call} was {_words(verdicts[text])}, then {_words(now) or outcome}; "
                    "derive it from the episode and the call alone",
                )
                return False
        right = verdicts.pop(make_call_str(gold))
        others = {text: verdict for text, verdict in verdicts.items() if verdict is not None}
        for text, verdict in others.items():
            self.asked[text] += 1
            self.rights[text] += verdict.is_right
        if right is None:
            return False
        self.asked[make_call_str(gold)] += 1
        self.rights[make_call_str(gold)] += right.is_right
        self._compare(index, episode, gold, right, {text: (calls[text], verdicts[text]) for text in others})
        return right.is_right

    def _compare(self, index: int, episode: Episode, gold: ToolCall, right: Verdict, others: dict[str, Any]) -> None:
        """Findings about the gold answer's verdict, and those on the other calls."""
        if not right.is_right:
            self.ledger.add(
                Kind.GOLD_WRONG,
                f"episode {index}: its solution, {gold}, is judged {right.outcome}, which is not right; correct "
                "solution() or respond()",
            )
            return
        earned = {text: reward_of(verdict) for text, (_, verdict) in others.items()}
        best = max(earned, key=lambda text: earned[text], default=None)
        worst = min(earned, key=lambda text: earned[text], default=None)
        if others and all(verdict.is_right for _, verdict in others.values()):
            self.ledger.add(
                Kind.ALL_RIGHT,
                f"episode {index}: every one of {len(others)} other calls is right, as {next(iter(others.values()))[0]}"
                ", so nothing can be learnt; correct respond()",
            )
        if best is not None and earned[best] > reward_of(right) + EPSILON:
            self.ledger.add(
                Kind.GOLD_NOT_BEST,
                f"episode {index}: its solution, {gold}, earns {reward_of(right):g}, but {others[best][0]} earns "
                f"{earned[best]:g}; return the best call, or correct the components",
            )
        if worst is not None and earned[worst] < 0:
            self.ledger.add(
                Kind.NEGATIVE_REWARD,
                f"episode {index}: the call {others[worst][0]} earns {earned[worst]:g}, less than the 0 of a "
                "completion without a call, so a policy may learn to call nothing; keep the components at 0 or above",
            )
        if reward_of(right) <= 0:
            self.ledger.add(
                Kind.GOLD_EARNS_NOTHING,
                f"episode {index}: its gold answer earns {reward_of(right):g}, no more than the 0 of a completion "
                "without a call; give a right answer a component above 0",
            )
        elif self.num_exploited < NUM_EXPLOITED:
            self.num_exploited += 1
            self._exploit(index, episode, gold, reward_of(right), [call for call, _ in others.values()])

    def _exploit(self, index: int, episode: Episode, gold: ToolCall, reward: float, others: Sequence[ToolCall]) -> None:
        tricks = exploits(gold, others, self.tools, allow_reasoning=self.allow_reasoning)
        for trick, completion in tricks.items():
            with self.ledger.catching(Kind.RESPOND_RAISES, where=f"episode {index}: "):
                verdict = verdict_on(self.env, episode, completion, allow_reasoning=self.allow_reasoning)
                if verdict.is_right or reward_of(verdict) >= reward - EPSILON:
                    self.ledger.add(
                        Kind.EXPLOIT,
                        f"episode {index}: {trick}: {shown(completion)} is judged {_words(verdict)} and earns "
                        f"{reward_of(verdict):g}, but wanted wrong and less than the gold answer's {reward:g}; make "
                        "respond() or the schema stricter",
                        trick.partition(" (")[0],
                    )

    def _choices(self, index: int, episode: Episode, gold: ToolCall) -> list[ToolCall]:
        """The calls to choose from; none, and a finding, where they are unfit."""
        with self.ledger.catching(Kind.CHOICES, where=f"episode {index}: "):
            words = choices_of(self.env, episode)
            choices = asked(lambda: self.env.choices(episode), list, "the choices", "choices")
            if twice := [word for word in words if words.count(word) > 1]:
                self.ledger.add(
                    Kind.CHOICES_ALIKE,
                    f"episode {index}: two of its choices are named {twice[0]}, and figures count them as one; give "
                    "each call once, each with arguments of its own",
                )
            elif words and str(gold) not in words:
                self.ledger.add(
                    Kind.CHOICES_WITHOUT_SOLUTION,
                    f"episode {index}: its solution, {gold}, is not among its choices, {', '.join(words)[:200]}; add "
                    "it to choices()",
                )
            return choices
        return []

    def _require_drafts(self, index: int, episode: Episode) -> None:
        def check(given: Any) -> None:
            for draft in given if not isinstance(given, str) else [given]:
                if not isinstance(draft, str):
                    raise BrokenEpisode(f"one is {shown(draft)}, but wanted a completion's text; return texts")
                status = parse_call_str(draft, self.tools, allow_reasoning=self.allow_reasoning).status
                if status != "ok":
                    raise BrokenEpisode(
                        f"{shown(draft)} is refused as {status}, but wanted completions that are worth guessing; "
                        "write them with make_call_str"
                    )

        with self.ledger.catching(Kind.DRAFTS, where=f"episode {index}: "):
            asked(lambda: self.env.drafts(episode), check, "the drafts", "drafts")

    def _is_unchanged(self, index: int, episode: Episode, before: dict[str, Any], methods: str) -> bool:
        with self.ledger.catching(Kind.EPISODE_CHANGED):
            require_same(index, before, comparable_fields(episode), f"given to {methods}", LEAVE_IT)
            return True
        return False

    def _kind_of_solution(self, episode: Episode, error: Exception) -> Kind:
        if not isinstance(error, BrokenEpisode) or is_raised(error):
            return Kind.SOLUTION_RAISES
        given = _given(lambda: self.env.solution(episode, ()))
        names = [tool["name"] for tool in self.tools]
        if not isinstance(given, ToolCall) or given.name not in names:
            return Kind.SOLUTION_UNFIT
        try:
            fits = refusal_of(self.tools, given.name, json.loads(make_call_str(given).split("\n")[1])["arguments"])
        except (TypeError, ValueError):
            return Kind.SOLUTION_UNFIT
        return Kind.SOLUTION_TEXT if fits is None else Kind.SOLUTION_UNFIT

    def _kind_of_verdict(self, episode: Episode, call: ToolCall, error: Exception) -> Kind:
        if not isinstance(error, BrokenEpisode) or is_raised(error):
            return Kind.RESPOND_RAISES
        given = _given(lambda: self.env.respond(episode, (call,)))
        if isinstance(given, Observation):
            return Kind.OBSERVATION
        if not isinstance(given, Verdict):
            return Kind.NO_VERDICT
        return Kind.VERDICT_VALUE if given.outcome in list(self.env.outcomes) else Kind.UNKNOWN_OUTCOME


def _given(ask: Callable[[], Any]) -> Any:
    """The value as the environment's code gives it, to see its kind; None where it gives none this time."""
    try:
        given = ask()
    except (Exception, SystemExit):
        return None
    if inspect.iscoroutine(given):
        given.close()  # Python would warn that it was never awaited
    return given


def _words(verdict: Verdict | None) -> str:
    return "" if verdict is None else f"{verdict.outcome} ({'right' if verdict.is_right else 'wrong'})"
