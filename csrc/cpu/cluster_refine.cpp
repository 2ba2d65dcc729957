#include "cluster_refine.h"

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "cluster_loops.h"
#include "scratch.h"

namespace molt {
namespace {

constexpr int64_t kSmall = 16384;                   // elements under which threads cost more than they save
constexpr int64_t kMaxPartials = int64_t{1} << 25;  // partial sums kept at once when one image has many threads

template <class T, class L>
class Worker {
  using A = Acc<T>;

 public:
  Worker(const Clusters& job, const Parallel& parallel)
      : job_(job),
        parallel_(parallel),
        maps_(static_cast<const T*>(job.maps)),
        labels_(static_cast<const L*>(job.labels)),
        out_(static_cast<T*>(job.out)),
        strips_((job.pixels + kStrip - 1) / kStrip),
        far_(kCanStream && job.out != job.maps &&
             job.batch * job.channels * job.pixels * static_cast<int64_t>(sizeof(T)) > kFarBytes),
        ranges_(job.batch * strips_) {}

  void run() {
    const bool whole_images = job_.batch >= 4 * parallel_.threads || parallel_.threads == 1;
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
    if (sparse || copies() || partials() > kMaxPartials) {
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
  bool means_wanted() const { return job_.means != nullptr || job_.members != nullptr; }
  bool copies() const { return job_.alpha == 0.0 && !means_wanted(); }

  Range image_range(int64_t image) const {
    Range all = ranges_[image * strips_];
    for (int64_t s = 1; s < strips_; ++s) {
      all.low = std::min(all.low, ranges_[image * strips_ + s].low);
      all.high = std::max(all.high, ranges_[image * strips_ + s].high);
    }
    return all;
  }

  void measure(int64_t image, int64_t strip) {
    ranges_[image * strips_ + strip] = bounds(labels(image, strip), length(strip), limit(image));
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
      throw std::invalid_argument(out_of_range("labels", job_.first_image + image, image_range(image), upper));
    }
  }

  // Labels spread so wide that a table over their range would dwarf the image, unless such a table is the result.
  bool is_sparse(const Range& all) const {
    return !means_wanted() && all.high - all.low >= std::max(kNarrow, job_.pixels);
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
    Clusters dense = job_;
    dense.batch = 1;
    dense.maps = maps_ + offset(image, 0, 0);
    dense.out = out_ + offset(image, 0, 0);
    dense.labels = ranks.data();
    dense.num_clusters = -1;
    dense.counts = nullptr;
    Worker<T, int32_t>(dense, parallel_.alone()).run();
  }

  // Adds the sums of one strip of one map to sums, and its pixels to counts, which may be null.
  template <class I>
  void add_strip(const T* values, const I* index, int64_t n, int64_t size, Scratch<A>& table, A* sums,
                 int32_t* counts) const {
    table.zero();
    add(values, index, n, table.data(), counts);
    fold(table.data(), size, sums);
  }

  // Turns sums into means, hands these out, and then into what is added to every pixel.
  void finish(int64_t image, int64_t channel, A* sums, const int32_t* counts, const Range& all) const {
    const A alpha = static_cast<A>(job_.alpha);
    const int64_t size = all.size();
    for (int64_t k = 0; k < size; ++k) sums[k] /= static_cast<A>(std::max(counts[k], 1));
    if (job_.means != nullptr) {
      A* row = static_cast<A*>(job_.means) + (image * job_.channels + channel) * job_.size;
      std::fill(row, row + job_.size, A{0});
      // Clusters without a pixel may lie beyond what was asked for.
      std::copy(sums, sums + std::min(size, job_.size - all.low), row + all.low);
    }
    if (job_.alpha != 1.0) {
      for (int64_t k = 0; k < size; ++k) sums[k] = alpha * sums[k];
    }
  }

  void hand_out(int64_t image, const int32_t* counts, const Range& all) const {
    if (job_.members == nullptr) return;
    int64_t* row = job_.members + image * job_.size;
    std::fill(row, row + job_.size, 0);
    std::copy(counts, counts + std::min(all.size(), job_.size - all.low), row + all.low);
  }

  template <class I>
  void paint_strip(int64_t at, const I* index, int64_t n, const A* blend) const {
    if (job_.alpha == 1.0) {
      fill(index, n, blend, out_ + at);
      return;
    }
    if constexpr (std::is_same_v<T, float>) {
      if (far_ && reinterpret_cast<uintptr_t>(out_ + at) % 16 == 0) {
        paint_far(maps_ + at, index, n, static_cast<A>(1.0 - job_.alpha), blend, out_ + at);
        return;
      }
    }
    paint(maps_ + at, index, n, static_cast<A>(1.0 - job_.alpha), blend, out_ + at);
  }

  // The labels of an image as indices.
  template <class I>
  const I* indices(int64_t image, int64_t strip, int64_t n, int64_t low, Scratch<I>& buffer) const {
    if constexpr (std::is_same_v<I, L>) {
      if (low == 0) return labels(image, strip);
    }
    narrow(labels(image, strip), n, low, buffer.data());
    return buffer.data();
  }

  void one_image(int64_t image) const {
    const Range all = image_range(image);
    if (copies()) {
      const size_t bytes = static_cast<size_t>(job_.channels * job_.pixels) * sizeof(T);
      if (maps_ != out_) std::memcpy(out_ + offset(image, 0, 0), maps_ + offset(image, 0, 0), bytes);
      return;
    }
    if (is_sparse(all)) return one_image_by_rank(image);
    if (all.high < 256) return one_image<uint8_t>(image, {0, all.high});
    if (all.size() <= 256) return one_image<uint8_t>(image, all);
    one_image<int32_t>(image, all);
  }

  // One image from end to end, while it is in the cache.
  template <class I>
  void one_image(int64_t image, const Range& all) const {
    const int64_t size = all.size();
    const bool as_is = std::is_same_v<I, L> && all.low == 0;
    Scratch<I> buffer(as_is ? 0 : job_.pixels);
    Scratch<int32_t> counts(size);
    Scratch<A> sums(size * job_.channels);
    Scratch<A> table(size * kLanes);
    counts.zero();
    sums.zero();
    const I* index = indices(image, 0, job_.pixels, all.low, buffer);
    for (int64_t s = 0; s < strips_; ++s) {
      for (int64_t c = 0; c < job_.channels; ++c) {
        add_strip(maps_ + offset(image, c, s), index + s * kStrip, length(s), size, table, sums.data() + c * size,
                  c == 0 ? counts.data() : nullptr);
      }
    }
    hand_out(image, counts.data(), all);
    for (int64_t c = 0; c < job_.channels; ++c) finish(image, c, sums.data() + c * size, counts.data(), all);
    if (out_ == nullptr) return;
    for (int64_t c = 0; c < job_.channels; ++c) {
      for (int64_t s = 0; s < strips_; ++s) {
        paint_strip(offset(image, c, s), index + s * kStrip, length(s), sums.data() + c * size);
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
    const std::unique_ptr<A[]> partial(new A[total * job_.channels]());
    std::vector<int32_t> strip_counts(total);

    std::vector<Range> whole(job_.batch);
    std::vector<int64_t> at_image(job_.batch + 1);
    for (int64_t b = 0; b < job_.batch; ++b) {
      whole[b] = image_range(b);
      at_image[b + 1] = at_image[b] + whole[b].size();
    }
    std::vector<int32_t> counts(at_image.back());
    std::vector<A> sums(at_image.back() * job_.channels);

    const auto sum = [&](auto type, int64_t image, int64_t first, int64_t strip) {
      const int64_t at = at_strip[image * strips_ + strip];
      const Range own = ranges_[image * strips_ + strip];
      const int64_t n = length(strip);
      Scratch<decltype(type)> buffer(n);
      Scratch<A> table(own.size() * kLanes);
      const auto* index = indices(image, strip, n, own.low, buffer);
      for (int64_t c = first; c < std::min(first + group, job_.channels); ++c) {
        A* to = partial.get() + at * job_.channels + c * own.size();
        add_strip(maps_ + offset(image, c, strip), index, n, own.size(), table, to,
                  c == 0 ? strip_counts.data() + at : nullptr);
      }
    };
    parallel_.for_each(units, [&](int64_t unit) {
      const int64_t strip = unit % strips_;
      const int64_t first = unit / strips_ % groups * group;
      const int64_t image = unit / strips_ / groups;
      if (ranges_[image * strips_ + strip].size() <= 256) {
        sum(uint8_t{}, image, first, strip);
      } else {
        sum(int32_t{}, image, first, strip);
      }
    });

    parallel_.for_each(job_.batch, [&](int64_t image) {
      const Range all = whole[image];
      int32_t* image_counts = counts.data() + at_image[image];
      A* image_sums = sums.data() + at_image[image] * job_.channels;
      for (int64_t s = 0; s < strips_; ++s) {
        const Range own = ranges_[image * strips_ + s];
        const int64_t at = at_strip[image * strips_ + s];
        const int64_t shift = own.low - all.low;
        for (int64_t k = 0; k < own.size(); ++k) image_counts[shift + k] += strip_counts[at + k];
        for (int64_t c = 0; c < job_.channels; ++c) {
          const A* from = partial.get() + at * job_.channels + c * own.size();
          A* to = image_sums + c * all.size() + shift;
          for (int64_t k = 0; k < own.size(); ++k) to[k] += from[k];
        }
      }
      hand_out(image, image_counts, all);
      for (int64_t c = 0; c < job_.channels; ++c) finish(image, c, image_sums + c * all.size(), image_counts, all);
    });
    if (out_ == nullptr) return;

    const auto blend = [&](auto type, int64_t image, int64_t first, int64_t strip) {
      const Range all = whole[image];
      const A* image_sums = sums.data() + at_image[image] * job_.channels;
      Scratch<decltype(type)> buffer(length(strip));
      const auto* index = indices(image, strip, length(strip), all.low, buffer);
      for (int64_t c = first; c < std::min(first + group, job_.channels); ++c) {
        paint_strip(offset(image, c, strip), index, length(strip), image_sums + c * all.size());
      }
    };
    parallel_.for_each(units, [&](int64_t unit) {
      const int64_t strip = unit % strips_;
      const int64_t first = unit / strips_ % groups * group;
      const int64_t image = unit / strips_ / groups;
      if (whole[image].size() <= 256) {
        blend(uint8_t{}, image, first, strip);
      } else {
        blend(int32_t{}, image, first, strip);
      }
    });
  }

  const Clusters& job_;
  const Parallel parallel_;
  const T* maps_;
  const L* labels_;
  T* out_;
  int64_t strips_;
  bool far_;
  std::vector<Range> ranges_;
};

template <class T>
void with_labels(const Clusters& job, const Parallel& parallel) {
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

void cluster_refine(const Clusters& job, const Parallel& given) {
  if (job.batch == 0 || job.channels == 0 || job.pixels == 0) return;
  if (job.pixels > kMaxPixels) throw std::invalid_argument(too_many_pixels("maps", job.pixels));
  const Parallel parallel = job.batch * job.channels * job.pixels < kSmall ? given.alone() : given;
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
