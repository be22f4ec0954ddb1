"""The bytes that a pass through the model holds, counted by running it on tensors that have shapes and no data.

The real model is built from its configuration and run, forward and backward, under torch's FakeTensorMode; every
storage is counted while it lives. So LoRA, freezing, checkpointing and autocast count as they are, and a new version of
a library is counted as it is. The only code that calls the model's parts one by one: vision blocks, merger, language
model and head, as its own `forward` reads values that such tensors do not have.
"""

import contextlib
import copy
import warnings
import weakref
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, DynamicCache, Qwen2_5_VLForConditionalGeneration

from fleet.model_folder.parts import part_of_weight
from fleet.qwen.draws import CHUNK_SIZE
from fleet.qwen.edge_scores import edge_scores
from fleet.qwen.group_passes import as_model_mask, base_qwen
from model_utils import PartSize, count_parameters

# Axes: R rows, S slots of a row, K scored slots, N patches, V vocabulary.

# copies of some slots' logits that the rules of sampling and the draws hold at a time
SCORES_DTYPES = (torch.float32,) * 2
DRAWS_DTYPES = (torch.float64,) * 4
# counted on one kind of device: a GPU's kernels hold the same for the backward pass
DEVICE = "cpu"
WINDOW_PATCHES = 64


@dataclass(frozen=True)
class PassShape:
    """One forward pass: R rows of S slots, of which K each are scored, and the N patches of all rows' images."""

    num_rows: int
    num_slots: int
    num_scored: int
    num_patches: int
    has_tree_mask: bool = True  # else rows of TRL's, that are causal
    are_features_known: bool = False  # the vision tower does not run


@dataclass(frozen=True)
class CountedModel:
    """The model that is counted, as the run will hold it.

    config: a Qwen2_5_VLConfig. dtype: of its weights. is_autocast: computed in bfloat16 under autocast. frozen: parts
    that have no gradient. lora: of new adapters.
    """

    config: Any
    dtype: torch.dtype
    is_autocast: bool
    frozen: Collection[str] = ()
    lora: LoraConfig | None = None
    is_checkpointed: bool = False
    attention: str = "sdpa"


@dataclass(frozen=True)
class Peak:
    """The largest moments of a pass, in bytes beside the weights.

    moments: pairs of what its gradients and all else hold, none below another in both. fixed: of all else, what does
    not grow with rows, as the copies of weights that autocast makes.
    """

    moments: tuple[tuple[int, int], ...]
    fixed: int = 0

    def total(self, scale: float = 1.0) -> int:
        """Gradients and all else together at the worst moment, for so many times as many rows."""
        return max((grads + self._scaled(others, scale) for grads, others in self.moments), default=0)

    def others(self, scale: float = 1.0) -> int:
        """All else alone at its worst moment."""
        return max((self._scaled(others, scale) for _, others in self.moments), default=0)

    def _scaled(self, others: int, scale: float) -> int:
        fixed = min(self.fixed, others)
        return fixed + round((others - fixed) * scale)


@dataclass(frozen=True)
class ModelSize:
    """Parameters by part, and of the linear layers that 4-bit loading quantizes: all but the head and adapters."""

    parts: dict[str, PartSize]
    quantizable: int

    @property
    def total(self) -> int:
        """All parameters, adapters included."""
        return sum(part.total for part in self.parts.values())

    @property
    def trainable(self) -> int:
        """The parameters that train."""
        return sum(part.trainable for part in self.parts.values())

    @property
    def adapters(self) -> int:
        """The parameters of adapters."""
        return sum(part.adapters for part in self.parts.values())


def size_of(model: CountedModel) -> ModelSize:
    """The sizes of a model, from its configuration."""
    with _quiet():
        policy = _built(model)
        linear = [
            module.weight.numel()
            for name, module in policy.named_modules()
            if isinstance(module, nn.Linear) and "lora_" not in name and not name.endswith("lm_head")
        ]
        return ModelSize(count_parameters(policy), sum(linear))


def training_peak(model: CountedModel, shape: PassShape) -> Peak:
    """The moments of a training pass, forward and backward, of which no gradient was there before."""
    with _quiet(), _without_data_on_device(_built(model)) as policy:
        with _Ledger() as ledger, torch.device(DEVICE):
            _pass_logps(policy, model, shape).sum().backward()
            gradients = {_key(parameter.grad) for parameter in policy.parameters() if parameter.grad is not None}
        fixed = _autocast_copies(policy) if model.is_autocast else 0
    return Peak(ledger.moments(gradients), fixed)


def sampling_peak(model: CountedModel, shape: PassShape) -> Peak:
    """The moments of round 1 of sampling: no gradient, a cache of keys and values, and the draws of some slots."""
    # a cache of keys and values and checkpointing exclude each other
    with _quiet(), _without_data_on_device(_built(replace(model, is_checkpointed=False))) as policy:
        with _Ledger() as ledger, torch.device(DEVICE), torch.no_grad():
            cache = DynamicCache(config=model.config.get_text_config())
            logits_RKV = _pass_logits(policy, model, shape, cache)
            logits_NV = logits_RKV.flatten(0, 1)[: max(1, CHUNK_SIZE // logits_RKV.shape[2])]
            drawn_from = [logits_NV.to(dtype, copy=True) for dtype in (*SCORES_DTYPES, *DRAWS_DTYPES)]
            del drawn_from
        fixed = _autocast_copies(policy) if model.is_autocast else 0
    return Peak(ledger.moments(set()), fixed)


class _Ledger(TorchDispatchMode):
    """Notes when each storage begins and ends."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []  # a storage's number, and its bytes: negative at its end
        self._known: dict[int, tuple[int, Any]] = {}  # by key: its number and a weak reference

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = {_key(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and _key(leaf) not in before:
                self._note(leaf)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def ends(_: Any) -> None:
            number, _reference = self._known.pop(key)
            self.events.append((number, -size))

        number = len(self.events)
        self.events.append((number, size))
        self._known[key] = number, weakref.ref(storage, ends)

    def moments(self, gradient_keys: Collection[int]) -> tuple[tuple[int, int], ...]:
        """The undominated pairs of what these storages and all others hold at any time."""
        numbers = {self._known[key][0] for key in gradient_keys}
        grads = others = 0
        best: dict[int, int] = {}
        for number, size in self.events:
            if number in numbers:
                grads += size
            else:
                others += size
            best[grads] = max(best.get(grads, 0), others)
        front: list[tuple[int, int]] = []
        for grads in sorted(best, reverse=True):
            if not front or best[grads] > front[-1][1]:
                front.append((grads, best[grads]))
        return tuple(front)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _built(model: CountedModel) -> nn.Module:
    """The model as training has it, on the meta device, where adapters can be made too."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(model.dtype)
    try:
        with torch.device("meta"):
            policy: Any = Qwen2_5_VLForConditionalGeneration(copy.deepcopy(model.config))
    finally:
        torch.set_default_dtype(before)
    policy.set_attn_implementation({"text_config": model.attention, "vision_config": _ATTENTION})
    for name, weight in policy.named_parameters():
        weight.requires_grad_(part_of_weight(name) not in model.frozen)
    policy.train()
    if model.is_checkpointed:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    if model.lora is not None:
        policy = get_peft_model(policy, model.lora)
        if model.is_checkpointed:
            policy.enable_input_require_grads()
    return policy


@contextlib.contextmanager
def _without_data_on_device(policy: nn.Module) -> Iterator[nn.Module]:
    """Within it, a model of the meta device has tensors that act as if they were on the device."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        policy.to_empty(device=DEVICE)
        base_qwen(policy).tie_weights()
        yield policy


def _autocast_copies(policy: nn.Module) -> int:
    """Bytes of the bfloat16 copies that autocast keeps of float32 weights that train, for as long as it lasts."""
    layers = [module for module in policy.modules() if isinstance(module, nn.Linear | nn.Conv3d)]
    weights = {id(layer.weight): layer.weight for layer in layers}.values()
    return sum(2 * weight.numel() for weight in weights if weight.requires_grad and weight.dtype == torch.float32)


def _pass_logps(policy: nn.Module, model: CountedModel, shape: PassShape) -> Tensor:
    logits_RKV = _pass_logits(policy, model, shape, None)
    tokens_RK = torch.zeros(logits_RKV.shape[:2], dtype=torch.int64)
    return edge_scores(logits_RKV, tokens_RK, 1.0)[0]


def _pass_logits(policy: nn.Module, model: CountedModel, shape: PassShape, cache: Any) -> Tensor:
    base = base_qwen(policy)
    text, width = base.model.language_model, model.config.get_text_config().hidden_size
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=model.is_autocast):
        features = _features(base.model.visual, model, shape)
        embedded = base.get_input_embeddings()(torch.zeros(shape.num_rows, shape.num_slots, dtype=torch.int64))
        is_image = torch.zeros(shape.num_rows, shape.num_slots, width, dtype=torch.bool)
        embedded = embedded.masked_scatter(is_image, features.to(embedded.dtype))
        del features, is_image
        mask = None
        if shape.has_tree_mask:
            sees = torch.zeros(shape.num_rows, 1, shape.num_slots, shape.num_slots, dtype=torch.bool)
            mask = as_model_mask(sees, model.attention)
        hidden = text(
            inputs_embeds=embedded,
            attention_mask=mask,
            position_ids=torch.zeros(3, shape.num_rows, shape.num_slots, dtype=torch.int64),
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        del embedded
        slots_RK = torch.zeros(shape.num_rows, shape.num_scored, dtype=torch.int64)
        return base.lm_head(hidden[torch.arange(shape.num_rows)[:, None], slots_RK])


def _features(vision: Any, model: CountedModel, shape: PassShape) -> Tensor:
    """Features of all images, (N / merged patches, width): from the tower, or as they come from the cache."""
    config = model.config.vision_config
    num_merged = shape.num_patches // config.spatial_merge_size**2
    if shape.are_features_known:
        return torch.empty(
            num_merged, config.out_hidden_size, dtype=torch.bfloat16 if model.is_autocast else model.dtype
        )
    # whole windows, as attention sees them here
    num_patches = -(-shape.num_patches // WINDOW_PATCHES) * WINDOW_PATCHES
    values = config.in_channels * config.temporal_patch_size * config.patch_size**2
    hidden = vision.patch_embed(torch.empty(num_patches, values, dtype=model.dtype))
    head_dim = config.hidden_size // config.num_heads
    rotations = torch.empty(num_patches, head_dim), torch.empty(num_patches, head_dim)
    bounds = torch.zeros(2, dtype=torch.int32)
    for block in vision.blocks:
        hidden = block(hidden, cu_seqlens=bounds, position_embeddings=rotations, max_seqlen=WINDOW_PATCHES)
    return vision.merger(hidden)[:num_merged]


def _attend_windows(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *, scaling: float, **others: Any
) -> tuple[Tensor, None]:
    """Attention as fleet/qwen/vision_windows.py has it, in windows of one length. query, key, value: (1, H, N, D)."""
    windows = [tensor[0].unflatten(1, (-1, WINDOW_PATCHES)).transpose(0, 1) for tensor in (query, key, value)]
    attended = nn.functional.scaled_dot_product_attention(*windows, scale=scaling)
    return attended.transpose(0, 1).flatten(1, 2)[None].transpose(1, 2).contiguous(), None


_ATTENTION = "flash_windows_counted"
AttentionInterface.register(_ATTENTION, _attend_windows)
