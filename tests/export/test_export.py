"""export.py on the toy: log-probabilities before and after, what opens the folder, and what its card says."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

import evaluate
import export
import training
from fleet.command.evaluate_options import parse_evaluate_options
from fleet.model_folder.files import read_json
from model_utils import load_qwen25_vl
from tests.export.oracle import HUB_NAMES, logprobs_of, logprobs_T, plain_model
from tests.helpers import toy_path

RUN = ["--fixed_correct_index", "none", "--per_device_batch_size", "2", "--sample_steps", "0", "--train_steps", "3",
       "--save_steps", "2", "--eval_steps", "2", "--eval_episodes", "12", "--keep_best"]  # fmt: skip
FILES = {
    "README.md", "chat_template.jinja", "config.json", "curve.png", "generation_config.json", "model.safetensors",
    "preprocessor_config.json", "processor_config.json", "run_config.json", "tokenizer.json", "tokenizer_config.json",
    "video_preprocessor_config.json",
}  # fmt: skip


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "lora"
    training.main([*RUN, "--use_lora", "--learning_rate", "5e-3", "--output_dir", str(run)])
    export.main([str(run)])
    return run


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "full"
    training.main([*RUN, "--learning_rate", "1e-3", "--output_dir", str(run)])
    export.main([f"--run={run}"])
    return run


def front_matter(folder: Path) -> tuple[dict[str, Any], str]:
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_a_merged_adapter_gives_the_log_probabilities_of_the_adapter_on_its_base(lora: Path) -> None:
    trained = logprobs_T(toy_base(lora), lora / "final")
    exported = logprobs_T(lora / "export")
    torch.testing.assert_close(exported, trained, rtol=0, atol=5e-5)
    assert (trained - logprobs_T(toy_base(lora))).abs().max() > 0.01, "the run changed nothing"


def toy_base(run: Path) -> str:
    return str(read_json(run / "final" / "adapter_config.json")["base_model_name_or_path"])


def test_a_full_fine_tune_keeps_its_bits(full: Path) -> None:
    assert logprobs_T(full / "export").equal(logprobs_T(full / "final"))
    assert not logprobs_T(full / "export").equal(logprobs_T(full / "checkpoint-2"))


def test_a_checkpoint_and_the_best_one_are_exported(full: Path, lora: Path, tmp_path: Path) -> None:
    export.main([str(full), "--checkpoint", "checkpoint-2", "--output", str(tmp_path / "second")])
    assert logprobs_T(tmp_path / "second").equal(logprobs_T(full / "checkpoint-2"))
    best = read_json(full / "checkpoint-3" / "trainer_state.json")["best_global_step"]
    export.main([str(full), "--checkpoint", "best", "--output", str(tmp_path / "best")])
    assert read_json(tmp_path / "best" / "run_config.json")["export"]["step"] == best
    # the folder itself says which run it is of
    export.main([str(lora / "checkpoint-2"), "--output", str(tmp_path / "adapter")])
    trained = logprobs_T(toy_base(lora), lora / "checkpoint-2")
    torch.testing.assert_close(logprobs_T(tmp_path / "adapter"), trained, rtol=0, atol=5e-5)
    assert "for 2 optimizer steps" in (tmp_path / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_folder_has_what_loaders_want(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind) / "export"
    assert {path.name for path in folder.iterdir()} == FILES
    config = read_json(folder / "config.json")
    assert config["architectures"] == ["Qwen2_5_VLForConditionalGeneration"] and config["model_type"] == "qwen2_5_vl"
    assert (config["dtype"], config["use_cache"]) == ("float32", True)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = list(file.keys())
    assert len(names) == 69 and [name for name in names if not HUB_NAMES.fullmatch(name)] == []
    assert read_json(folder / "generation_config.json") == read_json(Path(toy_path()) / "generation_config.json")
    processor, trained = (AutoProcessor.from_pretrained(place) for place in (folder, folder.parent / "final"))
    assert processor.chat_template == trained.chat_template
    assert processor.image_processor.to_dict() == trained.image_processor.to_dict()
    assert processor.tokenizer.get_vocab() == trained.tokenizer.get_vocab()


def test_nothing_of_this_machine_is_in_it(lora: Path) -> None:
    for path in (lora / "export").iterdir():
        if path.suffix in (".md", ".json", ".jinja"):
            text = path.read_text()
            for place in (str(lora.parent), str(Path.cwd()), str(Path.home()), "/cache/"):
                assert place not in text, path.name


def test_the_card_says_how_it_was_made_and_what_was_measured(lora: Path) -> None:
    front, text = front_matter(lora / "export")
    assert front["library_name"] == "transformers" and front["pipeline_tag"] == "image-text-to-text"
    assert "rloo" in front["tags"] and "base_model" not in front, "the toy has no name on the hub"
    final = json.loads((lora / "evaluations.jsonl").read_text().splitlines()[-1])
    accuracy = final["greedy_accuracy"]
    low, high = accuracy["ci95"]
    shown = f"| greedy accuracy | {100 * accuracy['value']:.1f} % ({100 * low:.1f} to {100 * high:.1f}) |"
    for words in (
        shown,
        "`./toy_images`: 12 images, 12 labels",
        "picking one of 4 pictures by its index; one is drawn and named",
        "at most **3,136 pixels**",
        "| `learning_rate` | `0.005` |",
        "first logged step | last logged step",
        "(curve.png)",
        "- the model it began with, on the same episodes",
        f"commit `{read_json(lora / 'config.json')['commit']}`",
    ):
        assert words in text, words


def test_an_evaluation_of_these_weights_is_in_the_card_and_another_is_not(full: Path, tmp_path: Path) -> None:
    run = shutil.copytree(full, tmp_path / "full")
    score = ["--model_id", str(run / "final"), "--baseline", "toy", "--eval_episodes", "16", "--num_samples", "1"]
    evaluate.main([*score, "--output", str(run / "evaluation.json")])
    export.main([str(run), "--overwrite"])
    assert "oftener than toy" in (run / "export" / "README.md").read_text()
    export.main([str(run), "--checkpoint", "checkpoint-2", "--output", str(tmp_path / "other")])
    assert "oftener than toy" not in (tmp_path / "other" / "README.md").read_text()


def test_the_export_is_scored_as_the_run_is(lora: Path, tmp_path: Path) -> None:
    same = ["--eval_episodes", "12", "--eval_seed", "1000000000", "--num_samples", "0"]
    moved = shutil.copytree(lora / "export", tmp_path / "moved")
    last = json.loads((lora / "evaluations.jsonl").read_text().splitlines()[-1])
    for folder in (lora / "export", moved):
        output = tmp_path / f"{folder.name}.json"
        evaluate.main(["--model_id", str(folder), *same, "--output", str(output)])
        document = json.loads(output.read_text())
        assert document["confusion"] == last["confusion"] and document["passed_over"] == last["passed_over"]
        assert parse_evaluate_options(["--model_id", str(folder)]).image_max_pixels == 3136
    training.main([*RUN[:8], "--train_steps", "1", "--model_id", str(moved), "--output_dir", str(tmp_path / "more"),
                   "--image_max_pixels", "3136", "--dry_run"])  # fmt: skip


def test_an_export_of_a_4_bit_run_is_not_scored_in_4_bits(lora: Path, tmp_path: Path) -> None:
    run = shutil.copytree(lora, tmp_path / "qlora")
    config = read_json(run / "config.json")
    config["options"]["load_in_4bit"] = True
    (run / "config.json").write_text(json.dumps(config))
    export.main([str(run), "--overwrite"])
    assert "trained over 4-bit base weights" in (run / "export" / "README.md").read_text()
    assert parse_evaluate_options(["--model_id", str(run / "final")]).load_in_4bit
    assert not parse_evaluate_options(["--model_id", str(run / "export")]).load_in_4bit
    trained = logprobs_T(toy_base(lora), lora / "final")
    torch.testing.assert_close(logprobs_T(run / "export"), trained, rtol=0, atol=5e-5)


def test_rounding_is_measured_and_said(lora: Path, tmp_path: Path) -> None:
    export.main([str(lora), "--dtype", "bfloat16", "--output", str(tmp_path / "half")])
    exported = plain_model(tmp_path / "half", dtype=torch.bfloat16)
    lost = update = 0.0
    adapted, base = plain_model(toy_base(lora), lora / "final").merge_and_unload(), plain_model(toy_base(lora))
    before, after = dict(base.named_parameters()), dict(exported.named_parameters())
    for name, weight in adapted.named_parameters():
        if not weight.equal(before[name]):
            lost += float((after[name].float() - weight).square().sum())
            update += float((weight - before[name]).square().sum())
    text = (tmp_path / "half" / "README.md").read_text()
    (said,) = re.findall(r"changed the adapter's update by ([\d.]+) % of its norm", text)
    assert float(said) == pytest.approx(100 * (lost / update) ** 0.5, abs=0.2)
    assert read_json(tmp_path / "half" / "config.json")["dtype"] == "bfloat16"


KINDS: dict[str, dict[str, Any]] = {
    "attention by name": {"target_modules": ["q_proj", "v_proj"]},
    "every linear layer": {"target_modules": "all-linear"},
    "vision and merger": {"target_modules": ["qkv", "mlp.0", "mlp.2"]},
    "rank-stabilized": {"target_modules": ["q_proj"], "use_rslora": True},
    "DoRA": {"target_modules": ["o_proj"], "use_dora": True},
    "with whole modules": {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]},
    "rank by layer": {"target_modules": ["q_proj", "gate_proj"], "rank_pattern": {"gate_proj": 2}},
    "no task": {"target_modules": ["up_proj"], "task_type": None},
}


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())
def test_an_adapter_from_elsewhere_is_taken_and_exported(settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(toy_path(), dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM"} | settings))
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.1 if "lora_" in name else 0.02)
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)
    expected = logprobs_of(model, toy_path())
    opened, _ = load_qwen25_vl(str(adapter))
    torch.testing.assert_close(logprobs_of(opened, toy_path()), expected, rtol=0, atol=5e-5)
    evaluate.main(["--model_id", str(adapter), "--eval_episodes", "2", "--num_samples", "0", "--image_max_pixels",
                   "3136"])  # fmt: skip
    export.main([str(adapter)])
    torch.testing.assert_close(logprobs_T(adapter / "export"), expected, rtol=0, atol=1e-4)
    if settings == KINDS["attention by name"]:
        # it trains on as well
        flags = ["--use_lora", "--model_id", str(adapter), "--train_steps", "1", "--image_max_pixels", "3136"]
        training.main([*RUN[:6], *flags, "--report_to", "none", "--output_dir", str(tmp_path / "run")])
        assert read_json(tmp_path / "run" / "final" / "adapter_config.json")["r"] == 4
    _, text = front_matter(adapter / "export")
    assert "no run of Fleet left" in text and "- held-out accuracy of these weights" in text
