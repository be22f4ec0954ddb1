"""Run as ranks by tests/test_distributed.py: evaluate.py with every layer gathered for each of its passes.

DeepSpeed keeps what is as small as the toy once it has gathered it, and a rank that makes fewer passes goes unseen.
Arguments: evaluate.py's
"""

from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator

import evaluate
from fleet.run.build import evaluation
from tests.distributed_generation import GATHERED_EACH_TIME


class GatheringAccelerator(Accelerator):
    def prepare(self, *objects: Any, **settings: Any) -> Any:
        self.state.deepspeed_plugin.deepspeed_config["zero_optimization"] |= GATHERED_EACH_TIME
        (wrapped,) = (super().prepare(*objects, **settings),)
        assert all(hasattr(parameter, "ds_id") for parameter in wrapped.parameters()), "ZeRO-3 has the weights"
        return wrapped


def main(argv: Sequence[str]) -> None:
    evaluation.Accelerator = GatheringAccelerator
    evaluate.main(list(argv))
