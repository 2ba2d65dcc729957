#pragma once

#include <cstdint>
#include <vector>

#include "parallel.h"
#include "types.h"

namespace molt {

// Contiguous maps (maps, height, width).
struct ComponentBoxes {
  const void* maps;
  MapType map_type;
  int64_t count;
  int64_t height;
  int64_t width;
  double threshold;   // share of each map's maximum, in (0, 1]
  bool diagonal;      // 8 neighbours instead of 4
  bool largest;       // only the largest component of each map
};

struct Component {
  int64_t left, top, right, bottom;  // right and bottom are outside
  int64_t area;
  double mean;
};

// The components of each map, largest first, of equal areas the one met first in reading order. A pixel belongs to one
// where it is positive and at least threshold * maximum; a map that holds NaN has none.
std::vector<std::vector<Component>> component_boxes(const ComponentBoxes& job, const Parallel& parallel);

}  // namespace molt
