"""What it costs to encode new images one at a time, which keeps their bits, beside all at once, which does not.

    python benchmarks/encode_time.py --model_size 30m --image_side_px 224

The vision tower of a random-weight Qwen2.5-VL of the chosen size alone; both ways in turns, medians. One JSON object
a line of new images, with versions and device, to the output file or the terminal.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.random_model import SIZES, configuration
from fleet.run.config import installed_versions
from fleet.toy.model import make_toy_processor


def main(argv: Sequence[str] | None = None) -> None:
    """Measures each number of images and prints or writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_size", default="30m", choices=SIZES, help="(default: 30m)")
    parser.add_argument("--image_side_px", type=int, default=224, help="a multiple of 28 (default: 224)")
    parser.add_argument("--num_images", default="1,4,8,32", help="new images in a generation (default: 1,4,8,32)")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of measurements (default: 5)")
    parser.add_argument("--output", type=Path, help="a JSON file for the results (default: the terminal)")
    given = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    counts = [int(count) for count in given.num_images.split(",")]
    rows = measure(given.model_size, given.image_side_px, counts, given.repeats, device, dtype)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    command = (
        f"python benchmarks/encode_time.py --model_size {given.model_size} --image_side_px {given.image_side_px} "
        f"--num_images {given.num_images} --repeats {given.repeats}"
    )
    results = {"device": name, "dtype": str(dtype).removeprefix("torch."), "versions": installed_versions(),
               "command": command, "rows": rows}  # fmt: skip
    text = json.dumps(results, indent=1) + "\n"
    if given.output is None:
        print(text, end="")
    else:
        given.output.write_text(text, encoding="utf-8")


@torch.no_grad()
def measure(
    size: str, side_px: int, counts: Sequence[int], repeats: int, device: torch.device, dtype: torch.dtype
) -> list[dict[str, float]]:
    """A row per count: median seconds alone and together, and the median over the pairs of their ratio."""
    config = configuration(size, make_toy_processor())
    tower = type_of_tower()._from_config(config.vision_config).to(device, dtype).eval()
    patch = config.vision_config.patch_size
    grid = torch.tensor([[1, side_px // patch, side_px // patch]], device=device)
    values = 3 * config.vision_config.temporal_patch_size * patch**2
    rows = []
    for count in counts:
        pixels = torch.randn(count, int(grid.prod()), values, device=device, dtype=dtype)

        def alone(pixels: torch.Tensor = pixels) -> None:
            for image in pixels:
                tower(image, grid_thw=grid)

        def together(pixels: torch.Tensor = pixels) -> None:
            tower(pixels.flatten(0, 1), grid_thw=grid.repeat(len(pixels), 1))

        pairs = [(seconds(alone, device), seconds(together, device)) for _ in range(repeats + 1)][1:]
        alone_s, together_s = (statistics.median(times) for times in zip(*pairs, strict=True))
        ratio = statistics.median(one / other for one, other in pairs)
        rows.append({"num_images": count, "alone_s": alone_s, "together_s": together_s, "ratio": ratio})
    return rows


def type_of_tower() -> type[torch.nn.Module]:
    """The class of Qwen2.5-VL's vision tower, by the name of its place in a model on no device."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(configuration("2m", make_toy_processor()))
    return type(model.model.visual)


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """How long one call takes, its last kernel included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start_s = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start_s


if __name__ == "__main__":
    main()
