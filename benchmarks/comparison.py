"""What came of two trainers' steps in turns: their times, ratios and parity, as JSON and as a table for a terminal.

Knows the trainers' stopwatches and first gradients; measures nothing itself.
"""

import argparse
import os
import platform
import statistics
import sys
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from benchmarks import ideal
from fleet.qwen.group_passes import base_qwen
from fleet.run.config import installed_versions

PHASES = ("prepare", "generate", "score", "train", "optimizer")
MODEL_PHASES = ("generate", "score", "train")


def summarize(arguments: argparse.Namespace, fleet: Any, stock: Any) -> dict[str, Any]:
    """The JSON result of a run, without its memory."""
    timed = {"fleet": fleet.stopwatch.steps[1:], "stock": stock.stopwatch.steps[1:]}
    for steps in timed.values():
        for seconds, _ in steps:
            outside = seconds["step"] - sum(seconds[phase] for phase in ("generate", "score", "train", "optimizer"))
            seconds["prepare"] = outside
    names = ("step", *PHASES)
    phases = {name: compare([step[0][name] for step in timed["fleet"]], [step[0][name] for step in timed["stock"]])
              for name in names}  # fmt: skip
    hit_rates = [line["vision_cache/hit_rate"] for line in fleet.state.log_history if "vision_cache/hit_rate" in line]
    work = ideal.Work(arguments, fleet, encoded_share=1 - statistics.mean(hit_rates[1:]) if hit_rates else None)
    # how much of calls is shared is for the policy to say, so arithmetic has no ideal for them
    ideals = {"step": work.step_ratio(), "train": work.train_ratio()} if arguments.completions == "random" else {}
    for name, ratio in ideals.items():
        phases[name] |= {"ideal_ratio": ratio, "share_of_ideal": phases[name]["ratio_median"] / ratio}
    overhead = [1 - sum(step[0][phase] for phase in MODEL_PHASES) / step[0]["step"] for step in timed["fleet"]]
    rollouts = arguments.num_rollouts * arguments.num_episodes
    return {
        "command": " ".join(["python benchmarks/step_time.py", *without_json(sys.argv[1:])]),
        "device": device_name(),
        "platform": platform.machine(),
        "versions": installed_versions(),
        "settings": {name: value for name, value in vars(arguments).items() if name not in ("json", "memory_of")},
        "num_parameters": sum(parameter.numel() for parameter in fleet.model.parameters()),
        "prompt_tokens": work.prompt,
        "vision_cache_hit_rate": statistics.mean(hit_rates[1:]) if hit_rates else None,
        **phases,
        "overhead": {"fleet_share_median": statistics.median(overhead)},
        "rollouts_per_s": {kind: rollouts / phases["step"][f"{kind}_s_median"] for kind in timed},
        "amounts": {kind: dict(steps[-1][1]) for kind, steps in timed.items()},
        "passes": passes(timed, fleet, stock),
        "parity": parity(fleet, stock),
    }


def passes(timed: dict[str, Any], fleet: Any, stock: Any) -> dict[str, Any]:
    """Of the last step: forward passes of the model in generation, and attention calls of one pass of vision."""
    found: dict[str, Any] = {}
    for kind, trainer in (("fleet", fleet), ("stock", stock)):
        prefix = "" if kind == "fleet" else "stock_"
        found[f"{prefix}generation_forwards"] = int(timed[kind][-1][1]["generation_forwards"])
        found[f"{prefix}vision_attention_calls"] = vision_attention_calls(trainer)
    shares = [line["sampling/one_pass"] for line in fleet.state.log_history if "sampling/one_pass" in line]
    # the first generation has no other to go by
    return found | {"one_pass_share": statistics.mean(shares[1:]) if shares[1:] else None}


class AttentionCounter(TorchFunctionMode):
    """Counts the calls of scaled dot-product attention within it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += function is torch.nn.functional.scaled_dot_product_attention
        return function(*args, **(kwargs or {}))


def vision_attention_calls(trainer: Any) -> int:
    """Of one pass of the vision tower over an episode's images."""
    row = trainer.train_dataset[0]
    images = trainer.processing_class.image_processor(row["images"], return_tensors="pt").to(trainer.model.device)
    with torch.no_grad(), AttentionCounter() as counter:
        model = base_qwen(trainer.accelerator.unwrap_model(trainer.model)).model
        model.get_image_features(images["pixel_values"], images["image_grid_thw"])
    return counter.count


def without_json(argv: list[str]) -> list[str]:
    """The command line without the file that it writes, whose place is no part of a result."""
    place = argv.index("--json") if "--json" in argv else len(argv)
    return [word for word in argv[:place] + argv[place + 2 :] if not word.startswith("--json=")]


def compare(fleet_s: list[float], stock_s: list[float]) -> dict[str, Any]:
    """Medians in seconds, and the ratio stock / fleet of each pair: its median, least and greatest."""
    result: dict[str, Any] = {
        "fleet_s_median": statistics.median(fleet_s),
        "stock_s_median": statistics.median(stock_s),
    }
    if min(fleet_s) > 0:
        ratios = [stock / fleet for fleet, stock in zip(fleet_s, stock_s, strict=True)]
        result |= {"ratio_median": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios)}
    return result


def parity(fleet: Any, stock: Any) -> dict[str, float]:
    """How far the first step's log-probabilities and gradients are apart; a gradient relative to its own norm."""
    by_name = fleet.first_gradients, stock.first_gradients
    if by_name[0].keys() != by_name[1].keys():
        raise AssertionError(f"gradients of different parameters: {sorted(by_name[0].keys() ^ by_name[1].keys())[:5]}")
    norms = {name: gradient.norm().item() for name, gradient in by_name[1].items()}
    # a gradient that is zero but for rounding has no direction to compare
    floor = max(1e-6 * max(norms.values()), 1e-30)  # all are zero where the first rewards are tied
    apart = {name: (by_name[0][name] - by_name[1][name]).norm().item() / max(norms[name], floor) for name in norms}
    if fleet.first_logps.keys() != stock.first_logps.keys():
        raise AssertionError("the first steps did not see the same completions")
    differences = [(logps - stock.first_logps[ids]).abs().max().item() for ids, logps in fleet.first_logps.items()]
    return {
        "max_logprob_abs": max(differences),
        "max_grad_rel": max(apart.values()),
        "num_gradients": len(apart),
        "num_gradients_below_floor": sum(norm < floor for norm in norms.values()),
    }


def device_name() -> str:
    """What the measured work runs on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"


def as_table(result: dict[str, Any]) -> str:
    """The result for a terminal."""
    lines = [f"{'phase':<12}{'fleet':>10}{'stock':>10}{'ratio':>8}   spread of the ratio"]
    for name in ("step", *PHASES):
        row = result[name]
        ratios = (
            f"{row['ratio_median']:7.2f}x   {row['ratio_min']:.2f} to {row['ratio_max']:.2f}"
            if "ratio_median" in row
            else "      -"
        )
        lines.append(f"{name:<12}{row['fleet_s_median']:>9.3f}s{row['stock_s_median']:>9.3f}s {ratios}")
    amounts = result["amounts"]
    for unit in ("tokens", "patches"):
        counts = [amounts[kind].get(unit, 0) for kind in ("fleet", "stock")]
        lines.append(f"{unit + ' a step':<16}{counts[0]:>6,.0f}{counts[1]:>10,.0f}")
    counts = result["passes"]
    for unit in ("generation_forwards", "vision_attention_calls"):
        lines.append(f"{unit.replace('_', ' ')}: {counts[unit]:,} against {counts[f'stock_{unit}']:,}")
    if counts["one_pass_share"] is not None:
        lines.append(f"steps that train on the pass they sample in: {counts['one_pass_share']:.0%}")
    for name in ("step", "train") if "ideal_ratio" in result["step"] else ():
        row = result[name]
        lines.append(
            f"ideal by FLOPs, {name}: {row['ideal_ratio']:.2f}x, of which {row['share_of_ideal']:.0%} is reached"
        )
    lines.append(f"Fleet's time outside the model: {result['overhead']['fleet_share_median']:.1%} of its step")
    found = result["parity"]
    lines.append(
        f"parity: log-probabilities within {found['max_logprob_abs']:.1e}, {found['num_gradients']} gradients within "
        f"{found['max_grad_rel']:.1e} of their norm"
    )
    if "two_passes" in result:
        row = result["two_passes"]
        lines.append(f"step in two passes: {row['fleet_s_median']:.3f}s, {row['ratio_median']:.2f}x")
    if "flatness" in result:
        few, many = result["settings"]["flatness"]
        lines.append(f"Fleet's step at {many} rollouts takes {result['flatness']:.2f} times as long as at {few}")
    if "memory" in result:
        mib = {kind: result["memory"][f"{kind}_bytes"] / 2**20 for kind in ("fleet", "stock")}
        lines.append(
            f"memory that the training pass adds at its peak: {mib['fleet']:.0f} MiB against {mib['stock']:.0f} MiB, "
            f"{result['memory']['ratio']:.1f}x"
        )
    return "\n".join(lines)
