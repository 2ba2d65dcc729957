"""The small networks of deep clustering while they train: one an image, all layers, loss and optimiser.

Two forms of the same arithmetic. `Grouped` is plain PyTorch with autograd, many images at once, on any device: images
are folded into channels and convolutions grouped, so that batch normalization is each image's own. `Fused` is one
image on the CPU: rows of channels, gradients written out, what lies between matrix products in C++.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from molt.ops._native import call

LEARNING_RATE, MOMENTUM = 0.1, 0.9
EPSILON = 1e-5  # of batch normalization, PyTorch's
UNFOLDED = 64  # numbers a pixel up to which the first layer's patches are laid out once, for all steps


class Grouped:
    """Networks of a batch of images (B, D, h, w), one a start and image: G = starts * B, the first start's before.

    Args:
        images: float32.
        states: parameters of one network for each start: weight, bias, scale and shift a layer.
        continuity: weight of the loss on neighbouring differences.
        dtype: of the convolutions; the rest is float32.
        form: ``"grouped"`` convolutions, or ``"products"``: patches laid out, then batched matrix products.
    """

    def __init__(
        self,
        images: Tensor,
        states: Sequence[Sequence[Tensor]],
        continuity: float,
        dtype: torch.dtype = torch.float32,
        form: str = "grouped",
    ) -> None:
        self.size = images.shape[2:]
        self.starts, self.group = len(states), len(states) * len(images)
        self.continuity = continuity
        self.dtype = dtype
        self.form = form
        self.pixels = self.repeat(images).reshape(1, -1, *self.size).to(dtype)
        self.parameters = [
            torch.cat([value.repeat(len(images), *[1] * (value.ndim - 1)) for value in values])
            .to(images.device)
            .requires_grad_()
            for values in zip(*states, strict=True)
        ]
        self.speeds = [torch.zeros_like(value) for value in self.parameters]
        self.responses = images.new_empty(0)

    def repeat(self, values: Tensor) -> Tensor:
        """Return what belongs to each image, (B, ...), for each network, (G, ...)."""
        return values.repeat(self.starts, *[1] * (values.ndim - 1))

    def respond(self) -> Tensor:
        """Return the responses (G, C, h, w) float32 as the networks now are."""
        with torch.enable_grad():
            x = self.pixels
            layers = len(self.parameters) // 4
            for layer in range(layers):
                weight, bias, scale, shift = self.parameters[4 * layer : 4 * layer + 4]
                x = self._convolve(x.to(self.dtype), weight.to(self.dtype), bias.to(self.dtype))
                if layer < layers - 1:
                    x = x.relu()
                x = F.batch_norm(x, None, None, scale, shift, training=True, eps=EPSILON)
            self.responses = x.float().view(self.group, -1, *self.size)
        return self.responses.detach()

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Convolve images (1, G * D, h, w) by weights (G * C, D, k, k), each with its own."""
        kernel = weight.shape[2]
        if self.form == "grouped":
            return F.conv2d(x, weight, bias, padding=kernel // 2, groups=self.group)
        patches = F.unfold(x, kernel, padding=kernel // 2) if kernel > 1 else x
        matrices = weight.reshape(self.group, -1, weight[0].numel())
        rows = torch.baddbmm(bias.view(self.group, -1, 1), matrices, patches.reshape(self.group, weight[0].numel(), -1))
        return rows.reshape(1, -1, *self.size)

    def answers(self) -> Tensor:
        """Return the strongest channel (G, h, w) of each pixel of the latest responses."""
        return self.responses.detach().argmax(1)

    def learn(self, labels: Tensor, active: Tensor) -> None:
        """Take a step of SGD with momentum towards labels (G, h, w); networks that are not ``active`` (G,) stay."""
        with torch.enable_grad():
            gradients = torch.autograd.grad(self._loss(labels.long()), self.parameters)
        with torch.no_grad():
            torch._foreach_mul_(self.speeds, MOMENTUM)
            torch._foreach_add_(self.speeds, gradients)
            # Multiplied by 1 or 0 and not branched on, so that a GPU runs ahead of the host.
            rate = LEARNING_RATE * active.float()
            moves = [
                (speed.unflatten(0, (self.group, -1)) * rate.view(-1, *[1] * speed.ndim)).view_as(speed)
                for speed in self.speeds
            ]
            torch._foreach_sub_(self.parameters, moves)

    def _loss(self, labels: Tensor) -> Tensor:
        """Return the sum over images of each image's mean loss."""
        loss = self.group * F.cross_entropy(self.responses, labels)
        if self.continuity:
            for axis in (2, 3):
                if self.responses.shape[axis] > 1:
                    step = self.responses.diff(dim=axis).abs().mean()
                    loss = loss + self.continuity * self.group * step
        return loss


class Fused:
    """The network of one image (1, D, h, w) on the CPU, float32, from one state; else as :class:`Grouped`."""

    def __init__(self, images: Tensor, state: Sequence[Tensor], continuity: float) -> None:
        self.size = images.shape[2:]
        self.continuity = continuity
        # One buffer for all parameters, one for their speeds and one for gradients: an optimiser step is three calls.
        self.values = torch.cat([self._laid_out(value).flatten() for value in state])
        self.speeds, self.gradients = torch.zeros_like(self.values), torch.zeros_like(self.values)
        self.parameters = self._views(self.values, state)
        self.slopes = self._views(self.gradients, state)
        self.images = images.contiguous(memory_format=torch.channels_last)
        self.unfolded: Tensor | None = None
        kernel = state[0].shape[2]
        if images.shape[1] * kernel * kernel <= UNFOLDED:
            patches = F.unfold(images, kernel, padding=kernel // 2)[0]
            patches = patches.view(images.shape[1], kernel * kernel, -1).transpose(0, 1).flatten(0, 1)
            self.unfolded = patches.t().contiguous()
        self.layers: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self.rows = images.new_empty(0)

    @staticmethod
    def _laid_out(value: Tensor) -> Tensor:
        """A convolution's weight with channels last, which is how it is stored."""
        return value.permute(0, 2, 3, 1) if value.ndim == 4 else value

    def _views(self, buffer: Tensor, state: Sequence[Tensor]) -> list[Tensor]:
        """Return the buffer's parts in the shapes of the parameters."""
        views = []
        for part, value in zip(buffer.split([value.numel() for value in state]), state, strict=True):
            shape = self._laid_out(value).shape
            views.append(part.view(shape).permute(0, 3, 1, 2) if value.ndim == 4 else part)
        return views

    def respond(self) -> Tensor:
        """Return the responses (1, C, h, w) float32, channels last, as the network now is."""
        self.layers = []
        rows = None
        number = len(self.parameters) // 4
        for layer in range(number):
            weight, bias, scale, shift = self.parameters[4 * layer : 4 * layer + 4]
            rows_in = rows
            if layer == 0 and self.unfolded is not None:
                rows_in = self.unfolded
                x = torch.addmm(bias, rows_in, self._matrix(weight).t())
            elif weight.shape[2] == 1:
                assert rows is not None
                x = torch.addmm(bias, rows, self._matrix(weight).t())
            else:
                image = self.images if rows is None else self._image(rows)
                x = self._rows(F.conv2d(image, weight, bias, padding=weight.shape[2] // 2))
                rows_in = self._rows(image)
            rows, mean, spread = call("deep_norm", x, scale, shift, layer < number - 1, EPSILON)
            assert rows_in is not None
            self.layers.append((rows_in, x, mean, spread))
        assert rows is not None
        self.rows = rows
        return self._image(rows)

    def answers(self) -> Tensor:
        """Return the strongest channel (1, h, w) int32 of each pixel of the latest responses."""
        return call("deep_answers", self.rows).view(1, *self.size)  # type: ignore[no-any-return]

    def learn(self, labels: Tensor, active: Tensor) -> None:
        """Take a step of SGD with momentum towards labels (1, h, w), whatever ``active`` is: a lone image stops."""
        gradient = call("deep_gradient", self.rows, labels.to(torch.int32).flatten())
        if self.continuity:
            gradient = self._with_continuity(gradient)
        for layer in reversed(range(len(self.layers))):
            rows_in, x, mean, spread = self.layers[layer]
            weight, _, scale, _ = self.parameters[4 * layer : 4 * layer + 4]
            dweight, dbias, dscale, dshift = self.slopes[4 * layer : 4 * layer + 4]
            relu = layer < len(self.layers) - 1
            found = call("deep_norm_backward", gradient, x, scale, mean, spread, relu)
            slope = found[0]
            for target, value in zip((dscale, dshift, dbias), found[1:], strict=True):
                target.copy_(value)
            if weight.shape[2] == 1 or (layer == 0 and self.unfolded is not None):
                torch.mm(slope.t(), rows_in, out=self._matrix(dweight))
                if layer > 0:
                    gradient = slope @ self._matrix(weight)
                continue
            image = self.images if layer == 0 else self._image(rows_in)
            back, change, _ = torch.ops.aten.convolution_backward(
                self._image(slope), image, weight, None, [1, 1], [weight.shape[2] // 2] * 2, [1, 1], False, [0, 0], 1,
                [layer > 0, True, False],
            )  # fmt: skip
            dweight.copy_(change)
            if layer > 0:
                gradient = self._rows(back)
        # The rows' gradient is of the sum over pixels; the loss is their mean.
        self.speeds.mul_(MOMENTUM).add_(self.gradients, alpha=1 / len(self.rows))
        self.values.sub_(self.speeds, alpha=LEARNING_RATE)

    def _with_continuity(self, gradient: Tensor) -> Tensor:
        """Add the gradient of the mean absolute difference between neighbours, times the number of pixels."""
        image = self.rows.view(*self.size, -1)
        total = gradient.view_as(image)
        for axis in (0, 1):
            if image.shape[axis] > 1:
                step = image.diff(dim=axis)
                slope = step.sign() * (self.continuity * len(self.rows) / step.numel())
                total.narrow(axis, 1, step.shape[axis]).add_(slope)
                total.narrow(axis, 0, step.shape[axis]).sub_(slope)
        return total.flatten(0, 1)

    @staticmethod
    def _matrix(weight: Tensor) -> Tensor:
        """A convolution's weight as (out, numbers a pixel)."""
        return weight.permute(0, 2, 3, 1).flatten(1)

    def _image(self, rows: Tensor) -> Tensor:
        """Rows (h * w, C) as an image (1, C, h, w), channels last, of the same memory."""
        return rows.view(1, *self.size, -1).permute(0, 3, 1, 2)

    @staticmethod
    def _rows(image: Tensor) -> Tensor:
        """An image (1, C, h, w), as rows (h * w, C), of the same memory where its channels are last."""
        return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def respond_shared(images: Tensor, state: Sequence[Tensor]) -> Tensor:
    """Return responses (B, C, h, w) of images (B, 3, h, w) by one network, normalized by each image's own statistics.

    Args:
        images: float.
        state: weight, bias, scale and shift of each layer.
    """
    x = images
    layers = len(state) // 4
    for layer in range(layers):
        weight, bias, scale, shift = state[4 * layer : 4 * layer + 4]
        x = F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), padding=weight.shape[2] // 2)
        if layer < layers - 1:
            x = x.relu()
        x = F.instance_norm(x, weight=scale, bias=shift, eps=EPSILON)
    return x
