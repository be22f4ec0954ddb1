"""Features of the images that a frozen vision tower has seen, kept in host memory for the whole run.

Owns what is kept and for how long. Knows an image by a digest of its pixels, so nothing goes stale while the vision
side is frozen. Where the merger alone trains nothing is kept: the tower's own output is wider than features, and a
frozen tower has no backward pass. Asks for one image at a time, so that a resumed run, whose cache is empty, gets the
same bits.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor, nn


def vision_is_frozen(model: nn.Module) -> bool:
    """True if nothing in the vision tower or its merger trains, adapters included."""
    return not any(parameter.requires_grad for name, parameter in model.named_parameters() if "visual." in name)


class VisionCache:
    """Holds at most `max_bytes` of features; the least recently used go first."""

    def __init__(self, model: nn.Module, max_bytes: int):
        """Raises ValueError if a part of the model's vision side trains: features would change under the cache."""
        if not vision_is_frozen(model):
            raise ValueError(
                "image features cannot be kept while the vision tower, its merger or an adapter in them trains; "
                "pass --freeze tower,merger or --vision_cache_mib 0"
            )
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()

    def features_of(
        self,
        digests: Sequence[bytes],
        encode: Callable[[int], Tensor],
        *,
        num_calls: int = 0,
        encode_nothing: Callable[[], object] | None = None,
    ) -> list[Tensor]:
        """The features of these images in order, each (image tokens, width), in host memory.

        encode: the features of the image at one place; called for the first place of each unknown image.
        num_calls: the encoder is called at least as often, because another rank does; the rest encode the first image,
        or call encode_nothing, where there may be no image.
        """
        unknown = self.unknown_places(digests)
        encoded = [encode(place) for place in unknown]
        for _ in range(num_calls - len(unknown)):
            encode(0) if encode_nothing is None else encode_nothing()
        fresh = {digests[place]: features.to("cpu") for place, features in zip(unknown, encoded, strict=True)}
        found = [fresh[digest] if digest in fresh else self._features[digest] for digest in digests]
        for digest, features in zip(digests, found, strict=True):
            self.num_bytes += 0 if digest in self._features else features.nbytes
            self._features[digest] = features
            self._features.move_to_end(digest)
            while self.num_bytes > self.max_bytes:
                self.num_bytes -= self._features.popitem(last=False)[1].nbytes
        return found

    def unknown_places(self, digests: Sequence[bytes]) -> list[int]:
        """The first place of each image that is not held."""
        first_places = {digest: place for place, digest in reversed(list(enumerate(digests)))}
        return sorted(place for digest, place in first_places.items() if digest not in self._features)
