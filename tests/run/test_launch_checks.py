"""What accelerate's file asks of DeepSpeed must agree with the flags, and is compared before a weight loads."""

from types import SimpleNamespace
from typing import Any

import pytest

from fleet.command.options import parse_options, resolve_options
from fleet.errors import UsageError
from fleet.run.launch_checks import require_launchers_deepspeed, require_launchers_dtype


def arguments(deepspeed: dict[str, Any] | None) -> Any:
    """Of a run of 2 processes that each train on 8 rollouts at a time, twice a step."""
    return SimpleNamespace(
        deepspeed_plugin=None if deepspeed is None else SimpleNamespace(deepspeed_config=deepspeed),
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        world_size=2,
        max_grad_norm=1.0,
    )


@pytest.mark.parametrize(
    "deepspeed",
    [
        None,
        {},
        {"gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "train_batch_size": "auto"},
        {"gradient_accumulation_steps": 2, "gradient_clipping": 1.0, "train_micro_batch_size_per_gpu": 8},
        {"train_batch_size": 32, "fp16": {"enabled": "auto"}, "bf16": {"enabled": True}},
    ],
)
def test_settings_that_follow_or_repeat_the_flags_pass(deepspeed: dict[str, Any] | None) -> None:
    require_launchers_deepspeed(arguments(deepspeed))


@pytest.mark.parametrize(
    ("deepspeed", "words"),
    [
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps=4, but the flags give"),
        ({"gradient_clipping": 0.5}, "gradient_clipping=0.5, but the flags give max_grad_norm=1.0"),
        ({"train_micro_batch_size_per_gpu": 1}, "the flags give per_device_batch_size x num_rollouts=8"),
        ({"train_batch_size": 8}, "gradient_accumulation_steps x processes=32; remove train_batch_size"),
        ({"optimizer": {"type": "AdamW"}}, "their own optimizer, but Fleet's flags set it; remove optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "their own scheduler"),
        ({"fp16": {"enabled": True}}, "enable fp16"),
    ],
)
def test_settings_against_the_flags_are_refused(deepspeed: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as refusal:
        require_launchers_deepspeed(arguments(deepspeed))
    assert words in str(refusal.value)


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_a_precision_that_fleet_does_not_compute_in_is_refused(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    options = resolve_options(parse_options([]), has_bf16_gpu=False)[0]
    with pytest.raises(UsageError, match=f"mixed_precision: {precision}, but Fleet computes in bf16 or float32"):
        require_launchers_dtype(options.dtype)
