"""What `molt benchmark --end-to-end` measures, and in which order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from molt.benchmark.pipelines import CLUSTERERS

PROVIDERS = ("native", "reference", "published_bincount", "published")
METHODS = ("seeded", "molt_dinov2_small")
# (batch, size) on a device; the first is the headline.
CELLS = {"cpu": ((1, 224), (1, 448), (8, 224)), "cuda": ((64, 448), (1, 448), (16, 448), (64, 224))}
# Of native rows at a GPU's headline, under autocast; of the last, of molt_* alone, whose loops are the papers'.
TARGETS: dict[str, dict[str, float]] = {
    "none": {"ratio": 1.25},
    "token_kmeans": {"ratio": 1.4},
    "deep_amortised": {"ratio": 2.0},
    "deep_fast": {"photos_per_s": 400.0},
    "deep_published": {"speedup_published": 100.0, "speedup_published_bincount": 8.0},
}
REHEARSED = (2, 56)  # of a GPU's configurations on the CPU
COST = {"slic": 1, "deep_fast": 2, "deep_amortised": 2, "deep_published": 3}  # what comes first if time is short


@dataclass(frozen=True)
class Configuration:
    """One row to measure."""

    method: str
    clusterer: str
    provider: str
    batch: int
    size: int
    headline: bool

    def __str__(self) -> str:
        return f"{self.method}, {self.clusterer}, {self.provider}, {self.batch} x {self.size} px"


def configurations(
    device: str,
    *,
    methods: Sequence[str] | None = None,
    clusterers: Sequence[str] | None = None,
    providers: Sequence[str] | None = None,
    batches: Sequence[int] | None = None,
    sizes: Sequence[int] | None = None,
    quick: bool = False,
    targets: bool = False,
) -> list[Configuration]:
    """Return what to measure: rows of which something is asked, the headline, the rest; slow clusterers last in each.

    Args:
        device: ``"cpu"`` or ``"cuda"``, which the batches and sizes left out depend on.
        methods: keys of ``pipelines.METHODS``.
        clusterers: of ``CLUSTERERS``; by default all, deep_published at the headline only.
        providers: of ``PROVIDERS``; the papers' loops run where the papers have such a method, and by default at the
            headline only.
        batches: photos at once; the first is the headline's.
        sizes: sides in pixels; likewise.
        quick: headline rows only.
        targets: only rows of which something is asked, and those that they are compared with.
    """
    first = CELLS[device][0]
    cells: list[tuple[int, int]] = list(CELLS[device])
    if batches is not None or sizes is not None:
        cells = list(itertools.product(batches or (first[0],), sizes or (first[1],)))
    found = []
    for cell, clusterer, method, provider in itertools.product(
        cells[:1] if quick else cells,
        clusterers or CLUSTERERS,
        methods or METHODS,
        providers or PROVIDERS,
    ):
        literal = provider.startswith("published")
        if literal and not (method.startswith("molt_") and clusterer in ("none", "deep_published")):
            continue
        if literal and providers is None and cell != cells[0]:
            continue
        if provider == "published_bincount" and clusterer == "none":
            continue
        if clusterer == "deep_published" and clusterers is None and cell != cells[0]:
            continue
        found.append(Configuration(method, clusterer, provider, *cell, headline=cell == cells[0]))
    order = list(methods or METHODS)
    asked = {one for one in found if is_asked(device, one)}
    found.sort(
        key=lambda one: (
            one not in asked,
            not one.headline,
            COST.get(one.clusterer, 0),
            one.size,
            order.index(one.method),
        )
    )
    return [one for one in found if one in asked or not targets]


def is_asked(device: str, one: Configuration) -> bool:
    """Whether something is asked of a configuration, or of another compared with it."""
    loop = one.clusterer == "deep_published" and one.provider.startswith("published")
    return bool(find_targets(device, replace(one, provider="native") if loop else one))


def find_targets(device: str, one: Configuration) -> dict[str, float]:
    """Return what is asked of a configuration: columns with numbers."""
    if device != "cuda" or one.provider != "native" or (one.batch, one.size) != CELLS["cuda"][0]:
        return {}
    if one.method not in METHODS or (one.clusterer == "deep_published" and not one.method.startswith("molt_")):
        return {}
    return dict(TARGETS.get(one.clusterer, {}))


def rehearsed(work: Sequence[Configuration]) -> list[Configuration]:
    """Return a GPU's configurations as they run on the CPU where nothing is measured: few small photos, each once."""
    batch, size = REHEARSED
    shrunk = (replace(one, batch=batch, size=size, headline=True) for one in work)
    return list(dict.fromkeys(shrunk))
