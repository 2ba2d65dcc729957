#include "component_boxes.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "clones.h"
#include "convert.h"
#include "runs.h"

namespace molt {
namespace {

constexpr int64_t kSmall = 16384;  // pixels under which threads cost more than they save
constexpr int64_t kLanes = 8;
constexpr int64_t kMaxSide = int64_t{1} << 30;

// The maximum, or NaN where a value is.
template <class A>
MOLT_INLINE A peak_of(const A* values, int64_t n, A peak) {
  A lanes[kLanes];
  int bad = 0;
  for (int64_t l = 0; l < kLanes; ++l) lanes[l] = peak;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      const A v = values[i + l];
      bad |= v != v;
      lanes[l] = v > lanes[l] ? v : lanes[l];
    }
  }
  for (; i < n; ++i) {
    bad |= values[i] != values[i];
    lanes[0] = values[i] > lanes[0] ? values[i] : lanes[0];
  }
  for (int64_t l = 0; l < kLanes; ++l) peak = lanes[l] > peak ? lanes[l] : peak;
  return bad ? std::numeric_limits<A>::quiet_NaN() : peak;
}

template <class A>
MOLT_INLINE void keep_of(const A* values, int64_t n, A cutoff, uint8_t* keep) {
  for (int64_t i = 0; i < n; ++i) keep[i] = values[i] >= cutoff ? 1 : 0;
}

template <class A>
MOLT_INLINE double sum_of(const A* values, int64_t n) {
  double lanes[4] = {0, 0, 0, 0};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    for (int64_t l = 0; l < 4; ++l) lanes[l] += static_cast<double>(values[i + l]);
  }
  for (int64_t l = 0; i < n; ++i, ++l) lanes[l] += static_cast<double>(values[i]);
  return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

// target_clones does not take templates, hence one plain function a type.
#define MOLT_ROW_LOOPS(A)                                                                                      \
  MOLT_CLONES A peak(const A* values, int64_t n, A so_far) { return peak_of(values, n, so_far); }              \
  MOLT_CLONES void keep(const A* values, int64_t n, A cutoff, uint8_t* to) { keep_of(values, n, cutoff, to); } \
  MOLT_CLONES double sum(const A* values, int64_t n) { return sum_of(values, n); }
MOLT_ROW_LOOPS(float)
MOLT_ROW_LOOPS(double)
#undef MOLT_ROW_LOOPS

template <class T>
class Finder {
  using A = Acc<T>;

 public:
  Finder(const ComponentBoxes& job, int64_t map)
      : job_(job), values_(static_cast<const T*>(job.maps) + map * job.height * job.width), row_(job.width) {}

  std::vector<Component> find() {
    A high = 0;
    for (int64_t y = 0; y < job_.height && high == high; ++y) high = peak(row(y), job_.width, high);
    if (!(high > A{0})) return {};
    // The least value that passes the comparison in double precision.
    const double least = job_.threshold * static_cast<double>(high);
    A cutoff = static_cast<A>(least);
    if (static_cast<double>(cutoff) < least) cutoff = std::nextafter(cutoff, std::numeric_limits<A>::infinity());
    cutoff = std::max(cutoff, std::numeric_limits<A>::denorm_min());
    find_runs(cutoff);
    if (runs_.empty()) return {};  // a threshold above 1, or NaN
    return components();
  }

 private:
  const A* row(int64_t y) {
    if constexpr (std::is_same_v<T, A>) {
      return values_ + y * job_.width;
    } else {
      widen_values(values_ + y * job_.width, job_.width, row_.data());
      return row_.data();
    }
  }

  void find_runs(A cutoff) {
    // One 0 more, so that every run has an end.
    std::vector<uint8_t> kept(job_.width + 1, 0);
    size_t above = 0;  // first run of the row above
    for (int64_t y = 0; y < job_.height; ++y) {
      keep(row(y), job_.width, cutoff, kept.data());
      above = add_row(runs_, above, kept.data(), job_.width, y, job_.diagonal);
    }
  }

  std::vector<Component> components() {
    std::vector<Component> found;
    std::vector<int64_t> of_run(runs_.size());
    for (size_t i = 0; i < runs_.size(); ++i) {
      const Run run = runs_[i];
      const int64_t root = root_of(runs_, static_cast<int64_t>(i));
      if (root == static_cast<int64_t>(i)) {
        of_run[i] = static_cast<int64_t>(found.size());
        found.push_back({run.begin, run.row, run.end, run.row + 1, 0, 0.0});
      } else {
        of_run[i] = of_run[root];
      }
      Component& own = found[of_run[i]];
      own.left = std::min(own.left, run.begin);
      own.right = std::max(own.right, run.end);
      own.bottom = run.row + 1;
      own.area += run.end - run.begin;
    }
    std::vector<int64_t> order(found.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
    const auto larger = [&](int64_t a, int64_t b) { return found[a].area > found[b].area; };
    if (job_.largest) {
      order = {std::min_element(order.begin(), order.end(), larger), order.end()};
      order.resize(1);
    } else {
      std::stable_sort(order.begin(), order.end(), larger);
    }
    std::vector<uint8_t> wanted(found.size(), 0);
    for (const int64_t i : order) wanted[i] = 1;
    int64_t loaded = -1;
    const A* values = nullptr;
    for (size_t i = 0; i < runs_.size(); ++i) {
      if (!wanted[of_run[i]]) continue;
      if (runs_[i].row != loaded) {
        loaded = runs_[i].row;
        values = row(loaded);
      }
      found[of_run[i]].mean += sum(values + runs_[i].begin, runs_[i].end - runs_[i].begin);
    }
    std::vector<Component> sorted;
    sorted.reserve(order.size());
    for (const int64_t i : order) {
      sorted.push_back(found[i]);
      sorted.back().mean /= static_cast<double>(found[i].area);
    }
    return sorted;
  }

  const ComponentBoxes& job_;
  const T* values_;
  std::vector<A> row_;
  std::vector<Run> runs_;
};

template <class T>
std::vector<std::vector<Component>> find_all(const ComponentBoxes& job, const Parallel& parallel) {
  std::vector<std::vector<Component>> found(job.count);
  parallel.for_each(job.count, [&](int64_t map) { found[map] = Finder<T>(job, map).find(); });
  return found;
}

}  // namespace

std::vector<std::vector<Component>> component_boxes(const ComponentBoxes& job, const Parallel& given) {
  if (job.height > kMaxSide || job.width > kMaxSide) throw std::invalid_argument("maps: a side is too long");
  const Parallel parallel = job.count * job.height * job.width < kSmall ? given.alone() : given;
  switch (job.map_type) {
    case MapType::float16:
      return find_all<half>(job, parallel);
    case MapType::bfloat16:
      return find_all<bfloat16>(job, parallel);
    case MapType::float32:
      return find_all<float>(job, parallel);
    case MapType::float64:
      return find_all<double>(job, parallel);
  }
  return {};
}

}  // namespace molt
