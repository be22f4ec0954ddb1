"""What the tests of plans share: the prediction for a command line, on a machine that is assumed."""

from pathlib import Path
from typing import Any

from environment import PickImageEnv
from fleet.command.options import Options, parse_options, resolve_options
from fleet.planning.machine import assumed_machine, launch_of_file, launch_without_file
from fleet.planning.plan import Planner, Prediction
from fleet.planning.published import published_config
from fleet.toy.model import TOY_DATA_ROOT

REAL = "Qwen/Qwen2.5-VL-3B-Instruct"


def small_config() -> Any:
    """A 3B of two blocks and two layers, which is counted in a second."""
    config = published_config(REAL)
    config.text_config.num_hidden_layers, config.vision_config.depth = 2, 2
    config.text_config.layer_types = config.text_config.layer_types[:2]
    config.vision_config.fullatt_block_indexes = [1]
    # all else of a vision tower of a real model
    return config


def options_of(line: str, gpus: str, accelerate: str | None = None) -> Options:
    words = ["--model_id", REAL, *line.split(), "--dry_run", "--assume_gpus", gpus]
    # what does nothing without ZeRO-3 is refused, by what a launcher says
    launch = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"} if accelerate else {}
    options = parse_options(words + (["--assume_accelerate", accelerate] if accelerate else []), launch)
    return resolve_options(options, has_bf16_gpu=True)[0]


def planned(
    line: str, gpus: str, accelerate: Path | None = None, *, config: Any = None, data_root: Path = TOY_DATA_ROOT
) -> Prediction:
    """The prediction for `training.py <line>`; with "auto", for the way that is taken."""
    planner = planner_of(line, gpus, accelerate, config=config, data_root=data_root)
    asked = planner.options.gradient_checkpointing
    found = planner.prediction(is_checkpointed=asked is True)
    return planner.prediction(is_checkpointed=True) if asked == "auto" and not found.fits else found


def planner_of(
    line: str, gpus: str, accelerate: Path | None = None, *, config: Any = None, data_root: Path = TOY_DATA_ROOT
) -> Planner:
    """The planner of `training.py <line>`."""
    options = options_of(line, gpus, None if accelerate is None else str(accelerate))
    count, machine = assumed_machine(gpus)
    launch = launch_without_file(count) if accelerate is None else launch_of_file(str(accelerate), count)
    env = PickImageEnv(data_root, options.candidates_per_episode, options.fixed_correct_index, 0)
    return Planner(options, env, launch, machine, config or small_config(), None)
