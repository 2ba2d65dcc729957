#pragma once

#include "cluster_refine.cuh"

// Numbers of clusters beyond what one warp's table holds: a block sums one window of kCells labels over a whole map,
// strip by strip in the order of the narrow kernel, so that an image gets the bits of its own number of clusters. Costs
// one reading of the map a window. Labels far beyond the number of pixels are first numbered through.
namespace molt::cuda {

constexpr int64_t kDense = 16384;                    // limits from which on labels are numbered through

template <class T>
struct WideArguments {
  using A = Acc<T>;

  Stored<T> source;
  Labels labels;
  Labels given;            // the labels before they were numbered through: fix the order of summation
  const int64_t* counts;   // limits of `labels`, or null
  const int64_t* given_counts;
  int64_t limit;
  int64_t given_limit;
  T* out;
  A* blend;         // (maps, rows)
  int64_t* totals;  // (batch, rows) or null
  int64_t rows;
  int64_t channels;
  int64_t first_map;
  int64_t maps;
  int64_t first_labels;  // image that `labels` begin with
  Blend<A> how;
};

template <class T>
__global__ void __launch_bounds__(kThreads, 5) wide_sum_kernel(const WideArguments<T> a) {
  using A = Acc<T>;
  constexpr int kPerThread = kCells<A> / kThreads;
  MOLT_SHARED(Cell<A>, tables, kWarps * kCells<A>);
  const int64_t windows = (a.rows + kCells<A> - 1) / kCells<A>;
  const int64_t pixels = a.source.pixels;
  for (int64_t unit = blockIdx.x; unit < a.maps * windows; unit += gridDim.x) {
    const int64_t map = a.first_map + unit / windows;
    const int64_t image = map / a.channels;
    const int64_t own = image - a.first_labels;
    const int64_t start = unit % windows * kCells<A>;
    const int64_t limit = image_limit(a.labels, a.counts, a.limit, own);
    const int64_t left = limit - start;
    const int span = static_cast<int>(left < 0 ? 0 : left < kCells<A> ? left : kCells<A>);
    const int shift = column_shift<A>(image_limit(a.given, a.given_counts, a.given_limit, image));
    A sums[kPerThread];
    int counts[kPerThread];
    for (int i = 0; i < kPerThread; ++i) sums[i] = 0, counts[i] = 0;
    for (int begin = 0; begin < pixels && span > 0; begin += kStrip) {
      const int end = strip_end(begin, pixels);
      sum_strip<A>(
          a.source, a.labels, map, own, pixels, begin, end, start, static_cast<unsigned>(span), shift, tables);
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const int k = static_cast<int>(threadIdx.x) + i * kThreads;
        if (k >= span) break;
        const Cell<A> total = fold_warps<A>(tables, k, shift);
        sums[i] += total.sum;
        counts[i] += total.count;
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int64_t k = start + threadIdx.x + i * kThreads;
      if (k >= a.rows) break;
      a.blend[unit / windows * a.rows + k] = a.how.of_mean(mean_of(sums[i], counts[i]));
      if (a.totals != nullptr && map % a.channels == 0) a.totals[image * a.rows + k] = counts[i];
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) wide_paint_kernel(const WideArguments<T> a) {
  using A = Acc<T>;
  const int64_t pixels = a.source.pixels;
  const int64_t strips = (pixels + kStrip - 1) / kStrip;
  for (int64_t unit = blockIdx.x; unit < a.maps * strips; unit += gridDim.x) {
    const int64_t map = a.first_map + unit / strips;
    const int64_t own = map / a.channels - a.first_labels;
    const unsigned limit = static_cast<unsigned>(image_limit(a.labels, a.counts, a.limit, own));
    const A* blend = a.blend + unit / strips * a.rows;
    const int begin = static_cast<int>(unit % strips) * kStrip;
    const int end = strip_end(begin, pixels);
    for (int at = begin + static_cast<int>(threadIdx.x) * 4; at < end; at += kThreads * 4) {
      A values[1][4];
      unsigned ids[1][4];
      for (int j = 0; j < 4; ++j) values[0][j] = at + j < end ? widen(a.source.maps[map * pixels + at + j]) : A{0};
      load_ids<1>(a.labels, own * pixels, at, 0, end, 0, limit, ids);
      for (int j = 0; j < 4; ++j) {
        if (ids[0][j] != kNone) values[0][j] = a.how.pixel(values[0][j], blend[ids[0][j]]);
      }
      store_values<1>(a.out + map * pixels, at, 0, end, values);
    }
  }
}

// Hash tables that give each label of an image a number below its number of different labels. Which number, depends on
// chance; no result does, as rows of one column are summed alike. Labels of an image with more columns stay as they are.
struct Numbering {
  Labels labels;
  const int64_t* counts;
  int64_t limit;
  unsigned long long* keys;  // (images, slots), all ones where free
  int* numbers;              // (images, slots)
  unsigned long long* found;  // (images)
  int* out;                  // (images, pixels), -1 for a label out of range
  int64_t pixels;
  int64_t first_image;
  int64_t images;
  int64_t slots;
  int64_t plain;  // limits up to this one stay
};

constexpr unsigned long long kFree = ~0ull;

__device__ inline int64_t first_slot(uint64_t label, int64_t slots) {
  label *= 0x9e3779b97f4a7c15ull;
  return static_cast<int64_t>((label >> 32 ^ label) & static_cast<uint64_t>(slots - 1));
}

static __global__ void __launch_bounds__(kThreads) number_kernel(const Numbering n, bool look_up) {
  const int64_t total = n.images * n.pixels;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < total; i += int64_t{gridDim.x} * kThreads) {
    const int64_t own = i / n.pixels;
    const int64_t at = n.first_image * n.pixels + i;
    const auto label = static_cast<uint64_t>(load_label(n.labels, at));
    const int64_t limit = image_limit(n.labels, n.counts, n.limit, n.first_image + own);
    const bool inside = label < static_cast<uint64_t>(limit);
    if (!inside && look_up) n.out[i] = -1;
    if (limit <= n.plain) {
      if (inside && look_up) n.out[i] = static_cast<int>(label);
      if (i % n.pixels == 0 && !look_up) n.found[own] = static_cast<unsigned long long>(limit);
      continue;
    }
    if (!inside) continue;
    // A neighbour of the same label brings it in.
    if (!look_up && i % n.pixels > 0 && load_label(n.labels, at - 1) == static_cast<int64_t>(label)) continue;
    unsigned long long* keys = n.keys + own * n.slots;
    int64_t slot = first_slot(label, n.slots);
    while (true) {
      const unsigned long long held = look_up ? keys[slot] : atomicCAS(keys + slot, kFree, label);
      if (held == label) break;
      if (held == kFree) {
        n.numbers[own * n.slots + slot] = static_cast<int>(atomicAdd(n.found + own, 1ull));
        break;
      }
      slot = (slot + 1) & (n.slots - 1);
    }
    if (look_up) n.out[i] = n.numbers[own * n.slots + slot];
  }
}

template <class T>
cudaError_t refine_wide(const Refine& job, const T* maps, Scratch& scratch, cudaStream_t stream) {
  using A = Acc<T>;
  WideArguments<T> a{};
  a.source = {maps, job.pixels};
  a.labels = a.given = {job.labels, job.label_type};
  a.counts = a.given_counts = job.counts;
  a.limit = a.given_limit = job.limit;
  a.out = static_cast<T*>(job.out);
  a.totals = job.totals;
  a.channels = job.channels;
  a.how = blend_of<T>(job.out != nullptr ? job.alpha : 1.0);
  const bool dense = job.out != nullptr && job.limit > kDense;
  a.rows = job.limit;
  if (dense) a.rows = job.pixels > kCells<A> ? job.pixels : kCells<A>;
  if (a.rows > job.limit) a.rows = job.limit;

  Numbering n{};
  int64_t bytes = job.means != nullptr ? 0 : a.rows * job.channels * static_cast<int64_t>(sizeof(A));
  if (dense) {
    n = {a.labels, job.counts, job.limit, nullptr, nullptr, nullptr, nullptr, job.pixels, 0, 0, 1,
         kCells<A>};
    while (n.slots < 2 * job.pixels) n.slots *= 2;
    bytes += n.slots * 12 + job.pixels * 4;
  }
  int64_t chunk = bytes > 0 ? scratch.most() / bytes : job.batch;
  chunk = chunk < 1 ? 1 : chunk < job.batch ? chunk : job.batch;
  A* blend = job.means != nullptr ? static_cast<A*>(job.means) : scratch.get_array<A>(chunk * job.channels * a.rows);
  if (dense) {
    n.keys = scratch.get_array<unsigned long long>(chunk * n.slots);
    n.numbers = scratch.get_array<int>(chunk * n.slots);
    n.found = scratch.get_array<unsigned long long>(chunk);
    n.out = scratch.get_array<int>(chunk * job.pixels);
    a.labels = {n.out, LabelType::int32};
    a.counts = reinterpret_cast<const int64_t*>(n.found);
    a.limit = a.rows;
  }
  const int64_t windows = divide_up(a.rows, kCells<A>);
  const int64_t strips = divide_up(job.pixels, kStrip);
  for (int64_t image = 0; image < job.batch; image += chunk) {
    const int64_t images = job.batch - image < chunk ? job.batch - image : chunk;
    a.first_map = image * job.channels;
    a.maps = images * job.channels;
    a.blend = job.means != nullptr ? blend + a.first_map * a.rows : blend;
    if (dense) {
      n.first_image = a.first_labels = image;
      n.images = images;
      MOLT_CHECK(cudaMemsetAsync(n.keys, 0xff, static_cast<size_t>(images * n.slots) * 8, stream));
      MOLT_CHECK(cudaMemsetAsync(n.found, 0, static_cast<size_t>(images) * 8, stream));
      for (const bool look_up : {false, true}) {
        const dim3 grid(grid_for(divide_up(images * job.pixels, kThreads)));
        MOLT_LAUNCH(number_kernel, grid, dim3(kThreads), stream, n, look_up);
        MOLT_CHECK_LAUNCH();
      }
    }
    const auto sum = wide_sum_kernel<T>;
    MOLT_LAUNCH(sum, dim3(grid_for(a.maps * windows)), dim3(kThreads), stream, a);
    MOLT_CHECK_LAUNCH();
    if (a.out != nullptr) {
      const auto paint = wide_paint_kernel<T>;
      MOLT_LAUNCH(paint, dim3(grid_for(a.maps * strips)), dim3(kThreads), stream, a);
      MOLT_CHECK_LAUNCH();
    }
  }
  return cudaSuccess;
}

}  // namespace molt::cuda
