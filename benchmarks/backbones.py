"""Try the smallest network of each of timm's families as CNNBackbone and as ViTBackbone, with random weights.

    python benchmarks/backbones.py [MODULE ...]

MODULE is one of timm's, such as `hrnet`; all by default, which takes a quarter of an hour. A family is what names in a
module begin with. What is accepted is run at the pipeline's sizes and at odd ones: grids must match, and a CNN's CAM
must have the network's own logits as its mean plus bias. The exit code is 1 where one that was accepted does not.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable

import timm
import torch

from molt.backbones import CNNBackbone, ViTBackbone
from molt.backbones.preprocess import normalize, to_multiple

SIZES = ((224, 224), (336, 336), (448, 448), (97, 150), (20, 90))


def families(modules: Iterable[str]) -> dict[str, str]:
    """Return the smallest network of each family."""
    found: dict[str, list[tuple[int, str]]] = defaultdict(list)
    for module in modules:
        for name in timm.list_models(module=module):
            with torch.device("meta"):
                size = sum(value.numel() for value in timm.create_model(name).parameters())
            word = re.match(r"(?:tf_|test_)?[a-z]+(?:v\d+)?", name)
            found[f"{module}/{name if word is None else word[0]}"].append((size, name))
    return {family: min(members)[1] for family, members in found.items()}


def as_cnn(name: str) -> str:
    """Say how a network works as CNNBackbone."""
    strides = reductions(name)
    try:
        cnn = CNNBackbone(name, pretrained=False, stride=16 if 16 in strides else strides[-1])
    except ValueError as error:
        return reason(error, name)
    classifier = cnn.model.get_classifier()
    for size in SIZES:
        images = torch.rand(1, 3, *size)
        seen = cnn(images)
        mean = cnn.cam(seen, torch.arange(cnn.num_classes)[None]).mean((2, 3))
        mean = mean if classifier.bias is None else mean + classifier.bias
        logits = cnn.model(normalize(to_multiple(images, cnn.multiple, cnn.least), cnn.model))
        off = float((mean - logits).abs().max() / logits.abs().max())
        if not off < 1e-3 or seen.patches.shape[1] != seen.grid[0] * seen.grid[1]:
            return f"FAILS at {size}: {off:.1e} off"
    sides = "any side" if cnn.multiple == (1, 1) else f"sides multiples of {cnn.multiple[0]} px"
    return f"exact CAM, {sides}" + (f" from {cnn.least} px" if cnn.least > max(strides) else "")


def reductions(name: str) -> list[int]:
    """Return the strides of a network's stages."""
    with torch.device("meta"):
        stages = getattr(timm.create_model(name), "feature_info", None)
    return [stage["reduction"] for stage in stages] if isinstance(stages, list) and stages else [16]


def as_vit(name: str) -> str:
    """Say how a network works as ViTBackbone."""
    try:
        vit = ViTBackbone(name, pretrained=False)
    except ValueError as error:
        return reason(error, name)
    for size in SIZES:
        seen = vit(torch.rand(1, 3, *size))
        count = seen.grid[0] * seen.grid[1]
        if seen.patches.shape[1] != count or (seen.attention is not None and seen.attention.shape[-1] != count):
            return f"FAILS at {size}: {tuple(seen.patches.shape)} for a grid of {seen.grid}"
    return "tokens and class rows" if vit.no_attention is None else f"tokens alone: {vit.no_attention}"


def reason(error: ValueError, name: str) -> str:
    """Return a refusal without names and numbers of the one network."""
    text = str(error).removeprefix(f"backbone {name!r} ").split(": ")[0]
    return "refused: " + text


@torch.no_grad()
def main() -> int:
    """Print a row a family, then the networks of each outcome."""
    warnings.filterwarnings("ignore")
    logging.getLogger("timm").setLevel(logging.ERROR)
    outcomes: dict[str, list[str]] = defaultdict(list)
    print("| family | network | CNNBackbone | ViTBackbone |\n|---|---|---|---|")
    for family, name in sorted(families(sys.argv[1:] or timm.list_modules()).items()):
        torch.manual_seed(0)
        rows = as_cnn(name), as_vit(name)
        print(f"| {family} | {name} | {' | '.join(rows)} |", flush=True)
        for kind, row in zip(("CNNBackbone", "ViTBackbone"), rows, strict=True):
            outcomes[f"{kind} | {row}"].append(name)
    print("\n| as | outcome | networks |\n|---|---|---|")
    for outcome, names in sorted(outcomes.items()):
        print(f"| {outcome} | {len(names)}: {', '.join(sorted(names))} |")
    return int(any("FAILS" in outcome for outcome in outcomes))


if __name__ == "__main__":
    raise SystemExit(main())
