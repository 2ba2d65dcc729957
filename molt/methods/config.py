"""What a MOLT is built from."""

from __future__ import annotations

from dataclasses import dataclass

from molt._arguments import check_int
from molt.methods.transformer import HEADS, OVER_HEADS, OVER_LAYERS
from molt.ops._checks import ORDERS

MOST_CLASSES, LARGEST_SIDE, MOST_SCALES = 100_000, 4096, 16  # a file from elsewhere must not ask for all the memory


@dataclass(frozen=True)
class MOLTConfig:
    """Everything a MOLT is built from but its weights; see :func:`create_model`."""

    name: str
    backbone: str
    num_classes: int
    sizes: tuple[tuple[int, int], ...]
    shared: bool = False
    head: str = "patches"
    layers: tuple[int, ...] | None = None
    over_layers: str = "sum"
    over_heads: str = "mean"
    order: str = "resize_first"
    scale_weights: tuple[float, ...] | None = None
    class_names: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_int("num_classes", self.num_classes, 1, MOST_CLASSES)
        if not 1 <= len(self.sizes) <= MOST_SCALES:
            raise ValueError(f"sizes must hold 1 to {MOST_SCALES} sizes, got {len(self.sizes)}")
        for size in self.sizes:
            for side in size:
                check_int("sizes", side, 1, LARGEST_SIDE)
        for name, options in (
            ("head", HEADS),
            ("over_layers", OVER_LAYERS),
            ("over_heads", OVER_HEADS),
            ("order", ORDERS),
        ):
            if getattr(self, name) not in options:
                raise ValueError(f"{name} must be one of {', '.join(options)}, got {getattr(self, name)!r}")
        if self.layers is not None and len(self.layers) == 0:
            raise ValueError("layers must name at least one block, or be None for all")
        if self.scale_weights is not None:
            if len(self.scale_weights) != len(self.sizes):
                raise ValueError(
                    f"scale_weights must hold one number a scale, {len(self.sizes)}, got {len(self.scale_weights)}"
                )
            if not all(0 <= w < float("inf") for w in self.scale_weights) or not any(self.scale_weights):
                raise ValueError(f"scale_weights must be finite, not negative and not all 0, got {self.scale_weights}")
        if self.class_names is not None and len(self.class_names) != self.num_classes:
            raise ValueError(f"class_names must hold {self.num_classes} names, got {len(self.class_names)}")
