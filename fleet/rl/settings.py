"""The settings of FleetRLOOTrainer that TRL's arguments lack. fleet/run/build sets them from the flags."""

from dataclasses import dataclass

from reward import DEFAULT_WEIGHTS, RewardWeights


@dataclass(frozen=True)
class TrainerSettings:
    """Settings of sampling, judging and rewarding."""

    reward_weights: RewardWeights = DEFAULT_WEIGHTS
    allow_reasoning: bool = False  # text before a call is accepted
    skips_bad_images: bool = False  # an episode whose image has gone bad is replaced; else the run stops
    max_skipped_steps: int = 5  # in a row that taught nothing, after which training ends
    shared_prefix: bool = True  # each prompt is computed once a group, where that is less work; else TRL's own passes
    vision_cache_bytes: int = 0  # host memory for the features of images, where the vision tower is frozen
    max_turns: int = 1  # of a rollout; from 2 on, tools may answer before the verdict
    max_context: int | None = None  # tokens of a conversation; None for as many as the model has positions
    image_max_pixels: int | None = None  # budget of one picture that a tool shows
    dynamic_sampling: int = 0  # attempts to replace a group that is all right or all wrong by a further episode's
    vision_learning_rate: float | None = None  # of tower and merger; None for the same as all
    vllm_max_logprob_gap: float = 0.1  # see VLLMSampler
    correction_cap: float | None = None  # of rollout_weights, where vLLM generates; None for no weights


DEFAULT_SETTINGS = TrainerSettings()
