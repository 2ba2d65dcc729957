"""What refinement is worth on maps of other networks."""

from __future__ import annotations

from collections.abc import Sequence

import timm
import torch

from molt._auto_alpha import Alpha
from molt.backbones.weights import CNN, SOURCES, VIT, describe_source
from molt.benchmark.ablation_clusters import CAM, Base, seeded_base
from molt.benchmark.ablation_networks import Clusters, SeededMaps, Wanted
from molt.clustering import DeepClustering, TokenKMeans

BACKBONES = "backbones"
DEFAULT = (
    CNN,
    "tf_efficientnet_lite2.in1k",
    VIT,
    "resnet50",
    "convnext_tiny",
    "deit_small_patch16_224",
)
ALPHAS: tuple[Alpha, ...] = ("auto",)


def full_name(name: str) -> str:
    """Return a timm name with the tag of the weights it stands for.

    Raises:
        ValueError: timm knows no such network.
    """
    if not timm.is_model(name):
        raise ValueError(f"backbone {name!r} is not a timm model name")
    config = timm.get_pretrained_cfg(name)
    return name if "." in name or config is None or not config.tag else f"{name}.{config.tag}"


def load(name: str, wanted: Wanted, device: torch.device, source: str) -> SeededMaps:
    """Return a network's maps: a CNN's from its own CAM, a ViT's from the usual CNN's.

    Raises:
        FileNotFoundError: no weights.
        ValueError: a network that is neither, or classes that are not the set's.
    """
    if source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, got {source!r}")
    with torch.device("meta"):
        shell = timm.create_model(name)
    vit = hasattr(shell, "patch_embed") and hasattr(shell, "num_prefix_tokens") and hasattr(shell, "blocks")
    if describe_source(name, source) is None and vit:
        from molt.backbones.weights import create_timm

        create_timm(name, source=source)  # for its message, before the CNN beside it is loaded
    return SeededMaps("default" if vit else "weak", wanted, device, source, name)


def bases(name: str, network: SeededMaps) -> tuple[list[str], list[Base]]:
    """Return the names of a network's maps, and what gives them."""
    found = [(f"{name}: seed maps", "fused")]
    if network.method.vit is None:
        found.insert(0, (f"{name}: {CAM}", "cam"))
    elif network.attends:
        found.append((f"{name}: class-row attention", "attention"))
    return [title for title, _ in found], [seeded_base(network, what) for _, what in found]


def clusterers(seeds: int) -> Sequence[Clusters]:
    """Return what the maps are refined with."""
    return [
        Clusters("k-means, own tokens", tuple(TokenKMeans(seed=seed) for seed in range(seeds)), "tokens"),
        Clusters("deep clustering", tuple(DeepClustering(seed=seed) for seed in range(seeds))),
    ]
