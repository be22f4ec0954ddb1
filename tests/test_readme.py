"""README.md, CONTRIBUTING.md and docs/*.md: commands work as written, names exist, figures are those measured."""

import ast
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from benchmarks import dynamic_sampling_seeds, example_seeds, look_seeds, toy_seeds, zoom_seeds
from benchmarks.reading import sentences
from benchmarks.step_time_table import ROWS, markdown_table
from fleet.ask import build_ask_parser
from fleet.check_env import build_check_parser
from fleet.command.evaluate_options import build_evaluate_parser, parse_evaluate_options
from fleet.command.export_options import build_export_parser
from fleet.command.options import build_parser, parse_options, resolve_options
from fleet.command.parser import parse_flags
from fleet.run.build.replay import build_replay_parser
from fleet.run_folder import read_jsonl
from tests import HANG_S
from tests.documented import PAGES
from tests.helpers import REPOSITORY, toy_path

TEXTS = {path.relative_to(REPOSITORY).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
README, ALL = TEXTS["README.md"], "\n".join(TEXTS.values())
BASH_BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", ALL, re.DOTALL)).replace("\\\n", " ")
COMMANDS = list(dict.fromkeys(line for line in BASH_BLOCKS.splitlines() if line.startswith("accelerate launch")))
MAX_WORDS, MAX_WORDS_A_SENTENCE = 1500, 18
LINES_OF_A_SCREEN = 60
SCORINGS = list(dict.fromkeys(line for line in BASH_BLOCKS.splitlines() if line.startswith("python evaluate.py")))
DEMO = "accelerate launch training.py --fixed_correct_index 0"
MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")


def flags_of(command: str) -> list[str]:
    words = shlex.split(command)
    return words[words.index("training.py") + 1 :]


def test_the_pages_have_commands() -> None:
    assert len(COMMANDS) >= 13 and DEMO in COMMANDS and SCORINGS
    assert f"$(LAUNCH) {DEMO.removeprefix('accelerate launch ')}\n" in MAKEFILE
    (look,) = [command for command in COMMANDS if "--eval_steps" in command]
    assert f"$(LAUNCH) {look.removeprefix('accelerate launch ')} --overwrite" in MAKEFILE


@pytest.mark.parametrize("command", COMMANDS)
def test_every_training_command_has_only_flags_that_exist(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--config run.yaml" in command:
        monkeypatch.chdir(tmp_path)
        Path("run.yaml").write_text("seed: 2\n")
    parse_options(flags_of(command))


@pytest.mark.parametrize("command", SCORINGS)
def test_every_scoring_command_has_only_flags_that_exist(command: str) -> None:
    words = shlex.split(command)[2:]
    if "--replay" in words:
        parse_flags(build_replay_parser(), words)
    else:
        parse_evaluate_options(words)


def test_the_yaml_example_is_a_config_file(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", ALL, re.DOTALL)
    (tmp_path / "run.yaml").write_text(example)
    options = parse_options(["--config", str(tmp_path / "run.yaml"), "--seed", "1"])
    assert (options.num_rollouts, options.per_device_batch_size, options.learning_rate, options.seed) == (
        8,
        16,
        2e-4,
        1,
    )


def test_every_flag_in_the_text_exists() -> None:
    of_launcher = {"--config_file", "--num_machines", "--num_processes", "--machine_rank", "--main_process_ip",
                   "--main_process_port", "--mixed_precision", "--dynamo_backend"}  # fmt: skip
    of_others = {"--num_seeds", "--no-build-isolation", "--help", "--kind"}
    of_vllm = {"--mm-processor-kwargs", "--enable-scale-out", "--logprobs-mode", "--weight-transfer-config"}
    of_benchmarks = {"--model_size", "--image_side_px"}
    parsers = (build_parser(), build_evaluate_parser(), build_export_parser(), build_ask_parser(), build_check_parser(),
               build_replay_parser())  # fmt: skip
    actions = [action for parser in parsers for action in parser._actions]
    known = (
        {flag for action in actions for flag in action.option_strings}
        | of_launcher
        | of_others
        | of_vllm
        | of_benchmarks
    )
    named = set(re.findall(r"(?<![\w-])--[a-z0-9_][a-z0-9_-]*", ALL))
    assert named - known == set()


def test_every_file_in_the_tree_exists() -> None:
    (tree,) = re.findall(r"```text\nfleet/\n(.*?)```", README, re.DOTALL)
    names = re.findall(
        r"[\w/]+\.(?:py|yaml|html|safetensors)|\w+/(?=,|\n|$)",
        "\n".join(line.split("#")[0] for line in tree.splitlines()),
    )
    assert len(names) > 12
    assert [name for name in names if not (REPOSITORY / name).exists()] == []
    files = {path.name for path in REPOSITORY.glob("*.py")}
    assert files - {Path(name).name for name in names} == set(), "a file at the top that the README does not name"


def test_default_values_in_the_flag_table_are_the_real_ones() -> None:
    rows = dict(re.findall(r"^\| `--(\w+)` \| ([^|]+?) \|", TEXTS["docs/flags.md"], re.MULTILINE))
    defaults, _ = resolve_options(parse_options([]), has_bf16_gpu=False)
    plain = {
        name: text.strip("`")
        for name, text in rows.items()
        if "toy)" not in text and " where " not in text and "toy" not in text
    }
    assert len(plain) >= 6
    for name, text in plain.items():
        assert getattr(defaults, name) == yaml.safe_load(text), name
    frozen, _ = resolve_options(parse_options(["--freeze", "tower,merger"]), has_bf16_gpu=False)
    cache_sizes = (frozen.vision_cache_mib, defaults.vision_cache_mib)
    assert rows["vision_cache_mib"] == "{} where vision is frozen, else {}".format(*cache_sizes)


def test_the_table_of_seeds_is_of_the_committed_results() -> None:
    runs = json.loads((REPOSITORY / "benchmarks" / "results" / "look_seeds.json").read_text())["runs"]
    for line in look_seeds.markdown_table(runs).splitlines():
        assert line in TEXTS["docs/evaluation.md"]
    before, after = (document["greedy_accuracy"]["value"] for document in (runs[0]["evaluation"]["baseline"],
                                                                           runs[0]["evaluation"]))  # fmt: skip
    assert f"on 512 held-out episodes has risen from {before:.0%} to {after:.0%};".replace("%", " %") in " ".join(
        README.split()
    )
    for run in runs:
        before, after = run["evaluation"]["baseline"], run["evaluation"]
        assert before["greedy_accuracy"]["value"] <= 0.6 and after["greedy_accuracy"]["value"] >= 0.9
        for document in (before, after):
            assert document["controls"]["blank_images"]["value"] == pytest.approx(0.25, abs=0.05)
        assert run["command_s"] < 600
    assert len(runs) == 3


def test_the_table_of_the_examples_is_of_the_committed_results() -> None:
    found = json.loads((REPOSITORY / "benchmarks" / "results" / "example_seeds.json").read_text())["runs"]
    for line in example_seeds.markdown_table(found).splitlines():
        assert line in TEXTS["docs/your_own_task.md"]
    assert [len(runs) for runs in found.values()] == [3, 3, 3]
    for runs in found.values():
        for run in runs:
            right, chance = (run["evaluation"][name]["value"] for name in ("greedy_accuracy", "chance"))
            assert right > chance + 0.4


def test_the_table_of_two_turns_is_of_the_committed_results() -> None:
    found = json.loads((REPOSITORY / "benchmarks" / "results" / "zoom_seeds.json").read_text())["runs"]
    for line in zoom_seeds.markdown_table(found["seeds"], found["before"], found["scripted"]).splitlines():
        assert line in TEXTS["docs/several_turns.md"]
    assert len(found["seeds"]) == 3
    assert found["before"]["greedy_accuracy"]["value"] < 0.4
    for run in found["seeds"]:
        assert run["evaluation"]["greedy_accuracy"]["value"] >= 0.8 and run["training_s"] < 600
        low, high = run["evaluation"]["controls"]["blank_images"]["ci95"]
        assert low <= 0.25 <= high
    for name in ("never looks", "looks at another picture"):
        low, high = found["scripted"][name]["ci95"]
        assert low <= 0.25 <= high


def test_the_table_of_replaced_groups_is_of_the_committed_results() -> None:
    found = json.loads((REPOSITORY / "benchmarks" / "results" / "dynamic_sampling.json").read_text())["runs"]
    for line in dynamic_sampling_seeds.markdown_table(found).splitlines():
        assert line in TEXTS["docs/dynamic_sampling.md"]
    assert [len(runs) for runs in found.values()] == [3] * 4


def test_the_table_of_the_first_demo_is_of_the_committed_results() -> None:
    runs = json.loads((REPOSITORY / "benchmarks" / "results" / "toy_seeds.json").read_text())["runs"]
    for line in toy_seeds.markdown_table(runs).splitlines():
        assert line in TEXTS["docs/toy_look.md"]
    assert len(runs) == 5


def test_the_costs_of_a_save_are_of_the_committed_results() -> None:
    result = json.loads((REPOSITORY / "benchmarks" / "results" / "save_time.json").read_text())
    low, high = result["longer_by_quartiles"]
    text = " ".join(TEXTS["docs/saves.md"].split())
    for words in (
        f"({result['checkpoint_bytes'] / 1e6:.1f} MB",
        f"keeps training waiting {result['fleet_s'] * 1e3:.1f} ms",
        f"Trainer's takes {result['trainer_s'] * 1e3:.1f} ms",
        f"medians of {result['num_pairs']} pairs",
        f"the difference is −{-result['longer_by']:.0%}".replace("%", " %"),
        f"between −{-low * 100:.0f} and +{high * 100:.0f} %",
        f"rotation take {result['background_s'] * 1e3:.0f} ms",
        f"hashing everything takes {result['check_s'] * 1e3:.0f} ms",
    ):
        assert words in text, words


def test_what_stock_does_with_faults_is_of_the_committed_results() -> None:
    stock = json.loads((REPOSITORY / "benchmarks" / "results" / "stock_faults.json").read_text())["stock"]
    assert stock["full fine-tune, resumed"].startswith("68 of its 69 weights")
    assert stock["one reward is inf"] == stock["one gradient is NaN"] == "69 of 69 parameters are not finite"
    damages = [what for name, what in stock.items() if not name.startswith(("one reward", "one gradient", "full"))]
    stopped = sum(what.startswith("every restart ends with") for what in damages)
    text = TEXTS["docs/reliability.md"]
    assert f"{len(damages)} kinds: {stopped} stop every restart, {len(damages) - stopped} go on" in text
    assert "keeps 68 of 69 base weights *" in text and text.count("69 of 69 parameters not finite *") == 2


def test_the_table_of_steps_is_of_the_committed_results() -> None:
    folder = REPOSITORY / "benchmarks" / "results" / "step_time"
    results = {name: json.loads((folder / f"{name}.json").read_text()) for name, _, _ in ROWS}
    for line in markdown_table(results).splitlines():
        assert line in TEXTS["docs/performance.md"]
    words = {
        "calls": "{:.1f} times less time than stock TRL's at 8 rollouts, {:.1f} times at 16 and {:.1f} times at 32",
        "random": "{:.1f}, {:.1f} and {:.1f} times",
    }
    for kind, sentence in words.items():
        ratios = [results[f"{kind}_{size}"]["step"]["ratio_median"] for size in ("g8", "g16", "g32")]
        assert sentence.format(*ratios) in " ".join(README.split())
    assert f"takes {results['calls_g8']['flatness']:.2f} times as long as one of 4" in " ".join(
        TEXTS["docs/performance.md"].split()
    )
    assert max(result["parity"]["max_logprob_abs"] for result in results.values()) <= 1e-5
    assert max(result["parity"]["max_grad_rel"] for result in results.values()) <= 1e-4


@pytest.mark.parametrize("page", [name for name in TEXTS if name != "docs/step_profile.md"])
def test_a_page_is_short_and_opens_with_its_contents(page: str) -> None:
    text = TEXTS[page]
    assert len(text.split()) <= MAX_WORDS
    heads = re.findall(r"^## (.+)$", text, re.MULTILINE)
    if page.startswith("docs/") and len(text.splitlines()) > LINES_OF_A_SCREEN and heads:
        listed = re.findall(r"^- \[(.+)\]\(#(.+)\)$", text, re.MULTILINE)
        assert listed == [(head, anchor_of(head)) for head in heads]


def anchor_of(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_sentences_are_short() -> None:
    counts = [len(words) for name, text in TEXTS.items() if name != "CONTRIBUTING.md" for words in sentences(text)]
    assert len(counts) > 400 and sum(counts) / len(counts) <= MAX_WORDS_A_SENTENCE


@pytest.mark.parametrize("page", TEXTS)
def test_every_link_leads_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)]+)\)|(?:src|srcset)=\"([^\"]+)\"", TEXTS[page])
    for target in (one or other for one, other in links):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (REPOSITORY / page).parent / name if name else REPOSITORY / page
        assert path.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [anchor_of(head) for head in heads], target


def test_every_page_is_linked_from_the_readme() -> None:
    linked = set(re.findall(r"\]\(([\w/]+\.md)", README))
    assert set(TEXTS) - linked == {"README.md", "docs/step_profile.md"}
    assert "(step_profile.md)" in TEXTS["docs/performance.md"]


MESSAGES = re.findall(r"^\| `([^`]*[ …][^`]*)` \|", TEXTS["docs/troubleshooting.md"], re.MULTILINE)


def test_troubleshooting_quotes_messages() -> None:
    assert len(MESSAGES) >= 50


@pytest.mark.parametrize("message", MESSAGES)
def test_every_message_of_troubleshooting_is_one_that_fleet_prints(message: str) -> None:
    pieces = [piece for piece in message.split("…") if len(piece.strip(" ;:,")) > 1]
    assert pieces and [piece for piece in pieces if not any(piece in text for text in CODE_TEXTS)] == []


def texts_of_code() -> list[str]:
    """Every text of Fleet's code as it is printed, with … for what an f-string fills in."""
    files = [*REPOSITORY.glob("*.py"), *REPOSITORY.glob("fleet/**/*.py"), *REPOSITORY.glob("utils/*.py")]
    found = []
    for node in (node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


CODE_TEXTS = texts_of_code()


@pytest.mark.slow
@pytest.mark.exhaustive  # make documented runs the demo too
def test_the_demo_command_learns(tmp_path: Path) -> None:
    toy_path()
    subprocess.run(
        [*shlex.split(DEMO), "--output_dir", str(tmp_path / "run")], cwd=REPOSITORY, check=True, timeout=HANG_S
    )
    lines = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == 60
    assert lines[0]["reward"] < 0.6
    # 0.97 and more here, and another processor makes another toy
    assert sum(line["reward"] for line in lines[-5:]) / 5 >= 0.9
