#!/usr/bin/env bash
# Builds the wheel once, isolated, and runs that same file on the oldest and the newest torch.
# Downloads torch three times and needs some 20 GB in TMPDIR while it runs, which it frees at the end.
set -euo pipefail

python=${PYTHON:-python3}
oldest=${OLDEST_TORCH:-2.10.0}
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"

echo "== wheel, with build isolation"
MOLT_REQUIRE_EXT=1 "$python" -m pip wheel --quiet --no-cache-dir --no-deps --wheel-dir wheels "$root"
ls -l wheels

cat >check.py <<'PY'
import molt
import torch
from molt.ops import cluster_refine

torch.manual_seed(0)
maps = torch.rand(3, 2, 90, 91, requires_grad=True)
labels = torch.randint(7, (3, 90, 91))
config = molt.config()
assert config["native"], config["native_missing"]
out = cluster_refine(maps, labels, 0.5, 7, backend="native")
torch.testing.assert_close(out, cluster_refine(maps, labels, 0.5, 7, backend="reference"))
(grad,) = torch.autograd.grad(out.sum(), maps)
torch.testing.assert_close(grad, torch.ones_like(grad))
compiled = torch.compile(lambda m, x, k: cluster_refine(m, x, 0.5, k), fullgraph=True, backend="aot_eager")
assert torch.equal(compiled(maps, labels, 7), out)
assert torch.equal(compiled(maps[:2], labels[:2], 8), out[:2])
with molt.backend("reference"):
    assert compiled(maps, labels, 7).grad_fn is not None
    torch.testing.assert_close(compiled(maps, labels, 7), out)
try:
    cluster_refine(maps, labels, 0.5, 3)
except ValueError as error:
    assert "expected values in [0, 3)" in str(error)
else:
    raise AssertionError("a label out of range went through")
torch.library.opcheck(torch.ops.molt.cluster_refine.default, (maps, labels, 0.5, 7))
print("ok: torch", torch.__version__, "runs what", config["native_build"]["torch"], "built")
PY

for wanted in "torch==$oldest" torch; do
  echo "== $wanted"
  rm -rf venv
  "$python" -m venv venv
  venv/bin/pip install --quiet --no-cache-dir "$wanted" numpy scipy
  venv/bin/pip install --quiet --no-deps wheels/*.whl
  env -u PYTHONPATH venv/bin/python -P check.py
done
