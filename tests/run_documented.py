"""Runs the table of documented.py in a copy of this tree, and prints each command with exit code and seconds.

    python -m tests.run_documented

A command fails by its exit code, by a traceback in its output, or by leaving no output where it should. The copy has
this tree's environment and is deleted at the end, so no command writes into the tree. Exits with 1 if any failed.
"""

import argparse
import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import IO

from tests.documented import FREE_PORT, LAST_STAGE, REPOSITORY, TABLE, NotRun, RunBy, Runs

TIMEOUT_S = 900
TRACEBACK = "Traceback (most recent call last)"
INDENT = 24
LINES_SHOWN = 40  # of the output of a command that failed


@dataclass(frozen=True)
class Result:
    """What came of a command. fault: None where there is none."""

    run: Runs
    exit_code: int
    seconds: float
    fault: str | None
    output: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs every command of the table, or those with given words in them; returns the exit code."""
    parser = argparse.ArgumentParser(prog="run_documented", description="Run what README.md and docs/*.md show.")
    parser.add_argument("--only", default="", metavar="WORDS", help="commands with these words in them (default: all)")
    wanted = [entry for entry in TABLE if parser.parse_args(arguments).only in entry.command]
    for entry in wanted:
        if isinstance(entry, RunBy):
            print(f"elsewhere               {entry.command}\n{'':{INDENT}}by {entry.where}: {entry.line}")
        elif isinstance(entry, NotRun):
            print(f"not run                 {entry.command}\n{'':{INDENT}}because: {entry.reason}")
    start_s = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fleet-documented-") as folder:
        results = run_all([entry for entry in wanted if isinstance(entry, Runs)], copy_of_tree(Path(folder) / "fleet"))
    num_failed = sum(result.fault is not None for result in results)
    num_elsewhere = sum(isinstance(entry, RunBy) for entry in wanted)
    print(
        f"{len(wanted)} documented commands: {len(results) - num_failed} ran, {num_failed} failed, {num_elsewhere} run "
        f"elsewhere, {len(wanted) - len(results) - num_elsewhere} not run; {time.perf_counter() - start_s:.0f} s"
    )
    return 1 if num_failed else 0


def copy_of_tree(folder: Path) -> Path:
    """A copy of this tree without what .gitignore names, with its environment and the files that the pages show."""
    ignored = [line.rstrip("/") for line in (REPOSITORY / ".gitignore").read_text(encoding="utf-8").splitlines()]
    # with the times of the files, by which make knows that the environment is up to date
    shutil.copytree(REPOSITORY, folder, symlinks=True, ignore=shutil.ignore_patterns(".git", *ignored))
    (folder / ".venv").symlink_to((REPOSITORY / ".venv").resolve())
    for name, page, language in (("run.yaml", "flags", "yaml"), ("my_reward.py", "your_own_task", "python")):
        text = (REPOSITORY / "docs" / f"{page}.md").read_text(encoding="utf-8")
        (example,) = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
        (folder / name).write_text(example, encoding="utf-8")
    write_parquet(folder)
    return folder


def write_parquet(folder: Path) -> None:
    """The reader's own data set: the toy's pictures in a file."""
    from datasets import ClassLabel, Dataset, Features, Image

    paths = sorted((folder / "toy_images").glob("*.png"))
    names = [path.stem.replace("_", " ") for path in paths]
    columns = {"photo": [str(path) for path in paths], "kind": list(range(len(paths)))}
    features = Features({"photo": Image(), "kind": ClassLabel(names=names)})
    Dataset.from_dict(columns, features=features).to_parquet(folder / "photos.parquet")


def run_all(runs: Sequence[Runs], tree: Path) -> list[Result]:
    """Runs stage after stage; within one, as many commands at a time as there are cores, each on its own."""
    cores = sorted(os.sched_getaffinity(0))
    results: list[Result] = []
    for stage in range(1, LAST_STAGE + 1):
        places: SimpleQueue[set[int]] = SimpleQueue()
        for place in [set(cores)] if stage == LAST_STAGE else [{core} for core in cores]:
            places.put(place)

        def run_on_a_place(run: Runs, places: SimpleQueue[set[int]] = places) -> Result:
            place = places.get()
            # of this thread, and of the processes that it starts
            os.sched_setaffinity(0, place)
            try:
                return run_one(run, tree)
            finally:
                places.put(place)

        with ThreadPoolExecutor(places.qsize()) as pool:
            results += pool.map(run_on_a_place, [run for run in runs if run.stage == stage])
    return results


def run_one(run: Runs, tree: Path) -> Result:
    """Runs a command, and its like beside it; prints what came of it."""
    port = free_port()
    variants = [None, run.beside] if run.beside else [None]
    commands = [run.as_run(further).replace(shlex.quote(FREE_PORT), port) for further in variants]
    start_s, start_time_s = time.perf_counter(), time.time()
    with contextlib.ExitStack() as open_files:
        files = [open_files.enter_context(tempfile.TemporaryFile("w+", errors="replace")) for _ in commands]
        processes = [start(command, tree, file) for command, file in zip(commands, files, strict=True)]
        exit_code = max(wait(process, TIMEOUT_S - (time.perf_counter() - start_s)) for process in processes)
        seconds = time.perf_counter() - start_s
        for file in files:
            file.seek(0)
        output = "\n".join(file.read() for file in files)
    result = Result(run, exit_code, seconds, find_fault(run, exit_code, output, tree, start_time_s), output)
    lines = [f"{'ok' if result.fault is None else 'FAILED':6} exit {exit_code:3} {seconds:6.1f} s  {commands[0]}"]
    lines += [f"{'':{INDENT}}beside {command}" for command in commands[1:]]
    if commands[0] != run.command:
        lines.append(f"{'':{INDENT}}for {run.command}")
    if result.fault is not None:
        lines += [f"{'':{INDENT}}{result.fault}; its last lines:", *output.splitlines()[-LINES_SHOWN:]]
    print("\n".join(lines), flush=True)
    return result


def start(command: str, tree: Path, output: IO[str]) -> "subprocess.Popen[str]":
    """Starts a command in the tree's environment, in a session of its own."""
    return subprocess.Popen(
        ["bash", "-c", f"source .venv/bin/activate && {command}"],
        cwd=tree, text=True, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
    )  # fmt: skip


def wait(process: "subprocess.Popen[str]", timeout_s: float) -> int:
    """The exit code, 124 for a process that did not end in time and was killed with all that it started."""
    try:
        code = process.wait(max(1, timeout_s))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return 124
    return code if code >= 0 else 128 - code


def find_fault(run: Runs, exit_code: int, output: str, tree: Path, start_time_s: float) -> str | None:
    """The first thing that is wrong with what a command did, in a line, or None.

    start_time_s: when it started, since the epoch; files that it should leave must be no older.
    """
    if exit_code != 0:
        return f"exit code {exit_code}, wanted 0"
    if TRACEBACK in output:
        return "its output has a traceback"
    if run.says not in output:
        return f"its output lacks {run.says!r}"
    named = re.search(r"^in (\S+): report\.html", output, re.MULTILINE)
    for pattern in run.leaves:
        if "{run}" in pattern and named is None:
            return "its output names no run folder"
        found = tree.glob(pattern.format(run=named[1] if named else ""))
        # clocks of file systems tick in steps
        if not any(path.stat().st_size and path.stat().st_mtime > start_time_s - 1 for path in found):
            return f"it left no {pattern}"
    return None


def free_port() -> str:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
