"""Run as ranks by tests/test_distributed.py: greedy completions of every rank's own prompts, as JSON, one file a rank.

Each batch is sampled token by token, and again with the environment's drafts; how often a layer's weights were
gathered in either generation is written too.

Arguments: OUTPUT gather|shards full|lora
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fleet.known_answers import drafts_on
from fleet.qwen.group_passes import base_qwen
from model_utils import make_lora_config
from tests.helpers import fleet_trainer, rloo_config, toy_model

GATHERED_EACH_TIME = {
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}
STOPS_AFTER = (1, 20)  # tokens that the ranks may sample: their decoding ends at different times


class Gathers:
    """Counts DeepSpeed's gathers of a parameter, each of which is one collective of all ranks."""

    def __init__(self, parameter: Any) -> None:
        self.count, self._parameter, self._gather = 0, parameter, parameter.all_gather_coalesced

    def __call__(self, parameters: Any, *arguments: Any, **settings: Any) -> Any:
        self.count += any(parameter is self._parameter for parameter in parameters)
        return self._gather(parameters, *arguments, **settings)


def main(argv: Sequence[str]) -> None:
    output, weights, kind = Path(argv[0]), argv[1], argv[2]
    args = rloo_config(output, ds3_gather_for_generation=weights == "gather", generation_kwargs={"do_sample": False})
    # as for a model that one device cannot hold: a layer is gathered for each of its passes, and let go
    args.deepspeed_plugin.deepspeed_config["zero_optimization"] |= GATHERED_EACH_TIME
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
    features = trainer._image_features(batch)
    layer = base_qwen(trainer.model).model.language_model.layers[-1]
    gathers = Gathers(layer.mlp.down_proj.weight)
    # DeepSpeed asks the first of the parameters that it gathers together
    for parameter in trainer.model.parameters():
        parameter.all_gather_coalesced = gathers
    guesses, _ = drafts_on(trainer.env, batch["episodes"])
    found, counts = [], []
    for of_episodes in ((), guesses):
        before = gathers.count
        found.append(trainer._draw(batch, features, of_episodes).completion_ids)
        counts.append(gathers.count - before)
    written = {"completions": found[0], "with_drafts": found[1], "gathers": counts}
    (output / f"rank{rank}.json").write_text(json.dumps(written), encoding="utf-8")
    trainer.accelerator.wait_for_everyone()
