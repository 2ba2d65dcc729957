"""The headline case of every operator, native against reference, under pytest-benchmark. Run with --benchmark-only.

`molt benchmark` runs every case and provider of the same registry.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from molt import benchmark as registry
from molt.benchmark.run import find_truth

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [
    (operation, case) for operation in registry.OPERATIONS.values() for case in operation.cases_on(DEVICE, quick=True)
]


@pytest.mark.parametrize("name", ["reference", "native"])
@pytest.mark.parametrize(("operation", "case"), CASES, ids=[f"{o.name}-{c.name}" for o, c in CASES])
def test_forward(benchmark: Any, operation: registry.Operation, case: registry.Case, name: str) -> None:
    inputs = operation.make(case, torch.Generator(DEVICE).manual_seed(1))
    (chosen,) = (p for p in operation.providers if p.name == name)

    def call() -> Any:
        result = chosen.resolve(case)(*inputs.args, **inputs.kwargs)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return result

    with torch.inference_mode():
        try:
            result = call()
        except registry.NotRun as reason:
            pytest.skip(str(reason))
        # A reference that is too slow to be timed is no less true.
        assert operation.compare(result, find_truth(operation, case, inputs), inputs) <= operation.tolerance[case.dtype]
        benchmark.group = f"{operation.name}, {case.name}"
        benchmark.extra_info.update(torch=torch.__version__, threads=torch.get_num_threads())
        benchmark.pedantic(call, rounds=10, warmup_rounds=1)
