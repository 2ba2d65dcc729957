"""What holds for every operator: schemas, compilation, bits, views, messages, and calls that must not crash."""

from __future__ import annotations

import dataclasses
import inspect
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from molt import _extension, ops
from molt.ops import reference
from molt.ops.kmeans import lloyd

BACKENDS = ["reference", "native"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OPERATORS = sorted(name for name in ops.__all__ if not inspect.isclass(getattr(ops, name)))
FLOATS = [name for name in OPERATORS if name != "cluster_vote"]
DYNAMIC = ["component_boxes", "sweep_boxes"]  # how many boxes there are depends on the values
DIFFERENTIABLE = ["cluster_mean", "cluster_refine", "fuse_and_refine", "fuse_maps", "upsample_normalize"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def alone(threads: Callable[[int], None]) -> None:
    """One thread, where tiny tensors would have threads wait for one another."""
    threads(1)


def arguments(name: str, batch: int = 2, dtype: torch.dtype = torch.float32, side: int = 11) -> tuple[Any, ...]:
    """What a user passes, tensors first."""
    maps = [torch.rand(batch, 2, h, w).to(dtype) for h, w in ((5, 6), (14, 4))]
    large = torch.rand(batch, 2, side, side + 2).to(dtype)
    labels = torch.randint(0, 6, (batch, side, side + 2))
    return {
        "upsample_normalize": (maps[0], (side, side + 2)),
        "fuse_maps": (maps, (side, side + 2), [1.0, 2.0]),
        "cluster_mean": (large, labels, 6),
        "cluster_refine": (large, labels, 0.4, 6),
        "fuse_and_refine": (maps, labels, 0.4, 6, [1.0, 2.0]),
        "cluster_vote": (labels, torch.randint(0, 20, labels.shape), 6, 20),
        "component_boxes": (large, 0.6),
        "largest_box": (large, 0.6),
        "kmeans": (torch.randn(batch, side**2, 5).to(dtype), 4),
        "slic": (torch.rand(batch, 3, side, side + 2).to(dtype), 9),
        "sweep_boxes": (large, (0.2, 0.6, 0.95)),
        "largest_at_cuts": (large, (0.2, 0.6, 0.95)),
    }[name]


def raw(name: str, batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """What torch.ops.molt takes."""
    given = arguments(name, batch, dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "upsample_normalize": lambda: (given[0], 11, 13),
        "fuse_maps": lambda: (given[0], 11, 13, [0.25, 0.75]),
        "cluster_mean": lambda: (*given, None),
        "cluster_refine": lambda: (*given, None),
        "fuse_and_refine": lambda: (*given[:2], [0.25, 0.75], 0.4, 6, None),
        "component_boxes": lambda: (*given, 8, False),
        "largest_box": lambda: (*given, 8),
        "kmeans": lambda: (given[0], torch.randn(batch, 3, 4, 5, dtype=wide), 5, True),
        "slic": lambda: (*given, 10.0, 4, True, True, 0.5, 3.0),
        "sweep_boxes": lambda: ((given[0].float() * 255).to(torch.uint8), True, 8),
        "largest_at_cuts": lambda: ((given[0].float() * 255).to(torch.uint8), True, 8),
    }.get(name, lambda: given)()


def tensors(result: Any) -> list[torch.Tensor]:
    """The tensors of a result or of arguments, in order."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(
        result, list | tuple
    ):  # first, as compiled code of torch 2.10 asks no tuple whether it is a dataclass
        return [tensor for part in result for tensor in tensors(part)]
    if dataclasses.is_dataclass(result):
        return [getattr(result, field.name) for field in dataclasses.fields(result)]
    return []


def changed(given: Any, how: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same arguments with other tensors."""
    if isinstance(given, list | tuple):
        return type(given)(changed(part, how) for part in given)
    return how(given) if isinstance(given, torch.Tensor) else given


def same(first: Any, second: Any) -> bool:
    pairs = zip(tensors(first), tensors(second), strict=True)
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in pairs)


def run(name: str, backend: str, given: tuple[Any, ...]) -> list[torch.Tensor]:
    """The public operator; of k-means only what is native, its starts being drawn in plain PyTorch."""
    if name != "kmeans":
        return tensors(getattr(ops, name)(*given, backend=backend))
    starts = given[0][:, None, :8:2].to(torch.float64 if given[0].dtype == torch.float64 else torch.float32)
    return list(lloyd(given[0], starts, 5, cosine=False, backend=backend))


def test_every_operator_has_a_schema_a_fake_and_a_twin() -> None:
    assert len(OPERATORS) == 12
    for name in OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"molt::{name}", "CPU")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"molt::{name}", "Meta")
        assert callable(getattr(reference, name))
        for backend in BACKENDS:
            given = arguments(name)
            for tensor in tensors(given):
                tensor.requires_grad_(tensor.is_floating_point())
            outputs = tensors(getattr(ops, name)(*given, backend=backend))
            assert any(out.requires_grad for out in outputs) == (name in DIFFERENTIABLE)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_opcheck(name: str, dtype: torch.dtype) -> None:
    given = raw(name, 2, dtype)
    for tensor in tensors(given):
        if dtype == torch.float32 and name in DIFFERENTIABLE and tensor.is_floating_point():
            tensor.requires_grad_()
    torch.library.opcheck(getattr(torch.ops.molt, name).default, given)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", OPERATORS)
def test_compiles_whole_and_once(name: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda given: run(name, "native", given), fullgraph=True, backend=counter)
    for batch in (2, 3, 5, 9):
        given = arguments(name, batch)
        assert same(compiled(given), run(name, "native", given))
    assert counter.frame_count == 2, "once for the first batch, once for all others"


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_changes_nothing(name: str, dtype: torch.dtype, backend: str) -> None:
    given = arguments(name, 2, dtype)
    want = run(name, backend, given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run(name, backend, given)
        public = tensors(getattr(ops, name)(*given, backend=backend))
    assert [t.dtype for t in out] == [t.dtype for t in want]
    assert {t.dtype for t in public} <= {t.dtype for t in want}
    if backend == "native":
        assert same(out, want)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("batch", "side"), [(1, 300), (3, 130), (40, 33)])
def test_bits_do_not_depend_on_threads(name: str, dtype: torch.dtype, batch: int, side: int, threads: Callable) -> None:
    given = arguments(name, batch, dtype, min(side, 60) if name == "kmeans" else side)
    results = []
    for number in (1, 2, 3, 7):
        threads(number)
        results.append(getattr(ops, name)(*given, backend="native"))
    assert all(same(results[0], other) for other in results[1:])


@pytest.mark.parametrize("name", [name for name in OPERATORS if name not in DYNAMIC])
@pytest.mark.parametrize(("batch", "side"), [(5, 130), (40, 21)])
def test_bits_do_not_depend_on_the_place_in_the_batch(name: str, batch: int, side: int) -> None:
    given = arguments(name, batch, torch.float32, min(side, 60) if name == "kmeans" else side)
    whole = tensors(getattr(ops, name)(*given, backend="native"))
    order = torch.randperm(batch)
    moved = tensors(getattr(ops, name)(*changed(given, lambda t: t[order]), backend="native"))
    assert all(torch.equal(a[order], b) for a, b in zip(whole, moved, strict=True))
    for i in (0, batch // 2, batch - 1):
        alone = tensors(getattr(ops, name)(*changed(given, lambda t, i=i: t[i : i + 1]), backend="native"))
        assert all(torch.equal(a[i : i + 1], b) for a, b in zip(whole, alone, strict=True))


def laid_out(how: str, tensor: torch.Tensor) -> torch.Tensor:
    """The same values in another layout."""
    if how == "strided":
        wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1] + 1, dtype=tensor.dtype)
        wide[..., 1::2] = tensor
        return wide[..., 1::2]
    if how == "transposed":
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    if how == "batch last":
        return tensor.movedim(0, -1).contiguous().movedim(-1, 0)
    if how == "channels last":
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
    if how == "offset":
        return torch.cat([tensor.flatten()[:1], tensor.flatten()])[1:].view(tensor.shape)
    return tensor[:1].expand(tensor.shape)


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("how", ["strided", "transposed", "batch last", "channels last", "offset", "expanded"])
def test_views(name: str, how: str, backend: str) -> None:
    for batch, dtype in ((3, torch.float32), (9, torch.bfloat16)):
        given = changed(arguments(name, batch, dtype), lambda t: laid_out(how, t))
        plain = changed(given, lambda t: t.clone(memory_format=torch.contiguous_format))
        out, want = (run(name, backend, x) for x in (given, plain))
        for mine, theirs in zip(out, want, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0 if backend == "native" else 1e-2)
        assert same(given, plain), "the input has changed"
        assert not any(t.data_ptr() in {s.data_ptr() for s in tensors(given)} for t in out if t.numel())


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_output_is_left_unwritten(name: str, dtype: torch.dtype) -> None:
    """Blocks of the outputs' sizes, full of NaN or of large numbers, are freed just before the call."""
    given = raw(name, 3, dtype)
    operator = getattr(torch.ops.molt, name)
    want = operator(*given)
    for byte in (0xFF, 0x7B):
        for _ in range(3):
            stale = [torch.full((t.nbytes,), byte, dtype=torch.uint8) for t in tensors(want) for _ in range(8)]
            del stale
            assert same(operator(*given), want)


@pytest.mark.parametrize("name", OPERATORS)
def test_many_python_threads_at_once(name: str) -> None:
    cases = [arguments(name, 2, torch.float32, 40) for _ in range(4)]
    want = [getattr(ops, name)(*case, backend="native") for case in cases]
    matches: list[list[bool]] = [[] for _ in cases]

    def work(i: int) -> None:
        for _ in range(5):
            matches[i].append(same(getattr(ops, name)(*cases[i], backend="native"), want[i]))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(cases))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert matches == [[True] * 5] * 4


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fake_results_are_like_real_ones(name: str, dtype: torch.dtype) -> None:
    given = raw(name, 2, dtype)
    real = tensors(getattr(torch.ops.molt, name)(*given))
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        faked = tensors(getattr(torch.ops.molt, name)(*changed(given, mode.from_tensor)))
    assert [t.dtype for t in faked] == [t.dtype for t in real] and all(t.device.type == "cpu" for t in faked)
    if name in DYNAMIC:
        assert [t.dim() for t in faked] == [t.dim() for t in real]
        return
    assert [tuple(t.shape) for t in faked] == [tuple(t.shape) for t in real]
    assert [t.stride() for t in faked] == [t.stride() for t in real]
    meta = tensors(getattr(torch.ops.molt, name)(*changed(given, lambda t: t.to("meta"))))
    assert [(tuple(t.shape), t.dtype) for t in meta] == [(tuple(t.shape), t.dtype) for t in real]


@pytest.mark.parametrize("name", OPERATORS)
def test_a_named_backend_never_falls_back(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, operator = arguments(name), getattr(ops, name)
    with pytest.raises(ValueError, match="^backend: got 'fast', expected one of auto, reference, native$"):
        operator(*given, backend="fast")
    on_meta = changed(given, lambda t: t.to("meta"))
    with pytest.raises(RuntimeError, match=f"^{name}: backend 'native' cannot run: there is no native kernel for meta"):
        operator(*on_meta, backend="native")
    if name in ("upsample_normalize", "fuse_maps"):
        with pytest.raises(RuntimeError, match=f"^{name}: backend 'native' cannot run: .*order 'normalize_first'"):
            operator(*given, order="normalize_first", backend="native")
        assert operator(*given, order="normalize_first").shape == operator(*given).shape
        with pytest.raises(ValueError, match="^order: got 'first', expected 'resize_first' or 'normalize_first'"):
            operator(*given, order="first")
    want = operator(*given, backend="reference")
    gone = _extension.Extension("molt._C", None, "molt._C is not there: no compiler")
    monkeypatch.setattr(_extension, "CPU", gone)
    with pytest.raises(
        RuntimeError, match=f"^{name}: backend 'native' cannot run: molt._C is not there.*to compile it"
    ):
        operator(*given, backend="native")
    monkeypatch.setattr(torch.ops.molt, name, None)
    assert same(operator(*given), want)


MAPS, LABELS = torch.rand(2, 1, 4, 5), torch.zeros(2, 4, 5, dtype=torch.int64)
LEVELS = (MAPS * 255).to(torch.uint8)
POINTS, STARTS = torch.rand(2, 6, 3), torch.rand(2, 1, 2, 3)
WRONG: dict[str, list[tuple]] = {
    "upsample_normalize": [(MAPS[0], 2, 2), (MAPS.int(), 2, 2), (MAPS, 0, 2), (MAPS, 2, -1), (MAPS[:, :, :0], 2, 2)],
    "fuse_maps": [
        ([], 2, 2, []),
        ([MAPS], 2, 2, []),
        ([MAPS], 2, 2, [0.5, 0.5]),
        ([MAPS, MAPS[:1]], 2, 2, [0.5, 0.5]),
        ([MAPS, MAPS[0]], 2, 2, [0.5, 0.5]),
        ([MAPS, MAPS.double()], 2, 2, [0.5, 0.5]),
        ([MAPS.bool()], 2, 2, [1.0]),
        ([MAPS], 2, 0, [1.0]),
    ],
    "cluster_mean": [
        (MAPS[0], LABELS, 1),
        (MAPS.int(), LABELS, 1),
        (MAPS, LABELS[:, :2], 1),
        (MAPS, LABELS.short(), 1),
        (MAPS, LABELS, -1),
        (MAPS, LABELS + 1, 1),
        (MAPS, LABELS - 1, 1),
        (MAPS, LABELS, 1, torch.tensor([1])),
        (MAPS, LABELS, 1, torch.tensor([1, -1])),
        (MAPS, LABELS, 1, torch.tensor([1, 5])),
        (MAPS, LABELS, 1, torch.tensor([1, 1]).int()),
        (MAPS, LABELS, 2**60),
    ],
    "cluster_refine": [
        (MAPS.bool(), LABELS, 0.5, 1),
        (MAPS[0], LABELS, 0.5, 1),
        (MAPS, LABELS[0], 0.5, 1),
        (MAPS, LABELS.float(), 0.5, 1),
        (MAPS, LABELS + 1, 0.5, 1),
        (MAPS, LABELS, 0.5, -1, torch.tensor([[1, 1]])),
    ],
    "fuse_and_refine": [
        ([], LABELS, [], 0.5, 1),
        ([MAPS], LABELS[0], [1.0], 0.5, 1),
        ([MAPS], LABELS[:1], [1.0], 0.5, 1),
        ([MAPS], LABELS[:, :0], [1.0], 0.5, 1),
        ([MAPS], LABELS.short(), [1.0], 0.5, 1),
        ([MAPS], LABELS + 3, [1.0], 0.5, 3),
        ([MAPS], LABELS - 3, [1.0], 0.5, -1),
        ([MAPS], LABELS, [1.0], 0.5, -1, torch.tensor([1])),
        ([MAPS.half(), MAPS], LABELS, [0.5, 0.5], 0.5, 1),
    ],
    "cluster_vote": [
        (LABELS[0], LABELS[0], 1, 1),
        (LABELS, LABELS[:1], 1, 1),
        (LABELS.float(), LABELS, 1, 1),
        (LABELS, LABELS.short(), 1, 1),
        (LABELS + 1, LABELS, 1, 1),
        (LABELS, LABELS - 1, 1, -1),
        (LABELS, LABELS + 2**40, -1, 1),
    ],
    "component_boxes": [(MAPS[0], 0.5, 8, False), (MAPS.int(), 0.5, 8, True), (MAPS, 0.5, 6, False)],
    "largest_box": [(MAPS[0], 0.5, 8), (MAPS.int(), 0.5, 8), (MAPS, 0.5, 0)],
    "kmeans": [
        (POINTS[0], STARTS, 2, True),
        (POINTS, STARTS[0], 2, True),
        (POINTS, STARTS[:1], 2, True),
        (POINTS, STARTS[..., :2], 2, True),
        (POINTS, STARTS.double(), 2, False),
        (POINTS.double(), STARTS, 2, False),
        (POINTS.int(), STARTS, 2, False),
        (POINTS[:, :0], STARTS, 2, False),
        (POINTS, STARTS[:, :, :0], 2, False),
    ],
    "sweep_boxes": [
        (LEVELS[0], True, 8),
        (MAPS, True, 8),
        (LEVELS, False, 6),
        (LEVELS, True, 4),
        (LEVELS[:, :, :0], True, 8),
    ],
    "largest_at_cuts": [(LEVELS[0], True, 8), (MAPS, True, 8), (LEVELS, False, 0), (LEVELS, True, 4)],
    "slic": [
        (MAPS[0], 2, 10.0, 4, False, True, 0.5, 3.0),
        (MAPS.int(), 2, 10.0, 4, False, True, 0.5, 3.0),
        (MAPS[:, :0], 2, 10.0, 4, False, True, 0.5, 3.0),
        (MAPS[:, :1].expand(-1, 2, -1, -1), 2, 10.0, 4, True, True, 0.5, 3.0),
        (MAPS, 0, 10.0, 4, False, True, 0.5, 3.0),
        (MAPS, 2, 0.0, 4, False, True, 0.5, 3.0),
        (MAPS, 2, 10.0, 0, False, True, 0.5, 3.0),
        (MAPS, 2, 10.0, 4, False, True, -0.5, 3.0),
        (MAPS * torch.nan, 2, 10.0, 4, False, True, 0.5, 3.0),
    ],
}


@pytest.mark.parametrize("name", OPERATORS)
def test_a_wrong_direct_call_raises(name: str) -> None:
    operator = getattr(torch.ops.molt, name)
    takes = len(operator.default._schema.arguments)
    for given in WRONG[name]:
        with pytest.raises(RuntimeError) as raised:
            operator(*given, *[None] * (takes - len(given)))  # without counts
        assert "missing value" not in str(raised.value)
    given = raw(name)
    for one in tensors(given)[1:]:
        with pytest.raises(RuntimeError, match=f"^{name}: got tensors on cpu and meta, expected one device"):
            operator(*changed(given, lambda t, one=one: t.to("meta") if t is one else t))


def test_thresholds_that_nothing_passes() -> None:
    for threshold in (1.5, float("inf"), float("nan")):
        for largest in (False, True):
            assert len(torch.ops.molt.component_boxes(MAPS, threshold, 8, largest)[0]) == 0
        assert not any(out.any() for out in torch.ops.molt.largest_box(MAPS, threshold, 4))
    assert len(torch.ops.molt.component_boxes(MAPS + 1, -1.0, 8, True)[0]) == 2


def test_a_lone_scale_obeys_its_weight() -> None:
    half = torch.ops.molt.fuse_maps([MAPS], 8, 9, [0.5])
    assert torch.equal(half, 0.5 * torch.ops.molt.upsample_normalize(MAPS, 8, 9))


def test_gradients_under_autocast_are_those_without() -> None:
    maps = torch.rand(1, 2, 7, 9, requires_grad=True)
    weight = torch.randn(1, 2, 30, 31)

    def gradient() -> torch.Tensor:
        out = ops.fuse_maps([maps, maps[..., :5]], (30, 31), backend="native")
        return torch.autograd.grad((out * weight).sum(), maps)[0]

    want = gradient()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gradient(), want)


def test_mean_gradients_of_float64_are_float64() -> None:
    values = torch.rand(1, 1, 1, 3, dtype=torch.float64, requires_grad=True)
    means, _ = ops.cluster_mean(values, torch.zeros(1, 1, 3, dtype=torch.int64), 1, backend="native")
    (grad,) = torch.autograd.grad(means.sum(), values)
    assert (grad - 1 / 3).abs().max() < 1e-16
