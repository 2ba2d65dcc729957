#include "fuse_maps.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <type_traits>

#include "clones.h"
#include "convert.h"
#include "pack.h"
#include "scratch.h"

namespace molt {
namespace {

constexpr int64_t kSmall = 16384;  // output pixels under which threads cost more than they save
constexpr int64_t kRows = 32;      // output rows a unit of work where there are few maps

// Where each output coordinate falls in the source: cell, the share of the next node, and which coordinates are the
// first or last of their cell. Exact integers, so that no rounding moves a sample to another cell.
template <class A>
struct Axis {
  Axis(int64_t from, int64_t to)
      : wide(to >= 2 * from), cell(to), share(to + kLanes), first(from, -1), last(from, -1) {
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
  bool wide;  // two and more samples a cell
  std::vector<int32_t> cell;
  std::vector<A> share;  // and zeros, for whole packs
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

// One scale of one map, ready for painting: weight * (v - low) * factor.
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

// The same cell by cell, for cells of many samples: a pack runs over into the next cell, which is written later, and
// at the end over `out`, which must have room for kLanes more.
template <class A>
MOLT_INLINE void along_cells(const A* row, const int32_t* first, const A* share, int64_t cells, int64_t n, A* out) {
  for (int64_t i = 0; i < cells; ++i) {
    const A left = row[i];
    const A way = row[i + 1] - left;
    const int64_t end = i + 1 < cells ? first[i + 1] : n;
    for (int64_t x = first[i]; x < end; x += kLanes) pack(out + x) = left + pack(share + x) * way;
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

// What one output row needs of one scale: the row above, the way from there to the row below, and how much of it.
template <class A>
struct RowPart {
  const A* upper;
  const A* step;
  A share;
};

// Values from their place in the range, (v - low) * factor within [0, 1]. Resized before they are stretched, in the
// arithmetic that found the range, so that 0 and 1 are attained.
template <class A>
MOLT_INLINE void stretch_row(const RowPart<A>& part, A low, A factor, int64_t n, A* out) {
  const A* upper = part.upper;
  const A* step = part.step;
  const A share = part.share;
  int64_t x = 0;
  for (; x + kLanes <= n; x += kLanes) {
    Pack<A> unit = (pack(upper + x) + share * pack(step + x) - low) * factor;
    unit = unit > A{0} ? unit : Pack<A>{};
    pack(out + x) = unit < A{1} ? unit : Pack<A>{} + A{1};
  }
  for (; x < n; ++x) {
    const A unit = (upper[x] + share * step[x] - low) * factor;
    out[x] = unit > A{0} ? (unit < A{1} ? unit : A{1}) : A{0};
  }
}

// The sum over scales whose rows are stretched and weighed already, within [0, most].
template <class A, int N, bool kAdd>
MOLT_INLINE void mix_rows(const RowPart<A>* parts, A most, int64_t n, A* out) {
  // Copies, which out cannot alias.
  RowPart<A> own[N];
  for (int s = 0; s < N; ++s) own[s] = parts[s];
  int64_t x = 0;
  for (; x + kLanes <= n; x += kLanes) {
    Pack<A> sum = kAdd ? pack(out + x) : Pack<A>{};
    for (int s = 0; s < N; ++s) sum += pack(own[s].upper + x) + own[s].share * pack(own[s].step + x);
    sum = sum > A{0} ? sum : Pack<A>{};
    pack(out + x) = sum < most ? sum : Pack<A>{} + most;
  }
  for (; x < n; ++x) {
    A sum = kAdd ? out[x] : A{0};
    for (int s = 0; s < N; ++s) sum += own[s].upper[x] + own[s].share * own[s].step[x];
    out[x] = sum > A{0} ? (sum < most ? sum : most) : A{0};
  }
}

// A node that no sample needs may lie so far outside the range that it would become infinite, and 0 times it NaN.
template <class A>
MOLT_INLINE void weigh_row(A low, A factor, int64_t n, A* row) {
  constexpr A kMost = std::numeric_limits<A>::max() / 4;
  for (int64_t x = 0; x < n; ++x) {
    const A unit = (row[x] - low) * factor;
    row[x] = unit > -kMost ? (unit < kMost ? unit : kMost) : -kMost;
  }
}

template <class A>
MOLT_INLINE void subtract_row(const A* lower, const A* upper, int64_t n, A* step) {
  for (int64_t x = 0; x < n; ++x) step[x] = lower[x] - upper[x];
}

// target_clones does not take templates, hence one plain function a type.
#define MOLT_FUSE_LOOPS(A)                                                                                       \
  MOLT_CLONES void across(const A* row, const int32_t* cell, const A* share, int64_t n, A* out) {                \
    across_row(row, cell, share, n, out);                                                                        \
  }                                                                                                              \
  MOLT_CLONES void along(const A* row, const int32_t* first, const A* share, int64_t cells, int64_t n, A* out) { \
    along_cells(row, first, share, cells, n, out);                                                               \
  }                                                                                                              \
  MOLT_CLONES bool widen(const A* upper, const A* lower, A share, int64_t n, Range<A>* range) {                  \
    return widen_range(upper, lower, share, n, range);                                                           \
  }                                                                                                              \
  MOLT_CLONES bool finite(const A* row, int64_t n) { return finite_row(row, n); }                                \
  MOLT_CLONES void stretch(const RowPart<A>& part, A low, A factor, int64_t n, A* out) {                         \
    stretch_row(part, low, factor, n, out);                                                                      \
  }                                                                                                              \
  MOLT_CLONES void weigh(A low, A factor, int64_t n, A* row) { weigh_row(low, factor, n, row); }                 \
  MOLT_CLONES void subtract(const A* lower, const A* upper, int64_t n, A* step) {                                \
    subtract_row(lower, upper, n, step);                                                                         \
  }                                                                                                              \
  MOLT_CLONES void mix2(const RowPart<A>* parts, A most, int64_t n, A* out) {                                    \
    mix_rows<A, 2, false>(parts, most, n, out);                                                                  \
  }                                                                                                              \
  MOLT_CLONES void mix3(const RowPart<A>* parts, A most, int64_t n, A* out) {                                    \
    mix_rows<A, 3, false>(parts, most, n, out);                                                                  \
  }                                                                                                              \
  MOLT_CLONES void mix_more(const RowPart<A>* parts, A most, int64_t n, A* out) {                                \
    mix_rows<A, 1, true>(parts, most, n, out);                                                                   \
  }
MOLT_FUSE_LOOPS(float)
MOLT_FUSE_LOOPS(double)
#undef MOLT_FUSE_LOOPS

// Of two and more scales.
template <class A>
void mix(const std::vector<RowPart<A>>& parts, A most, int64_t n, A* out) {
  const size_t head = std::min<size_t>(parts.size(), 3);
  if (head == 2) {
    mix2(parts.data(), most, n, out);
  } else {
    mix3(parts.data(), most, n, out);
  }
  for (size_t s = head; s < parts.size(); ++s) mix_more(&parts[s], most, n, out);
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
    Scratch<A> row(scale.width + 1);
    Scratch<A> above(n);
    Scratch<A> below(n);
    A* upper = above.data();
    A* lower = below.data();
    *range = {std::numeric_limits<A>::infinity(), -std::numeric_limits<A>::infinity()};
    for (int64_t j = 0; j <= scale.height; ++j) {
      if (j < scale.height) {
        read(map, s, j, gain, row.data());
        if (!finite(row.data(), scale.width)) return false;
        across(row.data(), right.corner_cell.data(), right.corner_share.data(), n, lower);
      }
      if (j > 0 && down.first[j - 1] >= 0) {
        const int32_t first = down.first[j - 1];
        const int32_t last = down.last[j - 1];
        if (!widen(upper, lower, down.share[first], n, range)) return false;
        if (last != first && !widen(upper, lower, down.share[last], n, range)) return false;
      }
      std::swap(upper, lower);
      if (j + 1 == scale.height) std::copy_n(upper, n, lower);
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
    const bool alone = count_ == 1;
    A most = 0;
    for (const Stretch<A>& own : stretches) most += own.weight;
    // The two source rows around an output row, resized in x: row j lies in slot j % 2, the way between them in slot 2.
    const int64_t width = job_.width;
    const int64_t pitch = width + kLanes;
    Scratch<A> slots(3 * static_cast<int64_t>(count_) * pitch);
    std::vector<int64_t> held(2 * count_, -1);
    std::vector<int64_t> between(count_, -1);
    Scratch<A> mixed(std::is_same_v<Out, A> ? 0 : width);
    std::vector<RowPart<A>> parts(count_);
    int64_t widest = 0;
    for (const Scale& scale : job_.scales) widest = std::max(widest, scale.width);
    Scratch<A> row(widest + 1);
    for (int64_t y = begin; y < end; ++y) {
      for (size_t s = 0; s < count_; ++s) {
        const Stretch<A>& own = stretches[s];
        A* slot = slots.data() + 3 * s * pitch;
        const int64_t upper = rows_[s].cell[y];
        const int64_t lower = std::min(upper + 1, job_.scales[s].height - 1);
        if (between[s] != upper) {
          for (int64_t j = upper; j <= lower; ++j) {
            if (held[2 * s + j % 2] == j) continue;
            held[2 * s + j % 2] = j;
            read(map, s, j, own.gain, row.data());
            A* to = slot + j % 2 * pitch;
            if (!alone) weigh(own.low, own.factor * own.weight, job_.scales[s].width + 1, row.data());
            const Axis<A>& right = columns_[s];
            if (right.wide) {
              along(row.data(), right.first.data(), right.share.data(), job_.scales[s].width, width, to);
            } else {
              across(row.data(), right.cell.data(), right.share.data(), width, to);
            }
          }
          subtract(slot + lower % 2 * pitch, slot + upper % 2 * pitch, width, slot + 2 * pitch);
          between[s] = upper;
        }
        parts[s] = {slot + upper % 2 * pitch, slot + 2 * pitch, rows_[s].share[y]};
      }
      A* to = mixed.data();
      if constexpr (std::is_same_v<Out, A>) to = out + y * width;
      if (alone) {
        molt::stretch(parts[0], stretches[0].low, stretches[0].factor, width, to);
        if (most != A{1}) std::transform(to, to + width, to, [most](A unit) { return most * unit; });
      } else {
        mix(parts, most, width, to);
      }
      if constexpr (!std::is_same_v<Out, A>) shorten_values(mixed.data(), width, out + y * width);
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
