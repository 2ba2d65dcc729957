#include "sweep.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <new>
#include <stdexcept>

#include "contour_trace.h"
#include "sweep_tree.h"

namespace molt {
namespace {

constexpr int64_t kMaxPixels = int64_t{1} << 30;

// A component between two changes: the cuts first..last.
struct Node {
  Grown grown;
  int32_t first, last;
};

// What one thread works in.
struct Space {
  LevelMap kept, filled;
  GrowthSpace growth;
  std::vector<Node> nodes, holes, outlines;
  std::vector<int32_t> closed;  // the cut at which each dropped component met the frame, and scratch
  std::vector<SweptBox> rows;
};

// The nodes of what is kept, as the cut falls.
struct KeptNodes {
  std::vector<Node>& nodes;
  void close(int32_t node, int32_t level) { nodes[node].first = level; }
  int32_t open(int32_t level, const Grown& grown) {
    nodes.push_back({grown, 0, level - 1});
    return static_cast<int32_t>(nodes.size()) - 1;
  }
};

// The nodes of what is dropped, as the cut rises.
struct DroppedNodes {
  std::vector<Node>& nodes;
  void close(int32_t node, int32_t level) { nodes[node].last = level - 1; }
  int32_t open(int32_t level, const Grown& grown) {
    nodes.push_back({grown, level, static_cast<int32_t>(kCuts) - 1});
    return static_cast<int32_t>(nodes.size()) - 1;
  }
};

void load(const Sweep& job, int64_t map, LevelMap& into) {
  into.shape(job.height, job.width);
  const uint8_t* from = job.levels + map * job.height * job.width;
  for (int64_t y = 0; y < job.height; ++y) {
    std::copy_n(from + y * job.width, job.width, into.level.data() + (y + 1) * into.stride + 1);
  }
  into.sort();
}

template <Grows kind>
void grow(const LevelMap& map, GrowthSpace& space, std::vector<Node>& nodes) {
  nodes.clear();
  KeptNodes visitor{nodes};
  Growth<kind>(map, space).run(visitor);
}

// The holes of `kept` at every cut, and in `filled` the map with all of them filled: a pixel's level there is the
// lowest cut at which the dropped pixels connect it to the frame. At each cut the pixels above that are the outermost
// components without their holes, so that areas add up. False where no cut has a hole; `filled` is then not made.
bool find_holes(const LevelMap& kept, Space& space, bool fill) {
  DroppedNodes visitor{space.holes};
  Growth<Grows::dropped>(kept, space.growth).run(visitor);
  if (space.holes.empty() || !fill) return !space.holes.empty();

  // A component met the frame where it, or the one it went into, did; level 255 is never dropped.
  space.closed.assign(space.growth.grown.size(), kLevels - 1);
  space.closed[0] = 0;
  for (auto merge = space.growth.merges.rbegin(); merge != space.growth.merges.rend(); ++merge) {
    space.closed[merge->lost] = merge->kept == 0 ? merge->level : space.closed[merge->kept];
  }
  LevelMap& filled = space.filled;
  filled.shape(kept.height, kept.width);
  for (int64_t y = 1; y <= kept.height; ++y) {
    const int64_t row = y * kept.stride;
    for (int64_t x = row + 1; x <= row + kept.width; ++x) {
      // What was never dropped has label 0, and keeps its level.
      filled.level[x] = std::max(kept.level[x], static_cast<uint8_t>(space.closed[space.growth.label[x]]));
    }
  }
  filled.sort();
  return true;
}

// Fills `space` with what is kept and its holes, and returns the nodes among which the largest is to be found; either
// only where it is asked for.
const std::vector<Node>& find_nodes(const Sweep& job, int64_t map, Space& space, bool all, bool largest) {
  load(job, map, space.kept);
  space.holes.clear();
  const bool holes = job.contours && find_holes(space.kept, space, largest);
  // Without holes the areas add up in what is kept itself.
  if (all || !holes) {
    if (job.contours && !holes) {
      grow<Grows::enclosed>(space.kept, space.growth, space.nodes);
    } else if (job.diagonal) {
      grow<Grows::pixels8>(space.kept, space.growth, space.nodes);
    } else {
      grow<Grows::pixels4>(space.kept, space.growth, space.nodes);
    }
  }
  if (!holes || !largest) return space.nodes;
  grow<Grows::enclosed>(space.filled, space.growth, space.outlines);
  return space.outlines;
}

struct Edges {
  int32_t left, top, right, bottom;
};

// Of a hole's contour, which runs through the pixels around it, or of a component.
Edges edges(const Grown& grown, bool hole) {
  const int32_t wider = hole ? 1 : 0;
  return {grown.left - 1 - wider, grown.top - 1 - wider, grown.right + wider, grown.bottom + wider};
}

// Contour areas of components, which come by falling last cut. An outermost one has that of its outline, known
// already; the others are followed.
class Areas {
 public:
  Areas(const LevelMap& kept, const std::vector<Node>& outlines, std::vector<int32_t>& of_start)
      : kept_(kept), outlines_(outlines), of_start_(of_start) {
    of_start.assign(kept.level.size(), -1);
  }

  double outer(const Node& node) {
    for (; next_ < outlines_.size() && outlines_[next_].last >= node.last; ++next_) {
      of_start_[outlines_[next_].grown.start] = static_cast<int32_t>(next_);
    }
    const int32_t same = of_start_[node.grown.start];
    if (same >= 0 && outlines_[same].first <= node.last) return static_cast<double>(outlines_[same].grown.size) / 2;
    return traced_area(kept_.level.data(), kept_.stride, node.grown.start, node.last, false);
  }

  double hole(const Node& node) const {
    return traced_area(kept_.level.data(), kept_.stride, node.grown.start - 1, node.last, true);
  }

 private:
  const LevelMap& kept_;
  const std::vector<Node>& outlines_;
  std::vector<int32_t>& of_start_;
  size_t next_ = 0;
};

// By falling last cut, components before holes, then by first pixel.
std::vector<SweptBox> in_order(const std::vector<SweptBox>& rows) {
  std::array<size_t, kCuts + 1> begin{};
  for (const SweptBox& row : rows) ++begin[kCuts - row.last];
  for (int64_t i = 1; i <= kCuts; ++i) begin[i] += begin[i - 1];
  std::vector<SweptBox> sorted(rows.size());
  std::array<size_t, kCuts + 1> next = begin;
  for (const SweptBox& row : rows) sorted[next[kCuts - 1 - row.last]++] = row;
  for (int64_t i = 0; i < kCuts; ++i) {
    std::sort(sorted.begin() + begin[i], sorted.begin() + begin[i + 1], [](const SweptBox& a, const SweptBox& b) {
      return a.hole != b.hole ? b.hole : a.start < b.start;
    });
  }
  return sorted;
}

std::vector<SweptBox> swept(const Sweep& job, int64_t map, Space& space) {
  const std::vector<Node>& outlines = find_nodes(job, map, space, true, true);
  std::vector<SweptBox>& found = space.rows;
  found.clear();
  const auto put = [&](const Node& node, bool hole, double area) {
    const Edges box = edges(node.grown, hole);
    found.push_back({box.left, box.top, box.right, box.bottom, area, node.first, node.last, hole, node.grown.start});
  };
  if (space.holes.empty()) {
    for (const Node& node : space.nodes) put(node, false, static_cast<double>(node.grown.size) / (job.contours ? 2 : 1));
  } else {
    Areas areas(space.kept, outlines, space.closed);
    for (const Node& node : space.nodes) put(node, false, areas.outer(node));
    for (const Node& node : space.holes) put(node, true, areas.hole(node));
  }
  return in_order(found);
}

// For every cut the best of what was put on ranges of cuts: each range is two overlapping ones of a power of two.
template <class Value>
class Best {
 public:
  explicit Best(Value nothing) {
    for (auto& row : table_) row.fill(nothing);
  }
  void put(int32_t first, int32_t last, const Value& value) {
    const int k = log2(last - first + 1);
    raise(table_[k][first], value);
    raise(table_[k][last + 1 - (1 << k)], value);
  }
  const std::array<Value, kLevels>& settle() {
    for (int k = kRows - 1; k > 0; --k) {
      for (int32_t i = 0; i + (1 << k) <= kLevels; ++i) {
        raise(table_[k - 1][i], table_[k][i]);
        raise(table_[k - 1][i + (1 << (k - 1))], table_[k][i]);
      }
    }
    return table_[0];
  }

 private:
  static constexpr int kRows = 8;
  static int log2(int32_t n) {
    int k = 0;
    while (n >> (k + 1)) ++k;
    return k;
  }
  static void raise(Value& value, const Value& other) {
    if (value < other) value = other;
  }
  std::array<std::array<Value, kLevels>, kRows> table_;
};

struct Ranked {
  uint64_t rank;
  int32_t node;
  bool operator<(const Ranked& other) const { return rank < other.rank; }
};

// The largest node at every cut, -1 where there is none.
std::array<int32_t, kCuts> largest_nodes(const std::vector<Node>& nodes, bool contours) {
  Best<Ranked> best({0, -1});
  for (size_t i = 0; i < nodes.size(); ++i) {
    const Grown& grown = nodes[i].grown;
    const auto start = static_cast<uint64_t>(grown.start);
    const uint64_t tie = contours ? start : std::numeric_limits<uint32_t>::max() - start;
    best.put(nodes[i].first, nodes[i].last, {static_cast<uint64_t>(grown.size) << 32 | tie, static_cast<int32_t>(i)});
  }
  const auto& found = best.settle();
  std::array<int32_t, kCuts> which;
  for (int64_t cut = 0; cut < kCuts; ++cut) which[cut] = found[cut].node;
  return which;
}

class Overlap {
 public:
  Overlap(const BoxCurves& job, int64_t map)
      : job_(job), begin_(job.offsets[map]), end_(job.offsets[map + 1]), most_x_(job.sweep.width - 1),
        most_y_(job.sweep.height - 1) {}

  double of(const Edges& box) const {
    const auto right = static_cast<double>(job_.clip ? std::min<int64_t>(box.right, most_x_) : box.right);
    const auto bottom = static_cast<double>(job_.clip ? std::min<int64_t>(box.bottom, most_y_) : box.bottom);
    return of(static_cast<double>(box.left), static_cast<double>(box.top), right, bottom);
  }

  double of(double left, double top, double right, double bottom) const {
    const double e = job_.extra;
    const double area = (right - left + e) * (bottom - top + e);
    double best = 0.0;
    for (int64_t i = begin_; i < end_; ++i) {
      const double* truth = job_.truths + 4 * i;
      const double width = std::min(right, truth[2]) - std::max(left, truth[0]) + e;
      const double height = std::min(bottom, truth[3]) - std::max(top, truth[1]) + e;
      const double both = std::max(0.0, width) * std::max(0.0, height);
      const double all = area + (truth[2] - truth[0] + e) * (truth[3] - truth[1] + e) - both;
      if (all > 0.0) best = std::max(best, both / all);
    }
    return best;
  }

 private:
  const BoxCurves& job_;
  int64_t begin_, end_, most_x_, most_y_;
};

void curves(const BoxCurves& job, int64_t map, Space& space) {
  const std::vector<Node>& outlines =
      find_nodes(job.sweep, map, space, job.any != nullptr, job.largest != nullptr);
  const Overlap overlap(job, map);
  const double nothing = overlap.of(job.empty[0], job.empty[1], job.empty[2], job.empty[3]);
  int64_t peak = kLevels - 1;
  while (peak > 0 && space.kept.begin[peak] == space.kept.begin[peak + 1]) --peak;
  job.peak[map] = peak;
  if (job.any != nullptr) {
    Best<double> best(0.0);
    for (const Node& node : space.nodes) best.put(node.first, node.last, overlap.of(edges(node.grown, false)));
    for (const Node& node : space.holes) best.put(node.first, node.last, overlap.of(edges(node.grown, true)));
    double* any = job.any + map * kCuts;
    std::copy_n(best.settle().begin(), kCuts, any);
    std::fill(any + std::min(peak, kCuts), any + kCuts, nothing);
  }
  if (job.largest != nullptr) {
    const auto which = largest_nodes(outlines, job.sweep.contours);
    double* largest = job.largest + map * kCuts;
    for (int64_t cut = 0; cut < std::min(peak, kCuts); ++cut) {
      const bool same = cut > 0 && which[cut] == which[cut - 1];
      largest[cut] = same ? largest[cut - 1] : overlap.of(edges(outlines[which[cut]].grown, false));
    }
    std::fill(largest + std::min(peak, kCuts), largest + kCuts, nothing);
  }
}

void check(const Sweep& job) {
  if (job.height < 1 || job.width < 1) throw std::invalid_argument("levels: expected maps with at least one pixel");
  if (job.height > kMaxPixels / job.width) throw std::invalid_argument("levels: a map has more than 2^30 pixels");
  if (job.contours && !job.diagonal) throw std::invalid_argument("connectivity: contours have 8 neighbours");
}

// One space a strip of maps: it is as large as a map, and worth keeping.
template <class F>
void for_each_map(int64_t count, const Parallel& parallel, const F& body) {
  const int64_t strips = std::min<int64_t>(count, std::max<int64_t>(parallel.threads, 1) * 4);
  std::atomic<bool> short_of_memory{false};
  parallel.for_each(strips, [&](int64_t strip) {
    try {
      Space space;
      for (int64_t map = strip * count / strips; map < (strip + 1) * count / strips; ++map) body(map, space);
    } catch (const std::bad_alloc&) {
      short_of_memory = true;  // must not leave another thread
    }
  });
  if (short_of_memory) throw std::bad_alloc();
}

}  // namespace

std::vector<std::vector<SweptBox>> sweep_boxes(const Sweep& job, const Parallel& parallel) {
  check(job);
  std::vector<std::vector<SweptBox>> found(job.count);
  for_each_map(job.count, parallel, [&](int64_t map, Space& space) { found[map] = swept(job, map, space); });
  return found;
}

void largest_at_cuts(const Sweep& job, float* boxes, double* area, const Parallel& parallel) {
  check(job);
  for_each_map(job.count, parallel, [&](int64_t map, Space& space) {
    const std::vector<Node>& nodes = find_nodes(job, map, space, false, true);
    const auto which = largest_nodes(nodes, job.contours);
    for (int64_t cut = 0; cut < kCuts; ++cut) {
      float* box = boxes + 4 * (map * kCuts + cut);
      if (which[cut] < 0) {
        std::fill(box, box + 4, 0.0F);
        area[map * kCuts + cut] = 0.0;
        continue;
      }
      const Grown& grown = nodes[which[cut]].grown;
      const Edges own = edges(grown, false);
      box[0] = static_cast<float>(own.left);
      box[1] = static_cast<float>(own.top);
      box[2] = static_cast<float>(own.right);
      box[3] = static_cast<float>(own.bottom);
      area[map * kCuts + cut] = static_cast<double>(grown.size) / (job.contours ? 2 : 1);
    }
  });
}

void box_curves(const BoxCurves& job, const Parallel& parallel) {
  check(job.sweep);
  for_each_map(job.sweep.count, parallel, [&](int64_t map, Space& space) { curves(job, map, space); });
}

}  // namespace molt
