"""An environment given by --env is tried before a weight loads: its constructor, its methods, and that it is pure."""

from pathlib import Path

import pytest

from fleet.command import preflight
from fleet.command.options import own_code, parse_options
from fleet.errors import UsageError
from fleet.run.config import sha256_of_imported_files, what_changed_since
from tests.helpers_env import write_env

pytestmark = pytest.mark.fast


def checked(env: str, *flags: str) -> object:
    """The environment that is found sound."""
    return preflight.check_before_loading(parse_options(["--env", env, *flags]), {}).env


def refusal(env: str, *flags: str) -> str:
    with pytest.raises(UsageError) as refused:
        checked(env, *flags)
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith(f"env={env}")
    return str(refused.value)


CONSTRUCTORS = {
    "none": "",
    "no parameters": "def __init__(self): self.given = {}",
    "two": "def __init__(self, seed, data_root): self.given = {'seed': seed, 'data_root': data_root}",
    "further ones with defaults": "def __init__(self, seed, *, table=3): self.given = {'seed': seed}",
    "any": "def __init__(self, **given): self.given = given",
}


@pytest.mark.parametrize("constructor", CONSTRUCTORS.values(), ids=CONSTRUCTORS.keys())
def test_a_constructor_is_given_by_name_what_it_takes(constructor: str, tmp_path: Path) -> None:
    env = checked(write_env(tmp_path, constructor), "--seed", "5", "--data_root", "somewhere")
    every = {"data_root": "somewhere", "candidates_per_episode": 4, "fixed_correct_index": 0, "seed": 5,
             "allow_reasoning": False}  # fmt: skip
    given = getattr(env, "given", {})
    assert given == {name: every[name] for name in given}
    assert len(given) == {"": 0}.get(constructor, 5 if "**" in constructor else constructor.count("': "))


REFUSED_CONSTRUCTORS = {
    "a needed parameter": (
        "def __init__(self, seed, table, width=2): ...",
        "its constructor needs table, but is given",
    ),
    "a parameter without name": ("def __init__(self, seed, /): ...", "its constructor needs seed, but is given"),
    "an error": ("def __init__(self): raise ValueError('no\\n table')", "no table (its constructor raised ValueError)"),
    "a mistake": ("def __init__(self): {}['table']", "failed with KeyError: 'table'; correct it"),
    "an exit": ("def __init__(self): raise SystemExit(3)", "failed with SystemExit: 3; correct it"),
}


@pytest.mark.parametrize(("body", "words"), REFUSED_CONSTRUCTORS.values(), ids=REFUSED_CONSTRUCTORS.keys())
def test_a_constructor_that_cannot_be_called_is_refused(body: str, words: str, tmp_path: Path) -> None:
    assert words in refusal(write_env(tmp_path, body))


METHODS = {
    "no index": ("def episode(self): ...", "episode() cannot be called as episode(index)"),
    "two numbers": ("def episode(self, a, b): ...", "episode(a, b) cannot be called as episode(index)"),
    "by name": ("def episode(self, *, index): ...", "episode(*, index) cannot be called as episode(index)"),
    "messages of nothing": ("def prompt_messages(self): ...", "cannot be called as prompt_messages(episode)"),
    "a dict": ("def episode(self, index): return {'images': 1}", "episode 0: episode() returned {'images': 1} (dict)"),
    "a generator": ("def episode(self, index): yield 1", "(generator), but wanted an Episode"),
    "nothing": (
        "def episode(self, index): ...",
        "episode 0: episode() returned None (NoneType), but wanted an Episode",
    ),
    "a mistake": ("def episode(self, index): return [][index]", "episode 0 failed with IndexError: list index out"),
    "a later mistake": ("def change(self, index): return {'seed': [0][index]}", "episode 1 failed with IndexError"),
    "an exit": ("def episode(self, index): raise SystemExit('bye')", "episode 0 failed with SystemExit: bye"),
    "a narrow picture": (
        "def change(self, index): return {'images': [Image.new('L', (400, 1))] * 3}",
        "image given by the environment is 400x1 pixels, narrower than 1:200",
    ),
    "a file that is not there": (
        "def change(self, index): return {'images': ['gone.png'] * 3}",
        "image gone.png cannot be read (No such file or directory)",
    ),
    "drafts of no text": (
        "def drafts(self, episode): return [7]",
        "drafts() returned [7] (list), but wanted a list of",
    ),
    "drafts that fail": ("def drafts(self, episode): open('gone')", "the drafts failed with FileNotFoundError"),
    "messages of one order": (
        "def prompt_messages(self, episode):\n        assert episode.labels[0] == 'a'\n"
        "        return super().prompt_messages(episode)",
        "the episode of control permuted_order failed with AssertionError",
    ),
}


@pytest.mark.parametrize(("body", "words"), METHODS.values(), ids=METHODS.keys())
def test_what_the_first_episodes_show_to_be_wrong_is_refused(body: str, words: str, tmp_path: Path) -> None:
    assert words in refusal(write_env(tmp_path, body))


AGAIN, ELSEWHERE = "changed when asked for again", "changed when asked of another instance, built alike"
IMPURE = {
    "the module's generator": (
        "def change(self, index): return {'labels': [str(random.random()) for _ in 'abc']}",
        AGAIN, "labels",
    ),
    "a generator of its own": (
        "def __init__(self, seed): self.rng = random.Random(seed)\n"
        "    def change(self, index): return {'seed': self.rng.getrandbits(64)}",
        AGAIN, "seed",
    ),
    "pictures": (
        "def change(self, index):\n"
        "        return {'images': [Image.new('F', (8, 8), random.random()) for _ in 'abc']}",
        AGAIN, "images",
    ),
    "messages": (
        "count = 0\n    def prompt_messages(self, episode):\n        self.count += 1\n"
        "        return [{'role': 'system', 'content': f'try {self.count}'}, *super().prompt_messages(episode)]",
        AGAIN, "messages",
    ),
    "what is remembered of the order": (
        "def __init__(self, seed): self.rng, self.kept = random.Random(seed), {}\n"
        "    def change(self, index): return {'target': self.kept.setdefault(index, str(self.rng.random()))}",
        ELSEWHERE, "target",
    ),
    "the beginning of the file": (
        "START = random.random()\n    def change(self, index): return {'target': str(self.START)}", ELSEWHERE, "target",
    ),
    "the instance": ("def change(self, index): return {'seed': id(self)}", ELSEWHERE, "seed"),
}  # fmt: skip


@pytest.mark.parametrize(("body", "how", "field"), IMPURE.values(), ids=IMPURE.keys())
def test_an_episode_that_is_another_one_is_refused_with_its_field(
    body: str, how: str, field: str, tmp_path: Path
) -> None:
    message = refusal(write_env(tmp_path, body))
    assert f"{how}: its {field} had " in message and "derive all randomness from the seed and the index" in message


ELSEWHERE_IN_PROCESSES = {
    "a hash of text": ("def change(self, index): return {'target': str(hash('a'))}", "target of episode 0"),
    "the order of a set": (
        "def change(self, index): return {'labels': list(set('abcdefghijklm'))[:3]}",
        "labels of episode 0",
    ),
}


@pytest.mark.parametrize(("body", "field"), ELSEWHERE_IN_PROCESSES.values(), ids=ELSEWHERE_IN_PROCESSES.keys())
def test_an_episode_that_is_another_one_in_another_process_is_refused(body: str, field: str, tmp_path: Path) -> None:
    assert f"the {field}: not the same in another process; derive all" in refusal(write_env(tmp_path, body))


def test_seeded_randomness_is_pure(tmp_path: Path) -> None:
    body = (
        "def __init__(self, seed): self.seed = seed\n"
        "    def change(self, index):\n        rng = np.random.default_rng([self.seed, index])\n"
        "        return {'images': rng.integers(0, 256, (3, 8, 8, 3), np.uint8), 'correct_index': rng.integers(3)}"
    )
    checked(write_env(tmp_path, body))


def test_only_the_bad_picture_stops_where_bad_ones_are_skipped(tmp_path: Path) -> None:
    env = write_env(tmp_path, "def change(self, index): return {'images': ['gone.png'] * 3}")
    checked(env, "--bad_images", "skip")


def test_without_images_must_return_an_environment(tmp_path: Path) -> None:
    body = (
        "def __init__(self, data_root): self.images = list_labelled_images(data_root)\n"
        "    def without_images(self, paths): self.images = ()"
    )
    data = tmp_path / "data"
    data.mkdir()
    (data / "bad.png").write_text("no picture")
    message = r"left out, env=.*without_images\(paths\) returned a NoneType, but wanted the environment without them"
    with pytest.raises(UsageError, match=message):
        checked(write_env(tmp_path, body), "--data_root", str(data), "--bad_images", "skip")


def test_what_changed_beside_a_file_is_said(tmp_path: Path) -> None:
    env = write_env(tmp_path, "from words import WORD")
    for name in ("words", "unused"):
        (tmp_path / f"{name}.py").write_text("WORD = 'one'\n")
    checked(env)
    code = own_code(parse_options(["--env", env]))
    recorded = {"imported_files": sha256_of_imported_files(code), "user_files": {}}
    assert list(recorded["imported_files"]["env"]) == ["words.py"]
    (tmp_path / "unused.py").write_text("WORD = 'two'\n")
    assert what_changed_since(recorded, code, "toy") == ["the file of --env"]
    for change in (lambda path: path.write_text("WORD = 'two'\n"), Path.unlink):
        change(tmp_path / "words.py")
        assert what_changed_since(recorded, code, "toy") == ["the file of --env", "words.py beside the file of --env"]
