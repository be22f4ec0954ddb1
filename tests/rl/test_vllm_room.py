"""What a colocated vLLM is given for a run: room for its prompts, and the trainer's dtype."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dataset import VLMDataCollator
from fleet.command.options import parse_options, resolve_options
from fleet.command.preflight import make_environment
from fleet.errors import UsageError
from fleet.rl.vllm_sampling import require_dtype
from fleet.run.build.settings import context_length
from fleet.run.data import longest_prompt
from tests.helpers import toy_dataset, toy_processor
from tests.rl.test_vllm_sampling import require_stop, trainer_with


def test_a_prompt_and_completion_without_room_are_refused_before_anything_is_drawn(tmp_path: Path) -> None:
    trainer = trainer_with(tmp_path)
    trainer.stand_in.max_model_length = 100
    words = r"a prompt has 1\d\d tokens and a completion up to 32, but vLLM has room for 100 .*_length 2\d\d, or lower"
    require_stop(trainer, words)
    assert "generated" not in trainer.stand_in.calls


def test_room_for_the_last_token_is_enough(tmp_path: Path) -> None:
    trainer = trainer_with(tmp_path, max_steps=1)
    row = trainer.train_dataset[0]
    length = trainer.data_collator([row] * 4)["input_ids"].shape[1]
    trainer.stand_in.max_model_length = length + 31
    require_stop(trainer, f"pass --vllm_max_model_length {length + 32}")
    enough = trainer_with(tmp_path, max_steps=1)
    enough.stand_in.max_model_length = length + 32
    enough.train()


@pytest.mark.parametrize(("mode", "dtype"), [("server", torch.float16), ("colocate", torch.bfloat16)])
def test_a_vllm_of_the_trainers_dtype_passes(mode: str, dtype: torch.dtype) -> None:
    vllm: Any = SimpleNamespace(mode=mode, llm=SimpleNamespace(model_config=SimpleNamespace(dtype=dtype)))
    require_dtype(vllm, torch.bfloat16)
    if mode == "colocate":
        with pytest.raises(
            UsageError, match="vLLM computes in bfloat16 beside a trainer in float32, .*--dtype float32"
        ):
            require_dtype(vllm, torch.float32)


@pytest.mark.parametrize(("num_candidates", "max_pixels", "num_images_tokens"), [(4, 3136, 16), (3, 6272, 24)])
def test_the_longest_prompt_has_each_image_at_its_budget(
    num_candidates: int, max_pixels: int, num_images_tokens: int
) -> None:
    dataset = toy_dataset(num_candidates, None)
    collate = VLMDataCollator(toy_processor(), 1)
    without_images = [
        int((batch["attention_mask"] * (batch["mm_token_type_ids"] == 0)).sum())
        for batch in (collate([dataset[number]]) for number in range(8))
    ]
    assert len(set(without_images)) > 1
    found = longest_prompt(dataset.env, toy_processor(), max_pixels, num_episodes=8)
    assert found == max(without_images) + num_images_tokens


@pytest.mark.parametrize(("num_positions", "room"), [(4096, 193 * 3 // 2 + 16), (250, 250)])
def test_the_room_is_for_the_run_and_never_more_than_the_model_has(num_positions: int, room: int) -> None:
    flags = ["--use_vllm", "--max_completion_length", "16", "--image_max_pixels", "3136", "--train_steps", "1"]
    options, _ = resolve_options(parse_options(flags), has_bf16_gpu=False)
    env = make_environment(options, options.seed)
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=num_positions))
    assert context_length(options, env, 4, toy_processor(), config) == room
