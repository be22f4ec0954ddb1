"""What the README says to type works as written, and what it names exists."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

from benchmarks import look_seeds
from benchmarks.step_time_table import ROWS, markdown_table
from fleet.ask import build_ask_parser
from fleet.command.evaluate_options import build_evaluate_parser, parse_evaluate_options
from fleet.command.options import build_parser, parse_options, resolve_options
from fleet.run_folder import read_jsonl
from tests import HANG_S
from tests.helpers import REPOSITORY, toy_path

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BASH_BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
COMMANDS = [line for line in BASH_BLOCKS.splitlines() if line.startswith("accelerate launch")]
SCORINGS = [line for line in BASH_BLOCKS.splitlines() if line.startswith("python evaluate.py")]
DEMO = "accelerate launch training.py --fixed_correct_index 0"
MAKEFILE = (REPOSITORY / "Makefile").read_text(encoding="utf-8")


def flags_of(command: str) -> list[str]:
    words = shlex.split(command)
    return words[words.index("training.py") + 1 :]


def test_the_readme_has_commands() -> None:
    assert len(COMMANDS) >= 6 and DEMO in COMMANDS and SCORINGS
    assert f"$(LAUNCH) {DEMO.removeprefix('accelerate launch ')}\n" in MAKEFILE
    (look,) = [command for command in COMMANDS if "--eval_steps" in command]
    assert f"$(LAUNCH) {look.removeprefix('accelerate launch ')} --overwrite" in MAKEFILE


@pytest.mark.parametrize("command", COMMANDS)
def test_every_training_command_has_only_flags_that_exist(command: str) -> None:
    parse_options(flags_of(command))


@pytest.mark.parametrize("command", SCORINGS)
def test_every_scoring_command_has_only_flags_that_exist(command: str) -> None:
    parse_evaluate_options(shlex.split(command)[2:])


def test_the_yaml_example_is_a_config_file(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
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
    of_others = {"--num_seeds", "--no-build-isolation", "--help"}
    of_vllm = {"--enable-scale-out", "--logprobs-mode", "--weight-transfer-config"}
    of_benchmarks = {"--model_size", "--image_side_px"}
    parsers = (build_parser(), build_evaluate_parser(), build_ask_parser())
    actions = [action for parser in parsers for action in parser._actions]
    known = (
        {flag for action in actions for flag in action.option_strings}
        | of_launcher
        | of_others
        | of_vllm
        | of_benchmarks
    )
    named = set(re.findall(r"(?<![\w-])--[a-z0-9_][a-z0-9_-]*", README))
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
    rows = dict(re.findall(r"^\| `--(\w+)` \| ([^|]+?) \|", README, re.MULTILINE))
    defaults, _ = resolve_options(parse_options([]), has_bf16_gpu=False)
    plain = {
        name: text.strip("`")
        for name, text in rows.items()
        if "toy)" not in text and " where " not in text and "toy" not in text
    }
    assert len(plain) >= 6
    for name, text in plain.items():
        assert getattr(defaults, name) == yaml.safe_load(text), name
    frozen, _ = resolve_options(parse_options(["--freeze_vision"]), has_bf16_gpu=False)
    cache_sizes = (frozen.vision_cache_mib, defaults.vision_cache_mib)
    assert rows["vision_cache_mib"] == "{} where vision is frozen, else {}".format(*cache_sizes)


def test_the_table_of_seeds_is_of_the_committed_results() -> None:
    runs = json.loads((REPOSITORY / "benchmarks" / "results" / "look_seeds.json").read_text())["runs"]
    for line in look_seeds.markdown_table(runs).splitlines():
        assert line in README
    for run in runs:
        before, after = run["evaluation"]["baseline"], run["evaluation"]
        assert before["greedy_accuracy"]["value"] <= 0.6 and after["greedy_accuracy"]["value"] >= 0.9
        for document in (before, after):
            assert document["controls"]["blank_images"]["value"] == pytest.approx(0.25, abs=0.05)
        assert run["command_s"] < 600
    assert len(runs) == 3


def test_the_table_of_steps_is_of_the_committed_results() -> None:
    folder = REPOSITORY / "benchmarks" / "results" / "step_time"
    results = {name: json.loads((folder / f"{name}.json").read_text()) for name, _, _ in ROWS}
    for line in markdown_table(results).splitlines():
        assert line in README
    assert max(result["parity"]["max_logprob_abs"] for result in results.values()) <= 1e-5
    assert max(result["parity"]["max_grad_rel"] for result in results.values()) <= 1e-4


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
