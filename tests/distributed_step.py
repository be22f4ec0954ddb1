"""Run as ranks by tests/test_distributed.py: two steps on fixed completions, and the weights that came of them.

Arguments: OUTPUT EPISODES_PER_DEVICE KIND packed|unpacked
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from dataset import RepeatableEpisodeDataset
from environment import Episode, PickImageEnv
from fleet.qwen.group_passes import base_qwen
from fleet.rl.drawing import Drawn
from fleet.rl.trainer import FleetRLOOTrainer
from fleet.toy.model import TOY_DATA_ROOT, TOY_IMAGE_PIXELS
from model_utils import make_lora_config
from tests.helpers import fleet_trainer, rloo_config, toy_model, toy_processor
from utils.tool_calls import make_tool_call_str

ANSWERS = [make_tool_call_str(0), "no call", make_tool_call_str(2), make_tool_call_str(1) + " and more of it"]

# what trains: parts that are frozen, or targets of LoRA, whose runs recompute activations
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": {"targets": ["language"]},
    "frozen-tower": {"freeze": ["tower"]},
    "frozen-language-model": {"freeze": ["language_model"]},
    "lora-everywhere": {"targets": ["language", "vision", "merger"]},
}


class HalfRepeatingEnv(PickImageEnv):
    """The first two episodes of every four are always the same ones: of two ranks, one soon knows all its pictures."""

    def episode(self, index: int) -> Episode:
        return super().episode(index % 4 if index % 4 < 2 else index)


class FixedFleetTrainer(FleetRLOOTrainer):
    """Answers by the pictures shown, so that an episode gets the same completions on whatever device it is."""

    unknown_images: list[int] = []

    def _image_features(self, batch: Any) -> Any:
        if self.vision_cache is not None:
            self.unknown_images = [*self.unknown_images, len(self.vision_cache.unknown_places(batch["image_digests"]))]
        return super()._image_features(batch)

    def _draw(self, batch: Any, features: Any, guesses: Any = (), answers: Any = None) -> Drawn:
        tokenizer = toy_processor().tokenizer
        numbers = [sum(map(len, episode.labels)) for episode in batch["episodes"]]
        completions = [
            tokenizer(ANSWERS[(number + rollout * (1 + number % 2)) % 4] + "<|im_end|>")["input_ids"]
            for number in numbers
            for rollout in range(batch["group_size"])
        ]
        return Drawn(completions)


def main(argv: Sequence[str]) -> None:
    output, episodes, kind, rows = Path(argv[0]), int(argv[1]), argv[2], argv[3]
    freeze, targets = KINDS[kind].get("freeze", ()), KINDS[kind].get("targets")
    # the arguments come first: they start ZeRO-3, under which the model must load
    args = rloo_config(
        output,
        per_device_train_batch_size=4 * episodes,
        optim="sgd",
        learning_rate=0.01,
        beta=0.05,
        gradient_checkpointing=targets is not None,
    )
    torch.manual_seed(0)
    trainer = fleet_trainer(
        args,
        FixedFleetTrainer,
        peft_config=make_lora_config(rank=4, targets=targets) if targets else None,
        model=toy_model(freeze=freeze),
        shared_prefix=rows == "packed",
        vision_cache_bytes=2**20 if kind == "lora" else 0,
        dataset=RepeatableEpisodeDataset(HalfRepeatingEnv(TOY_DATA_ROOT, 4, 0), TOY_IMAGE_PIXELS),
    )
    encoder_passes: list[int] = []
    visual = base_qwen(trainer.accelerator.unwrap_model(trainer.model)).model.visual
    visual.register_forward_hook(lambda module, args, output: encoder_passes.append(trainer.state.global_step))
    trainer.train()
    assert trainer._rollouts is not None and trainer._rollouts.sampled.is_packed == (rows == "packed")
    trainer.save_model(str(output / "final"))
    unknown, passes = gather_object([trainer.unknown_images]), gather_object([encoder_passes])
    if len(unknown) == 2 and kind == "lora":
        assert unknown[0][1] == 0 < unknown[1][1], f"wanted one rank alone to encode: {unknown}"
        most = [max(of_ranks) for of_ranks in zip(*unknown, strict=True)]
        assert passes == [[0] * most[0] + [1] * most[1]] * 2, f"wanted as many passes on either rank: {passes}, {most}"
    if trainer.is_world_process_zero():
        lines = [line for line in trainer.state.log_history if "reward" in line]
        figures = [str(line[name]) for name in ("grad_norm", "reward", "kl", "entropy") for line in lines]
        (output / "figures.txt").write_text(" ".join(figures), encoding="utf-8")
