"""What a MOLT is built from."""

from __future__ import annotations

from dataclasses import dataclass

from molt._arguments import check_int, check_number
from molt._text import has_control
from molt._words import count
from molt.methods.transformer import HEADS, OVER_HEADS, OVER_LAYERS, POOLINGS, check_spatial_map
from molt.ops._checks import ORDERS

# A file from elsewhere must not ask for all the memory.
MOST_CLASSES, LARGEST_SIDE, MOST_SCALES, MOST_LAYERS = 100_000, 4096, 16, 1000


@dataclass(frozen=True)
class MOLTConfig:
    """Everything a MOLT is built from but its weights; see :func:`create_model`."""

    name: str
    backbone: str
    num_classes: int
    sizes: tuple[tuple[int, int], ...]
    shared: bool = False
    head: str = "patches"
    pooling: str = "mean"
    layers: tuple[int, ...] | None = None
    over_layers: str = "sum"
    over_heads: str = "mean"
    clip: bool = False
    order: str = "resize_first"
    scale_weights: tuple[float, ...] | None = None
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Check every field, as a file from elsewhere may hold anything."""
        for name in ("name", "backbone"):
            _check_text(name, getattr(self, name))
        check_int("num_classes", self.num_classes, 1, MOST_CLASSES)
        for name in ("shared", "clip"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        self._check_sizes()
        for name, options in (
            ("head", HEADS),
            ("pooling", POOLINGS),
            ("over_layers", OVER_LAYERS),
            ("over_heads", OVER_HEADS),
            ("order", ORDERS),
        ):
            if getattr(self, name) not in options:
                raise ValueError(f"{name} must be one of {', '.join(options)}, got {getattr(self, name)!r}")
        if self.head == "spatial":
            check_spatial_map(self.layers, self.over_layers, self.over_heads)
        if self.layers is not None:
            _check_tuple("layers", self.layers, 1, MOST_LAYERS)
            for layer in self.layers:
                check_int("layers", layer, -MOST_LAYERS, MOST_LAYERS)
        if self.scale_weights is not None:
            _check_tuple("scale_weights", self.scale_weights, len(self.sizes), len(self.sizes))
            total = sum(check_number("scale_weights", weight) for weight in self.scale_weights)
            if not 0 < total < float("inf"):
                raise ValueError(f"scale_weights must add up to a finite number above 0, got {self.scale_weights}")
        if self.class_names is not None:
            _check_tuple("class_names", self.class_names, self.num_classes, self.num_classes)
            for name in self.class_names:
                _check_text("class_names", name)

    def check_fit(self, patch_size: tuple[int, int], depth: int) -> None:
        """Check sizes and layers against the backbone they are for.

        Raises:
            ValueError: sides that are no multiples of the patch size, a layer the backbone does not have, or one twice.
        """
        ph, pw = patch_size
        for height, width in self.sizes:
            if height % ph or width % pw:
                near = f"{max(1, round(height / ph)) * ph}x{max(1, round(width / pw)) * pw}"
                raise ValueError(
                    f"sizes must be multiples of the patch size {ph}x{pw} of {self.backbone}, got {height}x{width}; "
                    f"near: {near}"
                )
        places = [check_int("layers", layer, -depth, depth - 1) % depth for layer in self.layers or ()]
        if len(set(places)) < len(places):
            raise ValueError(f"layers must name each block once, got {self.layers}")

    def _check_sizes(self) -> None:
        _check_tuple("sizes", self.sizes, 1, MOST_SCALES)
        for size in self.sizes:
            if not isinstance(size, tuple) or len(size) != 2:
                raise TypeError(f"sizes must hold (H, W) pairs, got {size!r}")
            for side in size:
                check_int("sizes", side, 1, LARGEST_SIDE)


def _check_text(name: str, value: object) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text, got {' '.join(repr(value).split()):.60}")
    if not value.strip() or has_control(value) or len(value) > 1000:
        raise ValueError(f"{name} must be printable text of at most 1000 characters, got {value!r:.60}")


def _check_tuple(name: str, value: object, least: int, most: int) -> None:
    if not isinstance(value, tuple):
        raise TypeError(f"{name} must be a sequence, got {value!r}")
    if not least <= len(value) <= most:
        expected = ("" if least == most else f"{least} to ") + count(most, "entry", "entries")
        raise ValueError(f"{name} must hold {expected}, got {len(value)}")
