from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

def build_config() -> dict[str, Any]: ...
def cluster_refine_numpy(
    maps: NDArray[np.floating[Any]],
    labels: NDArray[np.integer[Any]],
    alpha: float = 0.5,
    num_clusters: int | NDArray[np.integer[Any]] | None = None,
) -> NDArray[np.floating[Any]]: ...
def box_curves_numpy(
    levels: NDArray[np.uint8],
    truths: NDArray[np.float64],
    offsets: NDArray[np.int64],
    contours: bool = True,
    clip: bool = True,
    extra: float = 1.0,
    empty: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
    any: bool = True,
    largest: bool = True,
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]: ...
