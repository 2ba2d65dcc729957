#pragma once

#include <cstdint>

#include "parallel.h"
#include "types.h"

namespace molt {

// Contiguous images (batch, channels, height, width), at least a pixel and a channel each, at most kMaxPixels; labels
// (batch, height, width), counts (batch).
struct Slic {
  const void* images;
  MapType type;
  int64_t batch;
  int64_t channels;
  int64_t height;
  int64_t width;
  int64_t segments;    // wanted, at least 1
  double compactness;  // above 0
  int64_t iterations;  // at least 1
  bool lab;            // RGB, stretched to [0, 1] and compared in CIELAB
  bool connected;
  double min_size;  // of a segment, as a share of the mean size, where connected
  double max_size;

  int32_t* labels;
  int64_t* counts;
};

// Numbers in a row of the planes that segments are looked for in: padded, so that a row ends in what is no pixel.
int64_t slic_stride(int64_t width);

// SLIC superpixels (Achanta et al., PAMI 2012), numbered in reading order of their first pixels. Of equally near
// centres the first wins; a centre without a pixel stays. Computed in float, sums in double, after values are taken
// relative to the image's lowest. The bits do not depend on the batch or on threads. NaN or infinite values throw.
void slic(const Slic& job, const Parallel& parallel);

// How seeds lie along a side.
struct SlicGrid {
  int64_t first;
  int64_t step;
  int64_t number;
};

// Seeds of an image along its height and width, `wanted` of them as nearly as a square grid of whole steps comes.
void slic_grid(int64_t height, int64_t width, int64_t wanted, SlicGrid* rows, SlicGrid* columns);

// Makes each segment one 4-connected piece of about the mean size `pixels / clusters`, in place; returns their number.
// Pieces are flooded from their first pixels in reading order and cut at `max_size` times the mean. One smaller than
// `min_size` times the mean joins, of the segments before it that it touches, the one whose own piece has the nearest
// mean colour, of equals the first. The first piece, which has none before it, is asked last and may join any.
// `planes` are the colours (channels, height, stride); stride is above width.
int64_t slic_connect(int32_t* labels, int64_t height, int64_t width, int64_t clusters, double min_size,
                     double max_size, const float* planes, int64_t channels, int64_t stride);

// Numbers labels in [0, clusters) anew in reading order; returns how many there are.
int64_t slic_renumber(int32_t* labels, int64_t pixels, int64_t clusters);

}  // namespace molt
