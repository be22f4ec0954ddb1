"""The school of an environment's own toy: the form of its calls, and to see what its pictures show where.

Teaches nothing of the task. The calls that it shows are right answers to other episodes. What a picture shows is learnt
from the pixels alone, by linear heads on hidden states that are thrown away afterwards: at an image token, the colours
of its four patches and its place; at the text behind the pictures, a thumbnail of all of them. Without them a model of
this size does not know where its image tokens are, and RLOO finds nothing to reward.
"""

import random
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import OneCycleLR
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from dataset import EpisodeBatch, RepeatableEpisodeDataset, Row, VLMDataCollator
from environment import EpisodeSource
from fleet.episodes import BrokenEpisode
from fleet.toy.lessons import END, train_stages
from fleet.verdicts import solution_of
from utils.tool_calls import make_call_str

# Axes: P episodes, L tokens of prompt and answer, K image tokens of a batch, H hidden size.

NO_CALL = "I do not know."
PATCHES_PER_TOKEN, NUM_PROBED = 4, 32  # episodes that tell how many pictures there are


def teach_form(
    model: Qwen2_5_VLForConditionalGeneration,
    processor: Qwen2_5_VLProcessor,
    env: EpisodeSource,
    recipe: dict[str, Any],
) -> None:
    """Trains the model in place to answer an environment's prompts with calls that other episodes ask for.

    So it knows the form of a call and which arguments there are, and nothing of the answer to an episode. A share of
    the answers, `1 - call_share`, is no call. Raises BrokenEpisode if the environment fails.
    """
    school = FormSchool(model, processor, env, recipe)
    parameters = [*model.parameters(), *(school.sight.parameters() if recipe["sees"] else ())]
    optimizer = AdamW(parameters, lr=recipe["learning_rate"], weight_decay=0.0)
    schedule = OneCycleLR(optimizer, recipe["learning_rate"], recipe["steps"])
    train_stages(model, [(school.losses(), optimizer, schedule)])


class FormSchool:
    """The lessons of one environment, step by step."""

    def __init__(self, model: Any, processor: Any, env: EpisodeSource, recipe: dict[str, Any]):
        self.model, self.processor, self.env, self.recipe = model, processor, env, recipe
        self.dataset = RepeatableEpisodeDataset(env, recipe["max_pixels"])
        self.collator = VLMDataCollator(processor, num_rollouts=1)
        probed = self.collator(self._rows(0, NUM_PROBED))
        num_tokens = int((probed["mm_token_type_ids"] == 1).sum(dim=1).max())
        self.sight = Sight(model.config.get_text_config(), max(probed["num_images"]), num_tokens)
        self.rng = random.Random(recipe["seed"])

    def losses(self) -> Iterator[Tensor]:
        """Cross-entropy of prompt text and answer, so that the tokens of the prompt are learnt too, and of sight."""
        size = self.recipe["episodes_per_step"]
        for step in range(self.recipe["steps"]):
            rows = self._rows(step * size, size)
            batch = self.collator(rows)
            calls = [make_call_str(solution_of(self.env, row["episode"])) for row in rows]
            # each is shown the answer to its neighbour
            answers = [
                (call if self.rng.random() < self.recipe["call_share"] else NO_CALL) + END
                for call in [*calls[1:], calls[0]]
            ]
            yield self._loss(batch, answers)

    def _loss(self, batch: EpisodeBatch, answers: list[str]) -> Tensor:
        answered = self.processor.tokenizer(answers, return_tensors="pt", padding=True, padding_side="right")
        ids_PL = torch.cat([batch["input_ids"], answered["input_ids"]], dim=1)
        mask_PL = torch.cat([batch["attention_mask"], answered["attention_mask"]], dim=1)
        kinds_PL = torch.cat([batch["mm_token_type_ids"], torch.zeros_like(answered["input_ids"])], dim=1)
        output = self.model(
            input_ids=ids_PL,
            attention_mask=mask_PL,
            mm_token_type_ids=kinds_PL,
            pixel_values=batch["pixel_values"],
            image_grid_thw=batch["image_grid_thw"],
            labels=ids_PL.masked_fill((mask_PL == 0) | (kinds_PL == 1), -100),
            output_hidden_states=self.recipe["sees"],
            use_cache=False,
        )
        return (
            output.loss + self.sight(output.hidden_states, batch, mask_PL, kinds_PL)
            if self.recipe["sees"]
            else output.loss
        )

    def _rows(self, first: int, count: int) -> list[Row]:
        rows = [self.dataset[number] for number in range(first, first + count)]
        for row in rows:
            if row["broken"] is not None:
                raise BrokenEpisode(row["broken"])
        return rows


class Sight(nn.Module):
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
        self, hidden_states: tuple[Tensor, ...], batch: EpisodeBatch, mask_PL: Tensor, kinds_PL: Tensor
    ) -> Tensor:
        """The mean squared error of what the heads say of the pixels. hidden_states: (P, L, H), embeddings first."""
        num_episodes, is_image_PL = len(mask_PL), kinds_PL == 1
        patch_colours = batch["pixel_values"].unflatten(1, (3, -1)).mean(dim=2)
        colours_K3 = patch_colours.view(-1, PATCHES_PER_TOKEN, 3).mean(dim=1)
        seen = torch.cat([patch_colours.view(-1, 3 * PATCHES_PER_TOKEN), self._places(batch)], dim=1)
        losses = [
            (head(self.norm(states[is_image_PL])) - seen).square().mean() * 2 / len(self.seen)
            for head, states in zip(self.seen, hidden_states[1:], strict=True)
        ]
        # a smaller episode's thumbnail is filled up with grey
        thumbnails = torch.zeros(num_episodes, self.num_tokens, 3)
        counts = is_image_PL.sum(dim=1).tolist()
        for number, colours in enumerate(colours_K3.split(counts)):
            thumbnails[number, : len(colours)] = colours[: self.num_tokens]
        is_behind_PL = (is_image_PL.flip(1).cumsum(dim=1).flip(1) == 0) & (mask_PL == 1)
        wanted = thumbnails.flatten(1)[:, None].expand(-1, mask_PL.shape[1], -1)[is_behind_PL]
        losses += [
            (head(self.norm(states[is_behind_PL])) - wanted).square().mean() / 2
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
