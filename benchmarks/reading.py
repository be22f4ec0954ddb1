"""Prints how much there is to read in a checkout: files, lines to follow a step, names, imports, sentences.

    python benchmarks/reading.py [--root DIR]

Needs no package but TRL's source, which is read and not imported. Exits with 1 if a name of the tables is unknown.
"""

import argparse
import ast
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

# Every function of Fleet and TRL that runs between the collator's batch and the optimizer's step, by default flags. A
# profiler saw them. STEP is to be read to follow a step; ASIDE (checks, bounds, clocks, kernels) is taken by its name.
# A file that a checkout does not have is passed over for the one that holds the name.
STEP: Mapping[str, str] = {
    "dataset.py": "VLMDataCollator.__call__ VLMDataCollator._encode VLMDataCollator._one_row_per_group",
    "environment.py": "judge",
    "reward.py": "make_trl_reward_function compute_rewards_from_generations reward_of",
    "fleet/qwen/group_passes.py": "generate_groups image_inputs base_qwen prompt_positions score_packed",
    "fleet/qwen/shared_prefix.py": "pack_groups attention_mask may_see unpack",
    "fleet/rl/algorithm.py": "needs_old_logps leave_one_out_advantages",
    "fleet/rl/guards.py": "RewardGuard.__call__ StepGuard.begin_generation StepGuard.note_scores "
    "StepGuard.on_pre_optimizer_step StepGuard._count without_gradient_if_not_finite",
    "fleet/rl/rollouts.py": "make_records instruction_of rollout_metrics",
    "fleet/rl/trainer.py": "Rollouts FleetRLOOTrainer._prepare_inputs FleetRLOOTrainer._groups_per_step "
    "FleetRLOOTrainer._roll_out FleetRLOOTrainer._image_features FleetRLOOTrainer._sample_completions "
    "FleetRLOOTrainer._usable FleetRLOOTrainer._generate_behind_one_prefill _without_media "
    "FleetRLOOTrainer._pad_completions FleetRLOOTrainer._chooses_packing FleetRLOOTrainer._task_rewards "
    "FleetRLOOTrainer._take_advantages FleetRLOOTrainer._own_rows FleetRLOOTrainer._record "
    "FleetRLOOTrainer._compute_loss FleetRLOOTrainer._completion_logps FleetRLOOTrainer._compare_with_vllm "
    "FleetRLOOTrainer._get_per_token_logps_and_entropies FleetRLOOTrainer._get_grad_norm",
    "trl/trainer/rloo_trainer.py": "RLOOTrainer.training_step RLOOTrainer.compute_loss RLOOTrainer._compute_loss",
    "trl/trainer/utils.py": "add_fused_lm_head",
    "trl/models/utils.py": "unwrap_model_for_generation _unwrap_model_for_generation",
}
ASIDE: Mapping[str, str] = {
    "dataset.py": "require_episodes count_faults",
    "model_utils.py": "up_to_end media_token_ids decode_completion",
    "fleet/own_code/reward_function.py": "BoundedReward.__call__ BoundedReward._call checked_call _as_list _length "
    "_is_table _checked checked_value",
    "fleet/qwen/flops.py": "compare_work packed_work unpacked_work vision_flops text_flops _pieces add_up",
    "fleet/qwen/group_passes.py": "why_not_to_pack",
    "fleet/qwen/shared_prefix.py": "_require_sound",
    "fleet/rl/rollouts.py": "length_metrics",
    "fleet/rl/trainer.py": "FleetRLOOTrainer._log_completions",
    "fleet/run/watchdog.py": "Watchdog.beat Watchdog._note Watchdog._tell_frozen_watch StillTime.beat StillTime.tick",
    "utils/images.py": "image_digest",
    "utils/plain_text.py": "require_plain_messages require_plain_text first_literal printable",
    "utils/tool_calls.py": "parse_tool_call_str _without_fence _parse_call_json _json_depth _object_with_unique_keys",
    "utils/user_files.py": "folder_kept",
    "trl/distributed.py": "DistributedBackend.__init__ DistributedBackend.is_zero3",
    "trl/extras/profiling.py": "profiling_decorator profiling_context ProfilingContext.__init__ "
    "ProfilingContext.__enter__ ProfilingContext.__exit__ ProfilingContext._log_metrics",
    "trl/kernels/chunked_logprob.py": "_use_triton ChunkedLogProbFunction.forward ChunkedLogProbFunction.backward "
    "_forward_tile _torch_transform _backward_tile _addmm_fp32",
    "trl/models/utils.py": "_override_model_generation_config",
    "trl/trainer/utils.py": "pad nanstd nanmin nanmax maybe_gather_lm_head_ctx",
}
# flags that no case of a run changes, and where flags are told from other names
PLAIN_FLAGS = ("weight_decay", "normalize_advantages", "mask_truncated_completions", "dataloader_num_workers")
FLAG_FILES = re.compile(r"fleet/command/.*|(fleet/run/build|run_setup|\w*options|\w*flags|training|evaluate)\.py")
ALL_OPTIONS = {"Options", "EvaluateOptions", "SharedOptions"}
COMMANDS = {"training", "evaluate", "report", "fleet.ask"}
# a part may import from its own row and from those above it
ROWS = (("utils",), ("fleet",), ("fleet.model_folder",), ("root",), ("fleet.own_code",), ("fleet.command", "fleet.qwen"),
        ("fleet.toy", "fleet.rl", "fleet.evaluation"), ("fleet.run", "fleet.report"), ("commands",))  # fmt: skip
APART = {"tests", "benchmarks"}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(root: Path) -> dict[str, ast.Module]:
    """The syntax tree of every .py file of the system, without tests and benchmarks, by its path from the root."""
    found = {}
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in APART | {"runs"}]
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            found[path.relative_to(root).as_posix()] = ast.parse(path.read_text(encoding="utf-8"))
    return dict(sorted(found.items()))


def definitions(tree: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.ClassDef | Function]]:
    """Classes, functions and methods by their qualified names, without those inside of functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef | Function):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from definitions(node, f"{prefix}{node.name}.")


def span(node: ast.ClassDef | Function) -> tuple[int, int]:
    """First and last line, decorators among them."""
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]), node.end_lineno or 0


def step_rows(table: Mapping[str, str], trees: Mapping[str, ast.Module]) -> tuple[list[tuple[str, str, int, int]], int]:
    """Each name of a table as (file, name, first line, last line), and how many names are nowhere, which are printed."""
    trl = importlib.util.find_spec("trl")
    folder = Path((trl.origin if trl else None) or "").parent.parent
    rows, num_unknown = [], 0
    for path, names in table.items():
        if path.startswith("trl/"):
            places = {path: ast.parse((folder / path).read_text(encoding="utf-8"))}
        else:
            places = {path: trees[path]} if path in trees else dict(trees)
        known = [(place, name, *span(node)) for place, tree in places.items() for name, node in definitions(tree)]
        for wanted in names.split():
            found = [row for row in known if row[1] == wanted]
            if len(found) != 1:
                print(
                    f"error: {wanted} is in {len(found)} files, wanted {path} alone; correct the table", file=sys.stderr
                )
            num_unknown += len(found) != 1
            rows += found[:1]
    return sorted(rows), num_unknown


def total(rows: list[tuple[str, str, int, int]]) -> str:
    """The sum of lines, each line of a file once, and the number of files."""
    lines = {(path, line) for path, _, first, last in rows for line in range(first, last + 1)}
    return f"{len(lines):,} in {len({path for path, *_ in rows})} files"


def lines_naming(flag: str, trees: Mapping[str, ast.Module]) -> int:
    """The lines of FLAG_FILES whose code names a flag."""
    nodes = [(path, node) for path, tree in trees.items() if FLAG_FILES.fullmatch(path) for node in ast.walk(tree)]
    forms = {flag, f"--{flag}"}
    return len({(path, getattr(node, "lineno", 0)) for path, node in nodes
                if any(getattr(node, field, None) in forms for field in ("id", "attr", "arg", "value"))})  # fmt: skip


def takers_of_options(trees: Mapping[str, ast.Module]) -> list[str]:
    """The folder of each function with a parameter annotated by ALL_OPTIONS or by a type variable bound to them."""
    folders = []
    for path, tree in trees.items():
        bound = {
            node.targets[0].id
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
            if "TypeVar" in ast.dump(node.value) and any(f"'{name}'" in ast.dump(node.value) for name in ALL_OPTIONS)
        }
        for node in ast.walk(tree):
            if isinstance(node, Function):
                words = {word for arg in ast.walk(node.args) if isinstance(arg, ast.arg) and arg.annotation
                         for word in re.findall(r"\w+", ast.unparse(arg.annotation))}  # fmt: skip
                if words & (ALL_OPTIONS | bound):
                    folders.append(str(Path(path).parent))
    return folders


def part_of(module: str) -> str:
    """The part that a module belongs to, as ROWS names it."""
    top, *rest = module.split(".")
    if module in COMMANDS:
        return "commands"
    if top == "fleet" and len(rest) >= 1 and f"fleet.{rest[0]}" in {part for row in ROWS for part in row}:
        return f"fleet.{rest[0]}"
    return top if top in ("fleet", "utils") else "root"


def imports_of_parts(trees: Mapping[str, ast.Module]) -> set[tuple[str, str]]:
    """(importing part, imported part) for each import from one part of the system to another."""
    modules = {path.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for path in trees}
    found = set()
    for path, tree in trees.items():
        importer = part_of(path.removesuffix(".py").replace("/", "."))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                names = [name for child in names if (name := f"{node.module}.{child}") in modules] or [str(node.module)]
            found |= {(importer, part_of(name)) for name in names if name in modules}
    return {(importer, imported) for importer, imported in found if importer != imported}


def faults_of_imports(pairs: set[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Imports that point up or aside by ROWS, and the parts that import themselves through others."""
    row_of = {part: place for place, row in enumerate(ROWS) for part in row}
    up = [f"{importer} -> {imported}" for importer, imported in sorted(pairs) if row_of[importer] <= row_of[imported]]
    reach = set(pairs)
    while further := {(a, d) for a, b in reach for c, d in pairs if b == c} - reach:
        reach |= further
    return up, sorted(importer for importer, imported in reach if importer == imported)


def sentences(page: str) -> list[list[str]]:
    """The sentences of a Markdown page as words, without code blocks, tables, headings, pictures and addresses.

    A sentence ends at a full stop, question mark, exclamation mark or colon before white space, and with its paragraph
    or list item.
    """
    page = re.sub(r"^```.*?^```$|<!--.*?-->", "\n\n", page, flags=re.DOTALL | re.MULTILINE)
    page = re.sub(r"^(\||#| {4}|\s*<).*$", "\n", page, flags=re.MULTILINE)
    page = re.sub(r"!\[[^\]]*\]\([^)]*\)|https?://\S+", "", page)
    page = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", page)
    page = re.sub(r"^\s*([-*]|\d+\.) ", "\n\n", page, flags=re.MULTILINE)
    pieces = re.split(r"\n\s*\n|(?<=[.!?:])[)*_\"`]*\s+", page)
    return [words for piece in pieces if (words := re.findall(r"\S*\w\S*", piece))]


def main() -> int:
    """Prints the figures; returns the exit code."""
    parser = argparse.ArgumentParser(description="Print how much there is to read in a checkout.")
    parser.add_argument("--root", default=Path(__file__).resolve().parent.parent, type=Path, help="default: this one")
    root = parser.parse_args().root
    trees = sources(root)
    rows, num_unknown = step_rows(STEP, trees)
    aside, num_unknown_aside = step_rows(ASIDE, trees)
    print(
        "to follow one RLOO step:", *(f"  {path}:{first}-{last} {name}" for path, name, first, last in rows), sep="\n"
    )
    files = {path: (root / path).read_text(encoding="utf-8").count("\n") for path in trees}
    functions = [(last - first + 1, name, path) for path, tree in trees.items() for name, node in definitions(tree)
                 if isinstance(node, Function) for first, last in [span(node)]]  # fmt: skip
    longest_file, longest = max(files, key=lambda path: files[path]), max(functions)
    takers = takers_of_options(trees)
    up, circles = faults_of_imports(imports_of_parts(trees))
    pages = [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    counts = [len(words) for page in pages for words in sentences(page.read_text(encoding="utf-8"))]
    docstrings = [ast.get_docstring(node) or "" for tree in trees.values() for node in ast.walk(tree)
                  if isinstance(node, ast.Module | ast.ClassDef | Function)]  # fmt: skip
    naming = {flag: lines_naming(flag, trees) for flag in PLAIN_FLAGS}
    for what, figure in {
        ".py files in the root": sum("/" not in path for path in trees),
        "lines to follow one RLOO step": total(rows),
        "lines that run in it and are taken by their names": total(aside),
        "both together": total([*rows, *aside]),
        "lines of the system without tests and benchmarks": f"{sum(files.values()):,}",
        "longest file": f"{files[longest_file]} ({longest_file})",
        "longest function": f"{longest[0]} ({longest[1]} in {longest[2]})",
        "lines of code that name a plain flag": f"{max(naming.values())} ({max(naming, key=lambda flag: naming[flag])})",
        "functions that take all options": f"{len(takers)} in {len(set(takers))} folders",
        "imports that point up, circles": f"{len(up)} {up}, {len(circles)} {circles}",
        "README words": f"{len(pages[0].read_text(encoding='utf-8').split()):,}",
        "words a sentence, README and docs, mean": f"{sum(counts) / len(counts):.1f} of {len(counts)} sentences",
        "docstrings that open with What/Whether/Which/How": sum(
            bool(re.match(r"(What|Whether|Which|How)\b", text)) for text in docstrings
        ),
    }.items():
        print(f"{what:52} {figure}")
    return 1 if num_unknown + num_unknown_aside else 0


if __name__ == "__main__":
    sys.exit(main())
