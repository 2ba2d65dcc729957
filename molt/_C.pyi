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
