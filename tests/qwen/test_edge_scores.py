"""The mass that a sampler's rules keep, worked by hand; tests/rl/test_rollout_correction.py has it in a trainer."""

import pytest
import torch

from fleet.qwen.edge_scores import Nucleus, log_kept_mass

PROBABILITIES = [0.5, 0.3, 0.15, 0.05]


@pytest.mark.parametrize(
    ("token", "temperature", "nucleus", "kept"),
    [
        (0, 1.0, Nucleus(0.7), 0.5 + 0.3),
        (0, 1.0, Nucleus(0.4), 0.5),
        (3, 1.0, Nucleus(0.999), 1.0),
        # a token outside counts with it
        (2, 1.0, Nucleus(0.7), 0.5 + 0.3 + 0.15),
        (0, 1.0, Nucleus(1.0), 1.0),
        (0, 1.0, Nucleus(1.0, (1, 3)), 0.5 + 0.15),
        # of what the ban leaves, 0.6, 0.3 and 0.1, two make 0.7
        (1, 1.0, Nucleus(0.7, (0,)), 0.3 + 0.15),
        # squares are 0.25, 0.09, 0.0225 and 0.0025 of 0.365
        (0, 0.5, Nucleus(0.9), (0.25 + 0.09) / 0.365),
    ],
)
def test_what_is_kept_worked_by_hand(token: int, temperature: float, nucleus: Nucleus, kept: float) -> None:
    # a shift of logits changes nothing
    logits = torch.tensor([[PROBABILITIES]]).log() + 7.0
    found = log_kept_mass(logits, torch.tensor([[token]]), temperature, nucleus)
    assert found.exp().item() == pytest.approx(kept)


def test_each_edge_has_its_own_mass_however_long_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(0), requires_grad=True)
    tokens = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(1))
    whole = log_kept_mass(logits, tokens, 0.7, Nucleus(0.8, (2,)))
    assert not whole.requires_grad and whole.max() <= 1e-6
    monkeypatch.setattr("fleet.qwen.edge_scores.CHUNK_SIZE", 22)
    assert torch.equal(log_kept_mass(logits, tokens, 0.7, Nucleus(0.8, (2,))), whole)
