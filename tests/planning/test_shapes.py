"""The shapes of passes, and that a largest batch is one that fits."""

from dataclasses import replace

import pytest

from fleet.planning.counted_pass import PassShape
from fleet.planning.lengths import Lengths
from fleet.planning.machine import Launch
from fleet.planning.shapes import RunShapes
from tests.planning.plans import options_of, planned, planner_of, small_config

LENGTHS = Lengths((64, 64.0, 64), 4, 400.0, 420, 20, patches=1024, is_estimate=False)


def shapes(line: str, num_processes: int = 1) -> RunShapes:
    return RunShapes(options_of(line, "1x80"), Launch(num_processes), small_config(), LENGTHS)


def test_held_out_pictures_are_encoded_though_those_of_training_are_known() -> None:
    found = shapes("--use_lora --eval_steps 5 --eval_episodes 100 --num_rollouts 4 --max_completion_length 10")
    # 32 drafts of 10 tokens and the prompt's end
    assert found.generation(16) == PassShape(16, 420 + 320, 321, 16 * 1024, are_features_known=True)
    assert found.evaluation(16) == PassShape(16, 420 + 320, 321, 16 * 1024, are_features_known=False)
    # no more than there are, shared out among processes
    assert replace(found, launch=Launch(25)).evaluation(16) == PassShape(4, 740, 321, 4 * 1024)
    assert shapes("--eval_steps 0 --control_steps 0").evaluation(16) is None


@pytest.mark.parametrize("lora", ["--use_lora", "--freeze tower"])
def test_the_largest_batch_fits_once_it_is_counted_itself(lora: str) -> None:
    line = f"--eval_steps 5 --eval_episodes 500 --num_rollouts 8 --max_completion_length 16 {lora}"
    largest = planned(f"{line} --per_device_batch_size 1", "1x24").largest_batch
    counted = planned(f"{line} --per_device_batch_size {largest}", "1x24")
    # what does not grow with a batch is scaled too, so that the first is careful
    assert counted.fits and largest <= counted.largest_batch


def test_held_out_answers_grow_with_the_batch_and_no_further_than_there_are_episodes() -> None:
    planner = planner_of("--use_lora --eval_steps 5 --eval_episodes 64 --per_device_batch_size 8", "1x80")
    counts, model = planner.prediction(is_checkpointed=False).counts, planner._model(is_checkpointed=False)
    found = [planner._moments(counts, model, groups).evaluation for groups in (8, 16, 64, 128)]
    scales = [evaluation and evaluation.scale for evaluation in found]
    # 64 prompts of 513 slots with logits go in three pieces, of at most 22
    assert scales == [1, 2, 22 / 8, 22 / 8]
