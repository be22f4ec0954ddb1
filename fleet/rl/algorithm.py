"""RLOO on one page: advantages, the KL term, the clipped loss, and whose log-probabilities they take.

The algorithm is REINFORCE leave-one-out of "Back to Basics" (arXiv 2402.14740). The policy pi samples G completions
y_1 ... y_G of a prompt x. A completion is one action: its log-probability is the sum over its tokens.

    R(y, x)  = r(y, x) - beta log(pi(y | x) / pi_ref(y | x))                  the KL is taken off the reward
    A_i      = R(y_i, x) - 1/(G-1) sum_{j != i} R(y_j, x)                     the siblings' mean is the baseline
    gradient = 1/G sum_i A_i grad log pi(y_i | x), averaged over prompts      no gradient flows through A

Unlike the paper, the loss is PPO's clipped ratio (arXiv 1707.06347), as in TRL, so that a generation may serve several
steps. With one step a generation the ratio is 1, and the gradient is the one above. A rollout without a reward is left
out of its group. Rewards may be clipped (by RLOOConfig's reward_clip_range alone) and advantages normalized, as in TRL.

Unlike TRL, a group stays whole on its device and in its micro-batch; TRL shuffles rollouts. The old policy has a pass
of its own only where `needs_old_logps`; TRL always gives it one.

Where vLLM drew the completions, a rollout's loss is multiplied by a truncated importance weight, `rollout_weights`.
TRL's RLOO has none; its GRPO compares a nucleus with the whole vocabulary (trl#6789).

Whose log-probabilities, all of the sampled tokens and after temperature:

| tensor             | policy                            | from                                                    |
|--------------------|-----------------------------------|---------------------------------------------------------|
| `sampler_logps_BT` | the one that drew the tokens      | vLLM, of the tokens that its top_p and its ban leave    |
| `target_logps_BT`  | the old one, with the same rules  | the old ones, over the mass that top_p and ban leave    |
| `old_logps_BT`     | the same weights in the trainer   | a pass after sampling, or the training pass, as numbers |
| `logps_BT`         | the one that this step trains     | the training pass, with gradient                        |
| `ref_logps_BT`     | the one that training began with  | a pass after sampling, where beta > 0                   |
"""

import torch
from torch import Tensor
from trl import RLOOConfig

# Axes: P episodes (groups), G rollouts of each, B = P * G of them group after group, T completion tokens.


def needs_old_logps(args: RLOOConfig) -> bool:
    """True if the old log-probabilities need a pass of their own, before a generation's first step.

    They need it where a generation serves several optimizer steps. Where it serves one, the training pass has them. But
    where beta > 0, normalized advantages depend on those of all micro-batches, which are then needed before the first.
    """
    is_used_once = args.num_iterations == 1 and args.gradient_accumulation_steps % args.steps_per_generation == 0
    return not is_used_once or (args.beta != 0.0 and args.normalize_advantages and args.steps_per_generation > 1)


def sequence_logps(logps_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log pi(y | x) of each completion: (B,), the sum over its tokens.

    logps_BT: float32. mask_BT: int64, 0 on padding and on completions that are left out.
    """
    return (logps_BT * mask_BT).sum(dim=1)


def token_kl(old_logps_BT: Tensor, ref_logps_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log(pi_old / pi_ref) of each token: (B, T) float32, 0 outside the mask. Its mean over samples is the KL."""
    return (old_logps_BT - ref_logps_BT) * mask_BT


def shaped_rewards(
    rewards_B: Tensor, kl_BT: Tensor | None, beta: float, clip_range: tuple[float, float] | None
) -> Tensor:
    """R(y, x): the task's rewards (B,), clipped to the range, less beta times the KL of the sequence.

    kl_BT: of token_kl, or None without a reference. R is NaN for a rollout without a reward, or with a token that is
    impossible under the reference.
    """
    shaped_B = rewards_B if clip_range is None else rewards_B.clamp(*clip_range)
    if kl_BT is not None:
        shaped_B = shaped_B - beta * kl_BT.sum(dim=1)
    return shaped_B.where(shaped_B.isfinite(), torch.nan)


def leave_one_out_advantages(rewards_PG: Tensor, *, normalize: bool = False) -> Tensor:
    """Advantage of each rollout over the mean of its siblings.

    rewards_PG: (P, G) float, G >= 2; NaN marks a rollout without a reward: it is nobody's sibling and its advantage
    is 0, as is that of a rollout without a scored sibling. Returns (P, G); each row sums to 0.
    normalize: scale the advantages of all scored rollouts together to mean 0 and unit deviation.
    Raises ValueError if G < 2 or a reward is infinite.

    >>> leave_one_out_advantages(torch.tensor([[1., 0., 0., 0.]]))
    tensor([[ 1.0000, -0.3333, -0.3333, -0.3333]])
    """
    if rewards_PG.shape[1] < 2:
        raise ValueError(
            f"{rewards_PG.shape[1]} rollout per episode, but leave-one-out needs at least 2; pass --num_rollouts 4"
        )
    if torch.isinf(rewards_PG).any():
        raise ValueError("a reward is infinite, and one such reward destroys the policy; return finite numbers")
    num_siblings_P1 = (~rewards_PG.isnan()).sum(dim=1, keepdim=True) - 1
    siblings_sum_PG = rewards_PG.nansum(dim=1, keepdim=True) - rewards_PG
    advantages_PG = rewards_PG - siblings_sum_PG / num_siblings_P1
    if normalize:
        scored = advantages_PG[~advantages_PG.isnan()]
        advantages_PG = (advantages_PG - scored.mean()) / (scored.std() + 1e-4)  # as TRL guards against a tie of all
    return advantages_PG.nan_to_num(nan=0.0)


def rollout_weights(target_logps_BT: Tensor, sampler_logps_BT: Tensor, mask_BT: Tensor, cap: float) -> Tensor:
    """Weight of each rollout's loss where another engine drew it: (B,) float32 in [0, cap], to be used as a number.

    A completion is one action: w = min(cap, prod_t target(y_t) / sampler(y_t)) over its tokens. The behaviour policy
    is the engine's, after temperature, top_p and the ban of media tokens, renormalized. The target is the trainer's old
    policy under the same three (`log_kept_mass`). So the weighted gradient has the mean that it would have if Fleet had
    drawn. The baseline does not depend on y_i, so it needs no weight. Without the cap the weights have mean 1 over the
    engine's samples. The cap bounds the variance, and biases the gradient where it binds.

    target_logps_BT, sampler_logps_BT: float32. mask_BT: int64. A token whose sampler log-probability is NaN counts as
    ratio 1, such as an end put in place of an empty completion. A completion that is cut is weighted by what is left.
    Source: "Truncated Importance Sampling" (Ionides, 2008); the cap as in "IMPALA" (arXiv 1802.01561), here of a
    sequence.

    >>> target_BT = torch.tensor([[0.5, 0.6], [0.9, 0.8]]).log()
    >>> sampler_BT = torch.tensor([[0.4, 0.5], [0.3, 0.4]]).log()
    >>> rollout_weights(target_BT, sampler_BT, torch.ones(2, 2, dtype=torch.int64), cap=2.0)
    tensor([1.5000, 2.0000])
    """
    is_known_BT = mask_BT.bool() & ~sampler_logps_BT.isnan()
    log_ratios_B = (target_logps_BT - sampler_logps_BT).where(is_known_BT, 0.0).sum(dim=1)
    return log_ratios_B.exp().clamp(max=cap)


def clipped_loss(
    logps_B: Tensor,
    old_logps_B: Tensor,
    advantages_B: Tensor,
    epsilon_low: float,
    epsilon_high: float,
    weights_B: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's loss with a completion as one action, and which rollouts it clips.

    With the ratio rho = pi(y | x) / pi_old(y | x), the loss is the mean of -w min(rho A, clip(rho, 1 - epsilon_low,
    1 + epsilon_high) A). All (B,) float32; only logps_B has a gradient. weights_B: w, of rollout_weights; None for 1.
    Returns the loss (a scalar), and two (B,) bool: clipped below, where A < 0, and above, where A > 0.

    >>> logps_B = torch.tensor([2.0, 1.0]).log()  # ratios 2, which is clipped to 1.2, and 1
    >>> clipped_loss(logps_B, torch.zeros(2), torch.tensor([3.0, -1.0]), 0.2, 0.2)[0]
    tensor(-1.3000)
    """
    ratio_B = torch.exp(logps_B - old_logps_B)
    bounded_B = ratio_B.clamp(1 - epsilon_low, 1 + epsilon_high)
    objective_B = torch.min(ratio_B * advantages_B, bounded_B * advantages_B)
    loss = -(objective_B if weights_B is None else weights_B * objective_B).mean()
    is_clipped_below_B = (ratio_B < 1 - epsilon_low) & (advantages_B < 0)
    is_clipped_above_B = (ratio_B > 1 + epsilon_high) & (advantages_B > 0)
    return loss, is_clipped_below_B, is_clipped_above_B
