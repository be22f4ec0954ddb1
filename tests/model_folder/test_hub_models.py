"""What a hub says of a model is heard before anything is fetched, and no answer stops no run."""

import json
import logging
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from huggingface_hub import constants

from fleet.errors import UsageError
from fleet.model_folder.hub import require_qwen_on_hub

MODELS = {
    "Qwen/Qwen2.5-VL-3B-Instruct": {"model_type": "qwen2_5_vl"},
    "Qwen/Qwen3-VL-8B-Instruct": {"model_type": "qwen3_vl"},
    "someone/an-adapter": {"peft": {"task_type": "CAUSAL_LM"}},
    "someone/no-config": None,
}


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub's API does, for the models above."""

    def do_GET(self) -> None:
        name = self.path.split("?")[0].removeprefix("/api/models/").split("/revision/")[0]
        if name in MODELS:
            status, content = 200, {"id": name, "config": MODELS[name], "siblings": []}
        else:
            status, content = 404, {"error": "Repository not found"}
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    # whoever runs the tests may have asked for the hub to be left alone
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_qwen_is_sound_and_nothing_is_said(hub: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fleet"):
        require_qwen_on_hub("Qwen/Qwen2.5-VL-3B-Instruct", endpoint=hub)
        require_qwen_on_hub("Qwen/Qwen2.5-VL-3B-Instruct", "a-branch", endpoint=hub)
    assert caplog.messages == []


def test_another_kind_of_model_is_refused(hub: str) -> None:
    with pytest.raises(UsageError, match=r"Qwen/Qwen3-VL-8B-Instruct on the hub is a qwen3_vl, but Fleet trains"):
        require_qwen_on_hub("Qwen/Qwen3-VL-8B-Instruct", endpoint=hub)


def test_a_model_that_the_hub_has_not_is_refused(hub: str) -> None:
    with pytest.raises(UsageError, match=r"Qwen/Qwen2.5-VL-4B: the hub shows you no such model; correct --model_id"):
        require_qwen_on_hub("Qwen/Qwen2.5-VL-4B", endpoint=hub)
    with pytest.raises(UsageError, match="no such model at revision v2"):
        require_qwen_on_hub("Qwen/Qwen2.5-VL-4B", "v2", endpoint=hub)


@pytest.mark.parametrize("model_id", ["someone/an-adapter", "someone/no-config"])
def test_a_model_whose_kind_is_not_named_is_said(hub: str, model_id: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fleet"):
        require_qwen_on_hub(model_id, endpoint=hub)
    assert f"{model_id} could not be asked whether it is a Qwen2.5-VL (the hub does not name its type)" in caplog.text


def test_a_hub_that_does_not_answer_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    with caplog.at_level(logging.INFO, logger="fleet"):
        require_qwen_on_hub("Qwen/Qwen2.5-VL-3B-Instruct", endpoint=nobody)
    assert "could not be asked whether it is a Qwen2.5-VL (" in caplog.text and "checked as it loads" in caplog.text
