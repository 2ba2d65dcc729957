#pragma once

#include <cstdint>

#include "parallel.h"
#include "types.h"

namespace molt {

// Contiguous features (batch, points, dims), centres (batch, restarts, clusters, dims), labels (batch, restarts,
// points), score (batch, restarts). Centres and score are float, or double for float64 features.
struct KMeans {
  const void* features;
  MapType type;
  const void* starts;
  int64_t batch;
  int64_t points;
  int64_t dims;
  int64_t restarts;
  int64_t clusters;
  int64_t iterations;
  bool cosine;  // centres are made unit vectors

  int32_t* labels;
  void* centres;
  void* score;
};

// Lloyd's algorithm from given centres: `iterations` rounds of assigning and averaging, then labels and score (the sum
// of 2 x.c - |c|^2 at each point's centre) of the last centres. Of equally near centres the first wins; a cluster
// without a point keeps its centre. The bits do not depend on the batch or on threads.
void kmeans(const KMeans& job, const Parallel& parallel);

}  // namespace molt
