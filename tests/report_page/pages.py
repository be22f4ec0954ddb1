"""Runs written by hand for the report's tests, and a visit to a page in a browser. Tells right from wrong itself."""

import json
import random
import shutil
from pathlib import Path

from PIL import Image

from tests import HANG_S

MAX_PAGES = 20  # more than any run here fills
HOSTILE = [
    "<script>window.wasHacked = true</script>",
    '<img src=x onerror="window.wasHacked = true">',
    '</script ><script >window.wasHacked = true</script ><!-- <script > \u2028 "quoted" & done',
]
OUTCOMES = {  # completion, outcome, parse status, index, reward
    "right": ('<tool_call>\n{"name": "pick_image", "arguments": {"index": 1}}\n</tool_call>', "correct", "ok", 1, 1.0),
    "wrong": (
        '<tool_call>\n{"name": "pick_image", "arguments": {"index": 2}}\n</tool_call>',
        "wrong_index",
        "ok",
        2,
        0.05,
    ),
    "far": (
        '<tool_call>{"name": "pick_image", "arguments": {"index": 9}}</tool_call>',
        "index_out_of_range",
        "ok",
        9,
        0.0,
    ),
    "prose": ("I think it is the second one.", "unparsable", "no_call", None, None),
}

# --- a run's folder ---------------------------------------------------------------------------------------------------


def estimate(value: float | None, n: int = 512) -> dict:
    interval = [None, None] if value is None else [max(0.0, value - 0.0312), min(1.0, value + 0.0277)]
    return {"value": value, "ci95": interval, "n": n if value is not None else 0}


def evaluation(step: int | None, accuracy: float) -> dict:
    return {
        "schema_version": 2, "model": "toy", "step": step, "episodes": 512, "seed": 7, "num_samples": 8,
        "prompt_style": "direct", "choices": ["0", "1", "2"],
        "greedy_accuracy": estimate(accuracy),
        "sampled_accuracy": estimate(accuracy - 0.0213),
        "pass_at_k": {"1": estimate(accuracy - 0.02), "4": estimate(accuracy + 0.015)},
        "chance": {"value": 0.3333, "ci95": [0.3333, 0.3333], "n": 512},
        "best_constant_choice": {**estimate(0.3571), "choice": "2"},
        "parse_status": {"ok": estimate(0.99)},
        "outcome": {"correct": estimate(accuracy)},
        "accuracy_by_choice": {"0": estimate(accuracy - 0.01, 170), "1": estimate(None), "2": estimate(0.9)},
        "confusion": [[150 + (step or 0), 11, 7, 2], [0, 0, 0, 0], [9, 8, 155, 0]],
        "controls": {
            "blank_images": estimate(0.3412),
            "swapped_images": estimate(0.9123),
            "permuted_order": estimate(0.3219),
            "redrawn_images": estimate(0.8888),
        },
        "baseline": None,
    }  # fmt: skip


def metrics_line(step: int, share: float) -> dict:
    return {
        "step": step, "loss": 0.0, "reward": share, "accuracy": share, "valid_call": 1.0, "entropy": 0.5 / step,
        "grad_norm": 1.25, "step_time_s": 30.0 if step == 1 else 0.5,
        "outcome/correct": share, "outcome/wrong_index": 1 - share, "parse/ok": 0.75, "parse/no_call": 0.25,
        "parse/too_long": 0.0, "groups/all_right": 0.25, "groups/all_wrong": 0.25, "groups/mixed": 0.5,
        "chosen/0": 0.25, "chosen/1": 0.5,
    }  # fmt: skip


def look_line(step: int, true: float, grey: float, is_blind: bool = False) -> dict:
    return {
        "step": step, "control/true": true, "control/grey": grey, "control/swapped": 0.75, "control/episodes": 32.0,
        "control/swapped_episodes": 16.0, "control/gains_blindly": float(is_blind), "control/seconds": 0.5,
    }  # fmt: skip


def rollout_of(completion: str, outcome: str, status: str, index: int | None, reward: float | None) -> dict:
    components = {"correct": float(outcome == "correct"), "valid_call": float(outcome in ("correct", "wrong_index"))}
    return {
        "completion": completion, "outcome": outcome, "is_right": outcome == "correct",
        "components": {} if index is None else components, "parse_status": status,
        "call": None if index is None else {"name": "pick_image", "arguments": {"index": index}},
        "reward": reward, "advantage": -0.65,
    }  # fmt: skip


def group_line(step: int, number: int, kinds: list[str], images: list[str], text: str = "Pick the red circle.") -> dict:
    rollouts = [rollout_of(*OUTCOMES[kind]) for kind in kinds]
    labels = ["blue square", "red circle", "green triangle"]
    return {
        "step": step, "group": number, "instruction": text, "target": "red circle", "correct_index": 1,
        "labels": labels, "images": images, "choices": ["0", "1", "2"], "solution": "1", "rollouts": rollouts,
    }  # fmt: skip


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def write_thumbnails(folder: Path, count: int, side_px: int = 16) -> list[str]:
    (folder / "thumbnails").mkdir(parents=True)
    rng = random.Random(0)
    names = [f"picture_{number}.webp" for number in range(count)]
    for name in names:
        small = Image.frombytes("RGB", (7, 7), rng.randbytes(147))
        small.resize((side_px, side_px), Image.Resampling.BICUBIC).save(folder / "thumbnails" / name)
    return names


def write_run(folder: Path, num_steps: int = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "options": {"model_id": "toy", "train_steps": 40, "candidates_per_episode": 3, "num_rollouts": 4, "env": None},
        "command": ["training.py", "--output_dir", HOSTILE[1]],
        "commit": None,
        "versions": {"python": HOSTILE[2]},
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_lines(folder / "metrics.jsonl", [metrics_line(step, step / num_steps) for step in range(1, num_steps + 1)])
    return folder


def write_full_run(folder: Path) -> Path:
    """40 steps, three evaluations, a look curve, 13 groups of which one is hostile and one lacks a picture."""
    write_run(folder, num_steps=40)
    steps = [metrics_line(step, step / 40) for step in range(1, 41)]
    curve = [look_line(0, 0.25, 0.28125), look_line(20, 0.625, 0.3125), look_line(40, 0.96875, 0.25)]
    write_lines(folder / "metrics.jsonl", [curve[0], *steps[:20], curve[1], *steps[20:], curve[2]])
    images = write_thumbnails(folder, 6)
    lines = [evaluation(None, 0.5), *(evaluation(step, 0.25 + step / 60) for step in (40, 0, 20))]
    write_lines(folder / "evaluations.jsonl", lines)
    mixes = [["right"] * 4, ["right", "wrong", "wrong", "far"], ["prose", "wrong", "wrong", "wrong"]]
    groups = [
        group_line(step, number, mixes[(step // 10 + number) % 3], images[number : number + 3])
        for step in (1, 20, 40)
        for number in range(4)
    ]
    odd = group_line(30, 0, ["right", "right", "prose"], [images[0], "lost.webp", "../outside.webp"], HOSTILE[2])
    shutil.copyfile(folder / "thumbnails" / images[0], folder / "outside.webp")
    odd["labels"] = [HOSTILE[1], "x" * 90, HOSTILE[0]]
    for rollout, text in zip(odd["rollouts"], HOSTILE, strict=True):
        rollout["completion"] = text
    write_lines(folder / "rollouts.jsonl", [*groups[:8], odd, *groups[8:]])
    return folder


class Visit:
    """An open page, and everything it complained of or asked the network for."""

    def __init__(self, browser, path: Path, **context_options):
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | context_options)
        self.context.set_default_timeout(HANG_S * 1000)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def texts(self, selector: str) -> list[str]:
        return self.page.locator(selector).all_inner_texts()

    def choose(self, outcome: str = "", step: str = "") -> None:
        self.page.locator(f"#outcomes input[value='{outcome}']").check(force=True)
        self.page.locator("#step").select_option(step)

    def walk(self) -> list[dict]:
        """Every group of the current filters, page by page: its heading, place, outcomes and pictures."""
        found = self.page.evaluate(READ_GROUPS)
        for _ in range(MAX_PAGES):
            if self.page.locator("#pager").is_hidden() or self.page.locator("#next").is_disabled():
                return found
            self.page.locator("#next").click()
            found += self.page.evaluate(READ_GROUPS)
        raise AssertionError(f"there is a next page after {MAX_PAGES}")


READ_GROUPS = """async () => {
  for (const image of document.querySelectorAll("#groups img")) { image.scrollIntoView(); await image.decode(); }
  return [...document.querySelectorAll("#groups .group")].map((group) => ({
    place: group.querySelector("header span").textContent,
    outcomes: [...group.querySelectorAll(".rollout")].map((rollout) => rollout.dataset.outcome),
    widths: [...group.querySelectorAll("img")].map((image) => image.naturalWidth),
    placeholders: [...group.querySelectorAll(".placeholder")].map((span) => span.textContent),
  }));
}"""

# what a text stands on: every ancestor's background laid over the one behind it
READ_CONTRASTS = """() => {
  const parse = (colour) => { const n = colour.match(/[\\d.]+/g).map(Number); return [n[0], n[1], n[2], n[3] ?? 1]; };
  const over = (top, below) => [0, 1, 2].map((k) => top[k] * top[3] + below[k] * (1 - top[3]));
  const light = (rgb) => rgb.map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  const luminance = (rgb) => { const [r, g, b] = light(rgb); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = (element) => {
    const chain = [];
    for (let at = element; at; at = at.parentElement) chain.unshift(parse(getComputedStyle(at).backgroundColor));
    return chain.reduce((below, top) => over(top, below), [255, 255, 255]);
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const parent = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    if (!text || !parent.checkVisibility() || ["SCRIPT", "OPTION", "NOSCRIPT"].includes(parent.tagName)) continue;
    const style = getComputedStyle(parent);
    const background = behind(parent);
    const isDrawn = parent instanceof SVGElement;
    const colour = over(parse(isDrawn ? style.fill : style.color), background);
    const [low, high] = [luminance(colour), luminance(background)].sort((a, b) => a - b);
    found.push({ text, isDrawn, ratio: (high + 0.05) / (low + 0.05) });
  }
  return found;
}"""

READ_OVERFLOWS = """() => [...document.querySelectorAll("body *")]
  .filter((element) => !element.closest(".scroll, svg") && element.getBoundingClientRect().right > innerWidth + 0.5)
  .map((element) => element.tagName + "." + element.className)"""
