#include "one_cut.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <new>
#include <stdexcept>
#include <vector>

#include "clones.h"
#include "contour_trace.h"
#include "runs.h"

namespace molt {
namespace {

constexpr int64_t kMaxPixels = int64_t{1} << 30;

// Writes the levels of a row, zeros for NaN; returns the highest, or 256 where one is NaN.
template <class T>
MOLT_INLINE int32_t levels_of(const T* values, int64_t n, uint8_t* to) {
  int32_t high = 0;
  for (int64_t i = 0; i < n; ++i) {
    const bool there = values[i] == values[i];
    const auto level = static_cast<int32_t>((there ? static_cast<double>(values[i]) : 0.0) * 255);
    to[i] = static_cast<uint8_t>(level);
    high = std::max(high, there ? level : 256);
  }
  return high;
}

// target_clones does not take templates.
MOLT_CLONES int32_t levels(const float* values, int64_t n, uint8_t* to) { return levels_of(values, n, to); }
MOLT_CLONES int32_t levels(const double* values, int64_t n, uint8_t* to) { return levels_of(values, n, to); }
MOLT_CLONES void keep(const uint8_t* level, int64_t n, int32_t cut, uint8_t* to) {
  const auto above = static_cast<uint8_t>(cut);
  for (int64_t i = 0; i < n; ++i) to[i] = level[i] > above ? 1 : 0;
}

struct Part {
  int64_t left, top, right, bottom, area;
};

struct Space {
  std::vector<uint8_t> level, kept;
  std::vector<Run> runs;
  std::vector<Part> parts;
  std::vector<int64_t> of_run;
};

template <class T>
void find(const OneCut& job, int64_t map, Space& space, int32_t* box) {
  const int64_t stride = job.width + 2;
  const T* from = static_cast<const T*>(job.maps) + map * job.height * job.width;
  space.level.resize(static_cast<size_t>((job.height + 2) * stride));  // whose frame stays zero
  space.kept.resize(static_cast<size_t>(job.width + 1));
  int32_t peak = 0;
  for (int64_t y = 0; y < job.height; ++y) {
    peak = std::max(peak, levels(from + y * job.width, job.width, space.level.data() + (y + 1) * stride + 1));
  }
  std::fill(box, box + 4, 0);
  if (peak > 255) return;
  const auto cut = static_cast<int32_t>(job.threshold * (job.relative ? peak : 255));
  if (peak <= cut) return;

  std::vector<Run>& runs = space.runs;
  runs.clear();
  size_t above = 0;
  for (int64_t y = 0; y < job.height; ++y) {
    keep(space.level.data() + (y + 1) * stride + 1, job.width, cut, space.kept.data());
    above = add_row(runs, above, space.kept.data(), job.width, y, true);
  }
  std::vector<Part>& parts = space.parts;
  parts.clear();
  space.of_run.resize(runs.size());
  for (size_t i = 0; i < runs.size(); ++i) {
    const Run run = runs[i];
    const int64_t root = root_of(runs, static_cast<int64_t>(i));
    if (root == static_cast<int64_t>(i)) {
      space.of_run[i] = static_cast<int64_t>(parts.size());
      parts.push_back({run.begin, run.row, run.end, run.row + 1, 0});
    } else {
      space.of_run[i] = space.of_run[root];
    }
    Part& own = parts[space.of_run[i]];
    own.left = std::min(own.left, run.begin);
    own.right = std::max(own.right, run.end);
    own.bottom = run.row + 1;
    own.area += run.end - run.begin;
  }
  // Parts come by their first pixel. Of equal areas the first leads, of contours the last: OpenCV lists them backwards.
  const Part* best = nullptr;
  double most = -1.0;
  for (size_t i = 0; i < runs.size(); ++i) {
    if (runs[i].parent != static_cast<int64_t>(i)) continue;
    const Part& part = parts[space.of_run[i]];
    auto area = static_cast<double>(part.area);
    if (job.contours) {
      if (static_cast<double>((part.right - part.left - 1) * (part.bottom - part.top - 1)) < most) continue;
      const int64_t start = (runs[i].row + 1) * stride + runs[i].begin + 1;
      area = traced_area(space.level.data(), stride, start, cut, false);
    }
    if (job.contours ? area >= most : area > most) {
      most = area;
      best = &part;
    }
  }
  box[0] = static_cast<int32_t>(best->left);
  box[1] = static_cast<int32_t>(best->top);
  box[2] = static_cast<int32_t>(best->right);
  box[3] = static_cast<int32_t>(best->bottom);
}

}  // namespace

void largest_at_one_cut(const OneCut& job, int32_t* boxes, const Parallel& parallel) {
  if (job.height < 1 || job.width < 1) throw std::invalid_argument("maps: expected maps with at least one pixel");
  if (job.height > kMaxPixels / job.width) throw std::invalid_argument("maps: a map has more than 2^30 pixels");
  const int64_t strips = std::min<int64_t>(job.count, std::max<int64_t>(parallel.threads, 1));
  std::atomic<bool> short_of_memory{false};
  parallel.for_each(strips, [&](int64_t strip) {
    try {
      Space space;
      for (int64_t map = strip * job.count / strips; map < (strip + 1) * job.count / strips; ++map) {
        if (job.map_type == MapType::float64) {
          find<double>(job, map, space, boxes + 4 * map);
        } else {
          find<float>(job, map, space, boxes + 4 * map);
        }
      }
    } catch (const std::bad_alloc&) {
      short_of_memory = true;  // must not leave another thread
    }
  });
  if (short_of_memory) throw std::bad_alloc();
}

bool count_scores(const double* scores, const uint8_t* mask, int64_t pixels, const double* edges, int64_t bins,
                  int64_t* counts) {
  // Where to begin among the edges, by the first bits of a score: a product with a power of two is exact.
  constexpr int64_t kParts = 4096;
  std::array<int32_t, kParts + 1> begin;
  int32_t at = 0;
  for (int64_t part = 0; part <= kParts; ++part) {
    while (at + 1 < bins && edges[at + 1] <= static_cast<double>(part) / kParts) ++at;
    begin[part] = at;
  }
  // Neighbours often fall into the same bin: in turns into tables of their own, none waits for the other's sum.
  constexpr int64_t kTables = 4;
  std::vector<uint32_t> tables(kTables * 3 * bins, 0);
  std::array<int64_t, 256> row;
  row.fill(2 * bins);
  row[0] = bins;
  row[1] = 0;
  const auto put = [&](int64_t i, uint32_t* table) {
    const double score = scores[i];
    if (!(score >= 0.0 && score <= 1.0)) return false;
    int32_t bin = begin[static_cast<int32_t>(score * kParts)];
    bin += edges[bin + 1] <= score ? 1 : 0;  // mostly all there is to do, and no branch to guess
    while (edges[bin + 1] <= score) ++bin;
    ++table[row[mask[i]] + bin];
    return true;
  };
  uint32_t* own[kTables];
  for (int64_t t = 0; t < kTables; ++t) own[t] = tables.data() + t * 3 * bins;
  int64_t i = 0;
  for (; i + kTables <= pixels; i += kTables) {
    bool inside = true;
    for (int64_t t = 0; t < kTables; ++t) inside = put(i + t, own[t]) && inside;
    if (!inside) return false;
  }
  for (; i < pixels; ++i) {
    if (!put(i, own[0])) return false;
  }
  for (int64_t t = 0; t < kTables; ++t) {
    for (int64_t bin = 0; bin < 2 * bins; ++bin) counts[bin] += own[t][bin];
  }
  return true;
}

}  // namespace molt
