#pragma once

#include <cstdint>

#include "parallel.h"
#include "types.h"

namespace molt {

// Contiguous labels, segments and out (batch, pixels); out has the type of labels.
struct ClusterVote {
  const void* labels;
  const void* segments;
  void* out;
  LabelType label_type;
  LabelType segment_type;
  int64_t batch;
  int64_t pixels;
  int64_t num_clusters;  // above every label; -1: any label >= 0 is right
  int64_t num_segments;  // above every segment; likewise
};

// out = the label that most pixels of the pixel's segment have, the lowest of equals.
// Throws std::invalid_argument for a value out of range; out is then undefined.
void cluster_vote(const ClusterVote& job, const Parallel& parallel);

}  // namespace molt
