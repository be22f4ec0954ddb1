"""The README.md of an exported model: front matter for the hub, and how the model was made, in Markdown.

Says what was measured with its interval, and names what was not. Owns the words alone: records.py reads the run.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from fleet.command.data_sets import HUB
from fleet.command.flags import TOY_MODEL_ID
from fleet.controls import CONTROL_MEANINGS
from fleet.evaluation.figures import percent_at
from fleet.export.records import Curve, Data, without_places
from fleet.export.trained_model import Kind
from fleet.run_folder import CURVE_NAME
from utils.plain_text import printable

TAGS = ("fleet", "rloo", "reinforcement-learning", "tool-use", "qwen2_5_vl")
NOT_MEASURED = (
    "any other task: what the base model could do may have been lost, and nothing here tests it",
    "other pictures, questions, numbers of pictures and picture sizes than those of this task",
    "safety, bias, and prompts that are written to mislead",
    "quantized weights, and other software than the versions below",
)


@dataclass(frozen=True)
class CardFacts:
    """All that a card says. config: the run's, as it is published; empty for a model from elsewhere.

    origin: the model that training began with. weights: one sentence a fact on how the exported weights were made.
    """

    name: str
    origin: str
    kind: Kind
    step: int | None
    config: Mapping[str, Any]
    data: Data
    curve: Curve | None
    has_curve_image: bool
    evaluations: Sequence[Mapping[str, Any]]
    weights: Sequence[str]
    versions: Mapping[str, str]

    @property
    def options(self) -> Mapping[str, Any]:
        """The resolved flags of the run; empty for a model from elsewhere."""
        return self.config.get("options", {})


def model_card(facts: CardFacts) -> str:
    """The whole text."""
    front = yaml.safe_dump(_front_matter(facts), sort_keys=False, allow_unicode=True)
    parts = [_opening(facts), _use(facts), _training(facts), _curve(facts), _evaluation(facts), _not_measured(facts),
             _weights(facts), _versions(facts)]  # fmt: skip
    return f"---\n{front}---\n\n" + "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(facts: CardFacts) -> dict[str, Any]:
    front: dict[str, Any] = {}
    if _is_hub_id(facts.origin):
        front |= {"base_model": facts.origin, "base_model_relation": "finetune"}
    front |= {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": list(TAGS)}
    data_root = str(facts.options.get("data_root", ""))
    if data_root.startswith(HUB):
        front["datasets"] = [data_root.removeprefix(HUB)]
    return front


def _is_hub_id(model_id: str) -> bool:
    return model_id.count("/") == 1 and not model_id.startswith(".")


def _opening(facts: CardFacts) -> str:
    began = "its built-in toy model" if facts.origin == TOY_MODEL_ID else f"`{printable(facts.origin)}`"
    if not facts.config:
        return (
            f"# {printable(facts.name)}\n\nA Qwen2.5-VL, exported by Fleet from {facts.kind} that no run of Fleet "
            f"left, and that began with {began}. How it was trained is not known here."
        )
    step = "" if facts.step is None else f" for {facts.step} optimizer steps"
    return (
        f"# {printable(facts.name)}\n\nA Qwen2.5-VL that answers with a tool call. Fleet trained {began} by "
        f"reinforcement learning (RLOO, arXiv 2402.14740){step}. The licence of the model it began with applies."
    )


def _use(facts: CardFacts) -> str:
    budget = facts.options.get("image_max_pixels")
    lines = [
        "## Use",
        "```python\nfrom transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
        'model = AutoModelForImageTextToText.from_pretrained(FOLDER, dtype="auto")\n'
        f"processor = AutoProcessor.from_pretrained(FOLDER{f', max_pixels={budget}' if budget else ''})\n```",
    ]
    if budget:
        lines.append(
            f"It was trained on pictures of at most **{budget:,} pixels** (width times height), to which Fleet shrinks "
            "them. `preprocessor_config.json` keeps the limit of the model it began with, as a second limit would "
            f"change pictures that are shrunk already. So give other software the budget: `max_pixels={budget}` as "
            f"above, or `vllm serve FOLDER --mm-processor-kwargs '{{\"max_pixels\": {budget}}}'`."
        )
    lines.append(
        "The system prompt of training describes the tools, so use the same one: `python -m fleet.ask --model_id "
        "FOLDER` writes it, and `python evaluate.py --model_id FOLDER` scores the model on held-out episodes."
    )
    return "\n\n".join(lines)


def _training(facts: CardFacts) -> str:
    if not facts.config:
        return ""
    options, data = facts.options, facts.data
    if options.get("env"):
        task = f"the environment `{printable(options['env'])}`"
        if options.get("env_args"):
            task += f" with `{printable(options['env_args'])}`"
    else:
        right = options.get("fixed_correct_index")
        asked = "one is drawn and named" if right is None else f"always the one at index {right}"
        task = f"picking one of {options.get('candidates_per_episode')} pictures by its index; {asked}"
    counted = [f"{number:,} {what}" for number, what in ((data.num_images, "images"), (data.num_labels, "labels"))
               if number is not None]  # fmt: skip
    call, right_call = (options.get(name) for name in ("reward_valid_call", "reward_correct"))
    reward = options.get("reward") or f"{call} for a call in range, and {right_call} more if it is right"
    rows = [
        ("task", task),
        ("data", f"`{printable(options.get('data_root'))}`: {', '.join(counted) or 'not counted'}"),
        ("reward", printable(reward)),
        ("turns", f"at most {options.get('max_turns')}"),
        ("trained", "an adapter (LoRA), merged here" if facts.kind is Kind.ADAPTER else "all weights but frozen ones"),
        ("episodes", f"{facts.config.get('num_episodes')}, {options.get('num_rollouts')} rollouts each; processes: "
                     f"{facts.config.get('num_processes')}"),
    ]  # fmt: skip
    flags = [f"| `{name}` | {_in_a_cell(value)} |" for name, value in options.items() if value is not None]
    return "\n".join(
        [
            "## Training\n",
            *_table(("", ""), rows),
            "\n<details><summary>All flags</summary>\n",
            "| flag | value |\n|---|---|",
            *flags,
            "\n</details>",
        ]
    )


def _curve(facts: CardFacts) -> str:
    if facts.curve is None:
        return ""
    window = f"{facts.curve.num_steps} logged steps" if facts.curve.num_steps > 1 else "logged step"
    rows = [(f"mean {one.name}", f"{one.first:.3f}", f"{one.last:.3f}") for one in facts.curve.figures]
    text = "## Curve\n\n" + "\n".join(_table(("in training", f"first {window}", f"last {window}"), rows))
    if facts.has_curve_image:
        text += f"\n\n![reward and accuracy over steps]({CURVE_NAME})"
        text += f"\n\nThese weights are of step {facts.curve.last_step}. The picture shows the whole run."
    return text + "\n\nThese are figures of sampled answers on training episodes, without intervals."


def _evaluation(facts: CardFacts) -> str:
    if not facts.config:
        return ""
    if not facts.evaluations:
        return (
            "## Held-out evaluation\n\nNone. `python evaluate.py --model_id FOLDER --output evaluation.json` makes one."
        )
    text = "## Held-out evaluation\n\n" + "\n\n".join(map(_one_evaluation, facts.evaluations))
    if facts.options.get("keep_best") and any(document.get("step") is not None for document in facts.evaluations):
        text += "\n\nThe run chose its best checkpoint by its own evaluations, so that one's figure flatters."
    return text


def _one_evaluation(document: Mapping[str, Any]) -> str:
    by = "the run itself" if document.get("step") is not None else "`evaluate.py`"
    baseline = document.get("baseline")
    columns = [document] if baseline is None else [document, baseline]
    keys: list[tuple[str, tuple[str, ...], str]] = [("greedy accuracy", ("greedy_accuracy",), "")]
    keys += [("sampled accuracy", ("sampled_accuracy",), f"{document.get('num_samples')} samples an episode")]
    keys += [(f"pass@{k}", ("pass_at_k", k), "") for k in document.get("pass_at_k") or ()]
    keys += [("chance", ("chance",), ""), ("best constant choice", ("best_constant_choice",), "")]
    keys += [(str(control).replace("_", " "), ("controls", str(control)), meaning)
             for control, meaning in CONTROL_MEANINGS.items()]  # fmt: skip
    names = ["this model"] + [printable(without_places(str(column["model"]))) for column in columns[1:]]
    rows = []
    for name, path, meaning in keys:
        figures = [percent_at(column, *path) for column in columns]
        if figures[0] != "-":
            rows.append((name, *figures, meaning))
    text = (
        f"By {by}, on {document.get('episodes')} held-out episodes of seed {document.get('seed')}, with 95 % "
        f"intervals. Episodes like those of training were left out ({document.get('passed_over')}).\n\n"
        + "\n".join(_table(("", *names, ""), rows))
    )
    difference = baseline.get("difference") if baseline else None
    if difference:
        low, high = difference["ci95"]
        text += (
            f"\n\nOn the same episodes it is right {100 * difference['value']:+.1f} points ({100 * low:+.1f} to "
            f"{100 * high:+.1f}) oftener than {names[1]}."
        )
    return text


def _not_measured(facts: CardFacts) -> str:
    found = list(NOT_MEASURED)
    if not facts.evaluations:
        found.insert(0, "held-out accuracy of these weights")
    elif not any(document.get("baseline") for document in facts.evaluations):
        found.insert(0, "the model it began with, on the same episodes")
    return "## Not measured\n\n" + "\n".join(f"- {line}" for line in found)


def _weights(facts: CardFacts) -> str:
    return "## Weights\n\n" + "\n".join(f"- {line}" for line in facts.weights)


def _versions(facts: CardFacts) -> str:
    versions = facts.config.get("versions") or facts.versions
    commit = f"commit `{facts.config['commit']}` of Fleet, " if facts.config.get("commit") else ""
    trained = ", ".join(f"{name} {number}" for name, number in versions.items())
    exported = ", ".join(f"{name} {number}" for name, number in facts.versions.items() if versions.get(name) != number)
    ended = f"Exported with other versions: {exported}." if exported else "Exported with the same versions."
    made = f"Trained with {commit}{trained}. {ended}" if facts.config else f"Exported with {trained}."
    return f"## Versions\n\n{made} `config.json` is transformers 5's; an older one does not read its rotary positions."


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]


def _in_a_cell(value: Any) -> str:
    return f"`{printable(value)}`".replace("|", "\\|")
