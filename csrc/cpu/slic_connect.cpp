#include <algorithm>
#include <cstdint>

#include "clones.h"
#include "scratch.h"
#include "slic.h"

namespace molt {
namespace {

constexpr int32_t kOutside = -1;

// What a pixel that has its segment is marked with: below kOutside, so that no cluster is equal to it.
int32_t mark(int32_t segment) { return -2 - segment; }

MOLT_INLINE int64_t flood(int32_t* field, int64_t stride, int32_t start, int32_t marked, int64_t most,
                          int32_t* queue) {
  const int32_t cluster = field[start];
  const int64_t ways[4] = {-stride, -1, 1, stride};
  int64_t found = 1;
  queue[0] = start;
  field[start] = marked;
  for (int64_t next = 0; next < found; ++next) {
    const int32_t at = queue[next];
    for (const int64_t way : ways) {
      const int32_t to = static_cast<int32_t>(at + way);
      if (field[to] != cluster || found == most) continue;
      field[to] = marked;
      queue[found++] = to;
    }
  }
  return found;
}

// A share of the mean size in whole pixels, within what a count can be.
int64_t share(double factor, int64_t pixels, int64_t clusters) {
  const double size = factor * (static_cast<double>(pixels) / static_cast<double>(clusters));
  return size < static_cast<double>(pixels) ? static_cast<int64_t>(size) : pixels;
}

}  // namespace

int64_t slic_renumber(int32_t* labels, int64_t pixels, int64_t clusters) {
  Scratch<int32_t> names(clusters);
  std::fill(names.data(), names.data() + clusters, -1);
  int32_t number = 0;
  for (int64_t i = 0; i < pixels; ++i) {
    int32_t& name = names[labels[i]];
    if (name < 0) name = number++;
    labels[i] = name;
  }
  return number;
}

int64_t slic_connect(int32_t* labels, int64_t height, int64_t width, int64_t clusters, double min_size,
                     double max_size) {
  const int64_t pixels = height * width;
  const int64_t least = share(min_size, pixels, clusters);
  const int64_t most = std::max<int64_t>(share(max_size, pixels, clusters), 1);
  // A frame around the image spares looking for its border.
  const int64_t stride = width + 2;
  Scratch<int32_t> framed(stride * (height + 2));
  Scratch<int32_t> queue(pixels);
  int32_t* field = framed.data();
  std::fill(field, field + stride * (height + 2), kOutside);
  for (int64_t y = 0; y < height; ++y) std::copy_n(labels + y * width, width, field + (y + 1) * stride + 1);

  int32_t number = 0;
  int64_t first_size = 0;
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t x = 0; x < width; ++x) {
      const int64_t at = (y + 1) * stride + x + 1;
      if (field[at] < 0) continue;
      const int64_t size = flood(field, stride, static_cast<int32_t>(at), mark(number), most, queue.data());
      if (size >= least || number == 0) {
        if (number++ == 0) first_size = size;
        continue;
      }
      const int32_t joined = field[x > 0 ? at - 1 : at - stride];
      if (joined == mark(0)) first_size += size;
      for (int64_t i = 0; i < size; ++i) field[queue[i]] = joined;
    }
  }
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t x = 0; x < width; ++x) labels[y * width + x] = mark(field[(y + 1) * stride + x + 1]);
  }
  if (number == 1 || first_size >= least) return number;

  // The first segment had no other to join when it was met.
  for (int64_t i = 0; i < pixels; ++i) {
    const int64_t x = i % width;
    const int32_t other = labels[i];
    if (other == 0) continue;
    const bool touches = (x > 0 && labels[i - 1] == 0) || (x + 1 < width && labels[i + 1] == 0) ||
                         (i >= width && labels[i - width] == 0) || (i + width < pixels && labels[i + width] == 0);
    if (!touches) continue;
    for (int64_t j = 0; j < pixels; ++j) labels[j] = labels[j] == other ? 0 : labels[j] - (labels[j] > other);
    break;
  }
  return number - 1;
}

}  // namespace molt
