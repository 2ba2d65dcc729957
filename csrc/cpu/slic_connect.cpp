#include <algorithm>
#include <cstdint>
#include <vector>

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

// The segment of nearest colour among those next to some pixels.
struct Nearest {
  const int32_t* field;
  int64_t stride;
  int64_t channels;
  const std::vector<double>& colours;
  const std::vector<double>& mean;
  int32_t best = kOutside, last = kOutside;
  double least = 0;

  void begin() { best = last = kOutside; }

  // Looks at the neighbours of a pixel that bear another mark than `own`.
  void look_around(int64_t at, int32_t own) {
    for (const int64_t way : {-stride, int64_t{-1}, int64_t{1}, stride}) {
      const int32_t there = field[at + way];
      if (there >= kOutside || there == own || there == last) continue;
      last = there;
      const double* colour = colours.data() + mark(there) * channels;
      double distance = 0;
      for (int64_t c = 0; c < channels; ++c) distance += (colour[c] - mean[c]) * (colour[c] - mean[c]);
      // Marks fall where segments rise.
      if (best != kOutside && (distance > least || (distance == least && there <= best))) continue;
      best = there;
      least = distance;
    }
  }

  int32_t found() const { return best; }
};

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
                     double max_size, const float* planes, int64_t channels, int64_t stride) {
  const int64_t pixels = height * width;
  const int64_t least = share(min_size, pixels, clusters);
  const int64_t most = std::max<int64_t>(share(max_size, pixels, clusters), 1);
  // A row above and below, and what is left of each row, frame the image, which spares looking for its border.
  Scratch<int32_t> framed(stride * (height + 2));
  Scratch<int32_t> queue(pixels);
  int32_t* field = framed.data();
  std::fill(field, field + stride * (height + 2), kOutside);
  for (int64_t y = 0; y < height; ++y) std::copy_n(labels + y * width, width, field + (y + 1) * stride);

  std::vector<double> colours;  // of each segment's own piece
  std::vector<double> mean(channels);
  Nearest nearest{field, stride, channels, colours, mean};
  int32_t number = 0;
  int64_t first_size = 0;
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t x = 0; x < width; ++x) {
      const int64_t start = (y + 1) * stride + x;
      if (field[start] < 0) continue;
      const int64_t size = flood(field, stride, static_cast<int32_t>(start), mark(number), most, queue.data());
      for (int64_t c = 0; c < channels; ++c) {
        const float* plane = planes + c * height * stride;
        double sum = 0;
        for (int64_t i = 0; i < size; ++i) sum += static_cast<double>(plane[queue[i] - stride]);
        mean[c] = sum / static_cast<double>(size);
      }
      if (size >= least || number == 0) {
        if (number++ == 0) first_size = size;
        colours.insert(colours.end(), mean.begin(), mean.end());
        continue;
      }
      nearest.begin();
      for (int64_t i = 0; i < size; ++i) nearest.look_around(queue[i], mark(number));
      const int32_t joined = nearest.found();
      if (joined == mark(0)) first_size += size;
      for (int64_t i = 0; i < size; ++i) field[queue[i]] = joined;
    }
  }

  int32_t other = -1;  // what the first segment joins
  if (number > 1 && first_size < least) {
    std::copy_n(colours.begin(), channels, mean.begin());
    nearest.begin();
    for (int64_t at = stride; at < stride * (height + 1); ++at) {
      if (field[at] == mark(0)) nearest.look_around(at, mark(0));
    }
    other = mark(nearest.found());
  }
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t x = 0; x < width; ++x) {
      const int32_t label = mark(field[(y + 1) * stride + x]);
      labels[y * width + x] = other < 0 ? label : label == other ? 0 : label - (label > other);
    }
  }
  return number - (other >= 0);
}

}  // namespace molt
