"""Run as ranks by tests/test_distributed.py: one step on sampled rollouts of two turns; what was said, and weights.

Tools show pictures in the first two episodes alone, so that of two ranks one has pictures to encode and one has none.
Arguments: OUTPUT EPISODES_PER_DEVICE full|lora
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dataset import RepeatableEpisodeDataset
from environment import Episode, ToolCall, Verdict
from fleet.toy.model import TOY_DATA_ROOT, TOY_IMAGE_PIXELS
from fleet.verdicts import Observation
from model_utils import make_lora_config
from tests import length_reward
from tests.distributed_generation import GATHERED_EACH_TIME
from tests.helpers import fleet_trainer, rloo_config, toy_model
from tests.turning_env import LookAgainEnv


class EarlyPictures(LookAgainEnv):
    def episode(self, index: int) -> Episode:
        return replace(super().episode(index), answer={"has_pictures": index < 2})

    def respond(self, episode: Episode, turns: Sequence[ToolCall]) -> Observation | Verdict:
        answer = super().respond(episode, turns)
        if isinstance(answer, Verdict):
            return answer
        return Observation(answer.text, episode.images[:1] if episode.answer["has_pictures"] else ())


def main(argv: Sequence[str]) -> None:
    output, episodes, kind = Path(argv[0]), int(argv[1]), argv[2]
    args = rloo_config(
        output,
        per_device_train_batch_size=4 * episodes,
        optim="sgd",
        learning_rate=0.01,
        max_steps=1,
        ds3_gather_for_generation=False,
    )
    if args.deepspeed_plugin is not None:
        args.deepspeed_plugin.deepspeed_config["zero_optimization"] |= GATHERED_EACH_TIME
    torch.manual_seed(0)
    trainer = fleet_trainer(
        args,
        peft_config=make_lora_config(rank=4) if kind == "lora" else None,
        model=toy_model(),
        vision_cache_bytes=2**20 if kind == "lora" else 0,
        dataset=RepeatableEpisodeDataset(EarlyPictures(TOY_DATA_ROOT, 4, 0), TOY_IMAGE_PIXELS),
        reward_function=length_reward.score,
        max_turns=2,
    )
    trainer.train()
    trainer.save_model(str(output / "final"))
    if trainer.is_world_process_zero():
        said = [[record.conversation, record.token_ids, record.reward] for record in trainer.latest_rollouts]
        (output / "said.json").write_text(json.dumps(said), encoding="utf-8")
