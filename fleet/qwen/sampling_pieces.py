"""A batch's completions in as few pieces as memory allows: whole groups, each piece with a first pass of its own."""

import itertools
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from dataset import EpisodeBatch
from fleet.qwen.group_passes import MAX_MASK_PAIRS, base_qwen, image_inputs, tree_prompts
from fleet.qwen.token_tree import Branches
from fleet.qwen.tree_sampling import Samples, SamplingRequest, sample_on_trees

# logits that a first pass may make, 4 GiB in bfloat16: prompts beyond them have a pass of their own
MAX_LOGITS = 2**31


def sample_batch(
    model: nn.Module,
    batch: EpisodeBatch,
    features: Sequence[Tensor] | None,
    request: SamplingRequest,
    *,
    most_of_ranks: Callable[[int], int] = lambda count: count,
    model_of_first_pass: nn.Module | None = None,
) -> list[Samples]:
    """G completions of each of the batch's P episodes, in one piece unless round 1 would be too large.

    features: of group_passes.image_inputs. The others are sample_on_trees'; a first pass in pieces has no gradient.
    """
    attention = base_qwen(model).config.get_text_config()._attn_implementation
    prompts, num_groups = tree_prompts(model, batch), len(request.drafts)
    num_nodes = max(len(Branches(group)) for group in request.drafts)
    vocabulary = base_qwen(model).config.get_text_config().vocab_size
    num_pieces = most_of_ranks(num_pieces_of(num_groups, prompts.ids_PL.shape[1], num_nodes, vocabulary, attention))
    ends = [num_groups * number // num_pieces for number in range(num_pieces + 1)]
    return [
        sample_on_trees(
            model,
            prompts[groups],
            image_inputs(batch, groups, features),
            attention,
            request[groups],
            most_of_ranks=most_of_ranks,
            model_of_first_pass=model_of_first_pass if num_pieces == 1 else None,
        )
        for groups in (slice(*pair) for pair in itertools.pairwise(ends))
    ]


def num_pieces_of(num_groups: int, prompt_length: int, num_nodes: int, vocabulary: int, attention: str) -> int:
    """The pieces that sampling is done in, so that round 1's mask and logits are not too large.

    num_nodes: of the largest tree of drafts, its root included. attention: the language model's.
    """
    pairs, logits = num_groups * (prompt_length + num_nodes) ** 2, num_groups * num_nodes * vocabulary
    pieces = max(-(-pairs // MAX_MASK_PAIRS.get(attention, 2**62)), -(-logits // MAX_LOGITS))
    return min(num_groups, pieces)
