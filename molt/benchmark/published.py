"""The method in its published form: one photo at a time, with the papers' loops written out.

The baseline that faster code is compared with, for results and for time. Nothing here tries to be fast.

Sources:
    TS-CAM: Gao et al., "TS-CAM: Token Semantic Coupled Attention Map for Weakly Supervised Object Localization",
        ICCV 2021.
    Kanezaki: "Unsupervised Image Segmentation by Backpropagation", ICASSP 2018.
    Kim: Kim, Kanezaki and Tanaka, "Unsupervised Learning of Image Segmentation Based on Differentiable Feature
        Clustering", IEEE TIP 2020.

Superpixels need scikit-image, boxes SciPy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Vote = Literal["numpy", "bincount"]
VOTES = ("numpy", "bincount")

LEARNING_RATE = 0.1
MOMENTUM = 0.9


class Clustering(NamedTuple):
    """What `deep_cluster` gives: labels (H, W) int64, responses (channels, H, W) float32, and steps taken."""

    labels: Labels
    responses: Floats
    steps: int


class Localization(NamedTuple):
    """What `localize` gives: float32 logits (C,), maps (K, H, W), int64 labels (H, W), float32 refined (K, H, W)."""

    logits: Floats
    maps: Floats
    labels: Labels
    refined: Floats


@torch.no_grad()
def attention_maps(model: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Patch tokens and the class token's attention to them, from the full attention matrices of every layer.

    Args:
        model: timm VisionTransformer or Eva in eval mode, with a class token as its first token.
        pixels: (1, 3, H, W) float, normalised as the model wants it.

    Returns:
        tokens: (N, D) float, after the final norm, without prefix tokens (class and register tokens).
        rows: (layers, heads, N) float in [0, 1]; a row's sum is at most 1, as prefix columns are left out.

    Source: TS-CAM, section 3.
    """
    if model.training:
        raise ValueError("the model must be in eval mode")
    if getattr(model, "cls_token", None) is None:
        raise ValueError("the model has no class token")
    if pixels.ndim != 4 or pixels.shape[0] != 1:
        raise ValueError(f"pixels must be of one photo, (1, 3, H, W), not {tuple(pixels.shape)}")

    matrices: list[Tensor] = []

    def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        matrices.append(inputs[0])

    attentions = [block.attn for block in model.blocks]
    fused = [attention.fused_attn for attention in attentions]
    hooks = []
    try:
        for attention in attentions:
            # Fused attention never forms the matrix, so that there would be nothing to keep.
            attention.fused_attn = False
            hooks.append(attention.attn_drop.register_forward_pre_hook(keep))
        features = model.forward_features(pixels)
    finally:
        for hook in hooks:
            hook.remove()
        for attention, value in zip(attentions, fused, strict=True):
            attention.fused_attn = value

    prefix = model.num_prefix_tokens
    tokens = features[0, prefix:]
    rows = torch.stack([matrix[0, :, 0, prefix:] for matrix in matrices])
    return tokens, rows


@torch.no_grad()
def class_maps(tokens: Tensor, grid: tuple[int, int], weight: Tensor, bias: Tensor | None) -> Tensor:
    """A map of each class: 3 x 3 convolution of the patch tokens laid out as an image.

    Args:
        tokens: (N, D) float, N = h * w in row order.
        grid: (h, w).
        weight: (C, D, 3, 3) float.
        bias: (C,) float, or None.

    Returns:
        (C, h, w) float of any value.

    Source: TS-CAM, section 3, the semantic branch.
    """
    height, width = grid
    if tokens.shape[0] != height * width:
        raise ValueError(f"{tokens.shape[0]} tokens do not fill a grid of {height} x {width}")
    image = tokens.T.reshape(1, tokens.shape[1], height, width)
    return F.conv2d(image, weight, bias, padding=1)[0]


@torch.no_grad()
def class_activation_maps(rows: Tensor, maps: Tensor) -> Tensor:
    """Class maps times the attention of the class token, for all classes.

    Args:
        rows: (layers, heads, N) float in [0, 1].
        maps: (C, h, w) float, N = h * w.

    Returns:
        (C, h, w) float of any value.

    Source: TS-CAM, section 3: mean over heads, sum over layers, then the product with each class's map.
    """
    attention = rows.mean(dim=1).sum(dim=0).reshape(maps.shape[1:])
    cams = torch.empty_like(maps)
    for c in range(maps.shape[0]):
        cams[c] = attention * maps[c]
    return cams


def minmax(cam: Floats) -> Floats:
    """One map stretched to [0, 1] by its own lowest and highest value.

    Args:
        cam: (H, W) float32 of any value.

    Returns:
        (H, W) float32 in [0, 1]; zeros for a constant map.

    Source: TS-CAM's evaluation; zeros for a constant map are our choice.
    """
    low, high = cam.min(), cam.max()
    if low == high:
        return np.zeros_like(cam)
    stretched: Floats = (cam - low) / (high - low)
    return stretched


def upsample_minmax(cam: Tensor, size: tuple[int, int]) -> Floats:
    """Every class's map at full size, each min-maxed over the whole of it.

    Args:
        cam: (C, h, w) float of any value.
        size: (H, W).

    Returns:
        (C, H, W) float32 in [0, 1]; zeros for a constant map.

    Source: TS-CAM's evaluation resizes, then min-maxes; bilinear with half-pixel centres is our choice.
    """
    full = np.zeros((cam.shape[0], *size), dtype=np.float32)
    for c in range(cam.shape[0]):
        # Asked before the resize, whose rounding makes a constant map vary in its last bit.
        if cam[c].min() != cam[c].max():
            full[c] = minmax(_resize(cam[c], size))
    return full


def combine(maps_per_scale: Sequence[Floats]) -> Floats:
    """Mean of the maps of all scales.

    Args:
        maps_per_scale: one (C, H, W) float32 in [0, 1] a scale.

    Returns:
        (C, H, W) float32 in [0, 1].

    Source: our choice.
    """
    total = np.zeros_like(maps_per_scale[0])
    for maps in maps_per_scale:
        total += maps
    total /= len(maps_per_scale)
    return total


@torch.no_grad()
def logits(maps: Tensor | Sequence[Tensor]) -> Floats:
    """Class scores: average pooling of the class maps, then the mean over scales.

    Args:
        maps: (C, h, w) float class maps, from before the product with attention; or one such tensor a scale.

    Returns:
        (C,) float32 of any value.

    Source: TS-CAM, section 3; the mean over scales is our choice.
    """
    scales = [maps] if isinstance(maps, Tensor) else list(maps)
    pooled = [scale.float().mean(dim=(1, 2)).cpu().numpy() for scale in scales]
    mean: Floats = np.mean(pooled, axis=0, dtype=np.float32)
    return mean


def superpixels(image: Floats, num_segments: int, compactness: float) -> Labels:
    """SLIC superpixels of one photo.

    Args:
        image: (H, W, 3) float RGB in [0, 1].
        num_segments: about how many are asked for, cut to one a pixel; SLIC may give more or fewer.
        compactness: SLIC's weight of place against colour.

    Returns:
        (H, W) int64 from 0.

    Raises:
        ImportError: scikit-image is not installed.

    Source: Kanezaki, the constraint on spatial continuity, with scikit-image's SLIC.
    """
    try:
        from skimage.segmentation import slic
    except ImportError as error:
        raise ImportError("superpixels need scikit-image: pip install scikit-image") from error

    pixels = image.shape[0] * image.shape[1]
    segments = slic(image, n_segments=min(num_segments, pixels), compactness=compactness, start_label=0)
    return np.asarray(segments, dtype=np.int64)


def superpixel_members(segments: Labels) -> list[npt.NDArray[np.intp]]:
    """The pixels of each superpixel, as places in the flattened image; the same for all steps, so found once.

    Args:
        segments: (H, W) int of any value.

    Returns:
        One (pixels,) int array a superpixel, by rising superpixel number.

    Source: Kanezaki's loop over superpixels, which has its pixel lists from before the first step.
    """
    flat = segments.reshape(-1)
    return [np.nonzero(flat == segment)[0] for segment in np.unique(flat)]


def superpixel_vote(labels: Labels, segments: Labels, members: Sequence[npt.NDArray[np.intp]] | None = None) -> Labels:
    """Each superpixel takes the most frequent label of its pixels, the lowest of equals.

    Args:
        labels: (H, W) int.
        segments: (H, W) int of any value.
        members: `superpixel_members(segments)`, where it is at hand.

    Returns:
        (H, W), new, of labels' dtype.

    Source: Kanezaki, the constraint on spatial continuity; the lowest of equals as in the published code.
    """
    if labels.shape != segments.shape:
        raise ValueError(f"labels {labels.shape} and segments {segments.shape} differ in shape")
    voted = labels.reshape(-1).copy()
    for places in superpixel_members(segments) if members is None else members:
        values, counts = np.unique(voted[places], return_counts=True)
        # Values rise, and argmax takes the first of equals: the lowest label.
        voted[places] = values[counts.argmax()]
    return voted.reshape(labels.shape)


def superpixel_vote_bincount(labels: Tensor, segments: Tensor, channels: int) -> Tensor:
    """`superpixel_vote` by one count of all pairs of superpixel and label, on the labels' device.

    Args:
        labels: (H, W) int64 in [0, channels).
        segments: (H, W) int64, at least 0.
        channels: number of labels.

    Returns:
        (H, W) int64; of equals the lowest label.

    Source: the same vote, written as a user of PyTorch would; our choice.
    """
    pairs = torch.bincount((segments * channels + labels).flatten(), minlength=channels * (int(segments.max()) + 1))
    return pairs.view(-1, channels).argmax(dim=1)[segments]


def clustering_net(channels: int, layers: int) -> nn.Sequential:
    """The clustering network, in training mode, with PyTorch's usual random weights.

    Args:
        channels: of every convolution, so the most clusters there can be.
        layers: 3 x 3 convolutions before the last, 1 x 1, one.

    Returns:
        A network from (1, 3, H, W) to (1, channels, H, W).

    Source: Kanezaki and Kim, the network: ReLU before batch norm, none at the end.
    """
    modules: list[nn.Module] = []
    inputs = 3
    for _ in range(layers):
        modules += [nn.Conv2d(inputs, channels, kernel_size=3, padding=1), nn.ReLU(), nn.BatchNorm2d(channels)]
        inputs = channels
    modules += [nn.Conv2d(inputs, channels, kernel_size=1), nn.BatchNorm2d(channels)]
    return nn.Sequential(*modules).train()


def initial_state(channels: int, layers: int, seed: int = 0) -> list[Tensor]:
    """Random first weights for `deep_cluster`; the random state of the caller stays as it was.

    Args:
        channels: of every convolution.
        layers: 3 x 3 convolutions.
        seed: of the random numbers.

    Returns:
        4 * (layers + 1) float32 tensors: convolution weight and bias, batch norm weight and bias, by layer.

    Source: PyTorch's usual first weights, as in the code published with Kanezaki and Kim.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = clustering_net(channels, layers)
    return [parameter.detach().clone() for parameter in net.parameters()]


def deep_cluster(
    image: Floats,
    state: Sequence[Tensor],
    channels: int,
    layers: int,
    steps: int,
    min_labels: int,
    segments: Labels | None,
    continuity: float,
    on_step: Callable[[int, Labels], None] | None = None,
    vote: Vote = "numpy",
) -> Clustering:
    """Clusters of one photo's pixels, from a small network trained on that photo alone.

    Args:
        image: (H, W, 3) float RGB in [0, 1]; H and W at least 2 where continuity > 0.
        state: 4 * (layers + 1) float tensors, the first weights in the order of `initial_state`; they stay as they
            are, and the work is done on their device.
        channels: of every convolution, so the most clusters there can be.
        layers: 3 x 3 convolutions.
        steps: the most steps taken, 0 or more.
        min_labels: stop after the step that found this many labels or fewer.
        segments: (H, W) int superpixels, or None for no vote.
        continuity: weight of the continuity loss, 0 for none.
        on_step: called with the step, from 0, and the (H, W) int64 labels of its forward, from before the vote.
        vote: "numpy", the published loop over superpixels; or "bincount", see `superpixel_vote_bincount`.

    Returns:
        labels: (H, W) int64 in [0, channels), the argmax of the responses; not renumbered, and not voted on.
        responses: (channels, H, W) float32 of any value, from a last forward after the loop.
        steps: how many steps were taken.

    Raises:
        ValueError: a state of other shapes, or an unknown vote.

    Source: Kanezaki, algorithm 1, with segments and no continuity; Kim, algorithm 1, with continuity and no segments.
        Both together is our choice.
    """
    if vote not in VOTES:
        raise ValueError(f"vote must be one of {', '.join(VOTES)}, got {vote!r}")
    device = state[0].device
    net = clustering_net(channels, layers).to(device)
    with torch.no_grad():
        for parameter, first in zip(net.parameters(), state, strict=True):
            if parameter.shape != first.shape:
                raise ValueError(f"state has {tuple(first.shape)} where {tuple(parameter.shape)} is needed")
            parameter.copy_(first)

    data = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32))[None].to(device)
    similarity = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(net.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    members = None if segments is None or vote == "bincount" else superpixel_members(segments)
    places = torch.from_numpy(segments).to(device) if segments is not None and vote == "bincount" else None

    taken = 0
    for step in range(steps):
        optimizer.zero_grad()
        responses = net(data)[0]
        target = responses.argmax(dim=0)
        labels = target.cpu().numpy()
        # Counted before the vote: the vote may hide labels that the network still gives.
        found = len(np.unique(labels))
        if on_step is not None:
            on_step(step, labels.copy())
        if places is not None:
            target = superpixel_vote_bincount(target, places, channels)
        elif segments is not None:
            target = torch.from_numpy(superpixel_vote(labels, segments, members)).to(device)

        loss = similarity(responses.permute(1, 2, 0).reshape(-1, channels), target.reshape(-1))
        if continuity > 0:
            vertical = responses[:, 1:, :] - responses[:, :-1, :]
            horizontal = responses[:, :, 1:] - responses[:, :, :-1]
            loss = loss + continuity * (vertical.abs().mean() + horizontal.abs().mean())
        loss.backward()
        optimizer.step()
        taken = step + 1
        if found <= min_labels:
            break

    # Still in training mode: batch norm by this photo's own mean and variance.
    with torch.no_grad():
        final = net(data)[0]
    labels = final.argmax(dim=0).cpu().numpy()
    return Clustering(labels, final.cpu().numpy(), taken)


def upsample_labels(clusters: Clustering, size: tuple[int, int]) -> Labels:
    """Labels at full size: argmax of the resized responses, among the channels that occur at the small size.

    Args:
        clusters: labels (h, w) int64 and responses (channels, h, w) float32.
        size: (H, W); where it is (h, w), the labels come back as they are.

    Returns:
        (H, W) int64; the first channel of equals.

    Source: our choice; the papers cluster at full size.
    """
    if clusters.labels.shape == tuple(size):
        return clusters.labels
    best = np.full(size, -np.inf, dtype=np.float32)
    labels = np.zeros(size, dtype=np.int64)
    for channel in np.unique(clusters.labels):
        response = _resize(torch.from_numpy(clusters.responses[channel]), size)
        better = response > best
        best[better] = response[better]
        labels[better] = channel
    return labels


def cluster_mean(cam: Floats, labels: Labels) -> Floats:
    """Each pixel takes the map's mean over its cluster.

    Args:
        cam: (H, W) float32 of any value.
        labels: (H, W) int of any value.

    Returns:
        (H, W) float32, within cam's range; the mean is taken in float64.

    Source: our choice.
    """
    painted = np.empty_like(cam)
    for label in np.unique(labels):
        inside = labels == label
        painted[inside] = cam[inside].mean(dtype=np.float64)
    return painted


def refine(cam: Floats, labels: Labels, alpha: float) -> Floats:
    """A map drawn towards its cluster means, then min-maxed.

    Args:
        cam: (H, W) float32 of any value.
        labels: (H, W) int of any value.
        alpha: in [0, 1], 0 keeps the map, 1 takes the means alone.

    Returns:
        (H, W) float32 in [0, 1]; zeros for a constant map.

    Source: our choice.
    """
    # A NumPy float64 alpha would turn the maps into float64.
    alpha = float(alpha)
    return minmax((1 - alpha) * cam + alpha * cluster_mean(cam, labels))


def largest_box(refined: Floats, threshold: float) -> Floats | None:
    """The box of the largest connected component of a map, corners touching.

    Args:
        refined: (H, W) float32 in [0, 1].
        threshold: in (0, 1), the share of the map's maximum that belongs to the object.

    Returns:
        (4,) float32 xyxy in pixels, the right and lower sides one past the last pixel; None for a map without a
        positive value.

    Source: TS-CAM's evaluation, by SciPy's labelling in place of OpenCV's contours.
    """
    from scipy import ndimage

    if not refined.max() > 0:
        return None
    components, _ = ndimage.label(refined >= threshold * refined.max(), np.ones((3, 3)))
    sizes = np.bincount(components.reshape(-1))
    sizes[0] = 0
    rows, columns = np.nonzero(components == sizes.argmax())
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1], dtype=np.float32)


def localize(
    models: Sequence[Any],
    heads: Sequence[tuple[Tensor, Tensor | None]],
    pixels_per_scale: Sequence[Tensor],
    size: tuple[int, int],
    classes: Sequence[int] | None,
    image: Floats,
    state: Sequence[Tensor] | None,
    *,
    channels: int = 100,
    layers: int = 2,
    steps: int = 1000,
    min_labels: int = 3,
    num_segments: int = 10000,
    compactness: float = 100.0,
    continuity: float = 0.0,
    alpha: float = 0.5,
    vote: Vote = "numpy",
    stage: Callable[[str], AbstractContextManager[Any]] = nullcontext,
) -> Localization:
    """The whole method on one photo: maps of each scale, their mean, clusters, and maps refined by the clusters.

    Args:
        models: one timm model a scale, in eval mode; the same one may come several times.
        heads: one ((C, D, 3, 3) weight, (C,) bias) a scale.
        pixels_per_scale: one (1, 3, Hs, Ws) float a scale, normalised; Hs and Ws multiples of the patch.
        size: (H, W) of the maps.
        classes: K classes in [0, C) to make maps of; None takes the likeliest.
        image: (h, w, 3) float RGB in [0, 1] at the size to cluster at, of any size.
        state: first weights of the clustering, as `initial_state` gives; None leaves the maps unrefined, and the
            labels all 0.
        channels: of the clustering, see `deep_cluster`.
        layers: of the clustering.
        steps: of the clustering, at most.
        min_labels: of the clustering.
        num_segments: see `superpixels`; 0 for no vote.
        compactness: of the superpixels.
        continuity: weight of the continuity loss.
        alpha: in [0, 1], see `refine`.
        vote: of the superpixels, see `deep_cluster`.
        stage: opens the stages "forward", "cam", "fuse", "cluster" and "refine", to time them.

    Returns:
        logits (C,), maps (K, H, W) in [0, 1], labels (H, W) int64, refined (K, H, W) in [0, 1], in classes' order.

    Source: TS-CAM for the maps, Kanezaki and Kim for the clusters and their settings; joining them is our choice.
    """
    with stage("forward"):
        seen = [attention_maps(model, pixels) for model, pixels in zip(models, pixels_per_scale, strict=True)]
    with stage("cam"):
        per_scale, cams = [], []
        for model, (tokens, rows), (weight, bias), pixels in zip(models, seen, heads, pixels_per_scale, strict=True):
            patch_height, patch_width = model.patch_embed.patch_size
            grid = (pixels.shape[2] // patch_height, pixels.shape[3] // patch_width)
            maps = class_maps(tokens, grid, weight, bias)
            per_scale.append(maps)
            cams.append(class_activation_maps(rows, maps))
        scores = logits(per_scale)
        chosen = [int(scores.argmax())] if classes is None else list(classes)
    with stage("fuse"):
        combined = combine([upsample_minmax(cam[chosen], size) for cam in cams])
    if state is None:
        return Localization(scores, combined, np.zeros(size, dtype=np.int64), np.stack([minmax(m) for m in combined]))

    with stage("cluster"):
        segments = superpixels(image, num_segments, compactness) if num_segments > 0 else None
        clusters = deep_cluster(image, state, channels, layers, steps, min_labels, segments, continuity, vote=vote)
        labels = upsample_labels(clusters, size)
    with stage("refine"):
        refined = np.stack([refine(cam, labels, alpha) for cam in combined])
    return Localization(scores, combined, labels, refined)


def _resize(cam: Tensor, size: tuple[int, int]) -> Floats:
    """One (h, w) map at (H, W), float32, bilinear with half-pixel centres and no antialiasing."""
    resized = F.interpolate(cam.float()[None, None], size=tuple(size), mode="bilinear", align_corners=False)
    array: Floats = resized[0, 0].cpu().numpy()
    return array
