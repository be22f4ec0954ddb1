"""No file runs code as it is loaded, and nothing leaves the machine unasked."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fleet.command.options import parse_options
from fleet.errors import UsageError
from fleet.rl.checkpoints import ProcessPlace
from fleet.rl.resumable_trainer import nothing_unpickled_unless, require_plain_pickles
from model_utils import load_processor, load_qwen25_vl
from tests import HANG_S
from tests.helpers import REPOSITORY, toy_path
from tests.processes import run_ranks, start_ranks
from tests.test_resume import QUICK, seal


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def plant(path: Path, payload: Path) -> None:
    """Puts code into a file that torch.save wrote, beside what it holds."""
    content = torch.load(path, weights_only=False)
    torch.save({**content, "planted": Payload(payload)} if isinstance(content, dict) else Payload(payload), path)


@pytest.fixture(scope="module")
def zero3_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    run_ranks(folder, [*QUICK, "--output_dir", str(folder / "run"), "--train_steps", "1"], 2, zero3=True)
    return folder / "run"


@pytest.mark.slow
def test_code_in_any_file_that_a_resume_unpickles_is_found_before_it_is_loaded(zero3_run: Path, tmp_path: Path) -> None:
    checkpoint = zero3_run / "checkpoint-1"
    require_plain_pickles(checkpoint, ProcessPlace())
    names = [path.relative_to(checkpoint) for path in checkpoint.rglob("*.p*t*") if path.suffix in (".pt", ".pth")]
    assert len(names) == 7, "four of ZeRO-3's, the schedule, two states of randomness"
    for number, name in enumerate(names):
        copy = shutil.copytree(checkpoint, tmp_path / str(number))
        plant(copy / name, tmp_path / "payload")
        assert (tmp_path / "payload").is_dir() is False
        with pytest.raises(UsageError, match="would run code as it is loaded, or cannot be read .it names posix.mkdir"):
            require_plain_pickles(copy, ProcessPlace())
        with nothing_unpickled_unless(False), pytest.raises(pickle.UnpicklingError):
            torch.load(copy / name, weights_only=False)
        assert not (tmp_path / "payload").exists()


def test_what_torch_did_not_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "optimizer.pt").write_bytes(pickle.dumps(Payload(tmp_path / "payload")))
    with pytest.raises(UsageError, match=r"optimizer.pt would run code as it is loaded, or cannot be read"):
        require_plain_pickles(tmp_path, ProcessPlace())
    assert not (tmp_path / "payload").exists()


@pytest.mark.slow
def test_all_ranks_refuse_code_that_one_would_load_and_run_it_only_if_told_to(zero3_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(zero3_run, tmp_path / "run")
    path = run / "checkpoint-1" / "global_step1" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    plant(path, tmp_path / "payload")
    seal(run / "checkpoint-1")
    arguments = [*QUICK, "--output_dir", str(run), "--train_steps", "2", "--resume"]
    ranks = start_ranks(tmp_path, arguments, 2, zero3=True)
    assert [rank.wait() for rank in ranks] == [2, 2]
    assert f"{path} would run code as it is loaded" in ranks[0].output
    assert "pass --trust_checkpoint" in ranks[0].output
    assert not (tmp_path / "payload").exists()
    run_ranks(tmp_path, [*arguments, "--trust_checkpoint"], 2, zero3=True)
    assert (tmp_path / "payload").exists(), "the payload works, so that its absence above means something"


def test_code_that_a_model_brings_is_not_run(tmp_path: Path) -> None:
    model = shutil.copytree(toy_path(), tmp_path / "model")
    (model / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'payload')!r})\nclass Evil: pass\n")
    for name, entry in (
        ("config.json", {"AutoConfig": "evil.Evil", "AutoModelForImageTextToText": "evil.Evil"}),
        ("processor_config.json", {"AutoProcessor": "evil.Evil"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}),
    ):
        content = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps({**content, "auto_map": entry}))
    load_qwen25_vl(str(model))
    load_processor(str(model))
    assert not (tmp_path / "payload").exists()


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    model = shutil.copytree(toy_path(), tmp_path / "model")
    (model / "model.safetensors").unlink()
    torch.save({"planted": Payload(tmp_path / "payload")}, model / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        load_qwen25_vl(str(model))
    assert not (tmp_path / "payload").exists()


# --- nothing leaves the machine ---------------------------------------------------------------------------------------

# an audit hook cannot be taken off, and sees every socket that Python makes
BLOCKED = """
import os, sys
log = open({log!r}, "a")
def block(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        target = arguments[0]
    elif event in ("socket.connect", "socket.sendto", "socket.bind"):
        target = arguments[1][0] if isinstance(arguments[1], tuple) else "unix:" + str(arguments[1])
    else:
        return
    print(event, target, file=log, flush=True)
    if target not in (None, "", "localhost", "127.0.0.1", "::1") and not str(target).startswith("unix:"):
        raise RuntimeError(f"{{event}} {{target}}: nothing may leave the machine")
sys.addaudithook(block)
import runpy
sys.argv = {argv!r}
runpy.run_path({script!r}, run_name="__main__")
"""


def run_blocked(script: str, arguments: list[str], log: Path, **variables: str) -> "subprocess.CompletedProcess[str]":
    code = BLOCKED.format(log=str(log), argv=[script, *arguments], script=script)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "DO_NOT_TRACK"))}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env=environment | variables | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, timeout=HANG_S,
    )  # fmt: skip


@pytest.mark.slow
def test_a_run_and_its_evaluation_open_no_connection(tmp_path: Path) -> None:
    log = tmp_path / "sockets"
    log.touch()
    flags = ["--per_device_batch_size", "2", "--train_steps", "1", "--output_dir", str(tmp_path / "run")]
    done = run_blocked("training.py", [*flags, "--eval_steps", "1", "--eval_episodes", "4"], log)
    assert done.returncode == 0, done.stderr[-3000:]
    assert log.read_text() == ""


@pytest.mark.slow
def test_offline_a_hub_model_opens_no_connection_and_online_it_would(tmp_path: Path) -> None:
    flags = ["--model_id", "Qwen/no-such-model", "--output_dir", str(tmp_path / "run")]
    offline, online = tmp_path / "offline", tmp_path / "online"
    for log in (offline, online):
        log.touch()
    assert run_blocked("training.py", flags, offline, HF_HUB_OFFLINE="1").returncode == 2
    assert offline.read_text() == ""
    assert run_blocked("training.py", flags, online).returncode != 0
    assert "huggingface.co" in online.read_text(), "the hook sees what a download does"


def test_vllm_is_asked_for_on_this_machine() -> None:
    assert parse_options([]).vllm_server_host == "127.0.0.1"
