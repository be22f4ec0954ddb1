"""RewardProcess: a user's reward function in a process of its own, asked by this one.

There the function runs as ordinary code does: in a main thread, in its own working directory, beside no model. It gets
copies of its arguments. Its process is ended where it hangs, and ends with this process in every case. Owns the asking;
reward_worker.py owns the work in that process. Imports no torch.
"""

import atexit
import contextlib
import json
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from fleet.own_code.reward_function import CheckedRewards, broken, cannot_cross
from utils.child_process import command_of

LOOK_S = 0.2  # a process that is gone, and whose socket others still hold, is noticed after this
END_S = 5.0  # a function's process may tidy up for so long at the end of the run
USER_MODULES = "fleet_"  # utils/user_files.py begins the names of modules so


class RewardProcess:
    """The function that `path/to/file.py:function` names, as a reward that always answers in time.

    Its process starts with this object. After it was ended, the next call starts another, with a fresh module.
    """

    def __init__(self, spec: str, timeout_s: float = 60.0):
        """Runs the file, however long it takes. timeout_s: of one call. Raises ValueError as load_reward_function."""
        self.spec, self.timeout_s = spec, timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._owner_pid = os.getpid()
        self.__name__ = self._start()
        atexit.register(self.close)

    def __call__(self, completions: Sequence[str], **columns: Any) -> CheckedRewards:
        """The function's values for B completions, in about `timeout_s`. Never raises. columns: the other KEYWORDS."""
        try:
            if self._process is None:
                self._start()
            request = self._request(completions, columns)
        except Exception as error:
            return broken(self.__name__, len(completions), cannot_cross(error))
        answer = self._ask(request, self.timeout_s)
        if isinstance(answer, str):
            self._end(0)
            return broken(self.__name__, len(completions), answer)
        return CheckedRewards(**answer)

    def close(self) -> None:
        """Ends the process, which may tidy up for a few seconds."""
        # a process forked from this one has the object, but not the child
        if os.getpid() == self._owner_pid:
            self._end(END_S)

    def _start(self) -> str:
        """Starts the process and has it run the file. Returns the function's name. Raises ValueError if that fails."""
        self._connection, worker_end = socket.socketpair()
        with worker_end:
            self._process = subprocess.Popen(
                command_of("fleet.own_code.reward_worker", worker_end.fileno(), os.getpid()),
                stdin=subprocess.DEVNULL,
                pass_fds=[worker_end.fileno()],
                # a terminal or a launcher signals this process's group, and does not mean the function
                process_group=0,
            )
        self._reader = self._connection.makefile("rb")
        self._num_logs_sent = 0
        answer = self._ask(pickle.dumps({"spec": self.spec, "path": sys.path}), None)
        if isinstance(answer, str):
            answer = {"problem": f"reward={self.spec} {answer}"}
        if answer["problem"] is not None:
            self._end(0)
            raise ValueError(answer["problem"])
        return str(answer["name"])

    def _request(self, completions: Sequence[str], columns: dict[str, Any]) -> bytes:
        state = columns.pop("trainer_state", None)
        # siblings share one prompt: pickled once, and unpickled once an entry
        entries = {id(entry): entry for column in columns.values() for entry in column}
        pickled = {key: pickle.dumps(entry) for key, entry in entries.items()}
        # the environment's file is run after the reward's
        modules = [(name, getattr(module, "__file__", None)) for name, module in list(sys.modules.items())]
        request: dict[str, Any] = {
            "files": {name: file for name, file in modules if name.startswith(USER_MODULES) and file},
            "completions": list(completions),
            "columns": {key: [pickled[id(entry)] for entry in column] for key, column in columns.items()},
        }
        if state is not None:
            fields = dict(vars(state))
            logs = fields.pop("log_history", [])
            # the log grows with the run, so only what is new of it crosses
            first = self._num_logs_sent if self._num_logs_sent <= len(logs) else 0
            self._num_logs_sent = len(logs)
            request |= {"trainer_state": fields, "num_logs_before": first, "new_logs": logs[first:]}
        return pickle.dumps(request)

    def _ask(self, request: bytes, timeout_s: float | None) -> dict[str, Any] | str:
        """The answer to a request; in words, why there is none."""
        assert self._process is not None
        waited_s = 0.0
        try:
            self._connection.settimeout(timeout_s)
            self._connection.sendall(request)
            self._connection.settimeout(None)
            while not select.select([self._connection], [], [], LOOK_S)[0]:
                # a look counts as it should last: in a longer one this process was stopped itself
                waited_s += LOOK_S
                if timeout_s is not None and waited_s >= timeout_s:
                    raise TimeoutError
                if self._process.poll() is not None:
                    return self._end_in_words()
            return dict(json.loads(self._reader.readline()))
        except TimeoutError:
            return f"did not return within {timeout_s:g} s; mend it, or raise --reward_timeout_s"
        # ValueError: the line is empty or cut off
        except (ValueError, OSError):
            return self._end_in_words()

    def _end_in_words(self) -> str:
        assert self._process is not None
        try:
            code = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            return "closed the socket to its process; let the descriptors that it did not open be"
        if code >= 0:
            return f"ended its process with exit code {code}; let it return its values, or raise an exception"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        why = ", as when memory runs out" if -code == signal.SIGKILL else ""
        return f"was ended in its process by {name}{why}; correct it"

    def _end(self, timeout_s: float) -> None:
        """Ends the process, which may tidy up for so long (0: at once), and those that it has started in its group."""
        process, self._process = self._process, None
        if process is None:
            return
        self._connection.close()
        self._reader.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


start_reward = lru_cache(RewardProcess)  # gives the one RewardProcess of a function and time limit
