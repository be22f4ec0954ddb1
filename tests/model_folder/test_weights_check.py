"""A model's files hold each weight that the model has, in its shape, and no other; else nothing is loaded."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import evaluate
import model_utils
import training
from fleet.command.preflight import require_model
from fleet.errors import UsageError
from fleet.model_folder.weights import first_weight_not_finite
from fleet.run.results import merge_adapter
from model_utils import load_qwen25_vl, require_loadable
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
    monkeypatch.setattr(
        "fleet.run.model_setup.load_qwen25_vl", lambda *args, **kwargs: pytest.fail("a weight was loaded")
    )
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
    monkeypatch.setattr(
        "fleet.run.model_setup.load_qwen25_vl", lambda *args, **kwargs: pytest.fail("a weight was loaded")
    )
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


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 12345\n"
CUT_OFF: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "in the weights": (lambda whole: whole[:-10], r"has [\d,]+ bytes, but by its header [\d,]+; copy it"),
    "in the header": (lambda whole: whole[:100], "has 100 bytes, which is not even its header; copy it"),
    "in the header's length": (lambda whole: whole[:5], "has 5 bytes, which is not even its header; copy it"),
    "at its beginning": (lambda whole: b"", "has 0 bytes, which is not even its header; copy it"),
    "with more behind it": (lambda whole: whole + b"more", r"has [\d,]+ bytes, but by its header [\d,]+; copy it"),
    "a header of other bytes": (
        lambda whole: whole[:8] + b"x" + whole[9:],
        "has a header that cannot be read; copy it",
    ),
    "a pointer": (lambda whole: LFS_POINTER, "is a pointer of Git LFS, not the weights; run git lfs pull"),
}


@pytest.mark.parametrize(("change", "words"), CUT_OFF.values(), ids=CUT_OFF.keys())
def test_a_download_that_broke_off_is_refused_by_the_name_of_its_file(
    change: Callable[[bytes], bytes], words: str, tmp_path: Path, adapter: Path
) -> None:
    model = shutil.copytree(toy_path(), tmp_path / "model")
    (model / WEIGHTS).unlink()
    toy_model().save_pretrained(model, max_shard_size="2MB")
    second = sorted(model.glob("*.safetensors"))[1]
    own = shutil.copytree(adapter, tmp_path / "adapter")
    for path, model_id in ((second, model), (own / ADAPTER_WEIGHTS, own)):
        require_model(str(model_id))
        path.write_bytes(change(path.read_bytes()))
        with pytest.raises(UsageError, match=f"weights {re.escape(str(path))} {words}"):
            require_model(str(model_id))
    with pytest.raises(UsageError, match=re.escape(str(second))):
        training.main(["--model_id", str(model), "--dry_run"])


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


def with_number(part: str, place: int, number: float) -> Callable[[Weights], Weights]:
    """Sets one number of the first weight whose name has the part."""

    def change(weights: Weights) -> Weights:
        name = next(name for name in sorted(weights) if part in name)
        weights[name].view(-1)[place] = number
        return weights

    return change


NOT_FINITE = {
    "NaN in a vision layer": (
        "visual.blocks.1.attn.qkv.weight",
        0,
        float("nan"),
        "model.visual.blocks.1.attn.qkv.weight",
    ),
    "inf as the last number": ("model.norm.weight", -1, float("inf"), "model.language_model.norm.weight"),
    "-inf in the output layer": (
        "embed_tokens.weight",
        5000,
        float("-inf"),
        "model.language_model.embed_tokens.weight",
    ),
}


@pytest.mark.parametrize(("part", "place", "number", "name"), NOT_FINITE.values(), ids=NOT_FINITE.keys())
def test_a_weight_that_is_not_finite_is_named_before_anything_is_scored_or_trained(
    part: str, place: int, number: float, name: str, tmp_path: Path
) -> None:
    unfit = rewritten(Path(toy_path()), tmp_path / "unfit", with_number(part, place, number))
    commands = [
        lambda: evaluate.main(["--model_id", str(unfit), "--eval_episodes", "4"]),
        lambda: training.main(["--model_id", str(unfit), "--train_steps", "1", "--output_dir", str(tmp_path / "run")]),
    ]
    for command in commands:
        with pytest.raises(UsageError) as refusal:
            command()
        assert str(refusal.value) == (
            f"model {unfit} has weights that are not finite numbers, {name} the first of them, but wanted a model that "
            "can answer; pass another, or a checkpoint from before its training failed"
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_in_each_dtype_is_looked_at(dtype: torch.dtype) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 0), torch.nn.Linear(3, 3)).to(dtype)
    assert first_weight_not_finite(model) is None
    with torch.no_grad():
        model[2].bias[1] = float("nan")
        assert first_weight_not_finite(model) == "2.bias"
        model[0].weight[2, 2] = float("-inf")
        assert first_weight_not_finite(model) == "0.weight"


def test_the_scales_of_4_bit_weights_are_looked_at() -> None:
    model = torch.nn.Linear(4, 4, bias=False)
    model.weight = torch.nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    inner = SimpleNamespace(absmax=torch.ones(1))
    model.weight.quant_state = SimpleNamespace(
        absmax=torch.zeros(1, dtype=torch.uint8), offset=torch.tensor(0.0), state2=inner
    )
    assert first_weight_not_finite(model) is None
    inner.absmax[0] = float("nan")
    assert first_weight_not_finite(model) == "weight"


def test_an_adapters_weight_that_is_not_finite_is_named(adapter: Path, tmp_path: Path) -> None:
    unfit = rewritten(adapter, tmp_path / "unfit", with_number("layers.1.self_attn.v_proj.lora_B", 3, float("nan")))
    with pytest.raises(
        UsageError, match=r"has weights that are not finite numbers, \S+layers.1.self_attn.v_proj.lora_B"
    ):
        evaluate.main(["--model_id", str(unfit), "--eval_episodes", "4"])


@pytest.mark.slow
def test_all_processes_hear_of_a_weight_that_one_of_them_has_a_shard_of(tmp_path: Path) -> None:
    # the second process has the shard with the last number
    change = with_number("visual.blocks.1.attn.qkv.weight", -1, float("nan"))
    unfit = rewritten(Path(toy_path()), tmp_path / "unfit", change)
    for target, flags in (("training", ["--train_steps", "1"]), ("evaluate", ["--eval_episodes", "4"])):
        ranks = start_ranks(tmp_path, ["--model_id", str(unfit), *flags], 2, zero3=True, target=target)
        assert [rank.wait() for rank in ranks] == [2, 2]
        (line,) = [line for rank in ranks for line in rank.output.splitlines() if line.startswith("error: ")]
        assert "model.visual.blocks.1.attn.qkv.weight the first of them" in line
