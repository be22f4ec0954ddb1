"""Memory of a run by hand-worked numbers: 1,000 parameters that train, of 1,500, under each kind of launch."""

from dataclasses import replace

import pytest

from fleet.planning.counted_pass import ModelSize, Peak
from fleet.planning.machine import Launch, Machine
from fleet.planning.memory import Memory, Moments, Policy, Sampling, checkpoint_bytes, memory_of
from fleet.vllm_memory import VLLMBytes
from model_utils import PartSize

SIZE = ModelSize({"tower": PartSize(0, 500, 0), "language_model": PartSize(1000, 1000, 0)}, quantizable=1200)
FULL = Policy(SIZE, item=4, trained_item=4)
HALF = replace(FULL, item=2, trained_item=2)
GPU = Machine(True, 10**9, None, base_bytes=7)
# at the loss 600 bytes of activations and no gradient; at the end all 4,000 of gradients and 50 more
TRAINING, GENERATION = Peak(((4000, 50), (0, 600))), Sampling(Peak(((0, 300),)))
MOMENTS = Moments(TRAINING, GENERATION, None, keeps_gradients=False, gathers_for_sampling=False)
NOTHING = VLLMBytes(0, 0, 0)
ZERO3 = Launch(4, zero_stage=3, has_deepspeed=True, max_live_parameters=100, reduce_bucket_size=10, sub_group_size=60)


def held(policy: Policy, launch: Launch, moments: Moments = MOMENTS, vllm: VLLMBytes = NOTHING) -> Memory:
    return memory_of(policy, launch, GPU, moments, vllm, cache=0)


def test_one_process_holds_weights_moments_and_at_the_end_of_a_pass_all_gradients() -> None:
    found = held(FULL, Launch())
    states = 7 + 6000 + 8000
    assert found.phases == {
        "training pass": states + 4050,
        "generation": states + 300,
        "evaluation": states,
        "optimizer step": states + 4000,
    }
    assert (found.total, found.largest_phase) == (states + 4050, "training pass")
    assert found.parts["weights"] == 6000 and found.parts["gradients"] == 4000 and found.parts["optimizer"] == 8000


def test_gradients_that_accumulate_are_there_beside_activations() -> None:
    found = held(FULL, Launch(), replace(MOMENTS, keeps_gradients=True))
    assert found.phases["training pass"] == 7 + 6000 + 8000 + 4000 + 600
    assert found.phases["generation"] == 7 + 6000 + 8000 + 4000 + 300


def test_ddp_holds_gradients_twice() -> None:
    assert held(FULL, Launch(2)).total == 7 + 6000 + 8000 + 4000 + 4050


def test_rollouts_that_grow_apart_have_a_cache_of_their_own() -> None:
    moments = replace(MOMENTS, generation=replace(GENERATION, row_cache=9000))
    assert held(FULL, Launch(), moments).total == 7 + 6000 + 8000 + 9000


def test_held_out_answers_hold_their_own_and_are_given_between_steps() -> None:
    moments = replace(MOMENTS, generation=None, evaluation=Sampling(Peak(((0, 300),), fixed=100), scale=3.0))
    found = held(FULL, Launch(), moments, VLLMBytes(5000, 0, 100))
    states = 7 + 6000 + 8000
    assert found.phases["generation"] == states + 5000 and found.phases["evaluation"] == states + 100 + 3 * 200
    gathered = held(HALF, ZERO3, replace(moments, gathers_for_sampling=True))
    assert gathered.parts["evaluation"] == 700 + 3000 and gathered.parts["generation"] == 0


def test_zero3_shards_states_and_keeps_some_weights_gathered() -> None:
    found = held(HALF, ZERO3)
    # a quarter of 1,500 weights of 2 bytes, and 100 gathered
    assert found.parts["weights"] == 750 + 200
    # a quarter of 1,000 gradients of 2 bytes, and a bucket of 10
    assert found.parts["gradients"] == 500 + 20
    # a quarter of a float32 copy and two moments
    assert found.parts["optimizer"] == 3000
    states = 7 + 950 + 520 + 3000
    assert found.phases == {
        "training pass": states + 600,
        "generation": states + 300,
        "evaluation": states,
        "optimizer step": states + 240,
    }
    gathered = held(HALF, ZERO3, replace(MOMENTS, gathers_for_sampling=True))
    assert gathered.phases["generation"] == states + 300 + 3000


def test_what_is_offloaded_is_in_the_hosts_memory() -> None:
    found = held(HALF, replace(ZERO3, offloads_optimizer=True))
    assert found.parts["optimizer"] == 0 and found.parts["gradients"] == 20
    # gradients in 2 and 4 bytes, a copy of 4, moments of 8
    assert found.host["offloaded"] == 18_000


def test_a_reference_is_held_in_float32_and_sharded() -> None:
    assert held(FULL, Launch()).parts["reference"] == 0
    assert held(replace(FULL, reference=1500), Launch()).parts["reference"] == 6000
    assert held(replace(HALF, reference=1500), ZERO3).parts["reference"] == 1500


def test_four_bits_hold_linear_layers_alone() -> None:
    size = ModelSize({"language_model": PartSize(40, 1540, 40)}, quantizable=1024)
    found = held(Policy(size, item=2, trained_item=4, is_4bit=True), Launch())
    # 1,024 in half a byte, a byte for each 64 and 0.25 for its scales; 476 in 2 bytes; 40 adapters in 4
    assert found.parts["weights"] == 512 + 16 + 0 + 952 + 160


@pytest.mark.parametrize(("sleeps", "training"), [(False, 5000), (True, 0)])
def test_a_vllm_that_sleeps_is_not_beside_a_training_pass(sleeps: bool, training: int) -> None:
    found = held(FULL, Launch(), vllm=VLLMBytes(5000, 0 if sleeps else 5000, 100))
    assert found.phases["training pass"] == 7 + 6000 + 8000 + 4050 + training
    assert found.phases["generation"] == 7 + 6000 + 8000 + 300 + 5000


def test_a_checkpoint_has_weights_and_states_and_under_zero3_both_forms() -> None:
    assert checkpoint_bytes(FULL, Launch(), is_lora=False) == 6000 + 8000
    # shards of 2 bytes, float32 states of 12, and the gathered model
    assert checkpoint_bytes(HALF, ZERO3, is_lora=False) == 3000 + 12_000 + 3000
    assert checkpoint_bytes(HALF, replace(ZERO3, gathers_for_saving=False), is_lora=False) == 3000 + 12_000
