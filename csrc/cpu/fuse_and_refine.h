#pragma once

#include "cluster_refine.h"
#include "fuse_maps.h"

namespace molt {

// fuse_maps, then cluster_refine of the result, into fuse.out. The fused maps stay in single precision (double for
// float64) in between, and in the cache while an image is worked on. Of `clusters`, maps, out, map_type and pixels are
// not read.
void fuse_and_refine(const FuseMaps& fuse, const Clusters& clusters, const Parallel& parallel);

}  // namespace molt
