"""cluster_vote against a NumPy loop over segments, on hard shapes, and its messages."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from molt import ops

BACKENDS = ["reference", "native"]
DTYPES = [torch.uint8, torch.int32, torch.int64]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Both of them, one after the other."""
    return request.param


def slow_vote(labels: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
    """Each image, each segment by itself; argmax takes the first, so the lowest, of equals."""
    out = labels.numpy().copy()
    for painted, image, parts in zip(out, labels.numpy(), segments.numpy(), strict=True):
        for segment in np.unique(parts):
            inside = parts == segment
            painted[inside] = np.bincount(image[inside]).argmax()
    return torch.from_numpy(out)


def random_case(
    shape: tuple[int, ...], clusters: int, parts: int, seed: int = 0, *dtypes: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and segments at random, so no segment is connected."""
    generator = torch.Generator().manual_seed(seed)
    first, second = dtypes or (torch.int64, torch.int64)
    labels = torch.randint(0, clusters, shape, generator=generator)
    return labels.to(first), torch.randint(0, parts, shape, generator=generator).to(second)


@pytest.mark.parametrize("label_dtype", DTYPES)
@pytest.mark.parametrize("segment_dtype", DTYPES)
@pytest.mark.parametrize("limits", [(None, None), (7, None), (None, 40), (7, 40), (11, 100), (np.int64(7), 40)])
def test_matches_a_loop(label_dtype: torch.dtype, segment_dtype: torch.dtype, limits: tuple, backend: str) -> None:
    labels, segments = random_case((3, 23, 31), 7, 40, 0, label_dtype, segment_dtype)
    before = labels.clone(), segments.clone()
    out = ops.cluster_vote(labels, segments, *limits, backend=backend)
    expected = slow_vote(labels, segments)
    assert (expected != labels).any(), "the vote does change something"
    assert out.dtype == label_dtype and out.shape == labels.shape and out.is_contiguous()
    assert torch.equal(out, expected)
    assert torch.equal(labels, before[0]) and torch.equal(segments, before[1])


@pytest.mark.parametrize(
    ("shape", "clusters", "parts"),
    [
        ((1, 1, 1), 1, 1),
        ((4, 1, 1), 9, 3),
        ((2, 1, 57), 3, 5),
        ((2, 57, 1), 3, 5),
        ((1, 40, 40), 200, 2),
        ((1, 40, 40), 2, 1000),
        ((9, 8, 8), 100, 64),
    ],
)
def test_hard_shapes(shape: tuple[int, ...], clusters: int, parts: int, backend: str) -> None:
    for seed in range(3):
        labels, segments = random_case(shape, clusters, parts, seed)
        assert torch.equal(ops.cluster_vote(labels, segments, backend=backend), slow_vote(labels, segments))


def test_blocks_that_a_majority_fills(backend: str) -> None:
    segments = torch.arange(12).view(1, 3, 4).repeat_interleave(5, 1).repeat_interleave(5, 2)
    truth = (segments * 7) % 5
    labels = truth.clone()
    labels[:, torch.arange(15) % 5 < 2] += 1  # 10 of a block's 25 pixels
    labels %= 5
    assert (labels != truth).sum() == 120
    assert torch.equal(ops.cluster_vote(labels, segments, 5, 12, backend=backend), truth)


def test_the_lowest_of_equals_wins(backend: str) -> None:
    labels = torch.tensor([[[5, 2, 2, 5, 9], [9, 3, 0, 3, 0]], [[5, 2, 5, 2, 7], [7, 7, 1, 4, 1]]])
    segments = torch.tensor([[[0, 0, 0, 0, 0], [0, 1, 1, 1, 1]], [[0, 0, 0, 0, 1], [1, 1, 1, 1, 1]]])
    expected = torch.tensor([[[2, 2, 2, 2, 2], [2, 0, 0, 0, 0]], [[2, 2, 2, 2, 7], [7, 7, 7, 7, 7]]])
    assert torch.equal(ops.cluster_vote(labels, segments, backend=backend), expected)
    assert torch.equal(ops.cluster_vote(labels, segments, 20, 20, backend=backend), expected)


def test_a_segment_need_not_be_connected(backend: str) -> None:
    labels = torch.tensor([[[1, 0, 1, 0, 1, 0, 3]]])
    segments = torch.tensor([[[4, 0, 4, 0, 0, 4, 4]]])
    assert ops.cluster_vote(labels, segments, backend=backend).tolist() == [[[1, 0, 1, 0, 0, 1, 1]]]


def test_images_do_not_vote_for_one_another(backend: str) -> None:
    """Images number their segments each for themselves: the same number is another segment."""
    labels, segments = random_case((5, 12, 13), 6, 9)
    together = ops.cluster_vote(labels, segments, backend=backend)
    for i in range(5):
        assert torch.equal(
            together[i : i + 1], ops.cluster_vote(labels[i : i + 1], segments[i : i + 1], backend=backend)
        )
    assert not torch.equal(together[0], ops.cluster_vote(labels[:1], segments[1:2], backend=backend)[0])


def test_strides_do_not_matter(backend: str) -> None:
    labels, segments = random_case((17, 4, 20), 6, 9)
    labels, segments = labels.permute(1, 2, 0)[:, ::2], segments.permute(1, 2, 0)[:, ::2]
    assert not labels.is_contiguous() and not segments.is_contiguous()
    expected = slow_vote(labels, segments)
    out = ops.cluster_vote(labels, segments, backend=backend)
    assert out.shape == (4, 10, 17) and torch.equal(out, expected)
    one = segments[:1, :, :].expand(4, 10, 17)
    assert one.stride(0) == 0
    assert torch.equal(ops.cluster_vote(labels.contiguous(), one, backend=backend), slow_vote(labels, one))
    assert torch.equal(ops.cluster_vote(labels, segments.contiguous(), backend=backend), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 5, 6), (2, 0, 6), (2, 5, 0), (0, 0, 0)])
def test_empty(shape: tuple[int, ...], dtype: torch.dtype, backend: str) -> None:
    labels = torch.zeros(shape, dtype=dtype)
    for limits in ((None, None), (3, 4), (0, 0)):
        out = ops.cluster_vote(labels, torch.zeros(shape, dtype=torch.int32), *limits, backend=backend)
        assert out.shape == shape and out.dtype == dtype


def test_result_is_no_view_of_the_labels(backend: str) -> None:
    labels = torch.zeros(1, 2, 2, dtype=torch.int64)
    out = ops.cluster_vote(labels, labels, backend=backend)
    out += 1
    assert not labels.any()
    empty = torch.zeros(0, 2, 2, dtype=torch.int64)
    assert ops.cluster_vote(empty, empty, backend=backend) is not empty


def test_grad_mode_and_inference_mode(backend: str) -> None:
    labels, segments = random_case((2, 9, 9), 4, 6)
    with torch.inference_mode():
        out = ops.cluster_vote(labels.clone(), segments.clone(), backend=backend)
    assert torch.equal(out, slow_vote(labels, segments))


GOOD = torch.zeros(2, 3, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("labels", "segments", "error", "word"),
    [
        (GOOD.float(), GOOD, TypeError, r"labels: got float32, expected uint8, int32, int64"),
        (GOOD, GOOD.bool(), TypeError, r"segments: got bool, expected uint8"),
        (GOOD.to(torch.int16), GOOD, TypeError, r"labels: got int16"),
        (GOOD, GOOD.to(torch.int8), TypeError, r"segments: got int8"),
        (GOOD.numpy(), GOOD, TypeError, r"labels: got ndarray, expected a tensor"),
        (GOOD, None, TypeError, r"segments: got NoneType, expected a tensor"),
        (GOOD[0], GOOD, ValueError, r"labels: got shape \(3, 4\), expected \(B, H, W\)"),
        (GOOD, GOOD[:, None], ValueError, r"segments: got shape \(2, 1, 3, 4\), expected \(B, H, W\)"),
        (GOOD, GOOD[:1], ValueError, r"segments: got shape \(1, 3, 4\), expected \(2, 3, 4\)"),
        (GOOD, GOOD.transpose(1, 2), ValueError, r"segments: got shape \(2, 4, 3\), expected \(2, 3, 4\)"),
    ],
)
def test_tensors_are_checked(labels: object, segments: object, error: type[Exception], word: str, backend: str) -> None:
    with pytest.raises(error, match="^" + word):
        ops.cluster_vote(labels, segments, backend=backend)


@pytest.mark.parametrize("which", ["labels", "segments"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_values_out_of_range_are_named(which: str, dtype: torch.dtype, backend: str) -> None:
    limit = {"labels": "num_clusters", "segments": "num_segments"}[which]
    for value, given, words in (
        (-1, {}, r"got -1 in image 1, expected values >= 0"),
        (-3, {limit: 5}, r"got -3 in image 1, expected values in \[0, 5\)"),
        (5, {limit: 5}, r"got 5 in image 1, expected values in \[0, 5\)"),
        (0, {limit: 0}, r"got 0 in image 0, expected values in \[0, 0\)"),
    ):
        tensors = {"labels": GOOD.to(dtype).clone(), "segments": GOOD.to(dtype).clone()}
        tensors[which][1, 2, 3] = value
        with pytest.raises(ValueError, match=f"^{which}: {words}"):
            ops.cluster_vote(**tensors, **given, backend=backend)
    inside = {"labels": GOOD.to(dtype).clone(), "segments": GOOD.to(dtype).clone()}
    inside[which][1, 2, 3] = 4
    assert torch.equal(
        ops.cluster_vote(**inside, **{limit: 5}, backend=backend), slow_vote(inside["labels"], inside["segments"])
    )


@pytest.mark.parametrize("name", ["num_clusters", "num_segments"])
@pytest.mark.parametrize(
    ("value", "error", "word"),
    [
        (True, TypeError, "got bool, expected an integer or None"),
        (4.0, TypeError, "got float, expected an integer or None"),
        ("4", TypeError, "got str, expected an integer or None"),
        (-1, ValueError, "got -1, expected a number >= 0"),
    ],
)
def test_limits_are_checked(name: str, value: object, error: type[Exception], word: str, backend: str) -> None:
    with pytest.raises(error, match=f"^{name}: {word}"):
        ops.cluster_vote(GOOD, GOOD, **{name: value}, backend=backend)


def test_large_segment_numbers(backend: str) -> None:
    """Segment numbers with gaps, and labels as high as uint8 goes."""
    labels, segments = random_case((2, 10, 10), 256, 5, 0, torch.uint8, torch.int64)
    labels[:, :, :5] = 255
    assert torch.equal(ops.cluster_vote(labels, segments * 997, backend=backend), slow_vote(labels, segments))


def test_compiles_without_a_break_where_the_limits_are_given(backend: str) -> None:
    labels, segments = torch.randint(0, 5, (2, 6, 7)), torch.randint(0, 9, (2, 6, 7))
    compiled = torch.compile(
        lambda a, b: ops.cluster_vote(a, b, 5, 9, backend=backend), fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(labels, segments), ops.cluster_vote(labels, segments, backend=backend))


@pytest.mark.parametrize(
    "shape", [(1, 1, 8), (1, 1, 9), (3, 7, 73), (3, 8, 64), (1, 64, 128), (1, 1, 8193), (12, 90, 92)]
)
@pytest.mark.parametrize("runs", [1, 3, 8, 11])
def test_runs_of_every_length(shape: tuple[int, ...], runs: int, backend: str) -> None:
    """Coherent and noisy images, on both sides of the groups that the native core looks at together."""
    for label_dtype, segment_dtype in (
        (torch.uint8, torch.int32),
        (torch.int32, torch.int64),
        (torch.int64, torch.uint8),
    ):
        labels, segments = random_case(shape, 5, 200, runs, label_dtype, segment_dtype)
        labels, segments = (x.repeat_interleave(runs, 2)[:, :, : shape[2]] for x in (labels, segments))
        assert torch.equal(ops.cluster_vote(labels, segments, backend=backend), slow_vote(labels, segments))


def test_ties_in_any_order_of_arrival(backend: str) -> None:
    generator = torch.Generator().manual_seed(0)
    votes = torch.arange(5).repeat(8).repeat(50, 1)  # each label 8 times
    shuffled = votes.gather(1, torch.rand(50, 40, generator=generator).argsort(1)).view(50, 5, 8)
    runs = torch.rand(50, 5, generator=generator).argsort(1)[:, :, None].expand(50, 5, 8)  # 8 at a time
    for labels in (shuffled, runs):
        for low in (0, 1, 300):
            out = ops.cluster_vote(labels + low, torch.full_like(labels, 3), backend=backend)
            assert (out == low).all()


@pytest.mark.parametrize(
    ("labels_by", "segments_by"), [(2**40, 1), (1, 2**40), (2**40, 2**41), (2**18, 1), (2**61, 2**61)]
)
def test_numbers_far_apart(labels_by: int, segments_by: int) -> None:
    """Wider than any table: the native core sorts, with the same result; the reference would not fit into memory."""
    labels, segments = random_case((2, 33, 35), 4, 4)
    labels[0, :9, :9], segments[1, 5:, 3:] = 3, 0
    out = ops.cluster_vote(labels * labels_by, segments * segments_by, backend="native")
    assert torch.equal(out, slow_vote(labels, segments) * labels_by)
    top = torch.where(labels == 3, 2**63 - 1, labels)
    out = ops.cluster_vote(top, segments, backend="native")
    assert torch.equal(out, torch.where(slow_vote(labels, segments) == 3, 2**63 - 1, slow_vote(labels, segments)))
    assert torch.equal(ops.cluster_vote(segments, top, backend="native"), slow_vote(segments, labels))


def test_sorted_votes_have_the_same_ties() -> None:
    labels = torch.tensor([[[5, 2, 2, 5, 9], [9, 3, 0, 3, 0]]])
    segments = torch.tensor([[[0, 0, 0, 0, 0], [0, 1, 1, 1, 1]]])
    for spread in (1, 2**40):
        out = ops.cluster_vote(labels * spread, segments * spread, backend="native")
        assert torch.equal(out, torch.tensor([[[2, 2, 2, 2, 2], [2, 0, 0, 0, 0]]]) * spread)


@pytest.mark.parametrize("clusters", [3, 500])
def test_a_large_image(clusters: int) -> None:
    labels, segments = random_case((1, 1500, 1400), clusters, 900)
    out = ops.cluster_vote(labels, segments, backend="native")
    assert torch.equal(out, ops.cluster_vote(labels, segments, backend="reference"))
    counts = np.bincount(labels[segments == 450].numpy(), minlength=clusters)
    assert (out[segments == 450] == counts.argmax()).all()


def test_a_compiled_reference_refuses_values_out_of_range() -> None:
    labels, segments = torch.tensor([[[0, 3, 0]]]), torch.tensor([[[0, 0, 1]]])
    vote = torch.compile(
        lambda x, s: ops.cluster_vote(x, s, 2, 3, backend="reference"), fullgraph=True, backend="aot_eager"
    )
    assert vote(labels.clamp(max=1), segments).tolist() == [[[0, 0, 0]]]
    with pytest.raises(RuntimeError, match="expected values in"):
        vote(labels, segments)
    with pytest.raises(RuntimeError, match="expected values in"):
        vote(labels.clamp(max=1), segments + 2)
