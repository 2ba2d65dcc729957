import logging
import math
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import molt
from molt import _backend, _extension
from molt.ops import cluster_refine

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LABEL_DTYPES = [torch.uint8, torch.int32, torch.int64]
BACKENDS = ["reference", "native"]
# One strip of the native core is 8192 pixels: both sides of it, one lane group of 8, and the usual sizes.
SHAPES = [(1, 1, 1, 1), (2, 3, 1, 7), (1, 1, 2, 4), (3, 2, 13, 17), (2, 1, 64, 128), (1, 2, 91, 91), (1, 9, 130, 127)]
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 2e-6, torch.float64: 1e-14}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def expected(maps, labels, alpha):
    """In float64 by a loop over images, maps and clusters, independent of the code under test."""
    values, index = maps.double().numpy(), labels.numpy()
    out = values.copy()
    for b in range(values.shape[0]):
        for c in range(values.shape[1]):
            for k in np.unique(index[b]):
                mask = index[b] == k
                out[b, c][mask] = (1 - alpha) * values[b, c][mask] + alpha * math.fsum(values[b, c][mask]) / mask.sum()
    return torch.from_numpy(out)


def random_case(shape, num_clusters, dtype=torch.float32, label_dtype=torch.int64):
    maps = torch.rand(shape, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, num_clusters, (shape[0], *shape[2:])).to(label_dtype)
    return maps, labels


def blocky(labels):
    """Runs of equal labels, as segmentations have, some of them not a multiple of anything."""
    return labels.repeat_interleave(11, 2)[:, :, : labels.shape[2]].contiguous()


def test_extension_is_there():
    assert _extension.CPU.module is not None, _extension.CPU.reason


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_loop(shape, dtype, backend):
    for label_dtype in LABEL_DTYPES:
        maps, labels = random_case(shape, 5, dtype, label_dtype)
        for index in (labels, blocky(labels)):
            out = cluster_refine(maps, index, 0.3, 5, backend=backend)
            assert out.dtype == dtype
            assert out.shape == maps.shape
            assert out.is_contiguous()
            torch.testing.assert_close(out.double(), expected(maps, index, 0.3), rtol=0, atol=TOLERANCE[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_clusters", [1, 2, 255, 256, 257, 5000])
@pytest.mark.parametrize("label_dtype", LABEL_DTYPES, ids=str)
def test_number_of_clusters(num_clusters, label_dtype, backend):
    used = min(num_clusters, 256) if label_dtype == torch.uint8 else num_clusters
    maps, labels = random_case((2, 2, 37, 41), used, label_dtype=label_dtype)
    labels[0, 0, 0], labels[1, -1, -1] = used - 1, 0
    want = expected(maps, labels, 0.5)
    for given in (num_clusters, None, torch.tensor([num_clusters] * 2), torch.tensor([used, num_clusters]).int()):
        out = cluster_refine(maps, labels, 0.5, given, backend=backend)
        torch.testing.assert_close(out.double(), want, rtol=0, atol=2e-6)


def test_number_of_clusters_far_beyond_memory():
    maps, labels = random_case((2, 2, 9, 9), 3)
    labels[0] = labels[0] * 2**61 + 5
    out = cluster_refine(maps, labels, 0.5, 2**63 - 1, backend="native")
    torch.testing.assert_close(out.double(), expected(maps, labels, 0.5), rtol=0, atol=1e-6)


def test_wide_labels_give_the_bits_of_their_ranks():
    maps, labels = random_case((2, 2, 100, 101), 7)
    assert torch.equal(cluster_refine(maps, labels * 10**9), cluster_refine(maps, labels))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 2, 4, 5), (2, 0, 4, 5), (2, 2, 0, 5), (2, 2, 4, 0), (0, 0, 0, 0)], ids=str)
def test_empty(shape, backend):
    maps = torch.empty(shape, requires_grad=True)
    labels = torch.full((shape[0], *shape[2:]), 99)
    for given in (0, 3, None, torch.zeros(shape[0], dtype=torch.int64)):
        out = cluster_refine(maps, labels, 0.5, given, backend=backend)
        assert out.shape == shape
    out.sum().backward()
    assert maps.grad.shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_alpha_ends(backend):
    maps, labels = random_case((2, 2, 20, 21), 4)
    maps[0, 0, 0, 0], maps[1, 1, 3, 3] = math.nan, math.inf
    kept = cluster_refine(maps, labels, 0, 4, backend=backend)
    assert torch.equal(kept.nan_to_num(), maps.nan_to_num())
    assert kept.data_ptr() != maps.data_ptr()
    mean = cluster_refine(maps, labels, 1, 4, backend=backend)
    cluster = labels[1] == labels[1, 3, 3]
    assert mean[1, 1][cluster].isposinf().all()
    assert mean[1, 1][~cluster].isfinite().all()
    assert mean[1, 0][cluster].unique().numel() == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_cluster_and_map(dtype, backend):
    maps, labels = random_case((2, 3, 30, 31), 4, dtype)
    clean = cluster_refine(maps, labels, 0.5, 4, backend=backend)
    maps[1, 2, 5, 6] = math.nan
    out = cluster_refine(maps, labels, 0.5, 4, backend=backend)
    poisoned = torch.zeros_like(maps, dtype=torch.bool)
    poisoned[1, 2] = labels[1] == labels[1, 5, 6]
    assert torch.equal(out.isnan(), poisoned)
    assert torch.equal(out[~poisoned], clean[~poisoned])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_conversions_cover_every_bit_pattern(dtype):
    # One cluster a pixel and alpha 0.5: (0.5 * v + 0.5 * v) goes to float32 and back, for every v.
    maps = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 1, 256, 256)
    labels = torch.arange(2**16).view(1, 256, 256)
    out = cluster_refine(maps, labels, 0.5, 2**16, backend="native")
    assert torch.equal(out.isnan(), maps.isnan())
    assert torch.equal(out.nan_to_num(nan=0.0), maps.nan_to_num(nan=0.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_rounding_is_torch_rounding(dtype):
    maps = (torch.randn(1, 1, 256, 300).exp() * torch.randn(1, 1, 256, 300) * 10).to(dtype)
    maps.view(-1)[:4000] *= 2.0**-14
    maps.view(-1)[4000:6000] *= 2.0**12
    labels = torch.arange(256 * 300).view(1, 256, 300) // 2
    wide = cluster_refine(maps.float(), labels, 0.5, backend="native")
    out = cluster_refine(maps, labels, 0.5, backend="native")
    torch.testing.assert_close(out, wide.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_half_maps_are_summed_in_float32():
    maps = torch.full((1, 1, 300, 300), 1.001, dtype=torch.float16)
    out = cluster_refine(maps, torch.zeros(1, 300, 300, dtype=torch.uint8), 1.0, 1)
    assert torch.equal(out, maps)


@pytest.mark.parametrize("backend", BACKENDS)
def test_views(backend):
    base = torch.rand(4, 6, 40, 44)
    index = torch.randint(0, 5, (4, 40, 44))
    cases = [
        (base[::2, 1::2, ::3, 1::2], index[::2, ::3, 1::2]),
        (base.to(memory_format=torch.channels_last), index.transpose(1, 2).contiguous().transpose(1, 2)),
        (base[:1].expand(4, -1, -1, -1), index[:1].expand(4, -1, -1)),
        (base[:, :1].expand(-1, 3, -1, -1), index),
        (base.flip(3), index.flip(1)),
        (base[1:, :, 3:, 5:], index[1:, 3:, 5:]),
    ]
    for maps, labels in cases:
        want = cluster_refine(maps.contiguous(), labels.contiguous(), 0.5, 5, backend=backend)
        before = maps.clone()
        out = cluster_refine(maps, labels, 0.5, 5, backend=backend)
        torch.testing.assert_close(out, want, rtol=0, atol=0 if backend == "native" else 2e-6)
        assert out.is_contiguous()
        assert torch.equal(maps, before)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(1, 1, 448, 448), (1, 21, 100, 90), (3, 2, 150, 149), (40, 1, 64, 65)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_bits_do_not_depend_on_threads(shape, dtype, threads):
    maps, labels = random_case(shape, 60, dtype)
    results = []
    for number in (1, 2, 3, 7):
        threads(number)
        results.append(cluster_refine(maps, labels, 0.37, 60, backend="native"))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("batch", [2, 5, 40])
def test_bits_do_not_depend_on_the_batch(batch):
    maps, labels = random_case((batch, 3, 97, 98), 30)
    labels[-1] *= 1000
    whole = cluster_refine(maps, labels, 0.37, backend="native")
    for i in range(batch):
        assert torch.equal(whole[i : i + 1], cluster_refine(maps[i : i + 1], labels[i : i + 1], 0.37, backend="native"))
        one = cluster_refine(maps[i : i + 1, 2:], labels[i : i + 1].int(), 0.37, 10**6, backend="native")
        assert torch.equal(whole[i : i + 1, 2:], one)
    order = torch.randperm(batch)
    assert torch.equal(whole[order], cluster_refine(maps[order], labels[order], 0.37, backend="native"))


def busy_ticks():
    """CPU ticks of every thread of this process."""
    stats = {task.name: (task / "stat").read_text() for task in Path("/proc/self/task").iterdir()}
    return {name: sum(map(int, stat.rpartition(")")[2].split()[11:13])) for name, stat in stats.items()}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_image_uses_more_than_one_thread(threads):
    maps, labels = random_case((1, 1, 1024, 1024), 10)

    def busy_threads(number):
        threads(number)
        before = busy_ticks()
        for _ in range(300):
            cluster_refine(maps, labels, 0.5, 10, backend="native")
        return sum(ticks - before.get(name, 0) > 10 for name, ticks in busy_ticks().items())

    assert busy_threads(1) == 1
    assert busy_threads(2) == 2


def test_many_python_threads_at_once():
    cases = [random_case((2, 2, 120, 121), 20) for _ in range(4)]
    want = [cluster_refine(m, x) for m, x in cases]
    got = [[] for _ in cases]

    def work(i):
        for _ in range(20):
            got[i].append(cluster_refine(*cases[i]))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for i, results in enumerate(got):
        assert len(results) == 20
        assert all(torch.equal(r, want[i]) for r in results)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3, 2, 5, 6), (2, 1, 120, 130), (30, 1, 40, 41)], ids=str)
def test_labels_out_of_range(shape, backend):
    maps, labels = random_case(shape, 4)
    for bad, limit, text in [
        (4, 4, r"^labels: got 4 in image 1, expected values in \[0, 4\)$"),
        (-1, 4, r"^labels: got -1 in image 1, expected values in \[0, 4\)$"),
        (-3, None, r"^labels: got -3 in image 1, expected values >= 0$"),
        (2**62, 4, rf"^labels: got {2**62} in image 1, expected values in \[0, 4\)$"),
        (3, torch.tensor([4, 3, *[4] * (shape[0] - 2)]), r"^labels: got 3 in image 1, expected values in \[0, 3\)$"),
    ]:
        wrong = labels.clone() % 3
        wrong[1, -1, -1] = bad
        with pytest.raises(ValueError, match=text):
            cluster_refine(maps, wrong, 0.5, limit, backend=backend)
        with pytest.raises(ValueError, match=r"^labels: "):
            cluster_refine(maps, wrong, 0.0, limit, backend=backend)
    with pytest.raises(ValueError, match=r"^labels: got \d in image 0, expected values in \[0, 0\)$"):
        cluster_refine(maps, labels, 0.5, 0, backend=backend)


MAPS, LABELS = torch.rand(2, 1, 4, 5), torch.zeros(2, 4, 5, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((MAPS.int(), LABELS), TypeError, "maps: got int32, expected float16, bfloat16, float32, float64"),
        ((MAPS.to(torch.complex64), LABELS), TypeError, "maps: got complex64"),
        ((MAPS.tolist(), LABELS), TypeError, "maps: got list, expected a tensor"),
        ((MAPS[0], LABELS), ValueError, r"maps: got shape \(1, 4, 5\), expected \(B, C, H, W\)"),
        ((MAPS, LABELS.float()), TypeError, "labels: got float32, expected uint8, int32, int64"),
        ((MAPS, LABELS.bool()), TypeError, "labels: got bool"),
        ((MAPS, LABELS.short()), TypeError, "labels: got int16"),
        ((MAPS, LABELS[:, None]), ValueError, r"labels: got shape \(2, 1, 4, 5\), expected \(B, H, W\)"),
        ((MAPS, LABELS[:, :3]), ValueError, r"labels: got shape \(2, 3, 5\), expected \(2, 4, 5\) to fit maps"),
        ((MAPS, LABELS[:1]), ValueError, r"labels: got shape \(1, 4, 5\), expected \(2, 4, 5\)"),
        ((MAPS, LABELS.to("meta")), ValueError, "labels: got a tensor on meta, expected cpu"),
        ((MAPS, LABELS, 1.1), ValueError, r"alpha: got 1.1, expected a number in \[0, 1\]"),
        ((MAPS, LABELS, -1e-9), ValueError, "alpha: got -1e-09"),
        ((MAPS, LABELS, math.nan), ValueError, "alpha: got nan"),
        ((MAPS, LABELS, "0.5"), TypeError, "alpha: got str, expected a number"),
        ((MAPS, LABELS, True), TypeError, "alpha: got bool"),
        ((MAPS, LABELS, 0.5, -1), ValueError, "num_clusters: got -1, expected a number >= 0"),
        ((MAPS, LABELS, 0.5, 2.0), TypeError, "num_clusters: got float, expected an integer"),
        ((MAPS, LABELS, 0.5, True), TypeError, "num_clusters: got bool"),
        ((MAPS, LABELS, 0.5, torch.ones(3, dtype=torch.int64)), ValueError, r"num_clusters: got shape \(3,\)"),
        ((MAPS, LABELS, 0.5, torch.ones(2)), TypeError, "num_clusters: got float32, expected integers"),
        ((MAPS, LABELS, 0.5, torch.tensor([1, -1])), ValueError, "num_clusters: got -1, expected numbers >= 0"),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_arguments(arguments, error, text, backend):
    with pytest.raises(error, match="^" + text):
        cluster_refine(*arguments, backend=backend)


def test_operator_called_directly_stays_inside_its_memory():
    op = torch.ops.molt.cluster_refine
    for arguments in [
        (MAPS[0], LABELS, 0.5, 1, None),
        (MAPS, LABELS[:, :2], 0.5, 1, None),
        (MAPS, LABELS.short(), 0.5, 1, None),
        (MAPS, LABELS, 0.5, -1, torch.tensor([1])),
        (MAPS, LABELS, 0.5, -1, torch.tensor([1, -1])),
        (MAPS, LABELS + 1, 0.5, 1, None),
        (MAPS, LABELS - 1, 0.5, -1, None),
    ]:
        with pytest.raises(RuntimeError, match=r"^(maps|labels|counts|num_clusters): "):
            op(*arguments)


@pytest.mark.parametrize("given", [4, torch.tensor([4, 9])], ids=["one number", "ragged"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients(given, backend):
    maps = torch.rand(2, 2, 3, 5, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 4, (2, 3, 5))

    def call(x):
        return cluster_refine(x, labels, 0.3, given, backend=backend)

    assert torch.autograd.gradcheck(call, maps)
    assert torch.autograd.gradgradcheck(call, maps)


def test_gradient_of_an_expanded_and_strided_map_matches_the_reference():
    labels = torch.randint(0, 4, (3, 10, 11))
    grads = []
    for backend in BACKENDS:
        maps = torch.linspace(0, 1, 2 * 10 * 11).view(1, 2, 10, 11).clone().requires_grad_()
        out = cluster_refine(maps.expand(3, -1, -1, -1), labels, 0.7, 4, backend=backend)
        (out[:, :, ::2, 1:].square().sum()).backward()
        grads.append(maps.grad)
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", [None, torch.tensor([4, 6])], ids=["one number", "ragged"])
def test_opcheck(dtype, counts):
    maps, labels = random_case((2, 3, 6, 7), 4, dtype)
    for index, values in ((labels, maps), (labels.int(), maps.clone(memory_format=torch.channels_last))):
        limit = 4 if counts is None else -1
        values.requires_grad_(dtype == torch.float32)
        torch.library.opcheck(torch.ops.molt.cluster_refine.default, (values, index, 0.5, limit, counts))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_whole_and_once(compiler):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(lambda m, x, k: cluster_refine(m, x, 0.5, k) * 2, fullgraph=True, backend=counter)

    def check(batch, height, num_clusters):
        maps, labels = random_case((batch, 2, height, height + 1), num_clusters)
        maps.requires_grad_()
        out = compiled(maps, labels, num_clusters)
        torch.testing.assert_close(out, cluster_refine(maps, labels, 0.5, num_clusters) * 2)
        (grad,) = torch.autograd.grad(out.square().sum(), maps)
        twin = maps.detach().requires_grad_()
        (want,) = torch.autograd.grad((cluster_refine(twin, labels, 0.5, num_clusters) * 2).square().sum(), twin)
        torch.testing.assert_close(grad, want)

    check(2, 5, 4)
    check(3, 6, 7)
    assert counter.frame_count == 2
    for case in ((4, 9, 8), (5, 20, 300), (9, 7, 3)):
        check(*case)
    assert counter.frame_count == 2, "compiled again after the dynamic graph"
    maps, labels = random_case((3, 2, 6, 7), 4)
    with pytest.raises(RuntimeError, match=r"labels: got 9 in image 2, expected values in \[0, 5\)"):
        compiled(maps, labels.index_fill(0, torch.tensor(2), 9), 5)


@pytest.mark.parametrize("given", [None, torch.tensor([4, 4])], ids=["none", "ragged"])
def test_compiles_with_every_kind_of_limit(given):
    torch._dynamo.reset()
    maps, labels = random_case((2, 2, 6, 7), 4)
    compiled = torch.compile(lambda m, x, k: cluster_refine(m, x, 0.5, k), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(maps, labels, given), cluster_refine(maps, labels, 0.5, 4))


def test_reference_compiles_whole_and_once():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda m, x, k: cluster_refine(m, x, 0.5, k, backend="reference"), fullgraph=True, backend=counter
    )
    for batch, height, num_clusters in ((2, 6, 4), (3, 7, 5), (4, 9, 6), (5, 20, 300)):
        maps, labels = random_case((batch, 2, height, height + 1), num_clusters)
        torch.testing.assert_close(compiled(maps, labels, num_clusters), cluster_refine(maps, labels, 0.5))
    assert counter.frame_count == 2
    with pytest.raises(RuntimeError, match="labels: expected values in"):
        compiled(maps, labels + 1, num_clusters)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda(dtype):
    maps, labels = random_case((2, 3, 50, 51), 6, dtype)
    for given in (6, None, torch.tensor([6, 9]), torch.tensor([6, 9], device="cuda")):
        out = cluster_refine(maps.cuda(), labels.cuda(), 0.3, given).cpu()
        torch.testing.assert_close(out.double(), expected(maps, labels, 0.3), rtol=0, atol=TOLERANCE[dtype])
    wrong = labels.clone()
    wrong[0, 0, 0], wrong[1, 3, 3] = -5, 6
    out = cluster_refine(maps.cuda(), wrong.cuda(), 0.3, 6).cpu()
    inside = ((wrong >= 0) & (wrong < 6))[:, None].expand_as(maps)
    assert torch.equal(out[~inside], maps[~inside])
    want = expected(maps, wrong, 0.3)
    torch.testing.assert_close(out[inside].double(), want[inside], rtol=0, atol=TOLERANCE[dtype])


def test_compiled_region_follows_the_backend(monkeypatch):
    torch._dynamo.reset()
    calls = []
    monkeypatch.setattr(
        "molt.ops.reference.cluster_refine", lambda maps, *_: calls.append(torch.compiler.is_compiling()) or maps * 3
    )
    compiled = torch.compile(lambda m, x: cluster_refine(m, x, 0.5, 4), backend="aot_eager")
    maps, labels = random_case((2, 2, 6, 7), 4)
    native = compiled(maps, labels)
    with molt.backend("reference"):
        assert torch.equal(compiled(maps, labels), maps * 3)
    assert torch.equal(compiled(maps, labels), native)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_keeps_the_dtype(dtype):
    maps, labels = random_case((1, 2, 9, 9), 4, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = cluster_refine(maps, labels, 0.5, 4, backend="native")
    assert out.dtype == dtype
    assert torch.equal(out, cluster_refine(maps, labels, 0.5, 4, backend="native"))


def test_works_in_inference_mode():
    maps, labels = random_case((1, 2, 9, 9), 4)
    with torch.inference_mode():
        out = cluster_refine(maps, labels, 0.5, 4)
    assert torch.equal(out, cluster_refine(maps, labels, 0.5, 4))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("label_dtype", ["uint8", "int32", "int64"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_numpy(dtype, label_dtype, backend):
    maps, labels = random_case((2, 3, 50, 51), 6)
    maps, labels = maps.numpy().astype(dtype), labels.numpy().astype(label_dtype)
    want = cluster_refine(torch.from_numpy(maps), torch.from_numpy(labels), 0.4, 6, backend=backend).numpy()
    for given in (6, None, np.array([6, 7]), np.array([6, 7], np.uint8)):
        out = cluster_refine(maps, labels, 0.4, given, backend=backend)
        assert isinstance(out, np.ndarray)
        assert out.dtype == dtype
        np.testing.assert_array_equal(out, want)
    maps, labels = np.asfortranarray(maps)[::-1, :, 1:, ::-2], np.asfortranarray(labels)[::-1, 1:, ::-2]
    want = cluster_refine(maps.copy(), labels.copy(), 0.4, 6, backend=backend)
    np.testing.assert_array_equal(cluster_refine(maps, labels, 0.4, 6, backend=backend), want)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((MAPS.numpy(), LABELS), TypeError, "labels: got Tensor, expected a NumPy array"),
        ((MAPS, LABELS.numpy()), TypeError, "maps: got Tensor, expected a NumPy array"),
        ((MAPS.int().numpy(), LABELS.numpy()), TypeError, "maps: got (dtype )?int32"),
        ((MAPS.numpy(), LABELS.short().numpy()), TypeError, "labels: got (dtype )?int16"),
        ((MAPS.numpy()[0], LABELS.numpy()), ValueError, r"maps: got shape \(1, 4, 5\)"),
        ((MAPS.numpy(), LABELS.numpy()[:, 1:]), ValueError, r"labels: got shape \(2, 3, 5\)"),
        ((MAPS.numpy(), LABELS.numpy(), 1.5), ValueError, "alpha: got 1.5"),
        ((MAPS.numpy(), LABELS.numpy(), 0.5, -2), ValueError, "num_clusters: got -2"),
        ((MAPS.numpy(), LABELS.numpy(), 0.5, np.array([1.0, 1.0])), TypeError, "num_clusters: got (dtype )?float64"),
        ((MAPS.numpy(), LABELS.numpy(), 0.5, np.array([1])), ValueError, r"num_clusters: got shape \(1,\)"),
        ((MAPS.numpy(), LABELS.numpy(), 0.5, np.array([1, -1])), ValueError, "num_clusters: got -1"),
        (
            (MAPS.numpy(), LABELS.numpy() + 3, 0.5, 3),
            ValueError,
            r"labels: got 3 in image 0, expected values in \[0, 3",
        ),
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_numpy_bad_arguments(arguments, error, text, backend):
    with pytest.raises(error, match="^" + text):
        cluster_refine(*arguments, backend=backend)


def test_numpy_core_releases_the_gil_and_does_not_copy():
    maps = np.zeros((1, 8, 2048, 2048), np.float32)
    labels = np.zeros((1, 2048, 2048), np.uint8)
    maps.flags.writeable = labels.flags.writeable = False
    ticks, done = [0], threading.Event()

    def tick():
        while not done.is_set():
            ticks[0] += 1

    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        before = ticks[0]
        _extension.CPU.module.cluster_refine_numpy(maps, labels, 0.5, 1)
        assert ticks[0] > before + 100
    finally:
        done.set()
        ticker.join()


def test_meta_tensors_and_other_devices_use_the_reference(caplog):
    _backend._say_once.cache_clear()
    maps, labels = MAPS.to("meta"), LABELS.to("meta")
    with caplog.at_level(logging.INFO, "molt"):
        for _ in range(2):
            assert cluster_refine(maps, labels, 0.5, 3).shape == MAPS.shape
    assert [r.getMessage() for r in caplog.records if "cluster_refine" in r.getMessage()] == [
        "cluster_refine uses the PyTorch reference: there is no native kernel for meta tensors, only for cpu and cuda"
    ]
    with pytest.raises(RuntimeError, match="backend 'native' cannot run: there is no native kernel for meta tensors"):
        cluster_refine(maps, labels, 0.5, 3, backend="native")


def test_without_the_extension(monkeypatch, caplog):
    _backend._say_once.cache_clear()
    gone = _extension.Extension("molt._C", None, "molt._C is not there: no compiler")
    monkeypatch.setattr(_extension, "CPU", gone)
    with caplog.at_level(logging.WARNING, "molt"):
        for _ in range(3):
            out = cluster_refine(MAPS, LABELS, 0.5, 1)
    assert torch.equal(out, cluster_refine(MAPS, LABELS, 0.5, 1, backend="reference"))
    assert len(caplog.records) == 1
    assert "molt._C is not there: no compiler; to compile it, install a C++ compiler" in caplog.records[0].getMessage()
    for maps, labels in ((MAPS, LABELS), (MAPS.numpy(), LABELS.numpy())):
        with pytest.raises(RuntimeError, match=r"backend 'native' cannot run: .*no compiler; to compile"):
            cluster_refine(maps, labels, 0.5, 1, backend="native")
    config = molt.config()
    assert config["native"] is False
    assert "no compiler" in config["native_missing"]


def test_backend_choice(monkeypatch):
    used = []
    monkeypatch.setattr("molt.ops.reference.cluster_refine", lambda maps, *_: used.append(1) or maps)
    cluster_refine(MAPS, LABELS)
    assert not used
    with molt.backend("reference"):
        assert molt.config()["backend"] == "reference"
        cluster_refine(MAPS, LABELS)
        assert len(used) == 1
        cluster_refine(MAPS, LABELS, backend="native")
        with molt.backend("native"):
            cluster_refine(MAPS, LABELS)
        assert len(used) == 1
        seen = []
        other = threading.Thread(target=lambda: seen.append(_backend.current()))
        other.start()
        other.join()
        assert seen == [_backend._default]
    assert molt.config()["backend"] == _backend._default
    for call in (lambda: molt.backend("fast").__enter__(), lambda: cluster_refine(MAPS, LABELS, backend="fast")):
        with pytest.raises(ValueError, match="backend: got 'fast', expected one of auto, reference, native"):
            call()
    monkeypatch.setattr(_backend, "_default", "reference")
    cluster_refine(MAPS, LABELS)
    assert len(used) == 2


def test_show_config(capsys):
    molt.show_config()
    text = capsys.readouterr().out
    assert f"molt: {molt.__version__}\n" in text
    assert "native_build.torch_abi_target: 2.10\n" in text
