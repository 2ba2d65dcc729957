"""cluster_refine: compiled core, plain PyTorch, and torch.compile of the latter. Run with --benchmark-only.

Labels come in blocks of 8 x 8 pixels, as clusters of images do, or at random, the worst case.
"""

import pytest
import torch

from molt.ops import cluster_refine

CASES = [
    ((32, 1, 224, 224), 100, torch.int64, "blocks"),
    ((32, 1, 224, 224), 100, torch.uint8, "blocks"),
    ((32, 1, 224, 224), 100, torch.int64, "random"),
    ((32, 1, 224, 224), 100, torch.uint8, "random"),
    ((1, 1, 448, 448), 5, torch.int64, "blocks"),
    ((1, 1, 448, 448), 5, torch.uint8, "blocks"),
    ((1, 64, 224, 224), 100, torch.int64, "blocks"),
]


def make(shape, num_clusters, label_dtype, kind):
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(shape, generator=generator)
    batch, _, height, width = shape
    step = 8 if kind == "blocks" else 1
    labels = torch.randint(num_clusters, (batch, height // step, width // step), generator=generator)
    labels = labels.repeat_interleave(step, 1).repeat_interleave(step, 2)
    return maps, labels.to(label_dtype)


def native(maps, labels, num_clusters):
    return cluster_refine(maps, labels, 0.5, num_clusters, backend="native")


def reference(maps, labels, num_clusters):
    return cluster_refine(maps, labels, 0.5, num_clusters, backend="reference")


def copy(maps, labels, num_clusters):
    return maps.clone()


@pytest.fixture(params=["native", "reference", "compiled reference", "copy"])
def provider(request):
    if request.param == "compiled reference":
        torch._dynamo.reset()
        return torch.compile(reference, fullgraph=True)
    return {"native": native, "reference": reference, "copy": copy}[request.param]


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{'x'.join(map(str, c[0]))}-k{c[1]}-{str(c[2]).removeprefix('torch.')}-{c[3]}"
)
def test_forward(benchmark, case, provider):
    maps, labels = make(*case)
    benchmark.group = f"cluster_refine {case}"
    benchmark.extra_info.update(torch=torch.__version__, threads=torch.get_num_threads())
    if provider is not copy:
        want = reference(maps, labels, case[1])
        torch.testing.assert_close(provider(maps, labels, case[1]), want, rtol=0, atol=1e-5)
    with torch.inference_mode():
        benchmark.pedantic(provider, (maps, labels, case[1]), rounds=30, warmup_rounds=3)


@pytest.mark.parametrize("provider", ["native", "reference"], indirect=True)
def test_forward_and_backward(benchmark, provider):
    maps, labels = make((32, 1, 224, 224), 100, torch.int64, "blocks")
    maps.requires_grad_()

    def step():
        (grad,) = torch.autograd.grad(provider(maps, labels, 100).sum(), maps)
        return grad

    twin = maps.detach().clone().requires_grad_()
    (want,) = torch.autograd.grad(reference(twin, labels, 100).sum(), twin)
    torch.testing.assert_close(step(), want, rtol=0, atol=1e-5)
    benchmark.pedantic(step, rounds=30, warmup_rounds=3)
