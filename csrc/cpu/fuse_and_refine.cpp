#include "fuse_and_refine.h"

#include <algorithm>
#include <cstddef>
#include <exception>
#include <memory>
#include <vector>

#include "convert.h"

namespace molt {
namespace {

constexpr int64_t kCached = int64_t{1} << 17;  // numbers that stay in a core's own cache between the two steps

template <class T>
void both(const FuseMaps& fuse, const Clusters& clusters, const Parallel& parallel) {
  using A = Acc<T>;
  const int64_t pixels = fuse.height * fuse.width;
  const int64_t size = clusters.channels * pixels;
  const bool direct = std::is_same_v<T, A>;
  T* out = static_cast<T*>(fuse.out);

  // Images from `first` on: fuse, then refine in place.
  const auto run = [&](int64_t first, int64_t number, A* wide, const Parallel& threads) {
    FuseMaps one = fuse;
    one.maps = number * clusters.channels;
    for (Scale& scale : one.scales) {
      const int64_t before = first * clusters.channels * scale.height * scale.width;
      scale.maps = static_cast<const T*>(scale.maps) + before;
    }
    one.out = wide;
    one.out_type = std::is_same_v<A, double> ? MapType::float64 : MapType::float32;
    fuse_maps(one, threads);
    Clusters own = clusters;
    const int64_t label_size = own.label_type == LabelType::uint8 ? 1 : own.label_type == LabelType::int32 ? 4 : 8;
    own.maps = own.out = wide;
    own.map_type = one.out_type;
    own.labels = static_cast<const std::byte*>(clusters.labels) + first * pixels * label_size;
    own.counts = clusters.counts == nullptr ? nullptr : clusters.counts + first;
    own.first_image = first;
    own.batch = number;
    own.pixels = pixels;
    cluster_refine(own, threads);
  };

  if (clusters.batch < 4 * parallel.threads && parallel.threads > 1) {
    if constexpr (direct) {
      run(0, clusters.batch, out, parallel);
    } else {
      const std::unique_ptr<A[]> wide(new A[size]);
      for (int64_t image = 0; image < clusters.batch; ++image) {
        run(image, 1, wide.get(), parallel);
        parallel.for_each(clusters.channels, [&](int64_t c) {
          shorten_values(wide.get() + c * pixels, pixels, out + image * size + c * pixels);
        });
      }
    }
    return;
  }
  // With 16-bit maps every image of a unit is there a second time, in single precision.
  const int64_t together = direct ? std::max<int64_t>(1, kCached / std::max<int64_t>(1, size)) : 1;
  std::vector<std::exception_ptr> errors((clusters.batch + together - 1) / together);
  parallel.for_each(static_cast<int64_t>(errors.size()), [&](int64_t unit) {
    const int64_t first = unit * together;
    const int64_t number = std::min(together, clusters.batch - first);
    try {
      if constexpr (direct) {
        run(first, number, out + first * size, parallel.alone());
      } else {
        const std::unique_ptr<A[]> wide(new A[number * size]);
        run(first, number, wide.get(), parallel.alone());
        shorten_values(wide.get(), number * size, out + first * size);
      }
    } catch (...) {
      errors[unit] = std::current_exception();
    }
  });
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

}  // namespace

void fuse_and_refine(const FuseMaps& fuse, const Clusters& clusters, const Parallel& parallel) {
  if (fuse.maps * fuse.height * fuse.width == 0) return;
  switch (fuse.map_type) {
    case MapType::float16:
      return both<half>(fuse, clusters, parallel);
    case MapType::bfloat16:
      return both<bfloat16>(fuse, clusters, parallel);
    case MapType::float32:
      return both<float>(fuse, clusters, parallel);
    case MapType::float64:
      return both<double>(fuse, clusters, parallel);
  }
}

}  // namespace molt
