"""The recipes' job script and container file, with stand-ins for what this machine lacks."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.helpers import REPOSITORY

SBATCH = REPOSITORY / "recipes" / "slurm_2x8.sbatch"
STAND_INS = {
    "scontrol": 'echo "node-a\nnode-b"',
    # two tasks, as of two machines
    "srun": 'shift; for SLURM_PROCID in 0 1; do export SLURM_PROCID; "$@"; done',
    "accelerate": 'printf "%s\\n" "$@" >> "$SEEN"; echo >> "$SEEN"',
}


@pytest.fixture
def seen(tmp_path: Path) -> tuple[dict[str, str], Path]:
    """Slurm's variables, with its programs and accelerate replaced; and the file of what accelerate was given."""
    for name, body in STAND_INS.items():
        program = tmp_path / name
        program.write_text(f"#!/bin/bash\n{body}\n")
        program.chmod(0o755)
    variables = {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SEEN": str(tmp_path / "seen"),
        "SLURM_JOB_NAME": "first", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_NNODES": "2",
    }  # fmt: skip
    return variables, tmp_path / "seen"


def test_each_machine_of_a_slurm_job_is_launched_with_its_rank(seen: tuple[dict[str, str], Path]) -> None:
    variables, path = seen
    words = [str(SBATCH), "recipes/32b_2x8gpus.yaml", "--data_root", "./my images"]
    subprocess.run(["bash", *words], env=variables, cwd=REPOSITORY, check=True)
    machines = [machine.splitlines() for machine in path.read_text().strip().split("\n\n")]
    assert len(machines) == 2
    for rank, given in enumerate(machines):
        flags = dict(
            zip(given[given.index("--config_file") :: 2], given[given.index("--config_file") + 1 :: 2], strict=False)
        )
        assert flags["--num_machines"] == "2" and flags["--num_processes"] == "16"
        assert flags["--machine_rank"] == str(rank) and flags["--main_process_ip"] == "node-a"
        after = given[given.index("training.py") + 1 :]
        assert after == ["--config", "recipes/32b_2x8gpus.yaml", "--output_dir", "runs/slurm-first", "--resume", "auto",
                         "--data_root", "./my images"]  # fmt: skip


def test_a_slurm_job_without_a_recipe_says_what_is_missing(seen: tuple[dict[str, str], Path]) -> None:
    done = subprocess.run(["bash", str(SBATCH)], env=seen[0], capture_output=True, text=True)
    assert done.returncode != 0 and "the recipe to run, such as recipes/32b_2x8gpus.yaml" in done.stderr


def test_the_two_machine_file_differs_from_the_one_machine_file_in_its_machines_alone() -> None:
    one, two = (
        yaml.safe_load((REPOSITORY / "recipes" / name).read_text()) for name in ("zero3.yaml", "zero3_2x8.yaml")
    )
    shipped = yaml.safe_load((REPOSITORY / "accelerate_config.yaml").read_text())
    of_machines = {"num_machines": 2, "num_processes": 16, "main_process_ip": "10.0.0.1", "main_process_port": 29500}
    assert two == one | of_machines
    shipped["deepspeed_config"]["offload_optimizer_device"] = "none"
    assert one == shipped


def test_the_container_file_copies_what_is_there_and_starts_what_exists() -> None:
    text = (REPOSITORY / "recipes" / "Dockerfile").read_text()
    copied = [line.split()[1] for line in text.splitlines() if line.startswith("COPY")]
    assert copied == ["requirements.txt", "."] and (REPOSITORY / "requirements.txt").is_file()
    assert set(re.findall(r"recipes/\S+\.yaml", text)) == {"recipes/3b_1gpu.yaml"}


@pytest.mark.parametrize("recipe", sorted(path.name for path in (REPOSITORY / "recipes").glob("*gpu*.yaml")))
def test_a_recipes_command_names_files_that_are_there(recipe: str) -> None:
    comment = "".join(
        line for line in (REPOSITORY / "recipes" / recipe).read_text().splitlines() if line.startswith("#")
    )
    named = re.findall(r"(?:recipes/\w+\.yaml|accelerate_config\.yaml)", comment)
    assert f"recipes/{recipe}" in named
    assert all((REPOSITORY / name).is_file() for name in named)
