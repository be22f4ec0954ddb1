"""The layout that design notes promise: few files in the root, parts that import one way, flags declared once."""

import ast
import dataclasses
import subprocess
import sys
from importlib import import_module

import pytest

from fleet.command.evaluate_options import EvaluateOptions
from fleet.command.options import Options
from tests.helpers import REPOSITORY

# The parts in their order: each may import those before it, and itself.
PARTS = (
    "utils", "fleet", "fleet.model_folder", "tasks", "fleet.own_code", "fleet.command", "fleet.qwen", "models",
    "fleet.evaluation", "fleet.rl", "fleet.toy", "fleet.planning", "fleet.report", "fleet.export", "fleet.run",
    "commands",
)  # fmt: skip
# the files in the root, and the command that has no file there
TASKS = ("environment", "dataset", "reward")
MODELS = ("model_utils",)
COMMANDS = ("training", "evaluate", "report", "export", "fleet.ask", "fleet.check_env")
IMPORT_NO_TORCH = ("utils", "fleet.own_code", "fleet.command", "fleet.report")
# what files of users' own may import from the root
OFFERED = {
    "training": "main",
    "evaluate": "TASK main check_before_loading plan_evaluation runs_behind write_document",
    "report": "TEMPLATE_NAME LAST_STEPS RunRecords Tile main write_report read_run render_page headline levels "
    "training_seconds",
    "export": "main",
    "environment": "TOOL_NAME TOOL_SCHEMA Outcome Judgement judge PickImageEnv pick_image_messages "
    "load_environment_class system_text sample_distinct Episode ParseStatus",
    "dataset": "Row EpisodeBatch RepeatableEpisodeDataset episode_row broken_row require_episodes count_faults "
    "VLMDataCollator prompts_of_rollouts repeat_episodes",
    "model_utils": "LORA_TARGETS PARTS load_qwen25_vl require_loadable open_base load_processor read_adapter_config "
    "vision_attention make_lora_config count_parameters generate_tool_call media_token_ids end_token_ids up_to_end "
    "decode_completion",
    "reward": "RewardWeights DEFAULT_WEIGHTS reward_of compute_rewards_from_generations make_trl_reward_function",
}
HEAVY = ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "deepspeed")

SOURCES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("", "utils", "fleet")
    for path in sorted((REPOSITORY / folder).glob("*.py" if not folder else "**/*.py"))
}


def part_of(module: str) -> str:
    if module in TASKS:
        return "tasks"
    if module in MODELS:
        return "models"
    if module in COMMANDS:
        return "commands"
    part = ".".join(module.split(".")[:2])
    return "utils" if part.startswith("utils") else part if part in PARTS else "fleet"


def imports_of(module: str, *, at_start: bool = False) -> set[str]:
    """The modules that a module imports anywhere, or as it is imported itself."""
    tree = ast.parse(SOURCES[module].read_text(encoding="utf-8"))
    nodes = tree.body if at_start else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & SOURCES.keys()
            found |= inner or {node.module}
    return found


def test_the_root_has_few_files() -> None:
    found = sorted(path.name for path in REPOSITORY.glob("*.py"))
    assert found == sorted(f"{name}.py" for name in (*TASKS, *MODELS, "training", "evaluate", "report", "export"))


@pytest.mark.parametrize("module", OFFERED)
def test_the_roots_files_offer_what_they_did(module: str) -> None:
    found = import_module(module)
    assert [name for name in OFFERED[module].split() if not hasattr(found, name)] == []


@pytest.mark.parametrize("module", [module for module in SOURCES if module not in ("fleet", "utils")])
def test_imports_point_one_way(module: str) -> None:
    own = PARTS.index(part_of(module))
    upward = [name for name in imports_of(module) & SOURCES.keys() if PARTS.index(part_of(name)) > own]
    assert upward == [], f"{module} is in {PARTS[own]}, and imports from a part above it"


def test_parts_without_torch_import_none() -> None:
    """Follows each import that is made as a module is imported."""
    for module in (name for name in SOURCES if part_of(name) in IMPORT_NO_TORCH or name in ("environment", "reward")):
        seen: set[str] = set()
        waiting = [module]
        while waiting:
            name = waiting.pop()
            found = imports_of(name, at_start=True)
            heavy = {imported for imported in found if imported.split(".")[0] in HEAVY}
            assert not heavy, f"{module} imports {heavy} through {name}"
            new = (found & SOURCES.keys()) - seen
            seen |= new
            waiting += new


def test_every_flag_is_declared_in_one_place() -> None:
    """A flag's name is a field of one class; a default of another command may be declared again beside its reason."""
    declared: dict[str, list[str]] = {}
    for options in (Options, EvaluateOptions):
        for base in options.__mro__[1:-1]:
            for name in base.__annotations__:
                declared.setdefault(name, []).append(base.__name__)
    twice = {name: classes for name, classes in declared.items() if len(set(classes)) > 1}
    assert twice.keys() == {"seed", "overwrite", "per_device_batch_size"}, "each means another thing in evaluate.py"
    assert {field.name for field in dataclasses.fields(Options)} <= declared.keys()


@pytest.mark.parametrize(
    "flag", ["weight_decay", "dataloader_num_workers", "logging_steps", "mask_truncated_completions"]
)
def test_a_plain_flag_is_named_in_one_line(flag: str) -> None:
    named = [
        f"{module}: {line.strip()}"
        for module, path in SOURCES.items()
        if part_of(module) in ("fleet.command", "fleet.run", "commands")
        for line in path.read_text(encoding="utf-8").splitlines()
        if flag in line
    ]
    assert len(named) == 1, named


def functions_with_all_options() -> list[str]:
    found = []
    for module, path in SOURCES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                types = [ast.unparse(argument.annotation) for argument in node.args.args if argument.annotation]
                if {"Options", "EvaluateOptions"} & set(types):
                    found.append(f"{module}.{node.name}")
    return found


def test_options_stop_at_the_door() -> None:
    found = functions_with_all_options()
    doors = ("training.", "fleet.command.", "fleet.planning.", "fleet.run.build.")
    assert [name for name in found if not name.startswith(doors)] == []
    assert len(found) <= 17, found


def test_the_tool_that_picks_an_image_is_named_in_two_files() -> None:
    named = {
        str(path.relative_to(REPOSITORY))
        for path in REPOSITORY.glob("**/*.py")
        if not {".venv", ".vllm", "runs", "tests"} & set(path.relative_to(REPOSITORY).parts)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "pick_image" in node.value
    }
    assert named == {"environment.py", "utils/tool_calls.py"}


def test_the_lines_to_read_are_counted_of_names_that_there_are() -> None:
    done = subprocess.run([sys.executable, "benchmarks/reading.py"], cwd=REPOSITORY, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
