"""Run as ranks by tests/test_distributed.py: greedy completions of every rank's own prompts, as JSON, one file a rank.

Arguments: OUTPUT gather|shards full|lora
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from model_utils import make_lora_config
from tests.helpers import fleet_trainer, rloo_config, toy_model

STOPS_AFTER = (3, 20)  # tokens that the ranks may sample: their decoding ends at different times


def main(argv: Sequence[str]) -> None:
    output, weights, kind = Path(argv[0]), argv[1], argv[2]
    args = rloo_config(output, ds3_gather_for_generation=weights == "gather", generation_kwargs={"do_sample": False})
    torch.manual_seed(0)
    lora = make_lora_config(rank=4) if kind == "lora" else None
    trainer = fleet_trainer(args, peft_config=lora, model=toy_model(), vision_cache_bytes=2**20 if lora else 0)
    # what `train` does before its first step: under ZeRO-3 the weights are sharded from here on
    trainer.model_wrapped = trainer.accelerator.prepare(trainer.model)
    trainer.model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    trainer.deepspeed = trainer.model_wrapped
    assert all(hasattr(parameter, "ds_id") for parameter in trainer.model.parameters()), "ZeRO-3 has the weights"
    rank = trainer.accelerator.process_index
    trainer.generation_config.max_new_tokens = STOPS_AFTER[rank]
    dataset = trainer.train_dataset
    batch = trainer.data_collator([dataset[2 * rank + episode] for episode in (0, 1) for _ in range(4)])
    completions = trainer._draw(batch, trainer._image_features(batch)).completion_ids
    (output / f"rank{rank}.json").write_text(json.dumps(completions), encoding="utf-8")
    trainer.accelerator.wait_for_everyone()
