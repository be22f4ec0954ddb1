"""The flags that training alone has, each declared once, as in flags.py."""

from dataclasses import dataclass
from pathlib import Path

from fleet.command.flags import A_SEED, A_SHARE, ABOVE_0, AT_LEAST_0, AT_LEAST_1, BELOW_1, Case, ModelFlags, by_model
from fleet.command.parser import Bound, SomeOf, assumed_gpus, flag, true_false_or_auto, user_path
from fleet.errors import UsageError
from fleet.model_folder.files import ADAPTER_CONFIG_NAME, is_adapter, read_json
from fleet.model_folder.parts import LANGUAGE_MODEL, LORA_TARGETS, PARTS, VISION_PARTS, parts_of_adapter
from fleet.schedule import optimizer_steps_per_generation

LORA_RATE = by_model(toy=(5e-4, "LoRA on the toy model"), real=(1e-5, "LoRA: ten times a full fine-tune's"))
FULL_RATE = by_model(
    toy=(1e-4, "full fine-tune of the toy"),
    look=(2e-4, "full fine-tune of the sighted toy"),
    real=(1e-6, "full fine-tune, TRL's default"),
)


def default_vision_cache(case: Case) -> tuple[int, str]:
    """(MiB, reason) of --vision_cache_mib."""
    if case.options.trained_parts & VISION_PARTS:
        return 0, "vision trains, so features change"
    if not case.options.shared_prefix:
        return 0, "TRL's own passes take no features"
    return 2048, "vision is frozen: features keep"


def default_control_steps(case: Case) -> tuple[int, str]:
    """(optimizer steps, reason) of --control_steps."""
    every = case.options.eval_steps
    return every, "evaluation has the answers" if every else "nothing is evaluated"


def default_control_episodes(case: Case) -> tuple[int, str]:
    """(episodes, reason) of --control_episodes."""
    if case.options.control_steps is None:
        return case.options.eval_episodes, "those of evaluation"
    return 32, "few, so that a point is cheap"


# fmt: off
@dataclass(frozen=True)
class TrainedPartFlags(ModelFlags):
    """The parts of the model that train, and those that are frozen."""

    freeze: str | None = flag(None, "parts to keep as they are, of tower, merger (both are the vision side) and "
        "language_model, with commas between them", "none", metavar="PARTS", parse=SomeOf(PARTS, or_none=True))
    use_lora: bool = flag(False, "train LoRA adapters alone, not the model's own weights")
    lora_targets: str = flag("language", "parts whose linear layers get adapters, of language, vision (its tower) and "
        "merger, with commas between them", "as pictures are then encoded once", metavar="PARTS",
        parse=SomeOf(tuple(LORA_TARGETS)))
    lora_rank: int = flag(16, "rank of new adapters",
        bounds=(AT_LEAST_1, Bound("at most 8,192", lambda value: value <= 8192)))  # the width of the widest model
    lora_alpha: int = flag(32, "scale of new adapters", "twice the rank", bounds=(AT_LEAST_1,))
    lora_dropout: float = flag(0.0, "dropout in new adapters, 0 to 1", "as old and new log-probabilities must agree",
        metavar="P", bounds=(AT_LEAST_0, BELOW_1))
    merge_lora: bool = flag(False, "also write the base model with the adapters merged in, as final_merged/",
        may_change=True)
    vision_cache_mib: int | None = flag(None, "host memory per process for features of images, each of which is then "
        "encoded once while it is held, in MiB; 0 keeps none",
        "2048 where tower and merger are frozen, as with LoRA on the language model; else 0, as features change",
        bounds=(AT_LEAST_0,), may_change=True, default_of=default_vision_cache)

    @property
    def frozen_parts(self) -> frozenset[str]:
        """The parts of the model that --freeze names."""
        return frozenset() if self.freeze is None else frozenset(self.freeze.split(","))

    @property
    def trained_parts(self) -> frozenset[str]:
        """The parts of the model in which a weight trains, an adapter's included."""
        if not self.use_lora:
            return frozenset(PARTS) - self.frozen_parts
        if not is_adapter(self.model_id):
            return frozenset(LORA_TARGETS[word][0] for word in self.lora_targets.split(","))
        try:
            return parts_of_adapter(read_json(Path(self.model_id) / ADAPTER_CONFIG_NAME))
        except UsageError:
            # the checks of the model's files refuse it, on all processes
            return frozenset({LANGUAGE_MODEL})


@dataclass(frozen=True)
class RewardFlags:
    """The worth of an answer."""

    reward: str | None = flag(None, "a reward function of your own, as path/to/file.py:function; accuracy stays what "
        "the environment judges", "Fleet's own, by reward_correct and reward_valid_call", metavar="FILE:FUNCTION",
        parse=user_path, is_file=True)
    reward_timeout_s: float = flag(60.0, "time that one call of the reward function may take before the run stops, in "
        "seconds", "far above a rule's, enough for a model or a server that judges", bounds=(ABOVE_0,), may_change=True)
    reward_correct: float = flag(0.95, "what the right index earns besides reward_valid_call", bounds=(ABOVE_0,))
    reward_valid_call: float = flag(0.05, "what any well-formed call in range earns",
        "so that a right answer is worth 1", bounds=(AT_LEAST_0,))


@dataclass(frozen=True)
class RLOOFlags:
    """The training of the policy on what was sampled. Names are TRL's where it has the same."""

    train_steps: int | None = flag(None, "optimizer steps in all", "60 for the toy, 100 where it must look, else 200",
        bounds=(AT_LEAST_1, Bound("at most 10,000,000", lambda value: value <= 10_000_000)), trl="max_steps",
        may_change=True, default_of=by_model(toy=(60, "the toy learns in 60"),
                                             look=(100, "the toy learns to look in 100"), real=(200, "a real model")))
    num_rollouts: int = flag(4, "rollouts per episode, at least 2", metavar="G", trl="num_generations")
    per_device_batch_size: int | None = flag(None, "episodes per device and micro-batch, each with its G rollouts",
        "8 for the toy, 16 where it must look, else 1", bounds=(AT_LEAST_1,),
        default_of=by_model(toy=(8, "the toy is small"), look=(16, "looking takes many episodes"),
                            real=(1, "one group of a real model at a time")))
    dynamic_sampling: int = flag(0, "times that a group which is all right or all wrong is replaced by a further "
        "episode's, at most; groups of one accord teach nothing of what is right", "each episode counts once",
        metavar="N", bounds=(AT_LEAST_0, Bound("at most 100", lambda value: value <= 100)))
    gradient_accumulation_steps: int = flag(1, "micro-batches per optimizer step", bounds=(AT_LEAST_1,), trl=True)
    steps_per_generation: int | None = flag(None, "micro-batches per generation", "gradient_accumulation_steps, which "
        "is on-policy", bounds=(AT_LEAST_1,), trl=True, default_of=lambda case:
        (case.options.gradient_accumulation_steps, "on-policy: one optimizer step a generation"))
    num_iterations: int = flag(1, "times each generation is trained on", "on-policy", bounds=(AT_LEAST_1,), trl=True)
    learning_rate: float | None = flag(None, "AdamW's",
        "1e-4 for the toy, 2e-4 where it must look, 5e-4 with LoRA; else 1e-6, 1e-5 with LoRA", bounds=(ABOVE_0,),
        trl=True, default_of=lambda case: (LORA_RATE if case.options.use_lora else FULL_RATE)(case))
    vision_learning_rate: float | None = flag(None, "AdamW's for the vision side, its tower and merger; the schedule "
        "scales both", "learning_rate", bounds=(ABOVE_0,))
    lr_scheduler_type: str = flag("constant", "learning-rate schedule: constant, constant_with_warmup, linear or "
        "cosine", "so that a longer run begins like a shorter one", metavar="NAME",
        choices=("constant", "constant_with_warmup", "linear", "cosine"), trl=True)
    warmup_steps: int = flag(0, "optimizer steps of linear warm-up; needs a schedule that warms up",
        bounds=(AT_LEAST_0,), trl=True)
    weight_decay: float = flag(0.0, "AdamW's", bounds=(AT_LEAST_0,), trl=True)
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm", bounds=(ABOVE_0,), trl=True)
    beta: float | None = flag(None, "weight of the KL to the reference model", "0, no reference model in memory",
        bounds=(AT_LEAST_0,), trl=True, default_of=lambda case: (0.0, "no KL term, so no reference model in memory"))
    epsilon: float = flag(0.2, "clip range of the ratio; off-policy only", bounds=(ABOVE_0,), trl=True)
    epsilon_high: float | None = flag(None, "upper clip range; off-policy only", "epsilon", bounds=(ABOVE_0,), trl=True)
    max_skipped_steps: int = flag(5, "the run saves and stops after so many optimizer steps in a row that taught "
        "nothing: skipped, as loss or gradient was not finite, or without a group of two rollouts that count",
        "as one odd batch passes and a broken model or reward does not", bounds=(AT_LEAST_1,), may_change=True)
    normalize_advantages: bool = flag(False, "scale advantages to unit deviation over the batch", trl=True)
    mask_truncated_completions: bool = flag(False, "train on no completion that hit the length limit", trl=True)
    gradient_checkpointing: bool | str | None = flag(None, "recompute activations to save memory; auto: where the "
        "memory that is predicted does not fit on the GPU without it, which is a quarter slower",
        "false for the toy, else auto", metavar="true|false|auto", parse=true_false_or_auto,
        default_of=by_model(toy=(False, "the toy model"), real=("auto", "only where memory needs it")))

    @property
    def optimizer_steps_per_generation(self) -> int:
        """Optimizer steps that one generation serves; 1 is on-policy."""
        accumulation = self.gradient_accumulation_steps
        per_generation = self.steps_per_generation or accumulation
        return optimizer_steps_per_generation(per_generation, self.num_iterations, accumulation)


@dataclass(frozen=True)
class GenerationFlags:
    """The engine of generation: Fleet, TRL or vLLM."""

    shared_prefix: bool = flag(True, "compute each prompt once per group in generation and training, as long as that "
        "is less work; false takes TRL's own passes")
    use_vllm: bool = flag(False, "generate with vLLM, which must be installed", trl=True,
        needs={True: ("vllm", "pip install 'vllm>=0.22,<0.32'")})
    vllm_mode: str = flag("colocate", "vLLM beside training on the same GPUs, or a server",
        choices=("colocate", "server"), trl=True)
    vllm_server_host: str = flag("127.0.0.1", "of the vLLM server", metavar="HOST", trl=True, may_change=True)
    vllm_server_port: int = flag(8000, "of the vLLM server", metavar="PORT",
        bounds=(Bound("from 1 to 65535", lambda value: 1 <= value <= 65535),), trl=True, may_change=True)
    vllm_gpu_memory_utilization: float = flag(0.3, "share of the GPU that colocated vLLM takes, 0 to 1", metavar="P",
        bounds=(A_SHARE,), trl=True, may_change=True)
    vllm_tensor_parallel_size: int = flag(1, "GPUs per colocated vLLM", bounds=(AT_LEAST_1,), trl=True)
    vllm_max_model_length: int | None = flag(None, "tokens that colocated vLLM has room for, of a prompt and its "
        "completion together", "max_completion_length and half as much again as the longest of the first 256 prompts",
        bounds=(AT_LEAST_1,), trl=True, may_change=True)
    vllm_enable_sleep_mode: bool = flag(False, "give back the GPU memory of colocated vLLM while the trainer computes",
        "as waking takes time each generation", trl=True, may_change=True)
    rollout_correction: str = flag("truncate", "weight each rollout by its probability under the trainer over that "
        "under vLLM, both with the same temperature and top_p, and truncate the weights; or none",
        "as a gradient from other probabilities than the trainer's is biased", choices=("truncate", "none"))
    rollout_correction_cap: float = flag(2.0, "the largest weight of a rollout", "it counts for two at most",
        bounds=(AT_LEAST_1,))
    vllm_max_logprob_gap: float = flag(0.1, "how far the log-probabilities of vLLM and of the trainer may be apart, "
        "on average over the tokens of the first generation, in nats, before the run stops; 16-bit rounding gives "
        "0.01, other prompts 0.3", bounds=(ABOVE_0,), may_change=True)


@dataclass(frozen=True)
class EvaluationFlags:
    """The scoring of held-out episodes during training."""

    eval_steps: int = flag(0, "optimizer steps between evaluations, the first before training, the last at its end; 0 "
        "for none", bounds=(AT_LEAST_0,), may_change=True)
    control_steps: int | None = flag(None, "optimizer steps between points of the look curve: a few held-out episodes "
        "with true, grey and swapped pictures show if the model looks; the first before training, the last at its end; "
        "0 for none", "eval_steps, as evaluation has the answers already", bounds=(AT_LEAST_0,), may_change=True,
        default_of=default_control_steps)
    control_episodes: int | None = flag(None, "held-out episodes of the look curve, the same each time",
        "eval_episodes without control_steps, else 32, which are quickly answered", bounds=(AT_LEAST_1,),
        default_of=default_control_episodes)
    stop_if_blind: str = flag("warn", "what the run does when accuracy on the look curve rises and rises as much with "
        "every picture grey: warn once, save and stop, or none", "as a leak may be known and wanted",
        choices=("none", "warn", "stop"), may_change=True)
    keep_best: bool = flag(False, "also keep the checkpoint with the best held-out accuracy; needs eval_steps",
        may_change=True)


@dataclass(frozen=True)
class RunFlags:
    """The run's folder, records and processes."""

    output_dir: str | None = flag(None, "what the run leaves", "a new runs/<date-time>-<model>", metavar="DIR",
        parse=user_path, may_change=True)
    overwrite: bool = flag(False, "empty a non-empty --output_dir first", may_change=True)
    resume: bool | str = flag(False, "continue the run in output_dir from its last whole checkpoint, or from its "
        "start if it has none yet; auto: if there is a run, else begin one, for jobs that are restarted",
        metavar="true|false|auto", parse=true_false_or_auto, may_change=True)
    trust_checkpoint: bool = flag(False, "on resume, unpickle whatever the checkpoint's files hold, code included",
        may_change=True)
    seed: int = flag(0, "of episodes, adapters and sampling", bounds=(AT_LEAST_0, A_SEED), trl=True)
    save_steps: int = flag(50, "optimizer steps between checkpoints", bounds=(AT_LEAST_1,), trl=True, may_change=True)
    save_total_limit: int = flag(2, "checkpoints kept", "the last good one and its successor", bounds=(AT_LEAST_1,),
        may_change=True)
    logging_steps: int = flag(1, "optimizer steps per line of metrics; the last step always has one",
        bounds=(AT_LEAST_1,), trl=True, may_change=True)
    sample_steps: int = flag(20, "optimizer steps between tables of completions, printed and, with their pictures, "
        "sent to --report_to; 0 for none", bounds=(AT_LEAST_0,), may_change=True)
    report_to: str = flag("tensorboard", "where metrics go besides metrics.jsonl", "which sends nothing",
        choices=("tensorboard", "wandb", "trackio", "none"), trl=True,
        needs={name: (name, f"pip install {name}") for name in ("tensorboard", "wandb", "trackio")}, may_change=True)
    dataloader_num_workers: int | None = flag(None, "processes that open, resize and process images ahead, each two "
        "batches at most; 0 for the main one", "2 with a GPU, else 0", bounds=(AT_LEAST_0,), trl=True, may_change=True,
        default_of=lambda case: (2, "a GPU is not to wait for images") if case.has_bf16_gpu
        else (0, "no GPU waits for images"))
    step_timeout_s: float = flag(1800.0, "seconds without progress (a generation, a call of rewards, a pass, a save) "
        "after which the run ends with the reason instead of hanging", "beyond the slowest of these", metavar="S",
        bounds=(Bound("at least 10 seconds", lambda value: value >= 10),), may_change=True)
    dry_run: bool = flag(False, "check everything, print what the run needs and whether it fits, and stop before any "
        "weight loads; exit code 2 if it does not", may_change=True)
    assume_gpus: str | None = flag(None, "with dry_run: answer for so many GPUs of so many GiB, as 8x80, or 8x80:H100 "
        "with a name", "this machine", metavar="NxGIB", parse=assumed_gpus, may_change=True)
    assume_accelerate: str | None = flag(None, "with dry_run: answer for a launch with this accelerate file", "the "
        "launch as it is", metavar="FILE", parse=user_path, may_change=True)
    json: bool = flag(False, "with dry_run: print the answer as one JSON object", may_change=True)
