"""Whole runs in processes of their own, forked from one that has the imports behind it: seconds, not half minutes.

They are what `accelerate launch` starts, environment variables included, without the launcher that watches them.
"""

import importlib
import multiprocessing
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import yaml

from tests import HANG_S
from tests.helpers import REPOSITORY, toy_path

ZERO3 = ["--config_file", "tests/zero3_cpu.yaml"]
ZERO3_CONFIG = REPOSITORY / "tests" / "zero3_cpu.yaml"

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.preloaded"])


@dataclass
class Rank:
    """A started process and the file that its output goes to."""

    process: ForkServerProcess
    log: Path

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def wait(self, timeout_s: float = HANG_S) -> int:
        """The exit code (minus the signal's number where one ended it); fails the test if it does not end in time."""
        self.process.join(timeout_s)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {timeout_s} s:\n{self.output[-3000:]}")
        return self.process.exitcode


def start_ranks(
    folder: Path,
    arguments: Sequence[str],
    num_processes: int = 1,
    *,
    zero3: bool = False,
    config: Path = ZERO3_CONFIG,
    target: str = "training",
) -> list[Rank]:
    """Starts `target`.main(arguments) as each rank of a run. Their logs are in `folder`.

    config: accelerate's, where zero3. target: a module, which each process imports.
    """
    toy_path()
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    ranks = []
    for rank in range(num_processes):
        variables = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        if num_processes > 1:
            variables |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes),
                "LOCAL_WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            }  # fmt: skip
        if zero3:
            variables |= zero3_variables(config)
        number = len(list(folder.glob("log-*")))
        log = folder / f"log-{number}-rank-{rank}"
        log.touch()
        process = _server.Process(target=_run, args=(target, list(arguments), variables, log))
        process.start()
        ranks.append(Rank(process, log))
    return ranks


def run_ranks(folder: Path, arguments: Sequence[str], num_processes: int = 1, **settings: Any) -> list[Rank]:
    """Runs what start_ranks starts to its end; every rank must exit with 0."""
    ranks = start_ranks(folder, arguments, num_processes, **settings)
    try:
        codes = [rank.wait() for rank in ranks]
    finally:
        for rank in ranks:
            rank.process.kill()  # the others, where one hangs
    assert codes == [0] * num_processes, "\n".join(rank.output[-3000:] for rank in ranks)
    return ranks


def start(launch_flags: list[str], script_and_flags: list[str], log: Path | None = None) -> "subprocess.Popen[str]":
    """Starts `accelerate launch`; its output goes to a pipe, or to `log`."""
    toy_path()  # built before the clock of any launch starts
    return subprocess.Popen(
        ["accelerate", "launch", "--main_process_port", free_port(), *launch_flags, *script_and_flags],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)},
        text=True,
        stdout=subprocess.PIPE if log is None else log.open("w"),
        stderr=subprocess.STDOUT,
    )


def launch(launch_flags: list[str], script_and_flags: list[str]) -> str:
    """The output of an `accelerate launch` that must succeed."""
    process = start(launch_flags, script_and_flags)
    output, _ = process.communicate(timeout=HANG_S)
    assert process.returncode == 0, output[-3000:]
    return output


def zero3_variables(config: Path) -> dict[str, str]:
    """What `accelerate launch --config_file` puts into the environment, by its own code."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import prepare_deepspeed_cmd_env

    arguments, _, _ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(config), "training.py"])
    )
    fields = yaml.safe_load(config.read_text())["deepspeed_config"]
    arguments.deepspeed_fields_from_accelerate_config = ",".join(fields)
    _, environment = prepare_deepspeed_cmd_env(arguments)
    return {name: value for name, value in environment.items() if name.startswith("ACCELERATE_")}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _run(target: str, arguments: list[str], variables: dict[str, str], log: Path) -> None:
    output = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(variables)
    from fleet.command import command_line

    main = importlib.import_module(target).main
    sys.exit(command_line.run(lambda: main(arguments)))
