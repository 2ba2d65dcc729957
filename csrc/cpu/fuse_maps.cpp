#include "fuse_maps.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <type_traits>

#include "clones.h"
#include "convert.h"

namespace molt {
namespace {

constexpr int64_t kSmall = 16384;  // output pixels under which threads cost more than they save
constexpr int64_t kLanes = 8;      // running extremes kept side by side, so that the loop vectorises
constexpr int64_t kRows = 32;      // output rows a unit of work where there are few maps

// Where each output coordinate falls in the source: cell, the share of the next node, and which coordinates are the
// first or last of their cell. Exact integers, so that no rounding moves a sample to another cell.
template <class A>
struct Axis {
  Axis(int64_t from, int64_t to) : cell(to), share(to), first(from, -1), last(from, -1) {
    for (int64_t i = 0; i < to; ++i) {
      const int64_t n = std::max<int64_t>(0, (2 * i + 1) * from - to);
      const int64_t at = std::min(n / (2 * to), from - 1);
      cell[i] = static_cast<int32_t>(at);
      share[i] = at == from - 1 ? A{0} : static_cast<A>(static_cast<double>(n - 2 * to * at) / (2.0 * to));
      if (first[at] < 0) first[at] = static_cast<int32_t>(i);
      last[at] = static_cast<int32_t>(i);
    }
    for (int64_t i = 0; i < to; ++i) {
      if (first[cell[i]] != i && last[cell[i]] != i) continue;
      corner_cell.push_back(cell[i]);
      corner_share.push_back(share[i]);
    }
  }
  std::vector<int32_t> cell;
  std::vector<A> share;
  std::vector<int32_t> first;
  std::vector<int32_t> last;
  std::vector<int32_t> corner_cell;
  std::vector<A> corner_share;
};

template <class A>
struct Range {
  A low;
  A high;
};

// One scale of one map, ready for painting: value = clamp((v - low) * factor) * weight.
template <class A>
struct Stretch {
  A gain;
  A low;
  A factor;
  A weight;
};

template <class A>
MOLT_INLINE void across_row(const A* row, const int32_t* cell, const A* share, int64_t n, A* out) {
  for (int64_t x = 0; x < n; ++x) {
    const A left = row[cell[x]];
    out[x] = left + share[x] * (row[cell[x] + 1] - left);
  }
}

// Says whether all samples are finite: differences of finite values can overflow.
template <class A>
MOLT_INLINE bool widen_range(const A* upper, const A* lower, A share, int64_t n, Range<A>* range) {
  A low[kLanes];
  A high[kLanes];
  A odd[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) {
    low[l] = range->low;
    high[l] = range->high;
    odd[l] = 0;
  }
  int64_t x = 0;
  for (; x + kLanes <= n; x += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      const A v = upper[x + l] + share * (lower[x + l] - upper[x + l]);
      low[l] = v < low[l] ? v : low[l];
      high[l] = v > high[l] ? v : high[l];
      odd[l] += v - v;
    }
  }
  for (int64_t l = 0; x < n; ++x, ++l) {
    const A v = upper[x] + share * (lower[x] - upper[x]);
    low[l] = v < low[l] ? v : low[l];
    high[l] = v > high[l] ? v : high[l];
    odd[l] += v - v;
  }
  bool finite = true;
  for (int64_t l = 0; l < kLanes; ++l) {
    range->low = low[l] < range->low ? low[l] : range->low;
    range->high = high[l] > range->high ? high[l] : range->high;
    finite = finite && odd[l] == A{0};
  }
  return finite;
}

template <class A>
MOLT_INLINE bool finite_row(const A* row, int64_t n) {
  int bad = 0;
  for (int64_t x = 0; x < n; ++x) bad |= !(row[x] - row[x] == A{0});
  return bad == 0;
}

// What one output row needs of one scale.
template <class A>
struct RowPart {
  const A* upper;
  const A* lower;
  A share;
  Stretch<A> stretch;
};

template <class A, int N, bool kAdd>
MOLT_INLINE void mix_rows(const RowPart<A>* parts, int64_t n, A* out) {
  for (int64_t x = 0; x < n; ++x) {
    A sum = kAdd ? out[x] : A{0};
    for (int s = 0; s < N; ++s) {
      const A v = parts[s].upper[x] + parts[s].share * (parts[s].lower[x] - parts[s].upper[x]);
      A unit = (v - parts[s].stretch.low) * parts[s].stretch.factor;
      unit = unit > A{0} ? unit : A{0};
      unit = unit < A{1} ? unit : A{1};
      sum += parts[s].stretch.weight * unit;
    }
    out[x] = sum;
  }
}

// target_clones does not take templates, hence one plain function a type.
#define MOLT_FUSE_LOOPS(A)                                                                                    \
  MOLT_CLONES void across(const A* row, const int32_t* cell, const A* share, int64_t n, A* out) {             \
    across_row(row, cell, share, n, out);                                                                     \
  }                                                                                                           \
  MOLT_CLONES bool widen(const A* upper, const A* lower, A share, int64_t n, Range<A>* range) {               \
    return widen_range(upper, lower, share, n, range);                                                        \
  }                                                                                                           \
  MOLT_CLONES bool finite(const A* row, int64_t n) { return finite_row(row, n); }                             \
  MOLT_CLONES void mix1(const RowPart<A>* parts, int64_t n, A* out) { mix_rows<A, 1, false>(parts, n, out); } \
  MOLT_CLONES void mix2(const RowPart<A>* parts, int64_t n, A* out) { mix_rows<A, 2, false>(parts, n, out); } \
  MOLT_CLONES void mix3(const RowPart<A>* parts, int64_t n, A* out) { mix_rows<A, 3, false>(parts, n, out); } \
  MOLT_CLONES void mix_more(const RowPart<A>* parts, int64_t n, A* out) { mix_rows<A, 1, true>(parts, n, out); }
MOLT_FUSE_LOOPS(float)
MOLT_FUSE_LOOPS(double)
#undef MOLT_FUSE_LOOPS

template <class A>
void mix(const std::vector<RowPart<A>>& parts, int64_t n, A* out) {
  const size_t head = std::min<size_t>(parts.size(), 3);
  if (parts.size() == 1) {
    mix1(parts.data(), n, out);
  } else if (head == 2) {
    mix2(parts.data(), n, out);
  } else {
    mix3(parts.data(), n, out);
  }
  for (size_t s = head; s < parts.size(); ++s) mix_more(&parts[s], n, out);
}

template <class T, class Out>
class Fuser {
  using A = Acc<T>;

 public:
  Fuser(const FuseMaps& job, const Parallel& parallel) : job_(job), parallel_(parallel), count_(job.scales.size()) {
    for (const Scale& scale : job.scales) {
      rows_.emplace_back(scale.height, job.height);
      columns_.emplace_back(scale.width, job.width);
    }
  }

  void run() const {
    if (job_.maps >= 4 * parallel_.threads || parallel_.threads == 1) {
      parallel_.for_each(job_.maps, [&](int64_t map) {
        std::vector<Stretch<A>> stretches(count_);
        for (size_t s = 0; s < count_; ++s) stretches[s] = stretch(map, s);
        paint(map, 0, job_.height, stretches);
      });
      return;
    }
    std::vector<Stretch<A>> stretches(job_.maps * count_);
    parallel_.for_each(static_cast<int64_t>(stretches.size()), [&](int64_t unit) {
      stretches[unit] = stretch(unit / static_cast<int64_t>(count_), unit % count_);
    });
    const int64_t blocks = (job_.height + kRows - 1) / kRows;
    parallel_.for_each(job_.maps * blocks, [&](int64_t unit) {
      const int64_t map = unit / blocks;
      const int64_t begin = unit % blocks * kRows;
      const auto own = stretches.begin() + map * count_;
      paint(map, begin, std::min(begin + kRows, job_.height), {own, own + count_});
    });
  }

 private:
  // A source row as numbers to compute with; one more at its end, for the last cell's right neighbour.
  void read(int64_t map, size_t s, int64_t row, A gain, A* to) const {
    const Scale& scale = job_.scales[s];
    const T* from = static_cast<const T*>(scale.maps) + (map * scale.height + row) * scale.width;
    widen_values(from, scale.width, to);
    if (gain != A{1}) {
      for (int64_t x = 0; x < scale.width; ++x) to[x] *= gain;
    }
    to[scale.width] = to[scale.width - 1];
  }

  // Resizing is linear in each axis inside a cell, so extremes lie on the first or last sample of some cell.
  bool measure(int64_t map, size_t s, A gain, Range<A>* range) const {
    const Scale& scale = job_.scales[s];
    const Axis<A>& down = rows_[s];
    const Axis<A>& right = columns_[s];
    const int64_t n = static_cast<int64_t>(right.corner_cell.size());
    std::vector<A> row(scale.width + 1);
    std::vector<A> upper(n);
    std::vector<A> lower(n);
    *range = {std::numeric_limits<A>::infinity(), -std::numeric_limits<A>::infinity()};
    for (int64_t j = 0; j <= scale.height; ++j) {
      if (j < scale.height) {
        read(map, s, j, gain, row.data());
        if (!finite(row.data(), scale.width)) return false;
        across(row.data(), right.corner_cell.data(), right.corner_share.data(), n, lower.data());
      }
      if (j > 0 && down.first[j - 1] >= 0) {
        const int32_t first = down.first[j - 1];
        const int32_t last = down.last[j - 1];
        if (!widen(upper.data(), lower.data(), down.share[first], n, range)) return false;
        if (last != first && !widen(upper.data(), lower.data(), down.share[last], n, range)) return false;
      }
      upper.swap(lower);
      if (j + 1 == scale.height) lower = upper;
    }
    return true;
  }

  Stretch<A> stretch(int64_t map, size_t s) const {
    const A weight = static_cast<A>(job_.scales[s].weight);
    const A nan = std::numeric_limits<A>::quiet_NaN();
    Range<A> range;
    A gain = 1;
    if (!measure(map, s, gain, &range)) return {gain, nan, nan, weight};
    A width = range.high - range.low;
    if (width > A{0} && width < std::numeric_limits<A>::min() * A{16}) {
      // The reciprocal of so small a range would overflow; a power of two changes no bit of the quotient.
      gain = static_cast<A>(std::ldexp(1.0, 64));
      measure(map, s, gain, &range);
      width = range.high - range.low;
    }
    if (!std::isfinite(width)) return {gain, nan, nan, weight};
    if (width == A{0}) return {gain, range.low, A{0}, weight};
    A factor = A{1} / width;
    // The maximum must come out as 1, not as the number below it.
    if (width * factor < A{1}) factor = std::nextafter(factor, std::numeric_limits<A>::infinity());
    return {gain, range.low, factor, weight};
  }

  void paint(int64_t map, int64_t begin, int64_t end, const std::vector<Stretch<A>>& stretches) const {
    Out* out = static_cast<Out*>(job_.out) + map * job_.height * job_.width;
    for (const Stretch<A>& own : stretches) {
      if (own.factor == own.factor) continue;
      std::vector<A> nan(job_.width, own.factor);
      for (int64_t y = begin; y < end; ++y) shorten_values(nan.data(), job_.width, out + y * job_.width);
      return;
    }
    // The two source rows around an output row, resized in x; row j lies in slot j % 2.
    std::vector<A> slots(2 * count_ * job_.width);
    std::vector<int64_t> held(2 * count_, -1);
    std::vector<A> mixed(std::is_same_v<Out, A> ? 0 : job_.width);
    std::vector<RowPart<A>> parts(count_);
    std::vector<A> row;
    for (int64_t y = begin; y < end; ++y) {
      for (size_t s = 0; s < count_; ++s) {
        const Scale& scale = job_.scales[s];
        const int64_t upper = rows_[s].cell[y];
        const int64_t lower = std::min(upper + 1, scale.height - 1);
        for (int64_t j = upper; j <= lower; ++j) {
          const size_t slot = 2 * s + j % 2;
          if (held[slot] == j) continue;
          row.resize(scale.width + 1);
          read(map, s, j, stretches[s].gain, row.data());
          across(row.data(), columns_[s].cell.data(), columns_[s].share.data(), job_.width,
                 slots.data() + slot * job_.width);
          held[slot] = j;
        }
        const A* at = slots.data() + 2 * s * job_.width;
        parts[s] = {at + upper % 2 * job_.width, at + lower % 2 * job_.width, rows_[s].share[y], stretches[s]};
      }
      if constexpr (std::is_same_v<Out, A>) {
        mix(parts, job_.width, out + y * job_.width);
      } else {
        mix(parts, job_.width, mixed.data());
        shorten_values(mixed.data(), job_.width, out + y * job_.width);
      }
    }
  }

  const FuseMaps& job_;
  const Parallel& parallel_;
  size_t count_;
  std::vector<Axis<A>> rows_;
  std::vector<Axis<A>> columns_;
};

template <class T>
void with_out(const FuseMaps& job, const Parallel& parallel) {
  if (job.out_type == job.map_type) return Fuser<T, T>(job, parallel).run();
  if (job.out_type == MapType::float32) return Fuser<T, float>(job, parallel).run();
  throw std::invalid_argument("out: expected the type of maps or float32");
}

}  // namespace

void fuse_maps(const FuseMaps& job, const Parallel& given) {
  if (job.maps == 0 || job.height == 0 || job.width == 0) return;
  Parallel parallel = given;
  if (job.maps * job.height * job.width < kSmall) parallel.threads = 1;
  switch (job.map_type) {
    case MapType::float16:
      return with_out<half>(job, parallel);
    case MapType::bfloat16:
      return with_out<bfloat16>(job, parallel);
    case MapType::float32:
      return Fuser<float, float>(job, parallel).run();
    case MapType::float64:
      return Fuser<double, double>(job, parallel).run();
  }
}

}  // namespace molt
