"""Warnings while a run goes wrong: each kind once, in plain words, with what to do about it.

Owns which figures of metrics.jsonl mean that a run does not learn, and the remedies. Pure Python on plain values:
rl/rollouts.py makes the figures, and the caller shows the warnings.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from enum import StrEnum
from statistics import fmean, stdev

from utils.tool_calls import ParseStatus

Metrics = Mapping[str, float | None]

MAX_MIXED = 0.02  # share of mixed groups up to which practically every group is tied
MIN_ONE_KIND = 0.95  # share from which tied groups are called all right or all wrong, and picks one index
MIN_DOMINANT = 0.5  # share above which one parse status is what is wrong with a run
MAX_ENTROPY_LEFT = 0.05  # of the first window's
SOLVED_ACCURACY = 0.95
SLOWEST_GAIN = 0.02  # of accuracy, from one window to the next, below which it does not rise
NUM_WINDOWS_AT_CHANCE = 5  # a policy starts at chance, so that alone is no news for as long


class Kind(StrEnum):
    """The kinds of warnings, each of which is given once a run."""

    SOLVED = "solved"
    ALL_WRONG = "all_wrong"
    ALL_TIED = "all_tied"
    NOT_LOOKING = "not_looking"
    UNPARSABLE = "unparsable"
    ENTROPY_COLLAPSE = "entropy_collapse"


PARSE_REMEDIES = {
    ParseStatus.NO_CALL: "the sample tables show what is said instead; start from an instruction-tuned or larger "
    "--model_id, or lower --temperature",
    ParseStatus.MULTIPLE_CALLS: "only exactly one call counts; lower --temperature, or ask for one call in the "
    "prompt_messages() of an environment of your own",
    ParseStatus.EXTRA_TEXT: "pass --allow_reasoning true to accept text before the call; text after it is never "
    "accepted: lower --temperature, or start from a larger --model_id",
    ParseStatus.MALFORMED_JSON: "lower --temperature, or start from a larger --model_id",
    ParseStatus.WRONG_NAME: "the call names none of the tools; if prompt_messages() is an environment's own, let it "
    "show environment.tools, else lower --temperature",
    ParseStatus.BAD_ARGUMENTS: "the arguments are exactly those of the tool's schema; if prompt_messages() is an "
    "environment's own, let it show that, else lower --temperature",
    ParseStatus.TOO_LONG: "a call has at most 4,096 characters; pass --allow_reasoning true if the text comes before "
    "the call, else lower --temperature or --max_completion_length",
}
# these statuses are also what is left of a good call that was cut off
CUT_OFF_STATUSES = frozenset({ParseStatus.NO_CALL, ParseStatus.MALFORMED_JSON})


class Diagnostics:
    """Watches the logged steps of one run.

    | kind             | when                                                                                     |
    |------------------|------------------------------------------------------------------------------------------|
    | solved           | over a window at most 2 % of groups are mixed, and at least 95 % all right                |
    | all_wrong        | the same, and at least 95 % all wrong                                                    |
    | all_tied         | the same, and neither                                                                    |
    | not_looking      | what is right varies, and accuracy is what the same choices earn without looking: over a  |
    |                  | window if 95 % of valid ones are one choice, else over five windows and the last of them |
    | unparsable       | over half a window, more than half of completions have one status, and no fewer lately    |
    | entropy_collapse | a window's mean is under 5 % of the first window's, at an accuracy below 0.95 not rising |

    After a resume, pass it the lines that the run wrote before and drop what it returns: it then knows the first
    window's entropy and the warnings that were given.
    """

    def __init__(self, *, fixed_correct_index: int | None, window: int = 20):
        """fixed_correct_index: the flag. window: logged steps that a warning is based on, 4 or more."""
        if window < 4:
            raise ValueError(f"window={window}, but halves of it are compared, so it needs at least 4 steps; pass 20")
        self.fixed_correct_index = fixed_correct_index
        self.window = window
        self.warnings: dict[Kind, str] = {}
        self._first_lines: list[Metrics] = []
        self._latest_lines: deque[Metrics] = deque(maxlen=NUM_WINDOWS_AT_CHANCE * window)

    def observe(self, metrics: Metrics) -> list[str]:
        """The new warnings after one more logged step; usually none.

        metrics: a line of metrics.jsonl; one without a reward (a step that reuses a generation) is passed over. A
        figure that is missing or None counts in no mean, and a mean needs half a window's figures.
        """
        if "reward" not in metrics:
            return []
        if len(self._first_lines) < self.window:
            self._first_lines.append(metrics)
        self._latest_lines.append(metrics)
        found = self._unparsable(), self._no_signal(), self._not_looking(), self._entropy_collapse()
        new = {kind: text for kind, text in filter(None, found) if kind not in self.warnings}
        self.warnings |= new
        return list(new.values())

    def _latest(self, num_lines: int) -> list[Metrics]:
        """The last lines; none, which have no means, as long as there are fewer."""
        return list(self._latest_lines)[-num_lines:] if len(self._latest_lines) >= num_lines else []

    def _unparsable(self) -> tuple[Kind, str] | None:
        lines = self._latest(self.window // 2)
        older, newer = lines[: len(lines) // 2], lines[len(lines) // 2 :]
        for status, remedy in PARSE_REMEDIES.items():
            name = f"parse/{status}"
            share, before, lately = mean_of(lines, name), mean_of(older, name), mean_of(newer, name)
            # a format that is being learnt needs no help
            if share > MIN_DOMINANT and lately >= before - 0.1:
                is_cut_off = mean_of(lines, "completions/clipped_ratio") > MIN_DOMINANT
                if is_cut_off and status in CUT_OFF_STATUSES:
                    remedy = "most are cut off at their token limit: raise --max_completion_length"
                text = f"{share:.0%} of completions in the last {len(lines)} logged steps are no call, for one reason, "
                return Kind.UNPARSABLE, f"{text}{status}: {remedy}"
        return None

    def _no_signal(self) -> tuple[Kind, str] | None:
        lines = self._latest(self.window)
        mixed, right, wrong = (mean_of(lines, f"groups/{kind}") for kind in ("mixed", "all_right", "all_wrong"))
        if any(map(math.isnan, (mixed, right, wrong))) or mixed > MAX_MIXED:
            return None
        since = f"in the last {len(lines)} logged steps"
        if right >= MIN_ONE_KIND:
            harder = "a higher --candidates_per_episode"
            harder += "" if self.fixed_correct_index is None else ", or --fixed_correct_index none"
            return Kind.SOLVED, (
                f"solved: every rollout was right in {right:.0%} of the groups {since}, so nothing is left to learn; "
                f"stop here, or make the task harder: {harder}"
            )
        if wrong >= MIN_ONE_KIND:
            return Kind.ALL_WRONG, (
                f"every rollout was wrong in {wrong:.0%} of the groups {since}, so none teaches what is right: "
                "look at the sample tables and the parse/<status> rates; then more --num_rollouts, a higher "
                "--temperature, fewer --candidates_per_episode first, --allow_reasoning true, or a larger --model_id"
            )
        return Kind.ALL_TIED, (
            f"the rollouts of a group are all right ({right:.0%}) or all wrong ({wrong:.0%}) {since}, so none teaches "
            "what is right: the policy gives one answer whatever is drawn; raise --temperature or "
            "--num_rollouts, or start again with a lower --learning_rate"
        )

    def _not_looking(self) -> tuple[Kind, str] | None:
        lines = self._latest(self.window)
        rights = [mean_of(lines, f"correct/{choice}") for choice in choices_in(lines)]
        # where one choice is right on purpose, there is nothing to look for
        is_fixed = self.fixed_correct_index is not None and max(rights, default=1.0) == 1.0
        if is_fixed or not is_as_good_as_blind(lines):
            return None
        found = {choice: mean_of(lines, f"chosen/{choice}") for choice in choices_in(lines)}
        shares = {choice: share for choice, share in found.items() if not math.isnan(share)}
        if not shares:
            return None
        choice, valid = max(shares, key=shares.__getitem__), sum(shares.values())
        accuracy = mean_of(lines, "accuracy")
        if shares[choice] >= MIN_ONE_KIND * valid:
            right_share = mean_of(lines, f"correct/{choice}")
            return Kind.NOT_LOOKING, (
                f"the policy does not look: {shares[choice] / valid:.0%} of its choices in the last "
                f"{len(lines)} logged steps are {choice}, right {right_share:.0%} of the time, and accuracy "
                f"{accuracy:.2f} is what that earns; start again with a lower --learning_rate, a higher --temperature "
                "or --beta 0.01"
            )
        all_lines = self._latest(NUM_WINDOWS_AT_CHANCE * self.window)
        if not is_as_good_as_blind(all_lines):
            return None
        return Kind.NOT_LOOKING, (
            f"the policy does not look: for {len(all_lines)} logged steps its accuracy, lately {accuracy:.2f}, is what "
            "the same choices would earn without the images; raise --learning_rate or --per_device_batch_size, lower "
            "--candidates_per_episode, train the vision side too (drop --freeze and --use_lora, or add "
            "--lora_targets language,vision,merger), or start from a larger --model_id"
        )

    def _entropy_collapse(self) -> tuple[Kind, str] | None:
        both = self._latest(2 * self.window)
        before, lines = both[: self.window], both[self.window :]
        first, now = mean_of(self._first_lines, "entropy"), mean_of(lines, "entropy")
        past_accuracy, accuracy = mean_of(before, "accuracy"), mean_of(lines, "accuracy")
        has_fallen = now < MAX_ENTROPY_LEFT * first
        is_stuck = accuracy < SOLVED_ACCURACY and accuracy <= past_accuracy + SLOWEST_GAIN
        if not (has_fallen and is_stuck):
            return None
        return Kind.ENTROPY_COLLAPSE, (
            f"entropy fell to {now / first:.1%} of what it was at first, at an accuracy of {accuracy:.2f} that no "
            "longer rises: the policy has stopped trying other answers; start again with a lower --learning_rate, a "
            "higher --temperature, or --beta 0.01"
        )


def is_as_good_as_blind(lines: Sequence[Metrics]) -> bool:
    """True if accuracy is no more than these choices earn when each ignores what is right.

    A step's choices of i are the share c_i of its rollouts, and i is right in a share q_i of all steps together.
    Blind choices are right in a share of sum(c_i q_i): q_i for one constant choice i, 1/N for even ones among N. (With
    q_i of the step alone, a step of one episode would always look blind.) The steps' excess over that counts if its
    mean is above two standard errors and above 0.01. False, for lack of evidence, if half the picks or more are
    invalid, or half the lines or more lack a figure.
    """
    excesses, valid_shares = [], []
    right = {choice: mean_of(lines, f"correct/{choice}") for choice in choices_in(lines)}
    for line in lines:
        accuracy = _known(line, "accuracy")
        pairs = [(_known(line, f"chosen/{choice}"), q) for choice, q in right.items()]
        pairs = [(c, q) for c, q in pairs if not math.isnan(c * q)]
        if pairs and not math.isnan(accuracy):
            excesses.append(accuracy - sum(c * q for c, q in pairs))
            valid_shares.append(sum(c for c, _ in pairs))
    if len(excesses) <= len(lines) / 2 or fmean(valid_shares) <= 0.5:
        return False
    return fmean(excesses) <= max(0.01, 2 * stdev(excesses) / math.sqrt(len(excesses)))


def mean_of(lines: Sequence[Metrics], name: str) -> float:
    """The mean of one figure over the lines that have it; NaN, for which no comparison holds, if under half have it.

    >>> mean_of([{"accuracy": 0.25}, {"accuracy": None}, {"accuracy": 0.75}], "accuracy")
    0.5
    """
    known = [value for line in lines if not math.isnan(value := _known(line, name))]
    return fmean(known) if known and len(known) >= len(lines) / 2 else math.nan


def choices_in(lines: Sequence[Metrics]) -> list[str]:
    """The choices of the figures chosen/<choice>, each once, in the order in which they appear."""
    prefix = "chosen/"
    names = dict.fromkeys(name for line in lines for name in line if name.startswith(prefix))
    return [name.removeprefix(prefix) for name in names]


def _known(line: Metrics, name: str) -> float:
    """A figure of one line; NaN if it is missing or infinite."""
    value = line.get(name)
    return value if value is not None and math.isfinite(value) else math.nan
