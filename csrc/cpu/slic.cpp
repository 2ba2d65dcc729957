#include "slic.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "clones.h"
#include "convert.h"
#include "index_loops.h"
#include "pack.h"
#include "scratch.h"
#include "slic_colour.h"

namespace molt {
namespace {

constexpr int64_t kSmall = 4096;    // values under which threads cost more than they save
constexpr int64_t kLarge = 32768;   // pixels from which one image is worth several threads, which meet every round
constexpr int64_t kRows = 16;       // of a strip; the order of sums depends on it, threads do not matter
constexpr int64_t kReach = 2;       // how many steps from its centre a pixel may lie
constexpr double kFarthest = 1e15;  // colour's distance in units of compactness, whose square float can hold
constexpr int64_t kTally = 3;       // numbers of a sum before its channels
constexpr float kNone = std::numeric_limits<float>::max();

// The ends of values, and whether all are finite.
template <class A>
struct Ends {
  A low = std::numeric_limits<A>::max();
  A high = std::numeric_limits<A>::lowest();
  bool sound = true;

  void add(const Ends& other) {
    low = std::min(low, other.low);
    high = std::max(high, other.high);
    sound = sound && other.sound;
  }
};

template <class A>
MOLT_INLINE Ends<A> ends_of(const A* values, int64_t n) {
  Ends<A> ends;
  A odd = 0;  // NaN where a value is not finite
  int64_t i = 0;
  if (n >= kLanes) {
    Pack<A> low = pack(values);
    Pack<A> high = low;
    Pack<A> nought = {};
    for (; i + kLanes <= n; i += kLanes) {
      const Pack<A> value = pack(values + i);
      low = value < low ? value : low;
      high = value > high ? value : high;
      nought += value * A{0};
    }
    for (int64_t l = 0; l < kLanes; ++l) {
      ends.low = std::min<A>(ends.low, low[l]);
      ends.high = std::max<A>(ends.high, high[l]);
      odd += nought[l];
    }
  }
  for (; i < n; ++i) {
    ends.low = std::min(ends.low, values[i]);
    ends.high = std::max(ends.high, values[i]);
    odd += values[i] * A{0};
  }
  ends.sound = odd == A{0};
  return ends;
}

// Halves, because a range may be larger than the largest number.
template <class A>
MOLT_INLINE void shift_of(const A* values, int64_t n, double low, double scale, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<float>((0.5 * static_cast<double>(values[i]) - low) * scale);
}

MOLT_CLONES Ends<float> ends(const float* values, int64_t n) { return ends_of(values, n); }
MOLT_CLONES Ends<double> ends(const double* values, int64_t n) { return ends_of(values, n); }
MOLT_CLONES void shift(const float* values, int64_t n, double low, double scale, float* to) {
  shift_of(values, n, low, scale, to);
}
MOLT_CLONES void shift(const double* values, int64_t n, double low, double scale, float* to) {
  shift_of(values, n, low, scale, to);
}

// What a centre looks at in a strip: rows [top, bottom), columns [left, right).
struct Window {
  int64_t top, bottom, left, right;
  double y, x;
  float weight;  // of the squared distance in pixels
};

// Offers a centre to the pixels of its window; those it is nearest to so far take `entry`. kChannels < 0: any number.
template <int kChannels>
MOLT_INLINE void offer_to(const float* planes, int64_t plane, int64_t stride, int64_t channels, const Window& window,
                          const float* colour, int32_t entry, int64_t first_row, float* best, int32_t* owner) {
  using Whole = typename PackOf<int32_t>::type;
  const int64_t count = kChannels < 0 ? channels : kChannels;
  const Whole lanes = {0, 1, 2, 3, 4, 5, 6, 7};
  const Pack<float> steps = {0, 1, 2, 3, 4, 5, 6, 7};
  for (int64_t y = window.top; y < window.bottom; ++y) {
    const float down = static_cast<float>(static_cast<double>(y) - window.y);
    const float base = down * down;
    const float* row = planes + y * stride;
    const int64_t near = (y - first_row) * stride;
    Pack<float> across = steps + static_cast<float>(static_cast<double>(window.left) - window.x);
    for (int64_t x = window.left; x < window.right; x += kLanes, across += static_cast<float>(kLanes)) {
      Pack<float> distance = (across * across + base) * window.weight;
      for (int64_t c = 0; c < count; ++c) {
        const Pack<float> apart = pack(row + c * plane + x) - colour[c];
        distance += apart * apart;
      }
      Pack<float>& nearest = pack(best + near + x);
      Pack<int32_t>& owners = pack(owner + near + x);
      Whole takes = distance < nearest;
      if (x + kLanes > window.right) takes &= lanes < static_cast<int32_t>(window.right - x);
      nearest = takes ? distance : nearest;
      owners = takes ? entry + Whole{} : owners;
    }
  }
}

// A row's pixels as they join centres: labels are written, and each run of one centre is added to its entry of `table`:
// how many, their rows and columns, their channels. What no window reaches keeps its label, uncounted.
template <int kChannels>
MOLT_INLINE bool gather_of(const int32_t* owner, const int32_t* met, const float* row, int64_t plane, int64_t channels,
                           int64_t y, int64_t width, int32_t* labels, double* table) {
  const int64_t count = kChannels < 0 ? channels : kChannels;
  int32_t moved = 0;
  for (int64_t x = 0; x < width;) {
    const int32_t entry = owner[x];
    int64_t stop = x + 1;
    while (stop + kGroup <= width && owner[stop] == entry && uniform(owner + stop)) stop += kGroup;
    while (stop < width && owner[stop] == entry) ++stop;
    if (entry >= 0) {
      const int32_t k = met[entry];
      for (int64_t i = x; i < stop; ++i) {
        moved |= labels[i] ^ k;
        labels[i] = k;
      }
      double* own = table + entry * (count + kTally);
      const double members = static_cast<double>(stop - x);
      own[0] += members;
      own[1] += members * static_cast<double>(y);
      own[2] += members * (0.5 * static_cast<double>(x + stop - 1));
      for (int64_t c = 0; c < count; ++c) {
        const float* values = row + c * plane;
        int64_t i = x;
        float sum = 0;
        if (stop - x >= kLanes) {
          Pack<float> lanes = {};
          for (; i + kLanes <= stop; i += kLanes) lanes += pack(values + i);
          sum = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
        }
        for (; i < stop; ++i) sum += values[i];
        own[kTally + c] += static_cast<double>(sum);
      }
    }
    x = stop;
  }
  return moved != 0;
}

// target_clones does not take templates, hence one plain function a number of channels.
#define MOLT_SLIC_LOOPS(name, number)                                                                                \
  MOLT_CLONES void offer_##name(const float* planes, int64_t plane, int64_t stride, int64_t channels,               \
                                const Window& window, const float* colour, int32_t entry, int64_t first_row,        \
                                float* best, int32_t* owner) {                                                      \
    offer_to<number>(planes, plane, stride, channels, window, colour, entry, first_row, best, owner);               \
  }                                                                                                                 \
  MOLT_CLONES bool gather_##name(const int32_t* owner, const int32_t* met, const float* row, int64_t plane,         \
                                 int64_t channels, int64_t y, int64_t width, int32_t* labels, double* table) {      \
    return gather_of<number>(owner, met, row, plane, channels, y, width, labels, table);                            \
  }
MOLT_SLIC_LOOPS(three, 3)
MOLT_SLIC_LOOPS(any, -1)
#undef MOLT_SLIC_LOOPS
MOLT_CLONES void offer_place(const float* planes, int64_t plane, int64_t stride, int64_t channels,
                             const Window& window, const float* colour, int32_t entry, int64_t first_row, float* best,
                             int32_t* owner) {
  offer_to<0>(planes, plane, stride, channels, window, colour, entry, first_row, best, owner);
}

template <class T>
class Superpixels {
 public:
  Superpixels(const Slic& job, int64_t image, const Parallel& parallel)
      : job_(job),
        parallel_(parallel),
        pixels_(job.height * job.width),
        stride_(slic_stride(job.width)),
        plane_(stride_ * job.height),
        strips_((job.height + kRows - 1) / kRows),
        images_(static_cast<const T*>(job.images) + image * job.channels * pixels_),
        labels_(job.labels + image * pixels_),
        planes_(job.channels * plane_) {}

  // False where a value is not finite.
  bool run(int64_t* count) {
    if (!prepare()) return false;
    seed();
    for (int64_t i = 0; i < job_.iterations; ++i) {
      if (!step(i == 0)) break;
    }
    const int64_t clusters = static_cast<int64_t>(centres_.size());
    *count = job_.connected ? slic_connect(labels_, job_.height, job_.width, clusters, job_.min_size, job_.max_size,
                                           planes_.data(), job_.channels, stride_)
                            : slic_renumber(labels_, pixels_, clusters);
    return true;
  }

 private:
  using A = Acc<T>;
  struct Centre {
    double y, x;
  };

  // A row of a channel in the type it is computed in.
  const A* row(int64_t channel, int64_t y, A* room) const {
    const T* from = images_ + channel * pixels_ + y * job_.width;
    if constexpr (std::is_same_v<T, A>) {
      return from;
    } else {
      widen_values(from, job_.width, room);
      return room;
    }
  }

  template <class F>
  void for_each_strip(const F& body) const {
    parallel_.for_each(strips_, [&](int64_t strip) {
      body(strip, strip * kRows, std::min(job_.height, (strip + 1) * kRows));
    });
  }

  bool prepare() {
    std::vector<Ends<A>> parts(strips_ * job_.channels);
    for_each_strip([&](int64_t strip, int64_t begin, int64_t end) {
      Scratch<A> room(job_.width);
      for (int64_t c = 0; c < job_.channels; ++c) {
        for (int64_t y = begin; y < end; ++y) {
          parts[strip * job_.channels + c].add(ends(row(c, y, room.data()), job_.width));
        }
      }
    });
    std::vector<Ends<A>> all(job_.channels);
    Ends<A> whole;
    for (int64_t i = 0; i < strips_ * job_.channels; ++i) {
      all[i % job_.channels].add(parts[i]);
      whole.add(parts[i]);
    }
    if (!whole.sound) return false;
    if (job_.lab) std::fill(all.begin(), all.end(), whole);
    double half = 0;
    for (const Ends<A>& one : all) half = std::max(half, 0.5 * one.high - 0.5 * one.low);

    // Distances in units of compactness; where colours would be too far apart, places come nearer instead.
    const double range = job_.lab ? 50.0 : half;
    const double shrink = std::min(1.0, kFarthest * (0.5 * job_.compactness / std::max(range, 1e-300)));
    place_ = shrink;
    const double unit = shrink < 1 ? 0.5 * kFarthest / range : 1.0 / job_.compactness;
    const double stretch = job_.lab ? (half > 0 ? 1.0 / half : 0.0) : 2 * unit;
    for_each_strip([&](int64_t, int64_t begin, int64_t end) {
      Scratch<A> room(job_.width);
      for (int64_t y = begin; y < end; ++y) {
        for (int64_t c = 0; c < job_.channels; ++c) {
          float* to = planes_.data() + c * plane_ + y * stride_;
          shift(row(c, y, room.data()), job_.width, 0.5 * static_cast<double>(all[c].low), stretch, to);
          std::fill(to + job_.width, to + stride_, 0.0f);
        }
        if (!job_.lab) continue;
        float* to = planes_.data() + y * stride_;
        to_lab(to, to + plane_, to + 2 * plane_, job_.width, static_cast<float>(unit));
      }
    });
    return true;
  }

  void seed() {
    slic_grid(job_.height, job_.width, job_.segments, &down_, &across_);
    centres_.resize(down_.number * across_.number);
    colours_.assign(centres_.size() * job_.channels, 0.0f);
    for (int64_t k = 0; k < static_cast<int64_t>(centres_.size()); ++k) {
      centres_[k] = {static_cast<double>(down_.first + k / across_.number * down_.step),
                     static_cast<double>(across_.first + k % across_.number * across_.step)};
    }
    std::fill(labels_, labels_ + pixels_, -1);
  }

  Window window(int64_t k) const {
    const auto low = [](double at) { return static_cast<int64_t>(std::max(at, 0.0)); };
    Window all;
    all.y = centres_[k].y;
    all.x = centres_[k].x;
    all.top = low(all.y - static_cast<double>(kReach * down_.step));
    all.bottom = std::min(job_.height, low(all.y + static_cast<double>(kReach * down_.step + 1)));
    all.left = low(all.x - static_cast<double>(kReach * across_.step));
    all.right = std::min(job_.width, low(all.x + static_cast<double>(kReach * across_.step + 1)));
    return all;
  }

  // The centres whose windows meet each strip, in order.
  void list() {
    const int64_t clusters = static_cast<int64_t>(centres_.size());
    windows_.resize(clusters);
    begins_.assign(strips_ + 1, 0);
    for (int64_t k = 0; k < clusters; ++k) {
      const Window& all = windows_[k] = window(k);
      for (int64_t strip = all.top / kRows; strip <= (all.bottom - 1) / kRows; ++strip) ++begins_[strip + 1];
    }
    for (int64_t strip = 0; strip < strips_; ++strip) begins_[strip + 1] += begins_[strip];
    met_.resize(begins_[strips_]);
    std::vector<int64_t> next(begins_.begin(), begins_.end() - 1);
    for (int64_t k = 0; k < clusters; ++k) {
      const Window& all = windows_[k];
      for (int64_t strip = all.top / kRows; strip <= (all.bottom - 1) / kRows; ++strip) {
        met_[next[strip]++] = static_cast<int32_t>(k);
      }
    }
  }

  // One round: each pixel joins its nearest centre, and centres move to their pixels' means. The first round has no
  // colours yet and goes by place alone. False where no pixel moved.
  bool step(bool first) {
    list();
    const int64_t width = job_.channels + kTally;
    sums_.assign(met_.size() * width, 0.0);
    const double unit = first ? 1.0 : place_;
    const double side = static_cast<double>(std::max(down_.step, across_.step));
    const float weight = static_cast<float>(unit * unit / (side * side));
    const auto offer = first ? offer_place : job_.channels == 3 ? offer_three : offer_any;
    const auto gather = job_.channels == 3 ? gather_three : gather_any;
    std::vector<uint8_t> moved(strips_, 0);
    for_each_strip([&](int64_t strip, int64_t begin, int64_t end) {
      Scratch<float> best((end - begin) * stride_);
      Scratch<int32_t> owner((end - begin) * stride_);
      std::fill(best.data(), best.data() + (end - begin) * stride_, kNone);
      std::fill(owner.data(), owner.data() + (end - begin) * stride_, -1);
      const int64_t offset = begins_[strip];
      for (int64_t e = offset; e < begins_[strip + 1]; ++e) {
        const int64_t k = met_[e];
        Window own = windows_[k];
        own.top = std::max(own.top, begin);
        own.bottom = std::min(own.bottom, end);
        own.weight = weight;
        offer(planes_.data(), plane_, stride_, job_.channels, own, colours_.data() + k * job_.channels,
              static_cast<int32_t>(e - offset), begin, best.data(), owner.data());
      }
      bool any = false;
      for (int64_t y = begin; y < end; ++y) {
        any |= gather(owner.data() + (y - begin) * stride_, met_.data() + offset, planes_.data() + y * stride_, plane_,
                      job_.channels, y, job_.width, labels_ + y * job_.width, sums_.data() + offset * width);
      }
      moved[strip] = any;
    });
    move();
    return std::any_of(moved.begin(), moved.end(), [](uint8_t one) { return one != 0; });
  }

  void move() {
    const int64_t width = job_.channels + kTally;
    totals_.assign(centres_.size() * width, 0.0);
    for (int64_t e = 0; e < static_cast<int64_t>(met_.size()); ++e) {
      double* total = totals_.data() + met_[e] * width;
      for (int64_t i = 0; i < width; ++i) total[i] += sums_[e * width + i];
    }
    for (int64_t k = 0; k < static_cast<int64_t>(centres_.size()); ++k) {
      const double* total = totals_.data() + k * width;
      if (total[0] == 0) continue;
      // Divided, not multiplied by a reciprocal: windows end where a whole number is, which the mean may well be.
      centres_[k] = {total[1] / total[0], total[2] / total[0]};
      for (int64_t c = 0; c < job_.channels; ++c) {
        colours_[k * job_.channels + c] = static_cast<float>(total[kTally + c] / total[0]);
      }
    }
  }

  const Slic& job_;
  const Parallel parallel_;
  const int64_t pixels_, stride_, plane_, strips_;
  const T* images_;
  int32_t* labels_;
  Scratch<float> planes_;
  double place_ = 1;
  SlicGrid down_{}, across_{};
  std::vector<Centre> centres_;
  std::vector<float> colours_;
  std::vector<int64_t> begins_;
  std::vector<int32_t> met_;
  std::vector<Window> windows_;
  std::vector<double> sums_, totals_;
};

template <class T>
void run(const Slic& job, const Parallel& parallel) {
  std::vector<uint8_t> sound(job.batch, 1);
  const auto one = [&](int64_t image, const Parallel& threads) {
    sound[image] = Superpixels<T>(job, image, threads).run(job.counts + image);
  };
  // Whole images where there are enough for every thread, else strips of one after the other.
  if (job.batch >= 4 * parallel.threads || (job.batch > 1 && job.height * job.width < kLarge)) {
    parallel.for_each(job.batch, [&](int64_t image) { one(image, parallel.alone()); });
  } else {
    const bool small = job.height * job.width < kLarge;
    for (int64_t image = 0; image < job.batch; ++image) one(image, small ? parallel.alone() : parallel);
  }
  for (int64_t image = 0; image < job.batch; ++image) {
    if (!sound[image]) {
      throw std::invalid_argument("images: got NaN or infinite values in image " + std::to_string(image) +
                                  ", expected finite values");
    }
  }
}

}  // namespace

int64_t slic_stride(int64_t width) { return (width + 2 * kLanes - 1) / kLanes * kLanes; }

void slic_grid(int64_t height, int64_t width, int64_t wanted, SlicGrid* rows, SlicGrid* columns) {
  const double pixels = static_cast<double>(height) * static_cast<double>(width);
  const double count = std::min(static_cast<double>(wanted), pixels);
  double down = std::sqrt(pixels / count);
  double across = down;
  // A side shorter than a step holds one row of seeds.
  const double shorter = static_cast<double>(std::min(height, width));
  if (shorter < down) {
    (height <= width ? down : across) = shorter;
    (height <= width ? across : down) = pixels / shorter / count;
  }
  const auto lay = [](double step, int64_t side) {
    const int64_t first = static_cast<int64_t>(step / 2);
    const int64_t whole = std::max<int64_t>(1, std::llrint(step));
    return SlicGrid{first, whole, (side - first + whole - 1) / whole};
  };
  *rows = lay(down, height);
  *columns = lay(across, width);
}

void slic(const Slic& job, const Parallel& given) {
  if (job.batch == 0) return;
  const int64_t pixels = job.height * job.width;
  const Parallel parallel = job.batch * pixels * job.channels < kSmall ? given.alone() : given;
  switch (job.type) {
    case MapType::float16:
      return run<half>(job, parallel);
    case MapType::bfloat16:
      return run<bfloat16>(job, parallel);
    case MapType::float32:
      return run<float>(job, parallel);
    case MapType::float64:
      return run<double>(job, parallel);
  }
}

}  // namespace molt
