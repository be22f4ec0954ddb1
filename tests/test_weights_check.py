"""A model's files hold each weight that the model has, in its shape, and no other; else nothing is loaded."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import evaluate
import model_utils
import training
from flags import UsageError
from model_utils import load_qwen25_vl, require_loadable
from run_results import merge_adapter
from tests.helpers import toy_model, toy_path
from tests.processes import start_ranks

Weights = dict[str, torch.Tensor]
WEIGHTS, ADAPTER_WEIGHTS = "model.safetensors", "adapter_model.safetensors"


def adapter_in(folder: Path, **settings: Any) -> Path:
    """A rank-8 adapter on queries and values, saved by PEFT. settings: of its LoraConfig."""
    wanted = {"r": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **settings}
    get_peft_model(toy_model(), LoraConfig(**wanted)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapter_in(tmp_path_factory.mktemp("adapters") / "sound")


def rewritten(source: Path, target: Path, change: Callable[[Weights], Weights]) -> Path:
    """A copy of a model's folder whose weights are changed."""
    shutil.copytree(source, target)
    name = ADAPTER_WEIGHTS if (target / ADAPTER_WEIGHTS).exists() else WEIGHTS
    save_file(change(load_file(target / name)), target / name, metadata={"format": "pt"})
    return target


def old_names(weights: Weights) -> Weights:
    return {name.replace("model.language_model.layers", "model.layers"): weight for name, weight in weights.items()}


def without(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: weight for name, weight in weights.items() if part not in name}


def with_another(name: str) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name: torch.zeros(2)}


def halved(weights: Weights) -> Weights:
    return {
        name: weight[:4].contiguous() if "lora_A" in name else weight[:, :4].contiguous()
        for name, weight in weights.items()
    }


LAYER = "base_model.model.model.language_model.layers.0.self_attn"
UNFIT_ADAPTERS = {
    "saved by an older transformers": (
        old_names,
        f"lack 12 weights, {LAYER}.q_proj.lora_A.default.weight among them and have unknown 12 weights, "
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight among them, but wanted each weight that the "
        "model has and no other; rename base_model.model.model.layers.* in adapter_model.safetensors, as an older "
        "transformers wrote it, to base_model.model.model.language_model.layers.*",
    ),
    "lacks a layer": (without("layers.0"), f"lack 4 weights, {LAYER}.q_proj.lora_A.default.weight among them, but"),
    "lacks all": (without("layers"), "lack 12 weights"),
    "has one more": (
        with_another(f"{LAYER}.k_proj.lora_A.weight"),
        f"have unknown 1 weights, {LAYER}.k_proj.lora_A.weight among them, but wanted each weight that the model has "
        "and no other; restore the files that were saved together",
    ),
    "another rank than its config says": (
        halved,
        f"its weights have other shapes than its adapter_config.json and its base give them (size mismatch for {LAYER}"
        ".q_proj.lora_A.default.weight: copying a param with shape torch.Size([4, 96])",
    ),
}


@pytest.mark.parametrize(("change", "words"), UNFIT_ADAPTERS.values(), ids=UNFIT_ADAPTERS.keys())
def test_an_adapter_that_does_not_fit_is_refused_by_name(
    change: Callable[[Weights], Weights], words: str, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfit = rewritten(adapter, tmp_path / "unfit", change)
    monkeypatch.setattr("model_setup.load_qwen25_vl", lambda *args, **kwargs: pytest.fail("a weight was loaded"))
    task = ["--model_id", str(unfit), "--eval_episodes", "4"]
    refusals = []
    for refuses in (
        lambda: training.main([*task, "--use_lora", "--eval_steps", "1", "--dry_run"]),
        lambda: evaluate.main(task),
        lambda: evaluate.main(["--baseline", *task[1:]]),
        lambda: merge_adapter(unfit, tmp_path / "merged"),
        lambda: load_qwen25_vl(str(unfit)),
    ):
        with pytest.raises(ValueError) as refusal:
            refuses()
        refusals.append(str(refusal.value))
        assert words in refusals[-1] and str(unfit) in refusals[-1]
    assert not (tmp_path / "merged").exists()


KINDS = {
    "bias": {"bias": "lora_only", "target_modules": ["q_proj"]},
    "rank-stabilized": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "with whole modules": {"modules_to_save": ["lm_head"]},
    "on the vision side too": {"target_modules": ["qkv", "gate_proj"]},
}


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())
def test_every_kind_of_lora_opens_and_is_refused_without_one_of_its_weights(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = adapter_in(tmp_path / "sound", **settings)
    require_loadable(str(folder))
    names = sorted(load_file(folder / ADAPTER_WEIGHTS))
    # one of each kind: lora_A, lora_B, bias, magnitude, whole module
    one_of_each = {tuple(name.split(".")[-2:]): name for name in names}
    for number, name in enumerate(one_of_each.values()):
        unfit = rewritten(folder, tmp_path / f"unfit-{number}", without(name))
        with pytest.raises(ValueError, match="lack 1 weights"):
            require_loadable(str(unfit))


def test_an_adapter_of_another_kind_is_refused(tmp_path: Path) -> None:
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    get_peft_model(toy_model(), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is of type PeftType.IA3, but Fleet takes LORA; pass a LoRA adapter"):
        load_qwen25_vl(str(tmp_path))


def test_an_adapter_on_the_hub_is_refused_and_not_opened_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_utils, "find_adapter_config_file", lambda model_id, revision: "adapter_config.json")
    with pytest.raises(
        ValueError, match="some/adapter is an adapter on the hub, .*hf download some/adapter --local-dir"
    ):
        load_qwen25_vl("some/adapter")


UNFIT_BASES = {
    "lacks a weight": (without("layers.1.mlp.up_proj"), "lack 1 weights, model.language_model.layers.1.mlp.up_proj"),
    "has one more": (
        with_another("model.layers.9.odd.weight"),
        "have unknown 1 weights, model.language_model.layers.9",
    ),
    "has another shape": (
        lambda weights: weights | {"lm_head.weight": torch.zeros(5, 96)},
        r"lm_head.weight in shape \(5, 96\)",
    ),
}


@pytest.mark.parametrize(("change", "words"), UNFIT_BASES.values(), ids=UNFIT_BASES.keys())
def test_a_model_that_does_not_fit_its_config_is_refused_by_name(
    change: Callable[[Weights], Weights], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfit = rewritten(Path(toy_path()), tmp_path / "unfit", change)
    monkeypatch.setattr("model_setup.load_qwen25_vl", lambda *args, **kwargs: pytest.fail("a weight was loaded"))
    for command in (training, evaluate):
        with pytest.raises(UsageError, match=words):
            command.main(["--model_id", str(unfit)])
    with pytest.raises(ValueError, match=words):
        load_qwen25_vl(str(unfit))


def test_an_index_that_names_a_missing_file_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    shutil.copytree(toy_path(), folder)
    (folder / WEIGHTS).unlink()
    toy_model().save_pretrained(folder, max_shard_size="500KB")
    require_loadable(str(folder))
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[1].unlink()
    with pytest.raises(
        UsageError, match=f"lacks 1 of the {len(shards)} files that its model.safetensors.index.json names"
    ):
        training.main(["--model_id", str(folder)])


@pytest.mark.parametrize("text", ['{"eos_token_id": ', "[]"])
def test_generation_settings_that_are_no_json_are_refused(text: str, tmp_path: Path) -> None:
    folder = shutil.copytree(toy_path(), tmp_path / "model")
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(UsageError, match="generation_config.json .*; restore it"):
        training.main(["--model_id", str(folder)])


def test_nothing_is_read_but_names_and_shapes(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(toy_path(), folder)
    content = bytearray((folder / WEIGHTS).read_bytes())
    # the header stays
    content[-100_000:] = b"\xff" * 100_000
    (folder / WEIGHTS).write_bytes(content)
    require_loadable(str(folder))


@pytest.mark.slow
def test_all_processes_hear_of_an_adapter_that_one_of_them_finds_unfit(adapter: Path, tmp_path: Path) -> None:
    unfit = rewritten(adapter, tmp_path / "unfit", old_names)
    for target, flags in (("training", ["--use_lora", "--train_steps", "1"]), ("evaluate", ["--eval_episodes", "4"])):
        ranks = start_ranks(tmp_path, ["--model_id", str(unfit), *flags], 2, zero3=True, target=target)
        assert [rank.wait() for rank in ranks] == [2, 2]
        (line,) = [line for rank in ranks for line in rank.output.splitlines() if line.startswith("error: ")]
        assert f"error: process 0: model {unfit} cannot be loaded (adapter {unfit}: its files lack 12" in line
