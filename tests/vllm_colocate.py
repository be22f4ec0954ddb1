"""Run by tests/test_vllm.py: trains with a real colocated vLLM, then asks the same vLLM what happens without each care.

Arguments: RESULTS.json, then flags of training.py.
"""

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from fleet.errors import RunRefused
from fleet.qwen.group_passes import base_qwen
from fleet.rl import vllm_sampling
from fleet.rl.vllm_sampling import VLLMSampler
from tests.vllm_on_cpu import adapt_colocated, run_training


def main(results: Path, argv: list[str]) -> None:
    adapt_colocated()
    trainers: list[Any] = []
    code = run_training(argv, trainers.append)
    (trainer,) = trainers
    trainer.model.eval()
    batch = trainer.data_collator([trainer.train_dataset[0]] * trainer.num_generations)
    found = {
        "exit_code": code,
        "room": trainer.vllm_generation.llm.model_config.max_model_len,
        "guard": expanded_prompt(trainer, batch),
        "media_drawn": media_drawn(trainer),
        **gaps_after_vision_changed(trainer, batch),
    }
    results.write_text(json.dumps(found))


def expanded_prompt(trainer: Any, batch: Any) -> str:
    """What the guard says of a prompt whose placeholders reach vLLM expanded, as TRL hands them on."""
    sampler = VLLMSampler(trainer.vllm_generation, trainer.processing_class, max_gap=0.1)
    with patch.object(vllm_sampling, "collapse_runs", lambda ids, token: list(ids)):
        try:
            sampler.sample(batch, trainer.state.global_step)
        except RunRefused as error:
            return str(error)
    return "nothing"


def media_drawn(trainer: Any) -> dict[str, int]:
    """How many media tokens are drawn of 64 x 16 with the trainer's bias, and with a pull towards them instead."""
    media = {trainer.model.config.image_token_id, trainer.model.config.video_token_id}
    generation, drawn = trainer.vllm_generation, {}
    kwargs = generation.generation_kwargs
    for name, bias in (("banned", kwargs["logit_bias"]), ("pulled", dict.fromkeys(media, 9.0))):
        generation.generation_kwargs = kwargs | {"logit_bias": bias, "ignore_eos": True}
        _, completions, *_ = generation.generate([[5, 6, 7, 8]] * 64, None, 1)
        drawn[name] = sum(token in media for row in completions for token in row)
    generation.generation_kwargs = kwargs
    return drawn


def gaps_after_vision_changed(trainer: Any, batch: Any) -> dict[str, float]:
    """The mean gap after the vision tower changed: synchronized by TRL alone, and with the encoder's cache reset."""
    with torch.no_grad():
        for parameter in base_qwen(trainer.model).model.visual.parameters():
            parameter.mul_(1.5)
    trainer.vllm_generation.sync_weights()
    stale = mean_gap(trainer, batch)
    trainer.vllm_generation.llm.llm_engine.reset_encoder_cache()
    trainer.vllm_generation.llm.reset_prefix_cache()
    return {"stale_gap": stale, "fresh_gap": mean_gap(trainer, batch)}


def mean_gap(trainer: Any, batch: Any) -> float:
    completions, logps = trainer.vllm.sample(batch, trainer.vllm._synced_step)
    return gap_to_a_plain_row(trainer, batch, completions[0], logps[0])


@torch.no_grad()
def gap_to_a_plain_row(trainer: Any, batch: Any, completion: list[int], logps: list[float]) -> float:
    """Against one plain row through the model, neither packed nor TRL's."""
    ids = torch.tensor([list(completion)])
    prompt = batch["input_ids"][0][batch["attention_mask"][0].bool()][None]
    sequence = torch.cat([prompt, ids], dim=1)
    logits = base_qwen(trainer.model)(
        input_ids=sequence,
        attention_mask=torch.ones_like(sequence),
        mm_token_type_ids=(sequence == trainer.processing_class.image_token_id).long(),
        pixel_values=batch["pixel_values"],
        image_grid_thw=batch["image_grid_thw"],
    ).logits
    own = logits[:, prompt.shape[1] - 1 : -1].log_softmax(dim=-1)
    return (own.gather(2, ids[:, :, None]).squeeze(2) - torch.tensor([logps])).abs().mean().item()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
