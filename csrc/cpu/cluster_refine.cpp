#include "cluster_refine.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "clones.h"
#include "half.h"

namespace molt {
namespace {

// The order of every sum: pixel i of a strip goes to lane i % kLanes, lanes are added pairwise, strips from first to
// last. Strips start at multiples of kStrip, so neither threads nor the batch nor the number of clusters matter.
constexpr int64_t kStrip = 8192;
constexpr int64_t kLanes = 8;
constexpr int64_t kSmall = 16384;                   // elements under which threads cost more than they save
constexpr int64_t kMinSparse = 1024;                // widths of label ranges that are never too wide for a table
constexpr int64_t kMaxPixels = int64_t{1} << 30;    // keeps the widest table within an int32 index
constexpr int64_t kMaxPartials = int64_t{1} << 25;  // partial sums kept at once when one image has many threads

// What a map is summed in.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

struct Range {
  int64_t low;
  int64_t high;
  int64_t size() const { return high - low + 1; }
};

template <class L>
MOLT_INLINE Range range_of(const L* labels, int64_t n) {
  L low = labels[0];
  L high = labels[0];
  for (int64_t i = 1; i < n; ++i) {
    low = labels[i] < low ? labels[i] : low;
    high = labels[i] > high ? labels[i] : high;
  }
  return {static_cast<int64_t>(low), static_cast<int64_t>(high)};
}

template <class L>
MOLT_INLINE void narrow_to(const L* labels, int64_t n, int64_t low, int32_t* index) {
  for (int64_t i = 0; i < n; ++i) index[i] = static_cast<int32_t>(static_cast<int64_t>(labels[i]) - low);
}

// Whether kLanes pixels from here share one cluster.
MOLT_INLINE bool uniform(const int32_t* index) {
  static_assert(kLanes == 8);
  uint64_t pair[4];
  std::memcpy(pair, index, sizeof(pair));
  const uint64_t swapped = pair[0] << 32 | pair[0] >> 32;
  return ((pair[0] ^ swapped) | (pair[0] ^ pair[1]) | (pair[0] ^ pair[2]) | (pair[0] ^ pair[3])) == 0;
}

template <class A>
MOLT_INLINE void add_values(const A* values, const int32_t* index, int64_t n, A* table) {
  int64_t i = 0;
  while (i + kLanes <= n) {
    if (!uniform(index + i)) {
      for (int64_t l = 0; l < kLanes; ++l) table[index[i + l] * kLanes + l] += values[i + l];
      i += kLanes;
      continue;
    }
    // A run of one cluster, the usual case: its lanes stay in registers.
    const int32_t first = index[i];
    A* row = table + first * kLanes;
    A lanes[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] = row[l];
    do {
      for (int64_t l = 0; l < kLanes; ++l) lanes[l] += values[i + l];
      i += kLanes;
    } while (i + kLanes <= n && index[i] == first && uniform(index + i));
    for (int64_t l = 0; l < kLanes; ++l) row[l] = lanes[l];
  }
  for (int64_t l = 0; i < n; ++i, ++l) table[index[i] * kLanes + l] += values[i];
}

MOLT_INLINE void add_ones(const int32_t* index, int64_t n, int32_t* table) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    if (uniform(index + i)) {
      table[index[i]] += kLanes;
    } else {
      for (int64_t l = 0; l < kLanes; ++l) ++table[index[i + l]];
    }
  }
  for (; i < n; ++i) ++table[index[i]];
}

template <class A>
MOLT_INLINE void fold_lanes(const A* table, int64_t size, A* sums) {
  for (int64_t k = 0; k < size; ++k) {
    const A* t = table + k * kLanes;
    sums[k] = ((t[0] + t[1]) + (t[2] + t[3])) + ((t[4] + t[5]) + (t[6] + t[7]));
  }
}

template <class A>
MOLT_INLINE void paint_values(const A* values, const int32_t* index, int64_t n, A keep, const A* blend, A* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = keep * values[i] + blend[index[i]];
}

template <class A>
MOLT_INLINE void fill_values(const int32_t* index, int64_t n, const A* blend, A* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = blend[index[i]];
}

// Half-precision maps pass through a small buffer: conversions and look-ups vectorise apart, not together.
constexpr int64_t kBuffer = 512;

// target_clones does not take templates, hence one plain function a type.
#define MOLT_LABEL_LOOPS(L)                                                                   \
  MOLT_CLONES Range range(const L* labels, int64_t n) { return range_of(labels, n); }         \
  MOLT_CLONES void narrow(const L* labels, int64_t n, int64_t low, int32_t* index) {          \
    narrow_to(labels, n, low, index);                                                         \
  }
MOLT_LABEL_LOOPS(uint8_t)
MOLT_LABEL_LOOPS(int32_t)
MOLT_LABEL_LOOPS(int64_t)
#undef MOLT_LABEL_LOOPS

#define MOLT_MAP_LOOPS(A)                                                                              \
  MOLT_CLONES void add(const A* values, const int32_t* index, int64_t n, A* table) {                   \
    add_values(values, index, n, table);                                                               \
  }                                                                                                    \
  MOLT_CLONES void paint(const A* values, const int32_t* index, int64_t n, A keep, const A* b, A* o) { \
    paint_values(values, index, n, keep, b, o);                                                        \
  }                                                                                                    \
  MOLT_CLONES void fill(const int32_t* index, int64_t n, const A* b, A* o) { fill_values(index, n, b, o); }
MOLT_MAP_LOOPS(float)
MOLT_MAP_LOOPS(double)
#undef MOLT_MAP_LOOPS

#define MOLT_HALF_LOOPS(T)                                                                                   \
  MOLT_CLONES void widen(const T* from, int64_t n, float* to) {                                              \
    for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[i]);                                               \
  }                                                                                                          \
  MOLT_CLONES void shorten(const float* from, int64_t n, T* to) {                                            \
    for (int64_t i = 0; i < n; ++i) store(from[i], to + i);                                                  \
  }                                                                                                          \
  void add(const T* values, const int32_t* index, int64_t n, float* table) {                                 \
    float wide[kBuffer];                                                                                     \
    for (int64_t i = 0; i < n; i += kBuffer) {                                                               \
      const int64_t part = std::min(kBuffer, n - i);                                                         \
      widen(values + i, part, wide);                                                                         \
      add(wide, index + i, part, table);                                                                     \
    }                                                                                                        \
  }                                                                                                          \
  void paint(const T* values, const int32_t* index, int64_t n, float keep, const float* blend, T* out) {     \
    float wide[kBuffer];                                                                                     \
    for (int64_t i = 0; i < n; i += kBuffer) {                                                               \
      const int64_t part = std::min(kBuffer, n - i);                                                         \
      widen(values + i, part, wide);                                                                         \
      paint(wide, index + i, part, keep, blend, wide);                                                       \
      shorten(wide, part, out + i);                                                                          \
    }                                                                                                        \
  }                                                                                                          \
  void fill(const int32_t* index, int64_t n, const float* blend, T* out) {                                   \
    float wide[kBuffer];                                                                                     \
    for (int64_t i = 0; i < n; i += kBuffer) {                                                               \
      const int64_t part = std::min(kBuffer, n - i);                                                         \
      fill(index + i, part, blend, wide);                                                                    \
      shorten(wide, part, out + i);                                                                          \
    }                                                                                                        \
  }
MOLT_HALF_LOOPS(half)
MOLT_HALF_LOOPS(bfloat16)
#undef MOLT_HALF_LOOPS

MOLT_CLONES void count(const int32_t* index, int64_t n, int32_t* table) { add_ones(index, n, table); }

template <class T, class L>
class Worker {
  using A = Acc<T>;

 public:
  Worker(const ClusterRefine& job, const Parallel& parallel)
      : job_(job),
        parallel_(parallel),
        maps_(static_cast<const T*>(job.maps)),
        labels_(static_cast<const L*>(job.labels)),
        out_(static_cast<T*>(job.out)),
        strips_((job.pixels + kStrip - 1) / kStrip),
        ranges_(job.batch * strips_) {}

  void run() {
    const bool whole_images = job_.batch >= 4 * parallel_.threads;
    if (whole_images) {
      // Everything in one parallel region: a barrier costs more than the work where cores are busy.
      parallel_.for_each(job_.batch, [&](int64_t image) {
        for (int64_t s = 0; s < strips_; ++s) measure(image, s);
        if (!is_bad(image)) one_image(image);
      });
      check();
      return;
    }
    parallel_.for_each(job_.batch * strips_, [&](int64_t unit) { measure(unit / strips_, unit % strips_); });
    check();
    bool sparse = false;
    for (int64_t image = 0; image < job_.batch; ++image) sparse = sparse || is_sparse(image_range(image));
    if (sparse || job_.alpha == 0.0 || partials() > kMaxPartials) {
      parallel_.for_each(job_.batch, [&](int64_t image) { one_image(image); });
    } else {
      by_strip();
    }
  }

 private:
  int64_t length(int64_t strip) const { return std::min(kStrip, job_.pixels - strip * kStrip); }
  const L* labels(int64_t image, int64_t strip) const { return labels_ + image * job_.pixels + strip * kStrip; }
  int64_t offset(int64_t image, int64_t channel, int64_t strip) const {
    return (image * job_.channels + channel) * job_.pixels + strip * kStrip;
  }
  const Range& strip_range(int64_t image, int64_t strip) const { return ranges_[image * strips_ + strip]; }

  Range image_range(int64_t image) const {
    Range all = strip_range(image, 0);
    for (int64_t s = 1; s < strips_; ++s) {
      all.low = std::min(all.low, strip_range(image, s).low);
      all.high = std::max(all.high, strip_range(image, s).high);
    }
    return all;
  }

  void measure(int64_t image, int64_t strip) {
    ranges_[image * strips_ + strip] = range(labels(image, strip), length(strip));
  }

  int64_t limit(int64_t image) const { return job_.counts != nullptr ? job_.counts[image] : job_.num_clusters; }

  bool is_bad(int64_t image) const {
    const int64_t upper = limit(image);
    const Range all = image_range(image);
    return all.low < 0 || (job_.counts != nullptr && upper < 0) || (upper >= 0 && all.high >= upper);
  }

  void check() const {
    for (int64_t image = 0; image < job_.batch; ++image) {
      if (!is_bad(image)) continue;
      const int64_t upper = limit(image);
      if (job_.counts != nullptr && upper < 0) {
        throw std::invalid_argument("num_clusters: got " + std::to_string(upper) + ", expected numbers >= 0");
      }
      const Range all = image_range(image);
      const std::string expected = upper < 0 ? "values >= 0" : "values in [0, " + std::to_string(upper) + ")";
      throw std::invalid_argument("labels: got " + std::to_string(all.low < 0 ? all.low : all.high) + " in image " +
                                  std::to_string(image) + ", expected " + expected);
    }
  }

  // Labels spread so wide that a table over their range would dwarf the image.
  bool is_sparse(const Range& all) const {
    return all.high - all.low >= std::max(kMinSparse, job_.pixels);
  }

  // The same work on the labels' ranks, which changes no order of summation and so no bit.
  void one_image_by_rank(int64_t image) const {
    const L* from = labels(image, 0);
    std::vector<L> seen(from, from + job_.pixels);
    std::sort(seen.begin(), seen.end());
    seen.erase(std::unique(seen.begin(), seen.end()), seen.end());
    std::vector<int32_t> ranks(job_.pixels);
    for (int64_t i = 0; i < job_.pixels; ++i) {
      ranks[i] = static_cast<int32_t>(std::lower_bound(seen.begin(), seen.end(), from[i]) - seen.begin());
    }
    ClusterRefine dense = job_;
    dense.batch = 1;
    dense.maps = maps_ + offset(image, 0, 0);
    dense.out = out_ + offset(image, 0, 0);
    dense.labels = ranks.data();
    dense.num_clusters = -1;
    dense.counts = nullptr;
    Parallel alone = parallel_;
    alone.threads = 1;
    Worker<T, int32_t>(dense, alone).run();
  }

  // Sums of one strip of one map, for the clusters of the strip's own range.
  void strip_sums(const T* values, const int32_t* index, int64_t n, int64_t size, std::vector<A>& table, A* sums) const {
    table.assign(static_cast<size_t>(size * kLanes), A{0});
    add(values, index, n, table.data());
    fold_lanes(table.data(), size, sums);
  }

  // Turns sums into what is added to every pixel. A cluster without a pixel is never read.
  void finish(A* sums, const int64_t* counts, int64_t size) const {
    const A alpha = static_cast<A>(job_.alpha);
    for (int64_t k = 0; k < size; ++k) {
      const A mean = sums[k] / static_cast<A>(std::max<int64_t>(counts[k], 1));
      sums[k] = job_.alpha == 1.0 ? mean : alpha * mean;
    }
  }

  void paint_strip(int64_t at, const int32_t* index, int64_t n, const A* blend) const {
    if (job_.alpha == 1.0) {
      fill(index, n, blend, out_ + at);
    } else {
      paint(maps_ + at, index, n, static_cast<A>(1.0 - job_.alpha), blend, out_ + at);
    }
  }

  // One image from end to end, while it is in the cache.
  void one_image(int64_t image) const {
    const Range all = image_range(image);
    if (job_.alpha == 0.0) {
      const size_t bytes = static_cast<size_t>(job_.channels * job_.pixels) * sizeof(T);
      std::memcpy(out_ + offset(image, 0, 0), maps_ + offset(image, 0, 0), bytes);
      return;
    }
    if (is_sparse(all)) return one_image_by_rank(image);
    const int64_t size = all.size();
    std::vector<int32_t> index(std::min(kStrip, job_.pixels));
    std::vector<int64_t> counts(size);
    std::vector<int32_t> strip_counts;
    std::vector<A> sums(size * job_.channels);
    std::vector<A> table;
    std::vector<A> partial;
    for (int64_t s = 0; s < strips_; ++s) {
      const Range own = strip_range(image, s);
      const int64_t shift = own.low - all.low;
      const int64_t n = length(s);
      narrow(labels(image, s), n, own.low, index.data());
      strip_counts.assign(own.size(), 0);
      count(index.data(), n, strip_counts.data());
      for (int64_t k = 0; k < own.size(); ++k) counts[shift + k] += strip_counts[k];
      partial.resize(own.size());
      for (int64_t c = 0; c < job_.channels; ++c) {
        strip_sums(maps_ + offset(image, c, s), index.data(), n, own.size(), table, partial.data());
        A* to = sums.data() + c * size + shift;
        for (int64_t k = 0; k < own.size(); ++k) to[k] += partial[k];
      }
    }
    for (int64_t c = 0; c < job_.channels; ++c) finish(sums.data() + c * size, counts.data(), size);
    for (int64_t s = 0; s < strips_; ++s) {
      narrow(labels(image, s), length(s), all.low, index.data());
      for (int64_t c = 0; c < job_.channels; ++c) {
        paint_strip(offset(image, c, s), index.data(), length(s), sums.data() + c * size);
      }
    }
  }

  int64_t partials() const {
    int64_t total = 0;
    for (const Range& own : ranges_) total += own.size();
    return total * job_.channels;
  }

  // Few images: strips and channels of one image go to different threads.
  void by_strip() const {
    const int64_t group = std::min(job_.channels, std::max<int64_t>(8, kSmall / job_.pixels));
    const int64_t groups = (job_.channels + group - 1) / group;
    const int64_t units = job_.batch * groups * strips_;

    std::vector<int64_t> at_strip(ranges_.size() + 1);
    for (size_t i = 0; i < ranges_.size(); ++i) at_strip[i + 1] = at_strip[i] + ranges_[i].size();
    const int64_t total = at_strip.back();
    const std::unique_ptr<A[]> partial(new A[total * job_.channels]);
    std::vector<int32_t> strip_counts(total);

    std::vector<Range> whole(job_.batch);
    std::vector<int64_t> at_image(job_.batch + 1);
    for (int64_t b = 0; b < job_.batch; ++b) {
      whole[b] = image_range(b);
      at_image[b + 1] = at_image[b] + whole[b].size();
    }
    std::vector<int64_t> counts(at_image.back());
    std::vector<A> sums(at_image.back() * job_.channels);

    parallel_.for_each(units, [&](int64_t unit) {
      const int64_t strip = unit % strips_;
      const int64_t first = unit / strips_ % groups * group;
      const int64_t image = unit / strips_ / groups;
      const Range own = strip_range(image, strip);
      const int64_t n = length(strip);
      const int64_t at = at_strip[image * strips_ + strip];
      std::vector<int32_t> index(n);
      std::vector<A> table;
      narrow(labels(image, strip), n, own.low, index.data());
      if (first == 0) count(index.data(), n, strip_counts.data() + at);
      for (int64_t c = first; c < std::min(first + group, job_.channels); ++c) {
        A* to = partial.get() + at * job_.channels + c * own.size();
        strip_sums(maps_ + offset(image, c, strip), index.data(), n, own.size(), table, to);
      }
    });

    parallel_.for_each(job_.batch, [&](int64_t image) {
      const Range all = whole[image];
      int64_t* image_counts = counts.data() + at_image[image];
      A* image_sums = sums.data() + at_image[image] * job_.channels;
      for (int64_t s = 0; s < strips_; ++s) {
        const Range own = strip_range(image, s);
        const int64_t at = at_strip[image * strips_ + s];
        const int64_t shift = own.low - all.low;
        for (int64_t k = 0; k < own.size(); ++k) image_counts[shift + k] += strip_counts[at + k];
        for (int64_t c = 0; c < job_.channels; ++c) {
          const A* from = partial.get() + at * job_.channels + c * own.size();
          A* to = image_sums + c * all.size() + shift;
          for (int64_t k = 0; k < own.size(); ++k) to[k] += from[k];
        }
      }
      for (int64_t c = 0; c < job_.channels; ++c) finish(image_sums + c * all.size(), image_counts, all.size());
    });

    parallel_.for_each(units, [&](int64_t unit) {
      const int64_t strip = unit % strips_;
      const int64_t first = unit / strips_ % groups * group;
      const int64_t image = unit / strips_ / groups;
      const Range all = whole[image];
      const A* image_sums = sums.data() + at_image[image] * job_.channels;
      std::vector<int32_t> index(length(strip));
      narrow(labels(image, strip), length(strip), all.low, index.data());
      for (int64_t c = first; c < std::min(first + group, job_.channels); ++c) {
        paint_strip(offset(image, c, strip), index.data(), length(strip), image_sums + c * all.size());
      }
    });
  }

  const ClusterRefine& job_;
  const Parallel& parallel_;
  const T* maps_;
  const L* labels_;
  T* out_;
  int64_t strips_;
  std::vector<Range> ranges_;
};

template <class T>
void with_labels(const ClusterRefine& job, const Parallel& parallel) {
  switch (job.label_type) {
    case LabelType::uint8:
      return Worker<T, uint8_t>(job, parallel).run();
    case LabelType::int32:
      return Worker<T, int32_t>(job, parallel).run();
    case LabelType::int64:
      return Worker<T, int64_t>(job, parallel).run();
  }
}

}  // namespace

void cluster_refine(const ClusterRefine& job, const Parallel& given) {
  if (job.batch == 0 || job.channels == 0 || job.pixels == 0) return;
  if (job.pixels > kMaxPixels) {
    throw std::invalid_argument("maps: got " + std::to_string(job.pixels) + " pixels a map, expected at most " +
                                std::to_string(kMaxPixels));
  }
  Parallel parallel = given;
  if (job.batch * job.channels * job.pixels < kSmall) parallel.threads = 1;
  switch (job.map_type) {
    case MapType::float16:
      return with_labels<half>(job, parallel);
    case MapType::bfloat16:
      return with_labels<bfloat16>(job, parallel);
    case MapType::float32:
      return with_labels<float>(job, parallel);
    case MapType::float64:
      return with_labels<double>(job, parallel);
  }
}

}  // namespace molt
