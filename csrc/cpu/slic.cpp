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

constexpr int64_t kSmall = 4096;    // pixels under which threads cost more than they save
constexpr int64_t kRows = 16;       // of a strip; the order of sums depends on it, threads do not matter
constexpr int64_t kReach = 2;       // how many steps from its centre a pixel may lie
constexpr double kFarthest = 1e15;  // colour's distance in units of compactness, whose square float can hold
constexpr float kNone = std::numeric_limits<float>::max();

// Values of one row; their ends and whether all are finite.
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
  int32_t odd = 0;
  for (int64_t i = 0; i < n; ++i) {
    const A value = values[i];
    ends.low = value < ends.low ? value : ends.low;
    ends.high = value > ends.high ? value : ends.high;
    odd |= !(value - value == A{0});
  }
  ends.sound = odd == 0;
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
    for (int64_t x = window.left; x < window.right; x += kLanes) {
      const Pack<float> across = steps + static_cast<float>(static_cast<double>(x) - window.x);
      Pack<float> distance = (across * across + base) * window.weight;
      for (int64_t c = 0; c < count; ++c) {
        const Pack<float> apart = pack(row + c * plane + x) - colour[c];
        distance += apart * apart;
      }
      Pack<float>& nearest = pack(best + near + x);
      Pack<int32_t>& owners = pack(owner + near + x);
      const Whole inside = lanes < static_cast<int32_t>(std::min<int64_t>(window.right - x, kLanes));
      const Whole takes = (distance < nearest) & inside;
      nearest = takes ? distance : nearest;
      owners = takes ? entry + Whole{} : owners;
    }
  }
}

#define MOLT_OFFER(name, number)                                                                                     \
  MOLT_CLONES void name(const float* planes, int64_t plane, int64_t stride, int64_t channels, const Window& window, \
                        const float* colour, int32_t entry, int64_t first_row, float* best, int32_t* owner) {       \
    offer_to<number>(planes, plane, stride, channels, window, colour, entry, first_row, best, owner);               \
  }
MOLT_OFFER(offer_place, 0)
MOLT_OFFER(offer_three, 3)
MOLT_OFFER(offer_any, -1)
#undef MOLT_OFFER

template <class T>
class Superpixels {
 public:
  Superpixels(const Slic& job, int64_t image, const Parallel& parallel)
      : job_(job),
        parallel_(parallel),
        pixels_(job.height * job.width),
        stride_((job.width + 2 * kLanes - 1) / kLanes * kLanes),
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
      if (!step(i == 0) && i > 1) break;
    }
    const int64_t clusters = static_cast<int64_t>(centres_.size());
    *count = job_.connected
                 ? slic_connect(labels_, job_.height, job_.width, clusters, job_.min_size, job_.max_size)
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
    begins_.assign(strips_ + 1, 0);
    for (int64_t k = 0; k < clusters; ++k) {
      const Window all = window(k);
      for (int64_t strip = all.top / kRows; strip <= (all.bottom - 1) / kRows; ++strip) ++begins_[strip + 1];
    }
    for (int64_t strip = 0; strip < strips_; ++strip) begins_[strip + 1] += begins_[strip];
    met_.resize(begins_[strips_]);
    std::vector<int64_t> next(begins_.begin(), begins_.end() - 1);
    for (int64_t k = 0; k < clusters; ++k) {
      const Window all = window(k);
      for (int64_t strip = all.top / kRows; strip <= (all.bottom - 1) / kRows; ++strip) {
        met_[next[strip]++] = static_cast<int32_t>(k);
      }
    }
  }

  // One round: each pixel joins its nearest centre, and centres move to their pixels' means. The first round has no
  // colours yet and goes by place alone. False where no pixel moved.
  bool step(bool first) {
    list();
    const int64_t entries = static_cast<int64_t>(met_.size());
    sums_.assign(entries * job_.channels, 0.0);
    tallies_.assign(entries, Tally{});
    std::vector<uint8_t> moved(strips_, 0);
    for_each_strip([&](int64_t strip, int64_t begin, int64_t end) {
      Scratch<float> best((end - begin) * stride_);
      Scratch<int32_t> owner((end - begin) * stride_);
      std::fill(best.data(), best.data() + (end - begin) * stride_, kNone);
      std::fill(owner.data(), owner.data() + (end - begin) * stride_, -1);
      const int64_t offset = begins_[strip];
      for (int64_t e = offset; e < begins_[strip + 1]; ++e) {
        const int64_t k = met_[e];
        Window own = window(k);
        own.top = std::max(own.top, begin);
        own.bottom = std::min(own.bottom, end);
        const double side = static_cast<double>(std::max(down_.step, across_.step));
        own.weight = static_cast<float>((first ? 1.0 : place_) * (first ? 1.0 : place_) / (side * side));
        const auto offer = first ? offer_place : job_.channels == 3 ? offer_three : offer_any;
        offer(planes_.data(), plane_, stride_, job_.channels, own, colours_.data() + k * job_.channels,
              static_cast<int32_t>(e - offset), begin, best.data(), owner.data());
      }
      moved[strip] = gather(offset, begin, end, owner.data());
    });
    move();
    return std::any_of(moved.begin(), moved.end(), [](uint8_t one) { return one != 0; });
  }

  // Writes a strip's labels and adds up its pixels, run by run. What no window reaches keeps its label, uncounted.
  bool gather(int64_t offset, int64_t begin, int64_t end, const int32_t* owner) {
    bool moved = false;
    for (int64_t y = begin; y < end; ++y) {
      const int32_t* own = owner + (y - begin) * stride_;
      int32_t* label = labels_ + y * job_.width;
      for (int64_t x = 0; x < job_.width;) {
        const int32_t entry = own[x];
        int64_t stop = x + 1;
        while (stop < job_.width && own[stop] == entry) ++stop;
        if (entry >= 0) {
          const int64_t at = offset + entry;
          const int32_t k = met_[at];
          for (int64_t i = x; i < stop; ++i) {
            moved |= label[i] != k;
            label[i] = k;
          }
          tallies_[at].members += stop - x;
          tallies_[at].y += y * (stop - x);
          tallies_[at].x += (x + stop - 1) * (stop - x) / 2;
          for (int64_t c = 0; c < job_.channels; ++c) {
            const float* values = planes_.data() + c * plane_ + y * stride_;
            double sum = 0;
            for (int64_t i = x; i < stop; ++i) sum += static_cast<double>(values[i]);
            sums_[at * job_.channels + c] += sum;
          }
        }
        x = stop;
      }
    }
    return moved;
  }

  void move() {
    const int64_t clusters = static_cast<int64_t>(centres_.size());
    std::vector<Tally> tallies(clusters);
    std::vector<double> sums(clusters * job_.channels, 0.0);
    for (int64_t e = 0; e < static_cast<int64_t>(met_.size()); ++e) {
      const int64_t k = met_[e];
      tallies[k].members += tallies_[e].members;
      tallies[k].y += tallies_[e].y;
      tallies[k].x += tallies_[e].x;
      for (int64_t c = 0; c < job_.channels; ++c) sums[k * job_.channels + c] += sums_[e * job_.channels + c];
    }
    for (int64_t k = 0; k < clusters; ++k) {
      if (tallies[k].members == 0) continue;
      const double members = static_cast<double>(tallies[k].members);
      centres_[k] = {static_cast<double>(tallies[k].y) / members, static_cast<double>(tallies[k].x) / members};
      for (int64_t c = 0; c < job_.channels; ++c) {
        colours_[k * job_.channels + c] = static_cast<float>(sums[k * job_.channels + c] / members);
      }
    }
  }

  struct Tally {
    int64_t members = 0, y = 0, x = 0;
  };

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
  std::vector<double> sums_;
  std::vector<Tally> tallies_;
};

template <class T>
void run(const Slic& job, const Parallel& parallel) {
  std::vector<uint8_t> sound(job.batch, 1);
  const auto one = [&](int64_t image, const Parallel& threads) {
    sound[image] = Superpixels<T>(job, image, threads).run(job.counts + image);
  };
  // Whole images where there are enough for every thread, else strips of one after the other.
  if (job.batch >= 4 * parallel.threads) {
    parallel.for_each(job.batch, [&](int64_t image) { one(image, parallel.alone()); });
  } else {
    for (int64_t image = 0; image < job.batch; ++image) one(image, parallel);
  }
  for (int64_t image = 0; image < job.batch; ++image) {
    if (!sound[image]) {
      throw std::invalid_argument("images: got NaN or infinite values in image " + std::to_string(image) +
                                  ", expected finite values");
    }
  }
}

}  // namespace

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
  if (pixels > kMaxPixels) throw std::invalid_argument(too_many_pixels("images", pixels));
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
