"""ResumableTrainer: a Trainer whose checkpoints are whole, and whose resumed run is the run that was begun.

The only code that leans on how transformers' Trainer and DeepSpeed save and load. Unlike theirs, a save is staged and
committed (checkpoints.py), between generations alone. Weights are loaded strictly by name. Files are unpickled into
nothing but tensors and plain values, unless they are trusted.
"""

import contextlib
import json
import pickle
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object, patch_environment
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_callback import TrainerCallback
from transformers.trainer_pt_utils import safe_globals
from transformers.trainer_utils import TrainOutput
from trl import RLOOTrainer

from fleet.command.resume_check import why_of_another_run
from fleet.errors import RunEnded, RunStopped, UsageError, one_line
from fleet.processes import gather_by_rank, raise_first
from fleet.rl.checkpoints import CheckpointFolder, ProcessPlace, remedy_of
from fleet.run_folder import CONFIG_NAME, RUN_CONFIG_NAME, write_atomically
from fleet.schedule import optimizer_steps_per_generation

# In the words of torch's RuntimeError for a file that it cannot write.
WRITE_FAILURES = ("PytorchStreamWriter", "inline_container")
# What a resume unpickles; training_args.bin is written for people alone.
UNPICKLED_FILES = ("optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state*.pth", "global_step*/*.pt")


class ResumableTrainer(RLOOTrainer):
    """TRL's RLOOTrainer with Fleet's checkpoints.

    run_config: the text of the run's configuration, which goes into each checkpoint. trusts_checkpoint: anything that
    a checkpoint holds is unpickled. num_kept_checkpoints: the best among them. on_activity: told of each thing that
    the trainer begins. displaced_by: why this process may write into the run's folder no longer, None while it may.
    """

    def __init__(
        self,
        *args: Any,
        run_config: str = "{}\n",
        trusts_checkpoint: bool = False,
        num_kept_checkpoints: int = 10**9,
        on_activity: Callable[[str], None] = lambda activity: None,
        displaced_by: Callable[[], str | None] = lambda: None,
        **kwargs: Any,
    ):
        """The others are RLOOTrainer's."""
        super().__init__(*args, **kwargs)
        self.run_config, self.trusts_checkpoint = run_config, trusts_checkpoint
        self.on_activity, self.displaced_by = on_activity, displaced_by
        self.checkpoints = CheckpointFolder(
            Path(self.args.output_dir),
            ProcessPlace(self.args.process_index, self.args.world_size, gather_object),
            # Trainer's own limit stays unset, as it counts damaged checkpoints too
            num_kept_checkpoints,
            on_waiting=lambda: self.on_activity("the commit of a save"),
            displaced_by=displaced_by,
            why_foreign=partial(why_of_another_run, json.loads(run_config)),
        )
        self._is_saving = False
        self.is_save_due = False
        self.add_callback(SnapToGeneration(self))

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains, and returns when the last checkpoint is on disk. Raises RunStopped if a save fails."""
        try:
            output = super().train(*args, **kwargs)
        except RunEnded as ended:
            if ended.is_of_all:
                self.checkpoints.wait()
            raise
        self.checkpoints.wait()
        return output

    def is_at_generation_end(self) -> bool:
        """True if the next step begins with a new generation."""
        args = self.args
        generation = args.steps_per_generation, args.num_iterations, args.gradient_accumulation_steps
        return self.state.global_step % optimizer_steps_per_generation(*generation) == 0

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.checkpoints.staging) if self._is_saving else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Saves between generations. In the middle of one the save waits for its end: SnapToGeneration asks again."""
        self.is_save_due = not self.is_at_generation_end()
        if self.is_save_due:
            return
        self.on_activity("a save")
        self.checkpoints.begin()
        self._is_saving = True
        try:
            super()._save_checkpoint(model, trial)
            self._finish_staged()
        except (OSError, SafetensorError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not any(words in str(error) for words in WRITE_FAILURES):
                raise
            raise RunStopped(
                f"process {self.args.process_index} could not save step {self.state.global_step} "
                f"({one_line(error)}); the checkpoints before it are whole; "
                f"{remedy_of(error, Path(self.args.output_dir))}, and pass --resume",
                is_of_all=False,
            ) from error
        finally:
            self._is_saving = False
        self.checkpoints.commit(self.state.global_step, self.state.best_global_step)

    def _finish_staged(self) -> None:
        """Adds the run's configuration, and replaces the one path that names the staging folder."""
        if not self.args.should_save:
            return
        staged = self.checkpoints.staging / f"checkpoint-{self.state.global_step}"
        if self.state.best_model_checkpoint is not None:
            best = f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(Path(self.args.output_dir) / best)
            self.state.save_to_json(str(staged / "trainer_state.json"))
        (staged / RUN_CONFIG_NAME).write_text(self.run_config, encoding="utf-8")
        config = Path(self.args.output_dir) / CONFIG_NAME
        if not config.exists():
            # the run's folder vanished and is there again; without its flags nothing in it could be resumed
            write_atomically(config, self.run_config)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Trainer's preparation, in which DeepSpeed and the optimizer load their files."""
        if resume_from_checkpoint is None:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        checkpoint = Path(resume_from_checkpoint)
        if is_deepspeed_zero3_enabled():
            problem = None
            try:
                self._require_deepspeed_names(checkpoint)
            except UsageError as error:
                problem = str(error)
            except Exception as error:
                problem = f"resume: the checkpoint cannot be read ({type(error).__name__}: {one_line(error)})"
            raise_first(gather_by_rank(problem), who="")
        with nothing_unpickled_unless(self.trusts_checkpoint):
            try:
                return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
            except pickle.UnpicklingError as error:
                raise UsageError(_refusal_of_pickle("resume", checkpoint, str(error).split("\n")[0])) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Loads a checkpoint's weights by name, all or none. Raises UsageError naming the first that differs.

        Trainer passes over names that differ, as all of a full fine-tune do. `from_pretrained` maps them.
        """
        policy = self.accelerator.unwrap_model(self.model if model is None else model)
        checkpoint = Path(resume_from_checkpoint)
        if isinstance(policy, PeftModel):
            wanted = get_peft_model_state_dict(policy, adapter_name=policy.active_adapters[0])
            with safe_open(checkpoint / "adapter_model.safetensors", framework="pt") as saved_adapter:
                saved_names = set(saved_adapter.keys())
            _refuse_names(checkpoint, wanted.keys() - saved_names, saved_names - wanted.keys())
            dtypes = {name: weight.dtype for name, weight in policy.named_parameters() if weight.requires_grad}
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            # PEFT makes float32 of what it loads, but over 4-bit weights an adapter trains in bfloat16
            for name, dtype in dtypes.items():
                weight = policy.get_parameter(name)
                weight.data = weight.data.to(dtype)
            return
        assert isinstance(policy, PreTrainedModel), f"Fleet saves no {type(policy).__name__}"
        saved, loading = type(policy).from_pretrained(
            checkpoint, dtype=policy.dtype, use_safetensors=True, output_loading_info=True
        )
        _refuse_names(checkpoint, loading["missing_keys"], loading["unexpected_keys"])
        policy.load_state_dict(saved.state_dict(), strict=True)

    def _require_deepspeed_names(self, checkpoint: Path) -> None:
        """Raises UsageError unless this process's ZeRO file has the weights that train, in their order and shapes."""
        # DeepSpeed cuts the weights out of one flat tensor by their place, not by their names
        pattern = f"global_step*/*zero_pp_rank_{self.args.process_index}_mp_rank_00_model_states.pt"
        path = next(checkpoint.glob(pattern), None)
        if path is None:
            raise UsageError(f"resume: {checkpoint} has no {pattern}; restore the checkpoint, or begin another run")
        groups = torch.load(path, weights_only=not self.trusts_checkpoint, mmap=True)["param_shapes"]
        weights = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        trained = {name: tuple(getattr(weight, "ds_shape", weight.shape)) for name, weight in weights.items()}
        saved_names = {name for group in groups for name in group}
        _refuse_names(checkpoint, trained.keys() - saved_names, saved_names - trained.keys())
        for group in groups:
            saved = [(name, tuple(shape)) for name, shape in group.items()]
            wanted = [(name, shape) for name, shape in trained.items() if name in group]
            if saved != wanted:
                name = next(ours[0] for ours, theirs in zip(saved, wanted, strict=True) if ours != theirs)
                raise UsageError(
                    f"resume: {checkpoint} has {name} at another place or in another shape than the model; resume with "
                    "the versions that wrote it"
                )


class SnapToGeneration(TrainerCallback):
    """Makes up for a save that fell into a generation, at the generation's end."""

    def __init__(self, trainer: ResumableTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Takes the intervals of logging, evaluating and saving from this run's flags, not from the checkpoint."""
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Asks for the save that is due."""
        if self.trainer.is_save_due and self.trainer.is_at_generation_end():
            control.should_save = True
        return control


def require_plain_pickles(checkpoint: Path, place: ProcessPlace, *, who: str = "resume") -> None:
    """Raises UsageError on all processes if a file to unpickle names a class that no save writes; reads the names.

    who: the start of the message.
    """
    paths = sorted(path for pattern in UNPICKLED_FILES for path in checkpoint.glob(pattern))
    problems, deepspeeds_classes = [], _deepspeeds_classes()
    for path in paths[place.rank :: place.num_processes]:
        try:
            with safe_globals(), torch.serialization.safe_globals(deepspeeds_classes):
                unknown = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        except OSError as error:
            problems.append(f"{who}: {path} cannot be read ({error.strerror or error}); restore it")
        except Exception as error:
            # a file that torch.save did not write may raise anything
            problems.append(_refusal_of_pickle(who, path, str(error).split("\n")[0]))
        else:
            if unknown:
                problems.append(_refusal_of_pickle(who, path, f"it names {unknown[0]}"))
    raise_first(place.gather(problems), who="")


@contextlib.contextmanager
def nothing_unpickled_unless(is_trusted: bool) -> Iterator[None]:
    """Within it, torch.load makes tensors, plain values and known classes alone, also for files that hide names."""
    if is_trusted:
        yield
        return
    # overrules DeepSpeed, which asks for everything (`weights_only=False`)
    with patch_environment(TORCH_FORCE_WEIGHTS_ONLY_LOAD=1), torch.serialization.safe_globals(_deepspeeds_classes()):
        yield


def _deepspeeds_classes() -> list[type]:
    """The classes of plain values that DeepSpeed pickles; Trainer's `safe_globals` are numpy's."""
    try:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
    except ImportError:
        return []
    return [ZeroStageEnum, LossScaler, DynamicLossScaler]


def _refusal_of_pickle(who: str, path: Path, reason: str) -> str:
    return (
        f"{who}: {path} would run code as it is loaded, or cannot be read ({reason}); if this checkpoint is your own "
        "work, pass --trust_checkpoint"
    )


def _refuse_names(checkpoint: Path, missing: Collection[str], unknown: Collection[str]) -> None:
    """Raises UsageError if any weight is missing or unknown."""
    kinds = (("lacks", missing), ("has unknown", unknown))
    found = [f"{word} {len(names)} weights, {min(names)} among them" for word, names in kinds if names]
    if found:
        raise UsageError(
            f"resume: {checkpoint} does not fit the model: it {' and '.join(found)}; restore the checkpoint, or "
            "begin another run"
        )
