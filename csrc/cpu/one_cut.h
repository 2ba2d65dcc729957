#pragma once

#include <cstdint>

#include "parallel.h"
#include "types.h"

namespace molt {

// Contiguous maps (count, height, width) of float or double in [0, 1]; one that holds NaN counts as zeros.
struct OneCut {
  const void* maps;
  MapType map_type;
  int64_t count;
  int64_t height;
  int64_t width;
  double threshold;  // share of the highest level above which pixels are kept; levels are 255 * map cut off
  bool relative;     // false: share of 255
  bool contours;     // the largest by the area of OpenCV's outer contours instead of by pixels
};

// The box (count, 4) of the largest 8-connected component, right and bottom outside, zeros where nothing is kept: what
// largest_at_cuts finds at this one cut. Contours inside a hole are smaller than what surrounds them.
void largest_at_one_cut(const OneCut& job, int32_t* boxes, const Parallel& parallel);

// Adds to counts (2, bins) how many scores lie in [edges[i], edges[i + 1]): where the mask is 1, and where it is 0.
// Edges, bins + 1 of them, rise from 0 on and end above 1. False where a score is outside [0, 1].
bool count_scores(const double* scores, const uint8_t* mask, int64_t pixels, const double* edges, int64_t bins,
                  int64_t* counts);

}  // namespace molt
