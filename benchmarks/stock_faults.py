"""What stock TRL and Trainer do with the faults of docs/reliability.md, on the toy model, in this process.

    python benchmarks/stock_faults.py --json benchmarks/results/stock_faults.json

Fleet's side of each is a test, named in docs/reliability.md.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers.trainer_utils import get_last_checkpoint
from trl import RLOOTrainer

from fleet.run.config import git_commit, installed_versions
from model_utils import make_lora_config
from tests.helpers import rloo_config, scripted_completions, stock_trainer, weights_of

Weights = dict[str, torch.Tensor]


def flip_bit(path: Path) -> None:
    """Changes one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(folder: Path) -> None:
    """Leaves a checkpoint's folder with nothing in it."""
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES: dict[str, Callable[[Path], object]] = {
    "weights missing": lambda at: (at / "adapter_model.safetensors").unlink(),
    "optimizer missing": lambda at: (at / "optimizer.pt").unlink(),
    "randomness missing": lambda at: (at / "rng_state.pth").unlink(),
    "trainer state missing": lambda at: (at / "trainer_state.json").unlink(),
    "weights truncated": lambda at: os.truncate(at / "adapter_model.safetensors", 1000),
    "optimizer truncated": lambda at: os.truncate(at / "optimizer.pt", 1000),
    "optimizer emptied": lambda at: os.truncate(at / "optimizer.pt", 0),
    "one bit of the weights": lambda at: flip_bit(at / "adapter_model.safetensors"),
    "folder emptied": empty,
}


class ScriptedSampling(RLOOTrainer):
    """TRL's trainer whose completions do not depend on its weights, so that only what is loaded can differ."""

    num_done = 0

    def _generate_single_turn(self, prompt_ids: Any, images: Any, multimodal_fields: Any) -> list[list[int]]:
        self.num_done = self.state.global_step
        return scripted_completions(self.num_generations, len(prompt_ids), self.num_done)


def main() -> None:
    """Runs every fault and prints, or writes, what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="where to write the record (default: nowhere)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        outcomes = {
            "full fine-tune, resumed": resume_of_full_fine_tune(Path(folder) / "full"),
            **damaged_checkpoints(Path(folder) / "damaged"),
            "one reward is inf": parameters_after(lambda rewards: [float("inf"), *rewards[1:]], Path(folder) / "inf"),
            "one reward is NaN": parameters_after(lambda rewards: [float("nan"), *rewards[1:]], Path(folder) / "nan"),
            "one gradient is NaN": parameters_after(None, Path(folder) / "gradient"),
        }
    of_run = {"command": " ".join(sys.argv), "commit": git_commit(), "versions": installed_versions()}
    print(json.dumps(outcomes, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(of_run | {"stock": outcomes}, indent=2) + "\n", encoding="utf-8")


def trainer_of(folder: Path, max_steps: int, *, lora: bool = True, **changes: Any) -> RLOOTrainer:
    """TRL's trainer on the toy, which saves after each step."""
    args = rloo_config(folder, max_steps=max_steps, save_strategy="steps", save_steps=1, **changes)
    return stock_trainer(args, make_lora_config() if lora else None, trainer_class=ScriptedSampling)


def trained(weights: Weights) -> Weights:
    """Those of LoRA's two factors that a run moves."""
    return {name: weight for name, weight in weights.items() if "lora_" in name}


def resume_of_full_fine_tune(folder: Path) -> str:
    """Whose weights a resumed full fine-tune has."""
    first = trainer_of(folder, 1, lora=False, learning_rate=1e-2)
    base = weights_of(first.model)
    first.train()
    resumed = trainer_of(folder, 1, lora=False, learning_rate=1e-2)
    # the first thing that `train` does with a checkpoint
    resumed._load_from_checkpoint(str(folder / "checkpoint-1"))
    after = weights_of(resumed.model)
    num_base = sum(torch.equal(after[name], base[name]) for name in base)
    return f"{num_base} of its {len(base)} weights are the base model's, with a warning"


def damaged_checkpoints(folder: Path) -> dict[str, str]:
    """What a restart does with each damage to the newest of two checkpoints."""
    run = folder / "run"
    trainer_of(run, 2).train()
    whole = final_weights_of_resume(Path(shutil.copytree(run, folder / "whole")))
    outcomes = {}
    for number, (name, inflict) in enumerate(DAMAGES.items()):
        copy = Path(shutil.copytree(run, folder / str(number)))
        inflict(copy / "checkpoint-2")
        try:
            weights = final_weights_of_resume(copy)
        except Exception as error:
            outcomes[name] = f"every restart ends with {type(error).__name__}"
        else:
            is_same = all(torch.equal(weights[key], whole[key]) for key in whole)
            outcomes[name] = "goes on as if whole" if is_same else "goes on in another state, without a word"
    return outcomes


def final_weights_of_resume(run: Path) -> Weights:
    """The adapter after a third step, taken from the newest checkpoint that Trainer finds."""
    trainer = trainer_of(run, 3)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(run)))
    return trained(weights_of(trainer.model))


def parameters_after(change_rewards: Callable[[list[float]], list[float]] | None, folder: Path) -> str:
    """Whether the parameters are finite after a step with changed rewards, or with a NaN in a gradient."""
    trainer = trainer_of(folder, 1, lora=False)
    if change_rewards is None:
        weight = next(iter(trainer.model.parameters()))
        weight.register_hook(lambda gradient: gradient * float("nan"))
    else:
        function, change = trainer.reward_funcs[0], change_rewards
        trainer.reward_funcs[0] = lambda **columns: change(function(**columns))
    trainer.train()
    num_bad = sum(not weight.isfinite().all() for weight in trainer.model.parameters())
    num_all = sum(1 for _ in trainer.model.parameters())
    return f"{num_bad} of {num_all} parameters are not finite" if num_bad else "all parameters are finite"


if __name__ == "__main__":
    main()
