"""The counts of a run's passes, kept in the cache: the same model and shapes are counted once on a machine."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from fleet.cache import cache_folder, made_once
from fleet.errors import UsageError
from fleet.planning import counted_pass
from fleet.planning.counted_pass import CountedModel, ModelSize, PassShape, Peak
from fleet.qwen import draws, edge_scores
from fleet.run_folder import write_atomically
from model_utils import PartSize

NAME = "counts.json"
# what decides which tensors a pass holds
PACKAGES = ("torch", "transformers", "peft")
SOURCES = tuple(str(module.__file__) for module in (counted_pass, draws, edge_scores))


@dataclass(frozen=True)
class Counts:
    """The sizes of a model, and the moments of its training pass and of the first passes of sampling.

    evaluation: of sampling held-out answers; None without any.
    """

    size: ModelSize
    training: Peak
    generation: Peak
    evaluation: Peak | None

    def as_json(self) -> str:
        """The counts as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The counts of such a text."""
        found = json.loads(text)
        parts = {name: PartSize(**part) for name, part in found["size"]["parts"].items()}
        evaluation = None if found["evaluation"] is None else _peak_of(found["evaluation"])
        training, generation = _peak_of(found["training"]), _peak_of(found["generation"])
        return cls(ModelSize(parts, found["size"]["quantizable"]), training, generation, evaluation)


def counts_of(
    model: CountedModel, training: PassShape, generation: PassShape, evaluation: PassShape | None = None
) -> Counts:
    """The counts of these passes, from the cache if it has them. Never fails for a cache that cannot be used."""
    shapes = training, generation, evaluation
    folder = cache_folder() / "counts" / f"{_digest(model, shapes)}-counts"

    def make(unfinished: Path) -> None:
        write_atomically(unfinished / NAME, _counted(model, *shapes).as_json())

    with suppress(UsageError, OSError, ValueError, KeyError, TypeError):
        made_once(folder, lambda path: (path / NAME).is_file(), make, "the counts of a pass")
        return Counts.from_json((folder / NAME).read_text(encoding="utf-8"))
    return _counted(model, *shapes)


def _counted(model: CountedModel, training: PassShape, generation: PassShape, evaluation: PassShape | None) -> Counts:
    return Counts(
        counted_pass.size_of(model),
        counted_pass.training_peak(model, training),
        counted_pass.sampling_peak(model, generation),
        None if evaluation is None else counted_pass.sampling_peak(model, evaluation),
    )


def _text(value: Any) -> str:
    # the order of a set differs from process to process
    return str(sorted(map(str, value))) if isinstance(value, set | frozenset) else str(value)


def _peak_of(found: dict[str, Any]) -> Peak:
    return Peak(tuple((int(grads), int(others)) for grads, others in found["moments"]), found["fixed"])


def _digest(model: CountedModel, shapes: Sequence[PassShape | None]) -> str:
    lora = None if model.lora is None else sorted((name, _text(value)) for name, value in vars(model.lora).items())
    rest = model.dtype, model.is_autocast, sorted(model.frozen), lora, model.is_checkpointed, model.attention
    source = b"".join(Path(path).read_bytes() for path in SOURCES)
    known = [model.config.to_json_string(), repr(rest), repr(shapes), *map(version, PACKAGES)]
    return hashlib.sha256("\n".join(known).encode() + source).hexdigest()[:24]
