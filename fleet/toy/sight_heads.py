"""Linear heads that make a toy see: at an image token what the pixels are, behind the pictures a thumbnail of all."""

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from dataset import EpisodeBatch

# Axes: P episodes, S slots of a packed row, K image tokens of a batch, H hidden size.

PATCHES_PER_TOKEN = 4


class SightHeads(nn.Module):
    """Linear heads on the language model's hidden states, for the lesson alone."""

    def __init__(self, config: Any, num_images: int, num_tokens: int):
        """num_images, num_tokens: the most pictures of an episode, and the most image tokens."""
        super().__init__()
        layers = config.num_hidden_layers
        self.num_images, self.num_tokens = num_images, num_tokens
        self.norm = nn.LayerNorm(config.hidden_size, elementwise_affine=False)
        # after every layer: the colours of four patches, the place in the picture, the number of the picture
        width = 3 * PATCHES_PER_TOKEN + 2 + num_images
        self.seen = nn.ModuleList(nn.Linear(config.hidden_size, width) for _ in range(layers))
        # after every layer but the first, at text behind the pictures
        self.recalled = nn.ModuleList(nn.Linear(config.hidden_size, 3 * num_tokens) for _ in range(layers - 1))

    def forward(
        self, hidden_states: tuple[Tensor, ...], batch: EpisodeBatch, is_image_PS: Tensor, is_behind_PS: Tensor
    ) -> Tensor:
        """The weighted mean squared errors of what the heads say of the pixels.

        hidden_states: (P, S, H) of each layer, embeddings first. is_image_PS, is_behind_PS: bool, the image tokens and
        the text behind the last of them.
        """
        patch_colours = batch["pixel_values"].unflatten(1, (3, -1)).mean(dim=2)
        colours_K3 = patch_colours.view(-1, PATCHES_PER_TOKEN, 3).mean(dim=1)
        seen = torch.cat([patch_colours.view(-1, 3 * PATCHES_PER_TOKEN), self._places(batch)], dim=1)
        losses = [
            (head(self.norm(states[is_image_PS])) - seen).square().mean() * 2 / len(self.seen)
            for head, states in zip(self.seen, hidden_states[1:], strict=True)
        ]
        # a smaller episode's thumbnail is filled up with grey
        thumbnails = torch.zeros(len(is_image_PS), self.num_tokens, 3)
        counts = is_image_PS.sum(dim=1).tolist()
        for number, colours in enumerate(colours_K3.split(counts)):
            thumbnails[number, : len(colours)] = colours[: self.num_tokens]
        wanted = thumbnails.flatten(1)[:, None].expand(-1, is_behind_PS.shape[1], -1)[is_behind_PS]
        losses += [
            (head(self.norm(states[is_behind_PS])) - wanted).square().mean() / 2
            for head, states in zip(self.recalled, hidden_states[2:], strict=True)
        ]
        return torch.stack(losses).sum()

    def _places(self, batch: EpisodeBatch) -> Tensor:
        """(K, 2 + images) float32: x and y of each image token from -1 to 1, and one-hot the number of its picture."""
        numbers = chain.from_iterable(range(count) for count in batch["num_images"])
        places = []
        for number, (_, height, width) in zip(numbers, batch["image_grid_thw"].tolist(), strict=True):
            rows, columns = torch.linspace(-1, 1, height // 2), torch.linspace(-1, 1, width // 2)
            here = torch.cartesian_prod(rows, columns).flip(1)
            which = torch.nn.functional.one_hot(torch.tensor(min(number, self.num_images - 1)), self.num_images)
            places.append(torch.cat([here, which.float().expand(len(here), -1)], dim=1))
        return torch.cat(places)
