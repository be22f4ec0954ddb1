"""Counted bytes against what autograd really keeps, against a process's memory, and against an H100's figures."""

from typing import Any

import pytest
import torch

from dataset import VLMDataCollator
from fleet.planning.counted_pass import CountedModel, PassShape, Peak, sampling_peak, size_of, training_peak
from fleet.planning.published import published_config
from fleet.qwen.group_passes import image_inputs, score_tree, tree_prompts
from fleet.qwen.token_tree import tree_of_rollouts
from model_utils import make_lora_config
from tests.helpers import toy_config, toy_dataset, toy_model, toy_processor

GIB = 2**30
GROUP_SIZE, LENGTH = 3, 20


class KeptStorages:
    """Bytes that autograd keeps for the backward pass, each storage once, without weights."""

    def __init__(self, model: Any):
        self.weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        self.sizes: dict[int, int] = {}

    def __enter__(self) -> "KeptStorages":
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def _note(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor


def really_kept(**changes: Any) -> tuple[int, PassShape, Any]:
    """What Fleet's real training pass keeps on the toy, its shape, and the toy's configuration."""
    model = toy_model(**changes).train()
    dataset = toy_dataset()
    batch: Any = VLMDataCollator(toy_processor(), GROUP_SIZE)([dataset[0]] * GROUP_SIZE + [dataset[1]] * GROUP_SIZE)
    torch.manual_seed(0)
    # completions that share nothing beyond their prompt
    ids = torch.randint(8, 300, (2, GROUP_SIZE, LENGTH)).tolist()
    tree = tree_of_rollouts(tree_prompts(model, batch), ids, padding_id=0)
    kept = KeptStorages(model)
    with kept:
        logps = score_tree(model, tree, image_inputs(batch, slice(0, 2), None), "sdpa", 1.0)[0]
    assert logps.requires_grad
    shape = PassShape(2, tree.input_ids_PS.shape[1], tree.edge_slot_PK.shape[1], int(batch["pixel_values"].shape[0]))
    return sum(kept.sizes.values()), shape, toy_config()


LORA = make_lora_config()
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full": ({}, {}),
    "lora": ({"use_lora": True}, {"lora": LORA}),
    "frozen vision": ({"freeze": ("tower", "merger")}, {"frozen": ("tower", "merger")}),
    "frozen language model": ({"freeze": ("language_model",)}, {"frozen": ("language_model",)}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_is_counted_as_autograd_keeps_it(kind: str) -> None:
    loading, counting = KINDS[kind]
    kept, shape, config = really_kept(**loading)
    counted = training_peak(CountedModel(config, torch.float32, is_autocast=False, **counting), shape)
    at_loss = max(others for grads, others in counted.moments if grads == 0)
    # transient tensors are counted too, and windows of the toy are padded to whole ones
    assert kept <= at_loss <= 1.15 * kept


def test_an_h100_measured_what_is_counted() -> None:
    """3B in bfloat16, two episodes of 8 rollouts of 30 tokens, four pictures of 448 px: weights and gradients held."""
    config = published_config("Qwen/Qwen2.5-VL-3B-Instruct")
    shape = PassShape(2, 1200 + 8 * 30, 8 * 30, 2 * 4 * 1024)
    for is_checkpointed, measured_gib in ((False, 44.48), (True, 16.71)):
        model = CountedModel(config, torch.bfloat16, is_autocast=False, is_checkpointed=is_checkpointed)
        weights = size_of(model).total * 2
        found = (2 * weights + training_peak(model, shape).others()) / GIB
        assert found == pytest.approx(measured_gib, rel=0.05)


def test_published_models_have_the_parameters_that_the_hub_says() -> None:
    billions = {"3B": 3.754622976, "7B": 8.292166656, "32B": 33.452718336, "72B": 73.410777344}
    for size, count in billions.items():
        config = published_config(f"Qwen/Qwen2.5-VL-{size}-Instruct")
        assert size_of(CountedModel(config, torch.bfloat16, is_autocast=False)).total == round(count * 1e9)
    assert published_config("Qwen/Qwen2.5-VL-5B-Instruct") is None


def test_parts_that_are_frozen_and_adapters_count_as_they_train() -> None:
    config = toy_config()
    full = size_of(CountedModel(config, torch.float32, is_autocast=False))
    frozen = size_of(CountedModel(config, torch.float32, is_autocast=False, frozen=("tower", "merger")))
    lora = size_of(CountedModel(config, torch.float32, is_autocast=False, lora=make_lora_config(4)))
    assert full.trainable == full.total == sum(parameter.numel() for parameter in toy_model().parameters())
    assert frozen.trainable == full.parts["language_model"].total
    # rank 4, three layers: query and output 96 + 96, key and value 96 + 48, the MLP's three 96 + 256
    assert lora.trainable == lora.adapters == 4 * 3 * (2 * (96 + 96) + 2 * (96 + 48) + 3 * (96 + 256))


def test_a_peak_grows_with_its_rows_alone() -> None:
    peak = Peak(((0, 100), (40, 30)), fixed=20)
    assert (peak.total(), peak.others(), peak.total(2.0), peak.others(0.5)) == (100, 100, 180, 60)
    # at a small scale the gradients of the end decide
    assert peak.total(0.25) == 40 + 20 + 2


def test_sampling_holds_no_gradient_and_a_cache() -> None:
    config = toy_config()
    small, large = (
        sampling_peak(CountedModel(config, torch.float32, is_autocast=False), PassShape(1, slots, 10, 64)).others()
        for slots in (200, 400)
    )
    # keys and values of three layers, two heads of 24
    assert large - small >= 200 * 3 * 2 * 2 * 24 * 4
