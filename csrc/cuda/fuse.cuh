#pragma once

#include "quads.cuh"

// Maps given by small maps of several scales: each upsampled (bilinear, half-pixel centres), min-max normalised and
// weighted, then added up. Upsampling and normalising are both affine, so the small maps are normalised beforehand, with
// the extremes of the large ones; the large maps exist pixel by pixel only.
namespace molt::cuda {

// Where a row or column of the large map lies between those of the small one.
template <class A>
struct Tap {
  int at;
  A t;  // 0: on `at` itself, and at + 1 may not exist
};

// In exact integers: the last of cells 0 .. small - 1 that begins at or before pixel `large_at`'s centre.
template <class A>
__device__ inline Tap<A> tap_of(int64_t large_at, int64_t large, int64_t small) {
  int64_t n = (2 * large_at + 1) * small - large;
  n = n > 0 ? n : 0;
  const int64_t cell = n / (2 * large) < small - 1 ? n / (2 * large) : small - 1;
  const A t = cell == small - 1 ? A{0} : static_cast<A>(n - 2 * large * cell) / static_cast<A>(2 * large);
  return {static_cast<int>(cell), t};
}

// First pixel of a cell; for `cell` = small, one past the last pixel.
__device__ inline int64_t first_of_cell(int64_t cell, int64_t large, int64_t small) {
  if (cell == 0) return 0;
  if (cell == small) return large;
  return ((2 * cell + 1) * large - small + 2 * small - 1) / (2 * small);
}

// A neighbour of no weight may be anything.
template <class A>
__device__ inline A between(A from, A to, A t) {
  return t == A{0} ? from : from + t * (to - from);
}

template <class A>
__device__ inline bool is_finite(A value) {
  return value - value == A{0};
}

template <class A>
struct FusedScale {
  const void* raw;        // (maps, height, width) as they came
  A* normalised;          // the same, normalised and weighted
  Tap<A>* rows;           // (large height)
  Tap<A>* columns;        // (large width)
  int height;
  int width;
  A weight;
};

template <class A>
struct FusedScales {
  FusedScale<A> at[kMaxScales];
  int count;
  int height;
  int width;
};

constexpr int kNormaliseThreads = 128;

// One small map of one scale by one block; the blocks with map = `maps` compute the taps of a scale.
template <class T>
__global__ void __launch_bounds__(kNormaliseThreads) normalise_kernel(const FusedScales<Acc<T>> scales, int64_t maps) {
  using A = Acc<T>;
  MOLT_SHARED(A, lows, kNormaliseThreads);
  MOLT_SHARED(A, highs, kNormaliseThreads);
  MOLT_SHARED(int, bad, 1);
  for (int64_t unit = blockIdx.x; unit < (maps + 1) * scales.count; unit += gridDim.x) {
    const FusedScale<A>& scale = scales.at[unit % scales.count];
    const int64_t map = unit / scales.count;
    const int tid = static_cast<int>(threadIdx.x);
    if (map == maps) {
      for (int y = tid; y < scales.height; y += kNormaliseThreads) {
        scale.rows[y] = tap_of<A>(y, scales.height, scale.height);
      }
      for (int x = tid; x < scales.width; x += kNormaliseThreads) {
        scale.columns[x] = tap_of<A>(x, scales.width, scale.width);
      }
      continue;
    }
    const int width = scale.width;
    const int size = scale.height * width;
    const T* raw = static_cast<const T*>(scale.raw) + map * size;
    if (tid == 0) bad[0] = 0;
    __syncthreads();
    A low = 0;
    A high = 0;
    bool any = false;
    for (int cell = tid; cell < size; cell += kNormaliseThreads) {
      const A own = widen(raw[cell]);
      if (!is_finite(own)) atomicOr(bad, 1);
      const int j = cell / width;
      const int i = cell % width;
      const int64_t ys[2] = {first_of_cell(j, scales.height, scale.height),
                             first_of_cell(j + 1, scales.height, scale.height) - 1};
      const int64_t xs[2] = {first_of_cell(i, scales.width, width), first_of_cell(i + 1, scales.width, width) - 1};
      if (ys[0] > ys[1] || xs[0] > xs[1]) continue;
      // The extremes within a cell are at its corners.
      for (int corner = 0; corner < 4; ++corner) {
        const Tap<A> y = tap_of<A>(ys[corner / 2], scales.height, scale.height);
        const Tap<A> x = tap_of<A>(xs[corner % 2], scales.width, width);
        const T* upper = raw + y.at * width + x.at;
        const T* lower = upper + (y.t != A{0} ? width : 0);
        const int right = x.t != A{0} ? 1 : 0;
        const A value = between(between(widen(upper[0]), widen(upper[right]), x.t),
                                between(widen(lower[0]), widen(lower[right]), x.t), y.t);
        if (!is_finite(value)) atomicOr(bad, 1);
        low = any && low < value ? low : value;
        high = any && high > value ? high : value;
        any = true;
      }
    }
    // Threads without a sample repeat the first thread's that has one: every map has a pixel.
    lows[tid] = any ? low : A(INFINITY);
    highs[tid] = any ? high : A(-INFINITY);
    for (int step = kNormaliseThreads / 2; step > 0; step /= 2) {
      __syncthreads();
      if (tid < step) {
        lows[tid] = lows[tid] < lows[tid + step] ? lows[tid] : lows[tid + step];
        highs[tid] = highs[tid] > highs[tid + step] ? highs[tid] : highs[tid + step];
      }
    }
    __syncthreads();
    low = lows[0];
    const A range = highs[0] - low;
    const bool broken = bad[0] != 0 || !is_finite(range);
    for (int cell = tid; cell < size; cell += kNormaliseThreads) {
      const A share = range == A{0} ? A{0} : scale.weight * ((widen(raw[cell]) - low) / range);
      scale.normalised[map * size + cell] = broken ? A(NAN) : share;
    }
    __syncthreads();
  }
}

template <class T>
struct Fused {
  using A = Acc<T>;
  static constexpr int kSteps = 1;
  static constexpr int kBytes = 0;  // read from memory for a pixel, next to nothing

  FusedScales<A> scales;

  template <bool kLast>
  __device__ void load(int64_t map, int at, int, int end, A (&values)[kSteps][4]) const {
    A(&v)[4] = values[0];
    for (int j = 0; j < 4; ++j) v[j] = 0;
    if (at >= end) return;
    const int first_y = static_cast<int>(static_cast<unsigned>(at) / static_cast<unsigned>(scales.width));
    const int first_x = at - first_y * scales.width;
    for (int s = 0; s < scales.count; ++s) {
      const FusedScale<A>& scale = scales.at[s];
      const A* small = scale.normalised + map * scale.height * scale.width;
      int y = first_y;
      int x = first_x;
      Tap<A> row{};
      int cell = -1;
      A upper_left{}, upper_right{}, lower_left{}, lower_right{};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (at + j >= end) break;
        if (x == scales.width) x = 0, ++y, cell = -1;
        const Tap<A> column = scale.columns[x];
        if (cell != column.at) {
          if (cell < 0) row = scale.rows[y];
          cell = column.at;
          const A* upper = small + row.at * scale.width + cell;
          const A* lower = upper + (row.t != A{0} ? scale.width : 0);
          // The last column has t = 0 throughout and no neighbour.
          const int right = cell + 1 < scale.width ? 1 : 0;
          upper_left = upper[0], upper_right = upper[right];
          lower_left = lower[0], lower_right = lower[right];
        }
        v[j] += between(between(upper_left, upper_right, column.t), between(lower_left, lower_right, column.t), row.t);
        ++x;
      }
    }
    // As a fused map of type T would hold it.
    for (int j = 0; j < 4; ++j) {
      T rounded;
      narrow(v[j], rounded);
      v[j] = widen(rounded);
    }
  }
};

// Normalises the small maps; what comes back reads them.
template <class T>
cudaError_t prepare_fused(const Refine& job, Scratch& scratch, cudaStream_t stream, Fused<T>& fused) {
  using A = Acc<T>;
  const int64_t maps = job.batch * job.channels;
  FusedScales<A>& scales = fused.scales;
  scales.count = static_cast<int>(job.scales.size());
  scales.height = job.height;
  scales.width = job.width;
  for (int s = 0; s < scales.count; ++s) {
    const Scale& from = job.scales[static_cast<size_t>(s)];
    FusedScale<A>& scale = scales.at[s];
    scale.raw = from.maps;
    scale.height = from.height;
    scale.width = from.width;
    scale.weight = static_cast<A>(from.weight);
    scale.normalised = scratch.get_array<A>(maps * from.height * from.width);
    scale.rows = scratch.get_array<Tap<A>>(job.height);
    scale.columns = scratch.get_array<Tap<A>>(job.width);
  }
  const auto kernel = normalise_kernel<T>;
  MOLT_LAUNCH(kernel, dim3(grid_for((maps + 1) * scales.count)), dim3(kNormaliseThreads), stream, scales, maps);
  MOLT_CHECK_LAUNCH();
  return cudaSuccess;
}

}  // namespace molt::cuda
