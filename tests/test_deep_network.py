"""The networks of deep clustering: the fused form, the grouped one and PyTorch's own layers compute the same."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import molt
from molt import ops
from molt.clustering import DeepClustering, _training
from molt.clustering._network import EPSILON, Fused, Grouped
from molt.clustering._training import Job, train
from molt.clustering.deep import random_state

SHAPES = [(1, 2), (2, 3), (127, 5), (128, 16), (129, 33), (1000, 100), (300, 1024)]


def rows(pixels: int, channels: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(pixels, channels, generator=generator) + torch.arange(channels) / channels


def image(batch: int = 1, channels: int = 3, height: int = 20, width: int = 27, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, channels, 4, 5, generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)
    return 0.9 * smooth + 0.1 * torch.rand(batch, channels, height, width, generator=generator)


def squares(batch: int, height: int, width: int) -> Tensor:
    y, x = torch.arange(height) // 3, torch.arange(width) // 3
    return (y[:, None] * (width // 3 + 1) + x).expand(batch, -1, -1).contiguous()


def states(channels: int, layers: int, number: int = 1, in_channels: int = 3, seed: int = 0) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [random_state(channels, layers, generator, in_channels) for _ in range(number)]


# What lies between the matrix products


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(("pixels", "channels"), SHAPES)
def test_norm_and_its_gradient_are_pytorchs(pixels: int, channels: int, relu: bool) -> None:
    x = rows(pixels, channels)
    scale, shift = torch.rand(channels) + 0.5, torch.randn(channels)
    out, mean, spread = torch.ops.molt.deep_norm(x, scale, shift, relu, EPSILON)
    wide = [value.double().requires_grad_() for value in (x, scale, shift)]
    used = wide[0].relu() if relu else wide[0]
    expected = (used - used.mean(0)) / (used.var(0, correction=0) + EPSILON).sqrt() * wide[1] + wide[2]
    assert (out - expected).abs().max() < 2e-5
    assert (mean - used.mean(0)).abs().max() < 1e-5 and spread.shape == (channels,)
    gradient = torch.randn(pixels, channels, generator=torch.Generator().manual_seed(1))
    dx, dscale, dshift, dbias = torch.ops.molt.deep_norm_backward(gradient, x, scale, mean, spread, relu)
    slopes = torch.autograd.grad(expected, wide, gradient.double())
    for found, truth in zip((dx, dscale, dshift, dbias), (*slopes, slopes[0].sum(0)), strict=True):
        assert (found - truth).abs().max() < 1e-4 * max(1.0, float(truth.abs().max()))


def test_norm_of_a_far_mean_does_not_cancel() -> None:
    x = rows(5000, 3) + 4000
    out, _, _ = torch.ops.molt.deep_norm(x, torch.ones(3), torch.zeros(3), False, EPSILON)
    expected = F.batch_norm(x.double(), None, None, training=True, eps=EPSILON)
    assert (out - expected).abs().max() < 2e-3


def test_norm_keeps_nan_in_its_channel() -> None:
    x = rows(300, 4)
    x[17, 2] = float("nan")
    for relu in (False, True):
        out, mean, spread = torch.ops.molt.deep_norm(x, torch.ones(4), torch.zeros(4), relu, EPSILON)
        assert out[:, 2].isnan().all() and out[:, [0, 1, 3]].isfinite().all()
        slopes = torch.ops.molt.deep_norm_backward(rows(300, 4, 1), x, torch.ones(4), mean, spread, relu)
        assert slopes[0][:, 2].isnan().any() and slopes[0][:, [0, 1, 3]].isfinite().all()


@pytest.mark.parametrize(("pixels", "channels"), SHAPES)
def test_answers_are_the_first_strongest_channel(pixels: int, channels: int) -> None:
    x = rows(pixels, channels).round()
    x[0] = 1
    labels = torch.ops.molt.deep_answers(x)
    assert labels.dtype == torch.int32
    first = (x == x.amax(1, keepdim=True)).int().argmax(1)
    assert torch.equal(labels.long(), first)
    assert labels[0] == 0


def test_a_row_with_nan_answers_as_argmax_does() -> None:
    x = rows(50, 7)
    x[3, 4] = x[8, 0] = x[9, 6] = x[9, 2] = float("nan")
    x[20] = float("-inf")
    x[21, 5] = float("inf")
    assert torch.equal(torch.ops.molt.deep_answers(x).long(), x.argmax(1))


@pytest.mark.parametrize(("pixels", "channels"), SHAPES)
def test_gradient_is_softmax_less_one(pixels: int, channels: int) -> None:
    x = 10 * rows(pixels, channels)
    labels = torch.randint(0, channels, (pixels,), generator=torch.Generator().manual_seed(2))
    found = torch.ops.molt.deep_gradient(x, labels.int())
    wide = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(wide, labels, reduction="sum"), wide)
    assert (found - expected).abs().max() < 3e-6


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.ops.molt.deep_norm(torch.rand(4), torch.ones(4), torch.ones(4), False, EPSILON),
        lambda: torch.ops.molt.deep_norm(torch.rand(4, 3), torch.ones(4), torch.ones(4), False, EPSILON),
        lambda: torch.ops.molt.deep_norm(torch.rand(0, 3), torch.ones(3), torch.ones(3), False, EPSILON),
        lambda: torch.ops.molt.deep_norm(torch.rand(4, 3).double(), torch.ones(3), torch.ones(3), False, EPSILON),
        lambda: torch.ops.molt.deep_gradient(torch.rand(4, 3), torch.tensor([0, 1, 3, 0], dtype=torch.int32)),
        lambda: torch.ops.molt.deep_gradient(torch.rand(4, 3), torch.zeros(4, dtype=torch.int64)),
        lambda: torch.ops.molt.deep_norm_backward(
            torch.rand(4, 2), torch.rand(4, 3), torch.ones(3), torch.ones(3), torch.ones(3), True
        ),
    ],
)
def test_the_steps_stay_inside_their_memory(call: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match="expected"):
        call()


def test_steps_do_not_depend_on_threads_or_strides() -> None:
    x, gradient = rows(3001, 37), rows(3001, 37, 1)
    scale = torch.rand(37)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            norm = torch.ops.molt.deep_norm(x, scale, scale, True, EPSILON)
            back = torch.ops.molt.deep_norm_backward(gradient, x, scale, *norm[1:], True)
            results.append((*norm, *back, torch.ops.molt.deep_answers(x)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    apart = x.t().contiguous().t()
    assert not apart.is_contiguous()
    assert torch.equal(torch.ops.molt.deep_norm(apart, scale, scale, True, EPSILON)[0], results[0][0])


# Whole networks


def split(network: Fused) -> list[Tensor]:
    """The fused form's speeds in the parameters' shapes."""
    return network._views(network.speeds, network.parameters)


@pytest.mark.parametrize("continuity", [0.0, 1.5])
@pytest.mark.parametrize(("layers", "in_channels"), [(1, 3), (2, 3), (3, 3), (2, 12)])
def test_fused_and_grouped_learn_alike(layers: int, in_channels: int, continuity: float) -> None:
    """Twelve inputs are too many to lay out, so that all convolutions run as such.

    Step by step from the fused form's state, since training amplifies rounding.
    """
    x = image(1, in_channels)
    votes = squares(1, 20, 27)
    (state,) = states(10, layers, in_channels=in_channels)
    active = torch.ones(1, dtype=torch.bool)
    fused = Fused(x, state, continuity)
    others = [Grouped(x, [state], continuity), Grouped(x, [state], continuity, form="products")]
    assert (fused.unfolded is None) == (in_channels == 12)
    for _ in range(4):
        responses = fused.respond()
        labels = ops.cluster_vote(fused.answers(), votes)
        fused.learn(labels, active)
        for other in others:
            assert (other.respond() - responses).abs().max() < 1e-4
            assert (other.answers() != fused.answers()).float().mean() < 0.005
            other.learn(labels, active)
            pairs = zip(fused.parameters, other.parameters, split(fused), other.speeds, strict=True)
            for mine, value, speed, other_speed in pairs:
                assert mine.shape == value.shape
                assert (mine - value).abs().max() < 1e-4 * max(1.0, float(mine.abs().max()))
                value.data.copy_(mine)
                other_speed.copy_(speed)
    assert (fused.parameters[0] - state[0]).abs().max() > 1e-2, "something was learnt"


@pytest.mark.parametrize("size", [(1, 2), (2, 1), (1, 40), (3, 3)])
def test_forms_agree_on_thin_images(size: tuple[int, int]) -> None:
    x = image(1, 3, *size)
    (state,) = states(6, 2)
    active = torch.ones(1, dtype=torch.bool)
    fused, grouped = Fused(x, state, 1.0), Grouped(x, [state], 1.0)
    for _ in range(3):
        assert (fused.respond() - grouped.respond()).abs().max() < 2e-3
        labels = fused.answers()
        fused.learn(labels, active)
        grouped.learn(labels, active)


@pytest.mark.parametrize("form", ["grouped", "products"])
def test_starts_and_images_do_not_mix(form: str) -> None:
    """Each network of a group is what it is alone."""
    x = image(3)
    several = states(8, 2, 2)
    together = Grouped(x, several, 0.0, form=form)
    responses = together.respond()
    labels = together.answers()
    together.learn(labels, torch.tensor([True] * 5 + [False]))
    after = together.respond()
    for start in range(2):
        for i in range(3):
            alone = Grouped(x[i : i + 1], several[start : start + 1], 0.0, form=form)
            at = 3 * start + i
            assert (alone.respond()[0] - responses[at]).abs().max() < 1e-5
            alone.learn(labels[at : at + 1], torch.tensor([at < 5]))
            assert (alone.respond()[0] - after[at]).abs().max() < 1e-4
    assert torch.equal(after[5], responses[5]) and not torch.equal(after[4], responses[4])


def test_train_orders_starts_within_an_image() -> None:
    x, votes = image(2), squares(2, 20, 27)
    several = states(8, 2, 3)
    job = Job(steps=2, min_labels=1, continuity=0.0, dtype=torch.float32)
    native = train(x, votes, int(votes.max()) + 1, several, job)
    assert native.shape == (2, 24, 20, 27)
    with molt.backend("reference"):
        plain = train(x, votes, int(votes.max()) + 1, several, job)
    assert (native - plain).abs().max() < 1e-3
    second = train(x[1:], votes[1:], int(votes.max()) + 1, several[2:], job)
    assert torch.equal(native[1:, 16:], second)


def test_bfloat16_convolutions_are_near() -> None:
    x = image()
    (state,) = states(16, 2)
    wide, narrow = Grouped(x, [state], 0.0), Grouped(x, [state], 0.0, torch.bfloat16)
    a, b = wide.respond(), narrow.respond()
    assert b.dtype == torch.float32 and 1e-4 < (a - b).abs().max() < 0.2
    labels, counts = DeepClustering(dtype=torch.bfloat16, working_size=24)(x)
    assert labels.shape == (1, 20, 27) and int(counts) == int(labels.max()) + 1


# Replaying a recorded step, as on a GPU


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """Where there is no GPU to record on, a step runs twice to warm up, and is replayed by being called again."""
    made: list[Callable[[], None]] = []

    def record(step: Callable[[], None]) -> Callable[[], None]:
        step()
        step()
        made.append(step)
        return step

    monkeypatch.setattr(_training, "_record", record)
    monkeypatch.setattr(_training, "_recorded", OrderedDict())
    return made


@pytest.mark.parametrize("vote", [True, False])
def test_a_replay_is_the_training_itself(recording: list, vote: bool) -> None:
    """Also for images of the same shape that come later, whose superpixels are fewer, and for fewer steps."""
    several = states(8, 2, 2)
    with torch.no_grad():
        for seed, steps in ((0, 5), (1, 5), (2, 4)):
            x = image(2, seed=seed)
            votes = squares(2, 20, 27) if vote else None
            if votes is not None and seed:
                votes = votes // 2
            limit = None if votes is None else int(votes.max()) + 1
            job = Job(steps=steps, min_labels=5, continuity=0.5, dtype=torch.float32)
            network = Grouped(x, several, 0.5)
            expected = _training._run(network, None if votes is None else network.repeat(votes), limit, job)
            found = _training._replay(x, votes, limit, several, job)
            assert torch.equal(found, expected)
            again = _training._replay(x, votes, limit, several, job)
            assert torch.equal(again, expected) and again.data_ptr() != found.data_ptr()
    assert len(recording) == (2 if vote else 1), "recorded once a shape"


def test_recordings_are_told_apart_and_few(recording: list, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_training, "MOST_RECORDED", 3)
    job = Job(steps=2, min_labels=1, continuity=0.0, dtype=torch.float32)
    with torch.no_grad():
        for seed in (0, 1):
            for height in (6, 7):
                x = image(1, height=height)
                expected = _training._run(Grouped(x, states(6, 1, seed=seed), 0.0), None, None, job)
                assert torch.equal(_training._replay(x, None, None, states(6, 1, seed=seed), job), expected)
        assert len(recording) == 4 and len(_training._recorded) == 3
        _training._replay(image(1, height=7), None, None, states(6, 1, seed=1), job)
        assert len(recording) == 4
        _training._replay(image(1, height=6), None, None, states(6, 1), job)
        assert len(recording) == 5, "the oldest was dropped"


def test_what_cannot_be_recorded_is_said_and_run_step_by_step(
    recording: list, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = []

    def fail(step: Callable[[], None]) -> Callable[[], None]:
        step()
        tried.append(step)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(_training, "_record", fail)
    job = Job(steps=2, min_labels=1, continuity=0.0, dtype=torch.float32)
    x, votes = image(), squares(1, 20, 27)
    with torch.no_grad():
        expected = _training._run(Grouped(x, states(6, 1), 0.0), votes, 128, job)
        assert torch.equal(_training._replay(x, votes, 128, states(6, 1), job), expected)
        assert torch.equal(_training._replay(x, votes, 128, states(6, 1), job), expected)
    assert len(tried) == 1 and len(caplog.records) == 1, "tried once"
    assert "without a CUDA graph" in caplog.text and "not permitted" in caplog.text and "more" not in caplog.text


def test_memory_that_does_not_suffice_is_told(recording: list, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(step: Callable[[], None]) -> Callable[[], None]:
        raise torch.OutOfMemoryError("out of memory")

    job = Job(steps=2, min_labels=1, continuity=0.0, dtype=torch.float32)
    with torch.no_grad():
        _training._replay(image(), None, None, states(6, 1), job)
        assert len(_training._recorded) == 1
        monkeypatch.setattr(_training, "_record", full)
        with pytest.raises(torch.OutOfMemoryError):
            _training._replay(image(height=9), None, None, states(6, 1), job)
    _training.forget()
    assert not _training._recorded


def test_a_recording_serves_one_backend(recording: list) -> None:
    job = Job(steps=2, min_labels=1, continuity=0.0, dtype=torch.float32)
    x, votes = image(), squares(1, 20, 27)
    with torch.no_grad():
        for backend in ("reference", "native", "reference"):
            with molt.backend(backend):
                _training._replay(x, votes, 128, states(6, 1), job)
    assert len(recording) == 2
