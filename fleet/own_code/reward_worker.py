"""Run as the process of a user's reward function: imports the user's file, then answers one call after another.

    python reward_worker.py <descriptor of a socket> <process id of the parent>

The user's code runs in the main thread of a process that has no other, as ordinary code does. Requests and answers
are frames on the socket; what the code prints goes to the parent's own output. Imports no torch by itself.
"""

import contextlib
import importlib.util
import io
import json
import os
import pickle
import signal
import socket
import struct
import sys
from collections.abc import Callable
from dataclasses import asdict
from types import FrameType, SimpleNamespace
from typing import Any

from fleet.own_code.reward_function import (
    CheckedRewards,
    broken,
    checked_call,
    describe_error,
    load_reward_function,
    name_of,
)
from utils.child_process import end_with_parent

FRAME_HEAD = struct.Struct("!Q")


def send_frame(connection: socket.socket, content: bytes) -> None:
    """Sends one frame: its length, then its bytes."""
    connection.sendall(FRAME_HEAD.pack(len(content)))
    connection.sendall(content)


def receive_frame(read: Callable[[int], bytes]) -> bytes:
    """The next frame. read: gives as many bytes as asked for, or fewer at the end. Raises EOFError there."""
    head = read(FRAME_HEAD.size)
    if len(head) < FRAME_HEAD.size:
        raise EOFError
    (length,) = FRAME_HEAD.unpack(head)
    content = read(length)
    if len(content) < length:
        raise EOFError
    return content


def outlive_signals(numbers: tuple[int, ...]) -> None:
    """Passes over signals that a terminal or a scheduler sends to all: the parent decides when this process ends.

    Processes that the user's code starts keep their usual ways, so they can be terminated.
    """
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
        """files: by the name of its module, each of the user's files that the parent has run."""
        super().__init__(io.BytesIO(content))
        self.files = files

    def find_class(self, module: str, name: str) -> Any:
        """The class of that name."""
        if module in self.files and module not in sys.modules:
            spec = importlib.util.spec_from_file_location(module, self.files[module])
            assert spec is not None and spec.loader is not None
            sys.modules[module] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[module])
        return super().find_class(module, name)


class Worker:
    """Answers calls of one reward function."""

    def __init__(self, function: Callable[..., Any], files: dict[str, str]):
        self.function, self.files = function, files
        self.log_history: list[dict[str, Any]] = []

    def answer(self, request: dict[str, Any]) -> CheckedRewards:
        """The function's values; each entry of a column is a copy of its own."""
        name, completions = name_of(self.function), request["completions"]
        try:
            columns: dict[str, Any] = {
                key: [ColumnUnpickler(entry, self.files).load() for entry in entries]
                for key, entries in request["columns"].items()
            }
        except BaseException as error:
            reason = f"cannot be given its columns: {describe_error(error)}; let episodes hold plain data"
            return broken(name, len(completions), reason)
        if request["trainer_state"] is not None:
            del self.log_history[request["num_logs_before"] :]
            self.log_history += request["new_logs"]
            columns["trainer_state"] = SimpleNamespace(**request["trainer_state"], log_history=self.log_history)
        return checked_call(self.function, name, completions, columns)


def main() -> None:
    """Imports the file that the first frame names, says what came of it, and answers calls until the parent closes."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    end_with_parent(int(sys.argv[2]))
    outlive_signals((signal.SIGINT, signal.SIGTERM))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True, errors="backslashreplace")
    reader = connection.makefile("rb")
    first = pickle.loads(receive_frame(reader.read))
    sys.path[:] = first["path"]
    try:
        worker = Worker(load_reward_function(first["spec"]), first["files"])
    except BaseException as error:
        failed = f"reward={first['spec']} failed with {describe_error(error)}; correct it"
        problem = str(error) if isinstance(error, ValueError) else failed
        send_frame(connection, json.dumps({"problem": " ".join(problem.split())}).encode())
        return
    send_frame(connection, json.dumps({"problem": None, "name": name_of(worker.function)}).encode())
    while True:
        try:
            request = pickle.loads(receive_frame(reader.read))
        except (EOFError, ConnectionError):
            return
        rewards = worker.answer(request)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        send_frame(connection, json.dumps(asdict(rewards)).encode())
