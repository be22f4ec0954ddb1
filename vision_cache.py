"""The features of images that a frozen vision tower has seen, kept in host memory for the whole run.

Owns what is kept and for how long; knows images by a digest of their pixels, so nothing can go stale while the tower
and its merger do not train, which `vision_is_frozen` says.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence

from torch import Tensor, nn


def vision_is_frozen(model: nn.Module) -> bool:
    """Whether nothing in the vision tower or its merger trains, adapters included."""
    return not any(parameter.requires_grad for name, parameter in model.named_parameters() if "visual." in name)


class VisionCache:
    """Least recently used features go first once `max_bytes` are held."""

    def __init__(self, model: nn.Module, max_bytes: int):
        """Raises ValueError if a part of the model's vision side trains: its features would change under the cache."""
        if not vision_is_frozen(model):
            raise ValueError(
                "image features cannot be kept while the vision tower, its merger or an adapter in them trains; "
                "pass --freeze_vision true or --vision_cache_mib 0"
            )
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()

    def features_of(
        self, digests: Sequence[bytes], encode: Callable[[list[int]], list[Tensor]], *, must_encode: bool
    ) -> list[Tensor]:
        """The features of these images in order, each (image tokens, width), in host memory.

        encode: the features of the images at these places; called once, with the first place of each unknown image.
        must_encode: call it also when every image is known, with the first place, because another rank calls it.
        """
        unknown = self.unknown_places(digests)
        fresh: dict[bytes, Tensor] = {}
        if unknown or must_encode:
            places = unknown or [0]
            # copies, because an encoder's results are views of all that it encoded at once
            encoded = [features.detach().to("cpu", copy=True) for features in encode(places)]
            fresh = {digests[place]: features for place, features in zip(places, encoded, strict=True)}
        found = [fresh[digest] if digest in fresh else self._features[digest] for digest in digests]
        for digest, features in zip(digests, found, strict=True):
            self._keep(digest, features)
        return found

    def unknown_places(self, digests: Sequence[bytes]) -> list[int]:
        """The first place of each image that is not held."""
        first_places = {digest: place for place, digest in reversed(list(enumerate(digests)))}
        return sorted(place for digest, place in first_places.items() if digest not in self._features)

    def _keep(self, digest: bytes, features: Tensor) -> None:
        if digest not in self._features:
            self.num_bytes += features.nbytes
            self._features[digest] = features
        self._features.move_to_end(digest)
        while self.num_bytes > self.max_bytes:
            _, dropped = self._features.popitem(last=False)
            self.num_bytes -= dropped.nbytes
