"""The built-in model: what it can do before training, and that its cache holds whole builds only."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from dataset import RepeatableEpisodeDataset
from environment import Outcome, ParseStatus, PickImageEnv, judge, load_environment_class
from fleet.toy.model import TOY_DATA_ROOT, TOY_IMAGE_PIXELS
from model_utils import decode_completion, end_token_ids, load_processor, load_qwen25_vl
from tests import HANG_S
from tests.helpers import REPOSITORY, fleet_trainer, rloo_config, toy_dataset, toy_model, toy_path, toy_processor

# a build of two steps, printed when done, in a process of its own
BUILD = "from fleet.toy import model; model.RECIPES['plain']['steps'] = 2; print(model.toy_model_path())"


def build_in(cache: Path) -> "subprocess.Popen[str]":
    # one thread, so that two builds add up their sums in the same order
    environment = {**os.environ, "FLEET_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", BUILD], cwd=REPOSITORY, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def test_it_is_a_real_qwen25_vl_with_its_real_processor() -> None:
    assert type(toy_model()) is Qwen2_5_VLForConditionalGeneration
    assert type(toy_processor()) is Qwen2_5_VLProcessor
    assert sum(file.stat().st_size for file in Path(toy_path()).glob("*.safetensors")) < 4 * 2**20
    tokenizer = toy_processor().tokenizer
    text = '<tool_call>\n{"name": "pick_image", "arguments": {"index": 3}}\n</tool_call>'
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


@pytest.mark.parametrize(("candidates", "least"), [(2, 0.3), (4, 0.12), (6, 0.01)])
def test_it_answers_with_calls_whose_index_is_spread(candidates: int, least: float, tmp_path: Path) -> None:
    args = rloo_config(tmp_path, num_generations=16, per_device_train_batch_size=256)
    trainer = fleet_trainer(args, dataset=toy_dataset(candidates, seed=99))
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(16) for _ in range(16)])
    torch.manual_seed(1)
    completions = trainer._draw(batch, None).completion_ids
    ends = end_token_ids(trainer.model)
    judged = [judge(decode_completion(toy_processor(), ids, ends), 0, candidates) for ids in completions]
    shares = Counter(verdict.index for verdict in judged if verdict.outcome in (Outcome.CORRECT, Outcome.WRONG_INDEX))
    assert sum(verdict.parse_status is ParseStatus.OK for verdict in judged) / len(judged) >= 0.93
    for index in range(candidates):
        share = shares[index] / len(judged)
        assert least < share < 2 / candidates, (index, share)


def test_it_answers_any_instruction_with_a_call(tmp_path: Path) -> None:
    trainer = fleet_trainer(rloo_config(tmp_path, num_generations=16, per_device_train_batch_size=128))
    odd_one_out = load_environment_class(f"{REPOSITORY}/examples/odd_one_out.py:OddOneOutEnv")
    for env in (PickImageEnv(TOY_DATA_ROOT, 4, None, seed=3), odd_one_out(TOY_DATA_ROOT, 4, None, seed=3)):
        dataset = RepeatableEpisodeDataset(env, TOY_IMAGE_PIXELS)
        torch.manual_seed(1)
        batch = trainer.data_collator([dataset[i] for i in range(8) for _ in range(16)])
        completions = trainer._draw(batch, None).completion_ids
        ends = end_token_ids(trainer.model)
        statuses = [judge(decode_completion(toy_processor(), ids, ends), 0, 4).parse_status for ids in completions]
        assert statuses.count(ParseStatus.OK) / len(statuses) >= 0.9


@pytest.mark.slow
@pytest.mark.exhaustive  # two ranks with an empty cache do the same in test_distributed.py
def test_two_processes_build_once_and_agree(tmp_path: Path) -> None:
    builders = [build_in(tmp_path), build_in(tmp_path)]
    outputs = [builder.communicate(timeout=HANG_S) for builder in builders]
    assert [builder.returncode for builder in builders] == [0, 0], outputs
    paths = {stdout.strip().splitlines()[-1] for stdout, _ in outputs}
    assert len(paths) == 1
    assert sum("building the toy model" in stderr for _, stderr in outputs) == 1, "one builds while the other waits"
    folder = Path(paths.pop())
    load_qwen25_vl(str(folder))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [folder.name]


@pytest.mark.slow
def test_an_unfinished_build_is_not_taken_for_a_model(tmp_path: Path) -> None:
    done = build_in(tmp_path).communicate(timeout=HANG_S)[0].strip().splitlines()[-1]
    # cloned, because the file that backs them is torn next
    whole = {name: weight.clone() for name, weight in load_file(Path(done) / "model.safetensors").items()}
    os.replace(done, f"{done}.unfinished")
    (Path(f"{done}.unfinished") / "model.safetensors").write_bytes(b"torn")
    again = build_in(tmp_path).communicate(timeout=HANG_S)[0].strip().splitlines()[-1]
    assert again == done
    rebuilt = load_file(Path(again) / "model.safetensors")
    assert whole.keys() == rebuilt.keys()
    assert [name for name in whole if not torch.equal(whole[name], rebuilt[name])] == [], "the recipe decides the bits"
    assert load_processor(again).tokenizer.padding_side == "left"
