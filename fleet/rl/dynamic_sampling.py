"""DynamicSampling: a group that is all right or all wrong makes way for a further episode's.

Source: "DAPO: An Open-Source LLM Reinforcement Learning System at Scale" (arXiv 2503.14476), section 3.2, here with a
bound on the attempts. Whole groups are drawn anew, and what counts is right and wrong alone, never a shaped reward.
"""

from collections.abc import Sequence
from typing import Any

from accelerate.utils import gather_object, send_to_device

from dataset import EpisodeBatch, RepeatableEpisodeDataset, VLMDataCollator, images_of, pick_episodes
from fleet.episode_numbers import further_number
from fleet.rl.group_sampling import DrawnGroups
from fleet.rl.judging import JudgedGroups, Judging
from fleet.rl.rollouts import RolloutRecord

# Axes: P episodes (groups), G rollouts of each.


class DynamicSampling(Judging):
    """A trainer that draws further episodes in place of those whose groups are settled."""

    def __init__(self, *, dataset: RepeatableEpisodeDataset, **rest: Any):
        """dataset: of the run's episodes, which has further ones too. rest: of Judging."""
        super().__init__(env=dataset.env, **rest)
        self.dataset = dataset

    def _judged_groups(self, batch: EpisodeBatch) -> tuple[JudgedGroups, list[RolloutRecord]]:
        """The groups to train on, one for each of the batch's, and the records of all others that were drawn for them.

        Every rank takes part, in as many attempts as any needs, and draws as many groups in each as the neediest: a
        rank with fewer settled groups draws episodes of others, whose groups are counted alone.
        """
        judged, passed_over = self._draw_and_judge(batch), list[RolloutRecord]()
        numbers, num_replaced = batch["numbers"], 0
        for attempt in range(1, self.settings.dynamic_sampling + 1):
            settled = judged.settled_places()
            most = max(gather_object([len(settled)]))
            if most == 0:
                break
            others = [place for place in range(len(numbers)) if place not in settled]
            places = [*settled, *others][:most]
            further = self._draw_and_judge(self._further_batch([further_number(numbers[p], attempt) for p in places]))
            chosen = choose(judged, further, places)
            passed_over += [
                record
                for number, groups in enumerate((judged, further))
                for place in range(groups.num_groups)
                if (number, place) not in chosen
                for record in groups.records_of(place)
            ]
            num_replaced += sum(number for number, _ in chosen)
            judged = joined((judged, further), chosen, self._tokenizer.pad_token_id)
        if self.settings.dynamic_sampling:
            self._log_attempts(len(numbers), num_replaced, len(passed_over) // self.num_generations)
        return judged, passed_over

    def _log_attempts(self, num_kept: int, num_replaced: int, num_passed: int) -> None:
        """Logs, over all devices, how many of the groups stand in for others, and how many were drawn for one."""
        by_rank = gather_object([(num_kept, num_replaced, num_passed)])
        kept, replaced, passed = (sum(counts) for counts in zip(*by_rank, strict=True))
        self._add_metrics(
            {
                "dynamic_sampling/replaced": replaced / kept,
                "dynamic_sampling/groups_per_kept": (kept + passed) / kept,
            }
        )

    def _draw_and_judge(self, batch: EpisodeBatch) -> JudgedGroups:
        self.on_activity("generation")
        guesses = self._require_shown(batch)
        answers = self._tool_answers(batch)
        drawn = self._draw_groups(batch, guesses, answers)
        self.on_activity("rewards")
        return self._judge(drawn, answers)

    def _further_batch(self, numbers: Sequence[int]) -> EpisodeBatch:
        """These episodes as the training batch has its own, on this device."""
        rows = [row for number in numbers for row in [self.dataset[number]] * self.num_generations]
        collator = VLMDataCollator(self.processing_class, self.num_generations)
        batch: EpisodeBatch = send_to_device(collator(rows), self.accelerator.device)
        return batch


def choose(groups: JudgedGroups, further: JudgedGroups, places: Sequence[int]) -> list[tuple[int, int]]:
    """For each of `groups`, (0, its place), or (1, the place of one of `further` that stands in for it).

    places: of the group that each of `further` was drawn for. One that is settled too stands in for none.
    """
    settled, settled_too = set(groups.settled_places()), set(further.settled_places())
    stands_in = {place: new for new, place in enumerate(places) if place in settled and new not in settled_too}
    return [(1, stands_in[place]) if place in stands_in else (0, place) for place in range(groups.num_groups)]


def joined(parts: Sequence[JudgedGroups], chosen: Sequence[tuple[int, int]], padding_id: int) -> JudgedGroups:
    """The chosen groups, as (number of the part, place of the group in it), in order. padding_id: of prompts."""
    drawn = [part.drawn for part in parts]
    size = drawn[0].batch["group_size"]
    rollouts = [(number, place * size + rollout) for number, place in chosen for rollout in range(size)]
    images = [
        (number, image) for number, place in chosen for image in images_of(drawn[number].batch["num_images"], place)
    ]

    def picked(field: str, places: Sequence[tuple[int, int]]) -> Any:
        values = [getattr(part, field) for part in drawn]
        return None if values[0] is None else [values[number][place] for number, place in places]

    return JudgedGroups(
        DrawnGroups(
            pick_episodes([part.batch for part in drawn], chosen, padding_id),
            picked("completion_ids", rollouts),
            picked("sampler_logps", rollouts),
            picked("turn_lengths", rollouts),
            picked("paths", rollouts),
            {digest: picture for part in drawn for digest, picture in part.pictures.items()},
            picked("image_features", images),
            samples=None,
        ),
        [parts[number].records[rollout] for number, rollout in rollouts],
        {name: picture for part in parts for name, picture in part.pictures_of_tools.items()},
    )
