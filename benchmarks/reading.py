"""Prints how much there is to read in a checkout: files, lines to follow a step, flags, imports, sentences.

    python benchmarks/reading.py [--root DIR]

Reads source alone, TRL's too, and imports none of it. Exits with 1 if a name of the tables is in no file.
"""

import argparse
import ast
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

# Every function of Fleet and TRL that runs between the collator's batch and the optimizer's step by default flags, as a
# profiler saw them. STEP turns the batch into the loss and must be read to follow a step. ASIDE is taken by its names:
# the collator before it; judge and reward, which are the task's; records and metrics; checks, bounds and clocks;
# kernels and functions of libraries. A file that a checkout lacks is searched for in all others.
STEP = {
    "dataset.py": "EpisodeBatch",
    "fleet/qwen/token_tree.py": "Branches Prompts TokenTree lay_out ancestry_mask by_rollout _Row _prompt_slots",
    "fleet/qwen/sampling_pieces.py": "sample_batch",
    "fleet/qwen/tree_sampling.py": "SamplingRequest Samples sample_on_trees _Rollout _Sampler",
    "fleet/qwen/sampling_passes.py": "FirstPass TreePasses",
    "fleet/qwen/draws.py": "named_uniforms draw_tokens",
    "fleet/qwen/group_passes.py": "image_inputs base_qwen tree_prompts tree_logits score_tree",
    "fleet/qwen/edge_scores.py": "Scores scores_of edge_scores _chunk_scores",
    "fleet/rl/algorithm.py": "needs_old_logps shaped_rewards leave_one_out_advantages sequence_logps clipped_loss",
    "fleet/rl/drawing.py": "Drawn Drawing(_image_features _draw _drafts _draw_on_trees _policy_that_samples "
    "_tries_one_pass)",
    "fleet/rl/group_sampling.py": "DrawnGroups SampledGroups GroupSampling(_draw_groups _are_ended _sampled "
    "_first_scores _trees _usable _chooses_packing _groups_per_step) _as_long_as",
    "fleet/rl/first_pass.py": "scores_of_first_pass as_wide_as",
    "fleet/rl/policy_passes.py": "PolicyPasses(_completion_logps)",
    "fleet/rl/spared_passes.py": "SparedPasses",
    "fleet/rl/judging.py": "JudgedGroups Rollouts Judging(_judge _reward _text_of _rewards) _by_rollout",
    "fleet/rl/dynamic_sampling.py": "DynamicSampling(_judged_groups _draw_and_judge)",
    "fleet/rl/trainer.py": "FleetRLOOTrainer(_prepare_inputs _roll_out _take_advantages _teaches _compute_loss)",
}
ASIDE = {
    "dataset.py": "VLMDataCollator(__call__ _encode) require_episodes count_faults _with_ranks",
    "environment.py": "PickImageTask(respond solution choices) Judgement _judged _correct_index",
    "model_utils.py": "media_token_ids decode_completion",
    "reward.py": "reward_of",
    "fleet/episodes.py": "asked",
    "fleet/qwen/flops.py": "compare_work _packed_work vision_flops text_flops _squares add_up",
    "fleet/qwen/drafts.py": "DraftMemory within_budget",
    "fleet/qwen/group_passes.py": "why_not_to_pack as_model_mask",
    "fleet/qwen/sampling_rules.py": "SamplingRules",
    "fleet/qwen/sampling_pieces.py": "num_pieces_of",
    "fleet/qwen/tree_sampling.py": "_continuations",
    "fleet/qwen/vision_windows.py": "attend_by_length _LatestBounds",
    "fleet/rl/guards.py": "without_gradient_if_not_finite "
    "StepGuard(begin_generation note_scores on_pre_optimizer_step)",
    "fleet/rl/rollouts.py": "make_records instruction_of rollout_metrics length_metrics",
    "fleet/rl/drawing.py": "Drawing(_add_metrics _tell_once _log_sampling _most_of_ranks draft_memory remember "
    "_why_not_one_pass)",
    "fleet/rl/group_sampling.py": "GroupSampling(_log_lengths)",
    "fleet/rl/first_pass.py": "why_not_one_pass",
    "fleet/rl/policy_passes.py": "PolicyPasses(_nucleus _weigh_rollouts)",
    "fleet/rl/judging.py": "Judging(_require_shown _tool_answers _log_rewards)",
    "fleet/rl/trainer.py": "FleetRLOOTrainer(_record _log_loss _get_grad_norm)",
    "fleet/known_answers.py": "solution_of solutions_of choices_of drafts_on drafts_of _sound_call",
    "fleet/verdicts.py": "Verdict verdicts_on verdict_on answer_to outcome_names _sound_answer _sound_verdict "
    "_sound_name _sound_component",
    "fleet/run/watchdog.py": "Watchdog(beat) StillTime(beat tick)",
    "utils/images.py": "image_digest",
    "utils/plain_text.py": "require_plain_messages require_plain_text first_literal printable",
    "utils/tool_schemas.py": "refusal_of",
    "utils/tool_calls.py": "parse_call_str _without_fence _parse_call_json _json_depth object_with_unique_keys",
    "utils/user_files.py": "folder_kept",
    "trl/distributed.py": "DistributedBackend(__init__ is_zero3)",
    "trl/extras/profiling.py": "profiling_decorator profiling_context "
    "ProfilingContext(__init__ __enter__ __exit__ _log_metrics)",
    "trl/kernels/chunked_logprob.py": "_use_triton ChunkedLogProbFunction(forward backward) _forward_tile "
    "_torch_transform _backward_tile _addmm_fp32",
    "trl/models/utils.py": "unwrap_model_for_generation _unwrap_model_for_generation _override_model_generation_config",
    "trl/trainer/rloo_trainer.py": "RLOOTrainer(training_step compute_loss)",
    "trl/trainer/utils.py": "add_fused_lm_head pad nanstd nanmin nanmax maybe_gather_lm_head_ctx",
}
# flags that no case of a run changes, and the files in which their names are flags
PLAIN_FLAGS = ("weight_decay", "normalize_advantages", "mask_truncated_completions", "logging_steps")
FLAG_FILES = re.compile(
    r"fleet/command/.*|(fleet/run/build/\w+|fleet/run/build|run_setup|\w*options|\w*flags|training|evaluate)\.py"
)
ALL_OPTIONS = "Options|EvaluateOptions|SharedOptions"
COMMANDS = {"training", "evaluate", "report", "fleet.ask", "fleet.check_env"}
# a part imports from the rows before its own
ROWS = ("utils", "fleet", "fleet.model_folder", "root", "fleet.own_code", "fleet.command fleet.qwen",
        "fleet.evaluation", "fleet.rl", "fleet.toy", "fleet.report", "fleet.run", "commands")  # fmt: skip
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Row = tuple[str, str, int, int]  # file, name, first and last line


def sources(root: Path) -> dict[str, ast.Module]:
    """The syntax tree of each .py file of the system, without tests and benchmarks, by its path from the root."""
    found = {}
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in ("tests", "benchmarks", "runs") and name[0] != "."]
        for path in (Path(folder, name) for name in names if name.endswith(".py")):
            found[path.relative_to(root).as_posix()] = ast.parse(path.read_text(encoding="utf-8"))
    return dict(sorted(found.items()))


def definitions(path: str, tree: ast.AST, prefix: str = "") -> Iterator[tuple[Row, Definition]]:
    """Classes, functions and methods with their decorators; not those inside of functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, Definition):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            yield (path, prefix + node.name, first, node.end_lineno or first), node
            if isinstance(node, ast.ClassDef):
                yield from definitions(path, node, f"{prefix}{node.name}.")


def rows_of(table: Mapping[str, str], trees: Mapping[str, ast.Module]) -> tuple[list[Row], bool]:
    """The rows of a table's names, and False if one of them, which is printed, is not in one file alone."""
    trl, rows, is_whole = importlib.util.find_spec("trl"), [], True
    if trl is None or trl.origin is None:
        sys.exit(
            "error: package trl is not installed, and its lines count too; run in Fleet's environment (make setup)"
        )
    for path, words in table.items():
        if path.startswith("trl/"):
            searched = {path: ast.parse((Path(trl.origin).parents[1] / path).read_text(encoding="utf-8"))}
        else:
            searched = {path: trees[path]} if path in trees else dict(trees)
        known = [row for place, tree in searched.items() for row, _ in definitions(place, tree)]
        for owner, methods, function in re.findall(r"(\w+)\(([^)]*)\)|(\w+)", words):
            for name in [f"{owner}.{method}" for method in methods.split()] or [function]:
                found = [row for row in known if row[1] == name]
                if len(found) != 1:
                    is_whole = False
                    print(f"error: {name} is in {len(found)} files, wanted {path}; correct the table", file=sys.stderr)
                rows += found[:1]
    return sorted(rows), is_whole


def total(rows: list[Row]) -> str:
    """The sum of lines, each line of a file once, and the number of files."""
    lines = {(path, line) for path, _, first, last in rows for line in range(first, last + 1)}
    return f"{len(lines):,} in {len({path for path, *_ in rows})} files"


def lines_naming(flag: str, trees: Mapping[str, ast.Module]) -> int:
    """The lines of FLAG_FILES whose code names a flag."""
    nodes = [(path, node) for path, tree in trees.items() if FLAG_FILES.fullmatch(path) for node in ast.walk(tree)]
    names = {flag, f"--{flag}"}
    return len({(path, getattr(node, "lineno", 0)) for path, node in nodes
                if any(getattr(node, field, None) in names for field in ("id", "attr", "arg", "value"))})  # fmt: skip


def takers_of_options(trees: Mapping[str, ast.Module]) -> list[str]:
    """The folder of each function with a parameter of ALL_OPTIONS, or of a type variable that is bound to them."""
    folders = []
    for path, tree in trees.items():
        bound = re.findall(rf"(\w+) = TypeVar\(.*\b(?:{ALL_OPTIONS})\b", ast.unparse(tree))
        taken = re.compile(rf": [^=,]*\b(?:{'|'.join([ALL_OPTIONS, *bound])})\b")
        functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        folders += [str(Path(path).parent) for node in functions if taken.search(ast.unparse(node.args))]
    return folders


def part_of(module: str) -> str:
    """The part of ROWS that a module belongs to."""
    if module in COMMANDS or module.startswith("examples."):
        return "commands"
    parts = (".".join(module.split(".")[:2]), module.split(".")[0])
    return next((part for part in parts if part in " ".join(ROWS).split()), "root")


def faults_of_imports(trees: Mapping[str, ast.Module]) -> tuple[list[str], list[str]]:
    """Imports that do not point to a row before their own, and parts that import themselves by way of others."""
    modules = {
        path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): tree for path, tree in trees.items()
    }
    pairs = set()
    for importer, tree in modules.items():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                names = [
                    f"{node.module}.{name}" if f"{node.module}.{name}" in modules else f"{node.module}"
                    for name in names
                ]
            pairs |= {(part_of(importer), part_of(name)) for name in names if name in modules}
    pairs = {pair for pair in pairs if pair[0] != pair[1]}
    place = {part: number for number, row in enumerate(ROWS) for part in row.split()}
    reached = set(pairs)
    while further := {(a, d) for a, b in reached for c, d in pairs if b == c} - reached:
        reached |= further
    up = [f"{importer} -> {imported}" for importer, imported in sorted(pairs) if place[importer] <= place[imported]]
    return up, sorted(importer for importer, imported in reached if importer == imported)


def sentences(page: str) -> list[list[str]]:
    """The sentences of a Markdown page as words, without code blocks, tables, headings, pictures and addresses.

    One ends at a full stop, question mark or exclamation mark before white space, and with its paragraph or list item.
    """
    page = re.sub(r"^```.*?^```$|^(\||#| {4}|\s*<).*?$", "\n\n", page, flags=re.DOTALL | re.MULTILINE)
    page = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", lambda link: "" if link[0][0] == "!" else link[1], page)
    page = re.sub(r"https?://\S+", "", page)
    page = re.sub(r"^\s*([-*]|\d+\.) ", "\n\n", page, flags=re.MULTILINE)
    pieces = re.split(r"\n\s*\n|(?<=[.!?])[)*_\"`]*\s+", page)
    return [words for piece in pieces if (words := re.findall(r"\S*\w\S*", piece))]


def main() -> int:
    """Prints the figures; returns the exit code."""
    parser = argparse.ArgumentParser(description="Print how much there is to read in a checkout.")
    parser.add_argument("--root", default=Path(__file__).resolve().parent.parent, type=Path, help="default: this one")
    root = parser.parse_args().root
    trees = sources(root)
    (step, is_whole), (aside, is_aside_whole) = rows_of(STEP, trees), rows_of(ASIDE, trees)
    print(
        "to follow one RLOO step:", *(f"  {path}:{first}-{last} {name}" for path, name, first, last in step), sep="\n"
    )
    files = {path: (root / path).read_text(encoding="utf-8").count("\n") for path in trees}
    longest_file = max(files, key=lambda path: files[path])
    known = [pair for path, tree in trees.items() for pair in definitions(path, tree)]
    longest = max((last - first + 1, f"{name} in {path}") for (path, name, first, last), node in known
                  if not isinstance(node, ast.ClassDef))  # fmt: skip
    named = max((lines_naming(flag, trees), flag) for flag in PLAIN_FLAGS)
    takers, (up, circles) = takers_of_options(trees), faults_of_imports(trees)
    pages = [path.read_text(encoding="utf-8") for path in (root / "README.md", *sorted((root / "docs").glob("*.md")))]
    counts = [len(words) for page in pages for words in sentences(page)]
    nodes = [
        *trees.values(),
        *(node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, Definition)),
    ]
    openings = [ast.get_docstring(node) or "" for node in nodes]
    for what, figure in {
        ".py files in the root": sum("/" not in path for path in trees),
        "lines to follow one RLOO step": total(step),
        "lines that run in it and are taken by their names": total(aside),
        "both together": total([*step, *aside]),
        "lines of the system without tests and benchmarks": f"{sum(files.values()):,}",
        "longest file": f"{files[longest_file]} ({longest_file})",
        "longest function": "{} ({})".format(*longest),
        "lines of code that name a plain flag": "{} ({})".format(*named),
        "functions that take all options": f"{len(takers)} in {len(set(takers))} folders",
        "imports that point up or aside": f"{len(up)} {', '.join(up)}",
        "parts in a circle of imports": f"{len(circles)} {', '.join(circles)}",
        "README words": f"{len(pages[0].split()):,}",
        "words a sentence, README and docs, mean": f"{sum(counts) / len(counts):.1f} of {len(counts)} sentences",
        "docstrings that open with What/Whether/Which/How": len(
            [text for text in openings if re.match(r"(What|Whether|Which|How)\b", text)]
        ),
    }.items():
        print(f"{what:52} {figure}")
    return 0 if is_whole and is_aside_whole else 1


if __name__ == "__main__":
    sys.exit(main())
