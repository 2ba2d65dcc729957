#pragma once

#include <cstdint>

#include "parallel.h"

namespace molt {

enum class MapType { float16, bfloat16, float32, float64 };
enum class LabelType { uint8, int32, int64 };

// Contiguous arrays: maps and out (batch, channels, pixels), labels (batch, pixels).
struct ClusterRefine {
  const void* maps;
  const void* labels;
  void* out;
  MapType map_type;
  LabelType label_type;
  int64_t batch;
  int64_t channels;
  int64_t pixels;
  double alpha;
  int64_t num_clusters;     // -1: any label >= 0 is right
  const int64_t* counts;    // (batch) or null; replaces num_clusters
};

// out = (1 - alpha) * map + alpha * mean of the map over the pixel's cluster.
// The bits of the result depend on nothing but the map, its labels and alpha.
// Throws std::invalid_argument for a label out of range; out is then undefined.
void cluster_refine(const ClusterRefine& job, const Parallel& parallel);

}  // namespace molt
