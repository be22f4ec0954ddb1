"""The flags of a run as what its parts take: TRL's arguments, and the settings of trainer, curve and answers.

Owns how Fleet's names reach the libraries.
"""

import logging
import operator
from dataclasses import fields
from typing import Any

from trl import RLOOConfig

from environment import EpisodeSource
from fleet.command.options import Options
from fleet.command.parser import flag_of
from fleet.evaluation.answering import AnswerSettings
from fleet.evaluation.figures import EvaluationPlan
from fleet.rl.look_watch import LookPlan
from fleet.rl.settings import TrainerSettings
from fleet.run import model_setup
from fleet.run.data import longest_prompt
from fleet.schedule import held_out_prompts_at_a_time
from reward import RewardWeights

logger = logging.getLogger("fleet")


def make_rloo_config(options: Options) -> RLOOConfig:
    """TRL's arguments for these resolved options. Constructing them starts the process group and DeepSpeed.

    Fleet counts episodes where TRL counts rollouts: a device's batch is per_device_batch_size x num_rollouts.
    """
    assert options.per_device_batch_size is not None
    shared = {
        name if flag_of(declared).trl is True else str(flag_of(declared).trl): getattr(options, name)
        for declared in fields(options)
        if (name := declared.name) and flag_of(declared).trl
    }
    return RLOOConfig(
        **shared,
        output_dir=options.output_dir or "runs",
        # "auto" is settled before the trainer is made
        gradient_checkpointing=options.gradient_checkpointing is True,
        per_device_train_batch_size=options.per_device_batch_size * options.num_rollouts,
        # the watchdog, which says why, comes first
        ddp_timeout=max(1800, int(options.step_timeout_s) + 120),
        bf16=options.dtype == "bfloat16",
        use_cpu=not model_setup.has_gpu(),
        dataloader_pin_memory=model_setup.has_gpu(),
        eval_strategy="steps" if options.eval_steps else "no",
        eval_steps=options.eval_steps or None,
        # Trainer's own evaluation loop, which is never run, wants whole groups
        per_device_eval_batch_size=options.num_rollouts,
        metric_for_best_model="greedy_accuracy" if options.keep_best else None,
        greater_is_better=True if options.keep_best else None,
        # read for the reference model alone, which a full fine-tune with beta > 0 loads again
        model_init_kwargs={"revision": options.revision} if options.revision and options.beta else None,
        # TRL has no argument for it
        generation_kwargs={"min_new_tokens": shortest} if (shortest := options.min_completion_length) else None,
        # an episode's number is its randomness, so the order stays as it is
        shuffle_dataset=False,
    )


def trainer_settings(options: Options, vision_cache_bytes: int) -> TrainerSettings:
    """The trainer's settings for resolved options. vision_cache_bytes: for image features, 0 for none."""
    return TrainerSettings(
        RewardWeights(options.reward_correct, options.reward_valid_call),
        allow_reasoning=options.allow_reasoning,
        skips_bad_images=options.bad_images == "skip",
        max_skipped_steps=options.max_skipped_steps,
        shared_prefix=options.shared_prefix,
        vision_cache_bytes=vision_cache_bytes,
        max_turns=options.max_turns,
        max_context=options.max_context_length,
        image_max_pixels=options.image_max_pixels,
        dynamic_sampling=options.dynamic_sampling,
        vision_learning_rate=options.vision_learning_rate,
        vllm_max_logprob_gap=options.vllm_max_logprob_gap,
        correction_cap=options.rollout_correction_cap if options.rollout_correction == "truncate" else None,
    )


def look_plan(options: Options, plan: EvaluationPlan, evaluation: EvaluationPlan | None) -> LookPlan:
    """The look curve of resolved options, on the plan's episodes. evaluation: the plan of held-out evaluation."""
    assert options.control_steps and options.train_steps, "resolved, and there is a curve"
    # by identity: targets of a user's own may not compare
    evaluated = () if evaluation is None else evaluation.episodes[: len(plan.episodes)]
    of_evaluation = len(evaluated) == len(plan.episodes) and all(map(operator.is_, plan.episodes, evaluated))
    intervals = [options.control_steps]
    if of_evaluation and options.eval_steps != options.control_steps:
        intervals.append(options.eval_steps)
    return LookPlan(
        plan,
        answer_settings(options),
        every=options.control_steps,
        # the last step has one of its own
        num_points=sum(options.train_steps // interval for interval in intervals) + 1,
        is_of_evaluation=of_evaluation,
        if_blind=options.stop_if_blind,
    )


def answer_settings(options: Options) -> AnswerSettings:
    """How held-out episodes are answered: as training generates."""
    assert options.per_device_batch_size and options.steps_per_generation and options.max_completion_length
    return AnswerSettings(
        episodes_per_batch=held_out_prompts_at_a_time(
            options.per_device_batch_size * options.steps_per_generation, options.num_rollouts
        ),
        max_completion_length=options.max_completion_length,
        max_pixels=options.image_max_pixels,
        repetition_penalty=options.repetition_penalty,
        min_completion_length=options.min_completion_length,
        allow_reasoning=options.allow_reasoning,
        max_turns=options.max_turns,
        max_context=options.max_context_length,
    )


def context_length(options: Options, env: EpisodeSource, num_episodes: int, processor: Any, config: Any) -> int:
    """The tokens of a prompt and its completion that a colocated vLLM needs room for; at most the model's positions.

    Prompts get half as much again as the longest of the first. Room that is not used costs nothing, as vLLM sets its
    cache by its share of the GPU. The model's own maximum may be more than that cache holds, and vLLM would not start.
    """
    assert options.image_max_pixels and options.max_completion_length
    longest = longest_prompt(env, processor, options.image_max_pixels, num_episodes)
    wanted = longest + longest // 2 + options.max_completion_length
    length = min(wanted, config.get_text_config().max_position_embeddings)
    logger.info(f"vLLM: room for {length:,} tokens of a prompt (the longest seen has {longest:,}) and its completion\n")
    return length
