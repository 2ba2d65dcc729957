#pragma once

#include <cstdint>
#include <vector>

#include "parallel.h"

namespace molt {

// Cuts run from 0 to 254: at cut c the pixels with a level above c are kept.
constexpr int64_t kCuts = 255;

// Contiguous maps (count, height, width) of levels.
struct Sweep {
  const uint8_t* levels;
  int64_t count;
  int64_t height;
  int64_t width;
  bool contours;  // OpenCV's outer and hole contours instead of components
  bool diagonal;  // 8 neighbours instead of 4; contours know only 8
};

struct SweptBox {
  int32_t left, top, right, bottom;  // right and bottom are outside
  double area;                       // pixels, or what a contour encloses
  int32_t first, last;               // the cuts at which it exists
  bool hole;
  int64_t start;  // its first pixel in reading order, of the padded map
};

// Every component, or contour, with the cuts over which its pixels stay the same: by descending last cut, outer ones
// before holes, then by first pixel.
std::vector<std::vector<SweptBox>> sweep_boxes(const Sweep& job, const Parallel& parallel);

// The largest at every cut: boxes (count, 255, 4) edges, area (count, 255); zeros where a cut keeps nothing. Of equal
// areas the one first in reading order, for contours the last: OpenCV lists them backwards.
void largest_at_cuts(const Sweep& job, float* boxes, double* area, const Parallel& parallel);

struct BoxCurves {
  Sweep sweep;
  const double* truths;    // (offsets[count], 4) xyxy
  const int64_t* offsets;  // (count + 1), the rows of each map's true boxes
  bool clip;               // right and bottom at most width - 1 and height - 1
  double extra;            // added to every side's length
  double empty[4];         // the box of a cut that keeps nothing
  double* any;             // (count, 255) best IoU of any box with any true box; null where not asked for
  double* largest;         // (count, 255) the same of the largest; null where not asked for
  int64_t* peak;           // (count) highest level
};

void box_curves(const BoxCurves& job, const Parallel& parallel);

}  // namespace molt
