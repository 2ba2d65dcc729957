#pragma once

#include <cstdint>

#include "parallel.h"
#include "types.h"

namespace molt {

// Contiguous arrays: maps and out (batch, channels, pixels), labels (batch, pixels), means (batch, channels, size),
// members (batch, size). Any of out, means and members may be null; out may be maps.
struct Clusters {
  const void* maps;
  const void* labels;
  MapType map_type;
  LabelType label_type;
  int64_t batch;
  int64_t channels;
  int64_t pixels;
  int64_t num_clusters;   // -1: any label >= 0 is right
  const int64_t* counts;  // (batch) or null; replaces num_clusters
  int64_t first_image;    // what messages call the first image

  void* out = nullptr;
  double alpha = 0.5;
  void* means = nullptr;  // float, or double for float64 maps
  int64_t* members = nullptr;
  int64_t size = 0;       // above every label, where means or members are wanted
};

// out = (1 - alpha) * map + alpha * mean of the map over the pixel's cluster; means holds the means, 0 for clusters
// without a pixel, and members the number of pixels.
// The bits of the result depend on nothing but the map, its labels and alpha.
// Throws std::invalid_argument for a label out of range; results are then undefined.
void cluster_refine(const Clusters& job, const Parallel& parallel);

}  // namespace molt
