"""Imported once by the server that tests/processes.py forks its processes from, so that none waits for imports."""

import os

os.environ.update(
    CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false"
)

import deepspeed  # noqa: F401
import trl  # noqa: F401

import training  # noqa: F401
from fleet.run import results  # noqa: F401
from fleet.run.build import evaluation  # noqa: F401
