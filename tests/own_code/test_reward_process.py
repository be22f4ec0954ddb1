"""A user's reward function in its own process: what works there, what it is given, and how its process ends."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from environment import Episode, load_environment_class
from fleet.command.options import parse_options
from fleet.command.preflight import own_reward
from fleet.errors import UsageError
from fleet.own_code.reward_process import RewardProcess
from tests import HANG_S

pytestmark = pytest.mark.fast

REPOSITORY = Path(__file__).resolve().parents[2]

REWARD_FILE = """
import os, re, signal, sqlite3, sys, threading, time

DB = sqlite3.connect(":memory:")
calls = 0

def alarm(completions, **columns):
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.alarm(5)
    signal.alarm(0)
    return [1.0] * len(completions)

def database(completions, **columns):
    return [DB.execute("select 2").fetchone()[0]] * len(completions)

def counts(completions, **columns):
    global calls
    calls += 1
    print("call", calls)
    print("caf\\u00e9", calls, file=sys.stderr)
    return [calls] * len(completions)

def is_alone(completions, **columns):
    is_main = threading.current_thread() is threading.main_thread() and threading.active_count() == 1
    return [is_main and "torch" not in sys.modules] * len(completions)

def greedy(completions, prompts, episode, completion_ids, trainer_state, **columns):
    completions.clear()
    for prompt in prompts:
        prompt.append("more")
    for found in episode:
        found.messages[0]["role"] = "changed"
    os.chdir("/")
    return [len(prompt) for prompt in prompts]

def looks(episode, **columns):
    return [found.images[0].getpixel((0, 0))[0] + found.bonus for found in episode]

def reads_state(trainer_state, completions, **columns):
    return [trainer_state.global_step + 10 * len(trainer_state.log_history)] * len(completions)

def own_pid(completions, **columns):
    return [os.getpid()] * len(completions)

def hangs(**columns):
    time.sleep(3600)

def hangs_once(completions, **columns):
    if not os.path.exists(__file__ + ".seen"):
        open(__file__ + ".seen", "w").close()
        time.sleep(3600)
    return [1.0] * len(completions)

def holds_the_lock(**columns):
    re.match("(a*)*b", "a" * 60)

def leaves(**columns):
    os._exit(3)

def crashes(**columns):
    os.kill(os.getpid(), signal.SIGSEGV)

def is_killed(**columns):
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def open_reward(tmp_path: Path) -> Iterator[Callable[..., RewardProcess]]:
    path = tmp_path / "own.py"
    path.write_text(REWARD_FILE, encoding="utf-8")
    with contextlib.ExitStack() as stack:
        yield lambda name, timeout_s=HANG_S: stack.enter_context(
            contextlib.closing(RewardProcess(f"{path}:{name}", timeout_s))
        )


def episode(**changes: Any) -> Episode:
    plain = Episode((Path("a.png"), Path("b.png")), ({"role": "user"},), 0, ("a", "b"), None, 0)
    return replace(plain, **changes)


@pytest.mark.parametrize(("name", "values"), [("alarm", [1, 1]), ("database", [2, 2]), ("is_alone", [1, 1])])
def test_a_function_runs_as_ordinary_code_does(name: str, values: list[float], open_reward: Any) -> None:
    reward = open_reward(name)
    assert reward.__name__ == name
    assert reward(["a", "b"]).values == values


def test_a_module_keeps_its_state_and_what_it_prints_is_the_runs_output(
    open_reward: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    reward = open_reward("counts")
    assert [reward(["a"]).values for _ in range(3)] == [[1.0], [2.0], [3.0]]
    printed = capfd.readouterr()
    assert printed.out == "call 1\ncall 2\ncall 3\n"
    assert [line.split()[1] for line in printed.err.splitlines()] == ["1", "2", "3"]


def test_what_a_function_changes_is_its_own(open_reward: Any) -> None:
    texts, prompt, shown, before = ["a", "b"], [{"role": "user"}], episode(), Path.cwd()
    columns = {"prompts": [prompt, prompt], "episode": [shown, shown], "completion_ids": [[1], [2]]}
    state = SimpleNamespace(global_step=1, log_history=[])
    assert open_reward("greedy")(texts, **columns, trainer_state=state).values == [2.0, 2.0]
    assert (texts, prompt) == (["a", "b"], [{"role": "user"}])
    assert (shown.messages, Path.cwd()) == (({"role": "user"},), before)


ENV_FILE = """
from dataclasses import dataclass
from environment import Episode, PickImageEnv

@dataclass(frozen=True)
class Bonus(Episode):
    bonus: int = 7

class Env(PickImageEnv):
    pass
"""


def test_pictures_in_memory_and_classes_of_an_environments_file_cross(tmp_path: Path, open_reward: Any) -> None:
    (tmp_path / "env.py").write_text(ENV_FILE)
    env_class = load_environment_class(f"{tmp_path / 'env.py'}:Env")
    bonus_class = vars(sys.modules[env_class.__module__])["Bonus"]
    picture = Image.new("RGB", (4, 4), (200, 0, 0))
    shown = bonus_class((picture, picture), (), 0, ("a", "b"), None, 0)
    assert open_reward("looks")(["a", "b"], episode=[shown, shown]).values == [207.0, 207.0]


def test_what_cannot_cross_is_told_in_one_line(open_reward: Any) -> None:
    shown = episode(messages=({"role": lambda: None},))
    problem = open_reward("looks")(["a"], episode=[shown]).problem
    assert problem is not None and "\n" not in problem
    assert problem.startswith("reward function looks cannot be given its columns: ")


def test_the_log_crosses_as_it_grows_and_as_it_was_after_a_resume(open_reward: Any) -> None:
    reward, values = open_reward("reads_state"), []
    for step, num_logs in ((1, 0), (2, 1), (3, 3), (3, 3), (2, 1), (9, 8)):
        state = SimpleNamespace(global_step=step, log_history=[{"loss": 0.0}] * num_logs)
        values += reward(["a"], trainer_state=state).values
    assert values == [1, 12, 33, 33, 12, 89]


@pytest.mark.parametrize(
    ("name", "timeout_s", "words"),
    [
        ("hangs", 0.3, "did not return within 0.3 s; mend it, or raise --reward_timeout_s"),
        ("holds_the_lock", 0.3, "did not return within 0.3 s; mend it, or raise --reward_timeout_s"),
        ("leaves", HANG_S, "ended its process with exit code 3; let it return its values, or raise an exception"),
        ("crashes", HANG_S, "was ended in its process by SIGSEGV; correct it"),
        ("is_killed", HANG_S, "was ended in its process by SIGKILL, as when memory runs out; correct it"),
    ],
)
def test_a_process_that_hangs_or_ends_is_broken_and_starts_again(
    name: str, timeout_s: float, words: str, open_reward: Any
) -> None:
    reward = open_reward(name, timeout_s)
    # the second time in a new process
    assert [reward(["a", "b"]).problem for _ in range(2)] == [f"reward function {name} {words}"] * 2


def test_after_a_hang_the_next_call_is_answered_by_a_new_process(open_reward: Any) -> None:
    reward = open_reward("hangs_once", 0.3)
    assert "did not return within 0.3 s" in reward(["a", "b"]).problem
    reward.timeout_s = HANG_S
    assert reward(["a", "b"]).values == [1.0, 1.0]


FAILING_FILES = {
    "leaves as it is run": ("import os; os._exit(7)", "ended its process with exit code 7"),
    "has no words": ("class E(Exception):\n    def __str__(self): raise OSError\nraise E", "OSError"),
    "is interrupted": ("raise KeyboardInterrupt", "KeyboardInterrupt"),
}


@pytest.mark.parametrize(("text", "words"), FAILING_FILES.values(), ids=FAILING_FILES.keys())
def test_a_file_that_ends_its_process_is_refused(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(text)
    with pytest.raises(UsageError) as refusal:
        own_reward(parse_options(["--reward", f"{path}:score"]))
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_does_not_end_the_process_before_its_parent_does(number: int, open_reward: Any) -> None:
    reward = open_reward("own_pid")
    (pid,) = reward(["a"]).values
    os.kill(int(pid), number)
    assert reward(["a"]).values == [pid]


PARENT = """
import sys, time
from fleet.own_code.reward_process import RewardProcess
reward = RewardProcess(sys.argv[1], 3600)
print(int(reward(["a"]).values[0]) if sys.argv[1].endswith("own_pid") else reward._process.pid, flush=True)
reward(["a"])
time.sleep(3600)
"""


@pytest.mark.parametrize("name", ["own_pid", "hangs", "holds_the_lock"])
def test_the_process_ends_when_its_parent_is_killed_whatever_it_does(name: str, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(REWARD_FILE, encoding="utf-8")
    command = [sys.executable, "-c", PARENT, f"{tmp_path / 'own.py'}:{name}"]
    parent = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert is_running(pid)
    parent.kill()
    parent.wait()
    deadline_s = time.monotonic() + HANG_S
    while is_running(pid):
        assert time.monotonic() < deadline_s, "the function's process outlives the run"
        time.sleep(0.01)
    parent.stdout.close()
