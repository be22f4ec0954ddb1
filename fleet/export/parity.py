"""Log-probabilities of a trained model and of its export on one fixed prompt, and how far apart they may be.

The prompt shows a picture, so the vision tower, the merger and the language model all have a part in it.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from fleet.errors import RunStopped

SIDE_PX = 84
QUESTION = "Pick the correct image, and say what it shows."
# of the mean difference; a merge adds in another order, and bfloat16 rounds weights and all between them
MAX_MEAN_GAP = {torch.float32: 1e-4, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class LogprobGap:
    """How far log-probabilities of tokens are apart, in nats."""

    mean: float
    greatest: float
    num_tokens: int

    def as_json(self) -> dict[str, float]:
        """The fields by name."""
        return asdict(self)


@torch.no_grad()
def prompt_logprobs(model: nn.Module, processor: Any) -> Tensor:
    """(T,) float32: the log-probability of each token of the fixed prompt but the first, given those before it."""
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=[_picture()], return_tensors="pt")
    logits_TV = model.eval()(**inputs).logits[0, :-1].float()
    return logits_TV.log_softmax(-1).gather(-1, inputs["input_ids"][0, 1:, None])[:, 0]


def gap_between(trained_T: Tensor, exported_T: Tensor) -> LogprobGap:
    """The differences of two models' log-probabilities on the same tokens."""
    gap_T = (trained_T - exported_T).abs()
    return LogprobGap(float(gap_T.mean()), float(gap_T.max()), gap_T.numel())


def require_parity(gap: LogprobGap, dtype: torch.dtype) -> None:
    """Raises RunStopped if exported weights say something else than trained ones."""
    if not gap.mean <= MAX_MEAN_GAP[dtype]:
        raise RunStopped(
            f"the exported weights are not what was trained: on a fixed prompt log-probabilities are {gap.mean:.2g} "
            f"apart on average, but wanted at most {MAX_MEAN_GAP[dtype]:g}; nothing was written. An adapter of a tied "
            "lm_head or embedding cannot be merged; for any other, pass --dtype float32",
            can_resume=False,
        )


def _picture() -> Image.Image:
    """Red grows to the right and green downwards."""
    ramp = torch.linspace(0, 255, SIDE_PX).to(torch.uint8)
    channels = (ramp.expand(SIDE_PX, -1), ramp[:, None].expand(-1, SIDE_PX), torch.full((SIDE_PX, SIDE_PX), 90))
    return Image.fromarray(torch.stack([channel.to(torch.uint8) for channel in channels], dim=-1).numpy())
