#pragma once

#include <cstdint>
#include <vector>

#include "parallel.h"
#include "types.h"

namespace molt {

// Contiguous maps (maps, height, width) of one scale.
struct Scale {
  const void* maps;
  int64_t height;
  int64_t width;
  double weight;
};

// out: contiguous (maps, height, width).
struct FuseMaps {
  std::vector<Scale> scales;
  MapType map_type;
  int64_t maps;
  int64_t height;
  int64_t width;
  void* out;
  MapType out_type;  // map_type, or what map_type is accumulated in
};

// out = sum over scales of weight * (v - min) / (max - min), v being the scale's map resized bilinearly to
// (height, width), and min and max those of v. A constant v counts as zeros; a map that holds NaN or infinity, or whose
// range does not fit its type, makes its own out NaN.
void fuse_maps(const FuseMaps& job, const Parallel& parallel);

}  // namespace molt
