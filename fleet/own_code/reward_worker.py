"""The process of a user's reward function: imports the user's file, then answers one call after another.

Its arguments are the descriptor of a socket and the process id of the parent. Over the socket come pickled requests
and go answers, a line of JSON each; the code's own output goes where the parent's goes. Imports no torch by itself.
"""

import contextlib
import importlib.util
import io
import json
import os
import pickle
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict
from types import FrameType, SimpleNamespace
from typing import Any

from fleet.own_code import reward_function
from utils.child_process import end_with_parent


def outlive_signals(numbers: tuple[int, ...]) -> None:
    """Ignores signals that are sent to all, as the parent ends this process. Processes that it starts heed them."""
    own_pid, before = os.getpid(), {number: signal.getsignal(number) for number in numbers}

    def pass_over(number: int, frame: FrameType | None) -> None:
        if os.getpid() != own_pid:
            signal.signal(number, before[number])
            signal.raise_signal(number)

    for number in numbers:
        signal.signal(number, pass_over)


class ColumnUnpickler(pickle.Unpickler):
    """Finds classes of the user's other files (an environment's own episodes) by running the file that has them."""

    def __init__(self, content: bytes, files: dict[str, str]):
        """files: the user's files that the parent has run, by the names of their modules."""
        super().__init__(io.BytesIO(content))
        self.files = files

    def find_class(self, module: str, name: str) -> Any:
        if module in self.files and module not in sys.modules:
            spec = importlib.util.spec_from_file_location(module, self.files[module])
            assert spec is not None and spec.loader is not None
            sys.modules[module] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[module])
        return super().find_class(module, name)


def answer(
    function: Callable[..., Any], request: dict[str, Any], log_history: list[dict[str, Any]]
) -> reward_function.CheckedRewards:
    """The function's values; each entry of a column is a copy of its own. log_history: of the last call; kept up."""
    name, completions = reward_function.name_of(function), request["completions"]
    try:
        columns: dict[str, Any] = {
            key: [ColumnUnpickler(entry, request["files"]).load() for entry in entries]
            for key, entries in request["columns"].items()
        }
    except BaseException as error:
        return reward_function.broken(name, len(completions), reward_function.cannot_cross(error))
    if "trainer_state" in request:
        log_history[request["num_logs_before"] :] = request["new_logs"]
        columns["trainer_state"] = SimpleNamespace(**request["trainer_state"], log_history=log_history)
    return reward_function.checked_call(function, name, completions, columns)


def main() -> None:
    """Imports the file that the first request names, reports the result, and answers calls until the parent closes."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    end_with_parent(int(sys.argv[2]))
    outlive_signals((signal.SIGINT, signal.SIGTERM))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    reader = connection.makefile("rb")
    first = pickle.load(reader)
    sys.path[:] = first["path"]
    try:
        function = reward_function.load_reward_function(first["spec"])
    except BaseException as error:
        failed = f"reward={first['spec']} failed with {reward_function.describe_error(error)}; correct it"
        problem = str(error) if isinstance(error, ValueError) else failed
        send_answer(connection, {"problem": " ".join(problem.split())})
        return
    send_answer(connection, {"problem": None, "name": reward_function.name_of(function)})
    log_history: list[dict[str, Any]] = []
    while True:
        try:
            request = pickle.load(reader)
        except (EOFError, pickle.UnpicklingError, ConnectionError):
            return
        rewards = answer(function, request, log_history)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        send_answer(connection, asdict(rewards))


def send_answer(connection: socket.socket, answer: dict[str, Any]) -> None:
    """Sends an answer as a line of JSON, which the parent reads without running the user's code."""
    connection.sendall(json.dumps(answer).encode() + b"\n")
