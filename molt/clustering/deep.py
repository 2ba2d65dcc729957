"""Clusters from a small network trained on one image at a time, without labels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from molt import ops
from molt._arguments import LARGEST_SEED, check_int, check_number
from molt.clustering._labels import compact, in_chunks, nearest, prepare, shrink
from molt.clustering.slic import segment
from molt.ops._checks import FLOATS, LABELS, check_tensor
from molt.structures import Features

LEAST_PIXELS = 2  # batch normalization over one pixel is undefined


class DeepClustering:
    """A convolutional network per image learns to agree with its own labels, until few are left.

    Each step takes the strongest channel of each pixel as its label and trains the network to answer with it. Two
    published forms, which may be combined: superpixels that vote for one label (Kanezaki, ICASSP 2018: the default),
    and a loss on differences between neighbouring responses (Kim, Kanezaki and Tanaka, TIP 2020: ``num_segments=0,
    continuity=1``). Which of these the MOLT paper used is not known. Network, optimiser (SGD, 0.1, momentum 0.9) and
    stopping rule are those papers'; the smaller input and network, fewer steps and a number of superpixels that fits
    the smaller input are our choice: the published size is ``channels=100, steps=1000, num_segments=10000,
    working_size=None``.

    Each image has its own network, whose initial state depends on the seed only, and images are worked on in passes
    of one size, so that a photo's labels do not depend on its batch. Training amplifies rounding, though: where
    kernels add in another order, which is so for another number of CPU threads and on a GPU for passes of 2 instead
    of 8 photos, about one pixel in ten ends in another cluster after 40 steps (other seeds move a third to a half).
    Labels are decided at the output's own pixels, from responses upsampled bilinearly.

    Args:
        channels: width of the network and most labels an image can have, 2 to 1024.
        layers: 3x3 convolutions, at least 1; a 1x1 convolution follows.
        steps: most gradient steps, at least 0.
        min_labels: training stops once an image has this few labels, at least 1.
        num_segments: superpixels wanted for the vote; 0 does without.
        continuity: weight of the loss on neighbouring differences, at least 0; 0 does without.
        seed: integer seed of the initial state.
        compactness: of the superpixels, above 0; high makes them nearly square.
        working_size: longest side in pixels at which images are clustered; None takes their own size.

    Raises:
        TypeError, ValueError: an argument of another type or out of range.
    """

    takes_features = False  # it takes them, but was made for pixels
    learning_rate = 0.1
    momentum = 0.9

    def __init__(
        self,
        channels: int = 32,
        layers: int = 2,
        steps: int = 40,
        min_labels: int = 3,
        num_segments: int = 800,
        continuity: float = 0.0,
        seed: int = 0,
        *,
        compactness: float = 100.0,
        working_size: int | None = 112,
    ) -> None:
        self.channels = check_int("channels", channels, 2, 1024)
        self.layers = check_int("layers", layers, 1)
        self.steps = check_int("steps", steps, 0)
        self.min_labels = check_int("min_labels", min_labels, 1)
        self.num_segments = check_int("num_segments", num_segments, 0)
        self.continuity = check_number("continuity", continuity)
        self.seed = check_int("seed", seed, 0, LARGEST_SEED)
        self.compactness = check_number("compactness", compactness, above=0)
        self.working_size = None if working_size is None else check_int("working_size", working_size, 1)

    def __call__(self, x: Tensor | Features, size: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Return labels (B, H, W) int32 in 0..count-1 and counts (B,) int64.

        Args:
            x: images (B, 3, H, W) RGB float in [0, 1]; or Features, whose patch directions then take the place of
                colours, on their own grid (our choice).
            size: (H, W) of the labels; by default the images' own.

        Raises:
            TypeError, ValueError: images of another type or shape, or on the CPU with NaN or infinite values.
        """
        values, target = prepare(x, size)

        def run(chunk: Tensor) -> tuple[Tensor, Tensor]:
            small = chunk if isinstance(x, Features) else shrink(chunk, self.working_size)
            responses = self._train(small, lab=not isinstance(x, Features))
            present = torch.zeros(len(chunk), self.channels, dtype=torch.bool, device=chunk.device)
            present.scatter_(1, responses.argmax(1).flatten(1), True)
            return compact(nearest(responses, target, present), self.channels)

        return in_chunks(run, values, target)

    def initial_state(self, in_channels: int = 3) -> list[Tensor]:
        """Return the initial parameters of one image's network, on the CPU, as PyTorch initialises such layers.

        A convolution's weight and bias, then its batch normalization's weight and bias, layer by layer.
        """
        generator = torch.Generator().manual_seed(self.seed)
        state = []
        widths = [in_channels, *[self.channels] * (self.layers + 1)]
        kernels = [3] * self.layers + [1]
        for wide, out, kernel in zip(widths[:-1], widths[1:], kernels, strict=True):
            bound = 1 / math.sqrt(wide * kernel * kernel)
            for shape in ((out, wide, kernel, kernel), (out,)):
                state.append((2 * torch.rand(shape, generator=generator) - 1) * bound)
            state += [torch.ones(out), torch.zeros(out)]
        return state

    def train(self, images: Tensor, segments: Tensor | None = None) -> Tensor:
        """Return the responses (B, channels, H, W) of each image's network after training, at the images' own size.

        Args:
            images: (B, D, H, W) float, finite, worked on together.
            segments: (B, H, W) integers from 0, superpixels that vote, or None.

        Raises:
            TypeError, ValueError: tensors of another dtype or shape.
        """
        check_tensor("images", images, FLOATS, "(B, D, H, W)")
        images = images.detach().float()
        if len(images) == 0:
            return images.new_zeros(0, self.channels, *images.shape[2:])
        if segments is not None:
            check_tensor("segments", segments, LABELS, "(B, H, W)")
            if segments.shape != images[:, 0].shape:
                expected = tuple(images[:, 0].shape)
                raise ValueError(f"segments: got shape {tuple(segments.shape)}, expected {expected} as images have")
        if images.shape[2] * images.shape[3] < LEAST_PIXELS:
            return images.new_zeros(len(images), self.channels, *images.shape[2:])
        group = len(images)
        # inference_mode's tensors take no gradient, so those that enter the graph are made anew outside it.
        with torch.inference_mode(False), torch.enable_grad():
            pixels = images.clone().reshape(1, -1, *images.shape[2:])
            segments = None if segments is None else segments.clone()
            limit = None if segments is None else int(segments.max()) + 1
            parameters = [
                value.to(images.device).repeat(group, *[1] * (value.ndim - 1)).requires_grad_()
                for value in self.initial_state(images.shape[1])
            ]
            speeds = [torch.zeros_like(value) for value in parameters]
            active = torch.ones(group, dtype=torch.bool, device=images.device)
            for _ in range(self.steps):
                responses = self._respond(pixels, parameters, group)
                labels = responses.detach().argmax(1)
                voted = labels if segments is None else ops.cluster_vote(labels, segments, self.channels, limit)
                self._step(parameters, speeds, self._loss(responses, voted), active)
                kinds = torch.zeros(group, self.channels, dtype=torch.int64, device=images.device)
                kinds.scatter_(1, labels.flatten(1), 1)
                active &= kinds.sum(1) > self.min_labels
                # On a GPU asking would stall it at every step.
                if images.device.type == "cpu" and not bool(active.any()):
                    break
            with torch.no_grad():
                return self._respond(pixels, parameters, group)

    def _train(self, images: Tensor, *, lab: bool) -> Tensor:
        """:meth:`train` with the images' own superpixels."""
        if self.num_segments == 0:
            return self.train(images)
        return self.train(images, segment(images, self.num_segments, self.compactness, lab=lab))

    def _respond(self, pixels: Tensor, parameters: list[Tensor], group: int) -> Tensor:
        """Return responses (G, channels, h, w) of images (1, G * D, h, w) by a network each."""
        x = pixels
        for layer in range(self.layers + 1):
            weight, bias, scale, shift = parameters[4 * layer : 4 * layer + 4]
            x = F.conv2d(x, weight, bias, padding=weight.shape[2] // 2, groups=group)
            if layer < self.layers:
                x = x.relu()
            # One image a group, so these are each image's own statistics.
            x = F.batch_norm(x, None, None, scale, shift, training=True)
        return x.view(group, self.channels, *x.shape[2:])

    def _loss(self, responses: Tensor, labels: Tensor) -> Tensor:
        """Return the sum over images of each image's mean loss."""
        loss = len(responses) * F.cross_entropy(responses, labels)
        if self.continuity:
            for axis in (2, 3):
                if responses.shape[axis] > 1:
                    loss = loss + self.continuity * len(responses) * responses.diff(dim=axis).abs().mean()
        return loss

    def _step(self, parameters: list[Tensor], speeds: list[Tensor], loss: Tensor, active: Tensor) -> None:
        """One step of SGD with momentum; networks that stopped stay as they are."""
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for value, speed, gradient in zip(parameters, speeds, gradients, strict=True):
                speed.mul_(self.momentum).add_(gradient)
                move = self.learning_rate * active.to(speed.dtype)
                value.unflatten(0, (len(active), -1)).sub_(
                    speed.unflatten(0, (len(active), -1)) * move.view(-1, *[1] * value.ndim)
                )
