#pragma once

#include <algorithm>
#include <vector>

#include "device.cuh"

// Connected components by union-find: every pixel points to a pixel of its component with a lower number, in the end to
// the lowest, the root. Areas, boxes and sums are added up at the root with integer atomics, so no order shows.
namespace molt::cuda {

constexpr int kPixelThreads = 256;
constexpr double kFixed = 4294967296.0;  // value / maximum is in (0, 1]; 2^32 times it, summed over 2^30 pixels, fits

// What a root gathers.
struct Gathered {
  unsigned long long sum;
  int area;
  int left;
  int right;
  int bottom;
};

struct ComponentArguments {
  const void* values;
  unsigned long long* peaks;    // (maps): bits of the largest positive value in float64, kNoPeak with a NaN
  int* parents;                 // (maps, pixels), -1 for background
  Gathered* gathered;           // (maps, pixels), at roots only
  unsigned long long* largest;  // (maps): area above, complement of the root below
  unsigned long long* found;    // number of components met
  Component* list;              // null: only counted
  int64_t first_map;
  int64_t maps;
  int pixels;
  int width;
  double threshold;
  bool diagonal;
  bool largest_only;
};

constexpr unsigned long long kNoPeak = ~0ull;

__device__ inline double peak_of(unsigned long long bits) {
  return __longlong_as_double(static_cast<long long>(bits));
}

// Warps stride over chunks of 32 neighbouring pixels of one map. What fits the scratch, or a single map, has fewer than
// 2^26 chunks.
__device__ inline unsigned chunks_of(const ComponentArguments& a) { return (static_cast<unsigned>(a.pixels) + 31) / 32; }
__device__ inline unsigned all_chunks(const ComponentArguments& a) {
  return static_cast<unsigned>(a.maps) * chunks_of(a);
}
__device__ inline unsigned first_chunk() { return blockIdx.x * (kPixelThreads / 32) + threadIdx.x / 32; }
__device__ inline unsigned chunk_stride() { return gridDim.x * (kPixelThreads / 32); }

struct Place {
  int64_t map;
  int index;  // the thread's pixel, or one beyond the map
  bool inside;
};

__device__ inline Place place_of(const ComponentArguments& a, unsigned chunk) {
  const unsigned chunks = chunks_of(a);
  const int index = static_cast<int>(chunk % chunks * 32 + threadIdx.x % 32);
  return {chunk / chunks, index, index < a.pixels};
}

template <class T>
__device__ inline double value_at(const ComponentArguments& a, const Place& place) {
  const T* row = static_cast<const T*>(a.values) + (a.first_map + place.map) * a.pixels;
  return static_cast<double>(widen(row[place.index]));
}

// Runs of kept neighbours in one row and chunk, as masks of lanes. All 32 lanes come here together.
struct Runs {
  unsigned begins;
  unsigned ends;

  __device__ int first(int lane) const { return 31 - __clz(static_cast<int>(begins & (kFull >> (31 - lane)))); }
  __device__ int last(int lane) const { return __ffs(static_cast<int>(ends & (kFull << lane))) - 1; }
};

__device__ inline Runs runs_of(const ComponentArguments& a, const Place& place, bool kept) {
  const unsigned foreground = __ballot_sync(kFull, kept);
  const unsigned row_starts = __ballot_sync(kFull, place.index % a.width == 0);
  const unsigned begins = foreground & (~(foreground << 1) | row_starts);
  return {begins, foreground & (~(foreground >> 1) | (begins >> 1))};
}

template <class T>
__global__ void __launch_bounds__(kPixelThreads) peak_kernel(const ComponentArguments a) {
  for (unsigned chunk = first_chunk(); chunk < all_chunks(a); chunk += chunk_stride()) {
    const Place place = place_of(a, chunk);
    unsigned long long key = 0;
    if (place.inside) {
      const double value = value_at<T>(a, place);
      // Bits of positive numbers are in the numbers' order.
      key = value > 0 ? static_cast<unsigned long long>(__double_as_longlong(value)) : value == value ? 0 : kNoPeak;
    }
    for (int step = 16; step > 0; step /= 2) {
      const unsigned long long other = __shfl_xor_sync(kFull, key, step);
      key = other > key ? other : key;
    }
    if (threadIdx.x % 32 == 0 && key > __ldcg(a.peaks + place.map)) atomicMax(a.peaks + place.map, key);
  }
}

// Kept pixels point to the first of their run.
template <class T>
__global__ void __launch_bounds__(kPixelThreads) run_kernel(const ComponentArguments a) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (unsigned chunk = first_chunk(); chunk < all_chunks(a); chunk += chunk_stride()) {
    const Place place = place_of(a, chunk);
    bool kept = false;
    if (place.inside) {
      const unsigned long long peak = a.peaks[place.map];
      const double value = value_at<T>(a, place);
      kept = peak != kNoPeak && value > 0 && value >= a.threshold * peak_of(peak);
    }
    const Runs runs = runs_of(a, place, kept);
    if (place.inside) {
      a.parents[place.map * a.pixels + place.index] = kept ? place.index - (lane - runs.first(lane)) : -1;
    }
  }
}

__device__ inline int find_root(const int* parents, int pixel) {
  int next = __ldcg(parents + pixel);
  while (next != pixel) {
    pixel = next;
    next = __ldcg(parents + pixel);
  }
  return pixel;
}

// Links the higher root to the lower; where another thread was faster, goes on with what it put there.
__device__ inline void unite(int* parents, int one, int other) {
  one = find_root(parents, one);
  other = find_root(parents, other);
  while (one != other) {
    if (one < other) {
      const int swap = one;
      one = other;
      other = swap;
    }
    const int before = atomicMin(parents + one, other);
    if (before == one) return;
    one = before;
  }
}

// Joins runs that touch. A pixel leaves to its left neighbour what that one joins anyway.
__global__ void __launch_bounds__(kPixelThreads) unite_kernel(const ComponentArguments a) {
  for (unsigned chunk = first_chunk(); chunk < all_chunks(a); chunk += chunk_stride()) {
    const Place place = place_of(a, chunk);
    if (!place.inside) continue;
    int* parents = a.parents + place.map * a.pixels;
    const int p = place.index;
    if (parents[p] < 0) continue;
    const int x = p % a.width;
    const bool left = x > 0 && parents[p - 1] >= 0;
    if (left && p % 32 == 0) unite(parents, p, p - 1);
    if (p < a.width) continue;
    const int up = p - a.width;
    const bool up_left = x > 0 && parents[up - 1] >= 0;
    if (parents[up] >= 0) {
      if (!(left && up_left)) unite(parents, p, up);
      continue;
    }
    if (!a.diagonal) continue;
    if (up_left && !left) unite(parents, p, up - 1);
    if (x + 1 < a.width && parents[up + 1] >= 0 && parents[p + 1] < 0) unite(parents, p, up + 1);
  }
}

__global__ void __launch_bounds__(kPixelThreads) flatten_kernel(const ComponentArguments a) {
  for (unsigned chunk = first_chunk(); chunk < all_chunks(a); chunk += chunk_stride()) {
    const Place place = place_of(a, chunk);
    if (!place.inside) continue;
    int* parents = a.parents + place.map * a.pixels;
    if (parents[place.index] < 0) continue;
    const int root = find_root(parents, place.index);
    parents[place.index] = root;
    if (root == place.index) a.gathered[place.map * a.pixels + root] = {0, 0, a.width, 0, 0};
  }
}

template <class T>
__global__ void __launch_bounds__(kPixelThreads) gather_kernel(const ComponentArguments a) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (unsigned chunk = first_chunk(); chunk < all_chunks(a); chunk += chunk_stride()) {
    const Place place = place_of(a, chunk);
    const int root = place.inside ? a.parents[place.map * a.pixels + place.index] : -1;
    const bool kept = root >= 0;
    const Runs runs = runs_of(a, place, kept);
    unsigned long long sum = 0;
    if (kept) {
      const double peak = peak_of(a.peaks[place.map]);
      const double share = peak < INFINITY ? value_at<T>(a, place) / peak : 1.0;
      sum = static_cast<unsigned long long>(share * kFixed + 0.5);
    }
    const int last = kept ? runs.last(lane) : lane;
    for (int step = 1; step < 32; step *= 2) {
      const unsigned long long other = __shfl_down_sync(kFull, sum, step);
      if (lane + step <= last) sum += other;
    }
    if (!kept || runs.first(lane) != lane) continue;
    Gathered* total = a.gathered + place.map * a.pixels + root;
    const int x = place.index % a.width;
    atomicAdd(&total->sum, sum);
    atomicAdd(&total->area, last - lane + 1);
    atomicMin(&total->left, x);
    atomicMax(&total->right, x + last - lane + 1);
    atomicMax(&total->bottom, place.index / a.width + 1);
  }
}

__device__ inline unsigned long long rank_of(int area, int root) {
  return static_cast<unsigned long long>(area) << 32 | (kFull - static_cast<unsigned>(root));
}

// The largest component of each map, of equals the one met first.
__global__ void __launch_bounds__(kPixelThreads) largest_kernel(const ComponentArguments a) {
  for (unsigned chunk = first_chunk(); chunk < all_chunks(a); chunk += chunk_stride()) {
    const Place place = place_of(a, chunk);
    if (!place.inside) continue;
    const int64_t at = place.map * a.pixels + place.index;
    if (a.parents[at] == place.index) atomicMax(a.largest + place.map, rank_of(a.gathered[at].area, place.index));
  }
}

__device__ inline Component component_at(const ComponentArguments& a, int64_t map, int root) {
  const Gathered& from = a.gathered[map * a.pixels + root];
  const double mean = static_cast<double>(from.sum) / kFixed / from.area * peak_of(a.peaks[map]);
  return {{static_cast<float>(from.left), static_cast<float>(root / a.width), static_cast<float>(from.right),
           static_cast<float>(from.bottom)},
          static_cast<float>(mean), root, from.area, a.first_map + map};
}

// Lists components in an order that chance decides; the host sorts them.
__global__ void __launch_bounds__(kPixelThreads) list_kernel(const ComponentArguments a) {
  for (unsigned chunk = first_chunk(); chunk < all_chunks(a); chunk += chunk_stride()) {
    const Place place = place_of(a, chunk);
    if (!place.inside) continue;
    const int64_t at = place.map * a.pixels + place.index;
    if (a.parents[at] != place.index) continue;
    if (a.largest_only && a.largest[place.map] != rank_of(a.gathered[at].area, place.index)) continue;
    const unsigned long long slot = atomicAdd(a.found, 1ull);
    if (a.list != nullptr) a.list[slot] = component_at(a, place.map, place.index);
  }
}

__global__ void __launch_bounds__(kPixelThreads) box_kernel(
    const ComponentArguments a, float* boxes, int64_t* area, float* mean) {
  const int64_t map = int64_t{blockIdx.x} * kPixelThreads + threadIdx.x;
  if (map >= a.maps) return;
  Component found{};
  if (a.largest[map] != 0) {
    found = component_at(a, map, static_cast<int>(kFull - static_cast<unsigned>(a.largest[map])));
  }
  const int64_t at = a.first_map + map;
  for (int i = 0; i < 4; ++i) boxes[at * 4 + i] = found.box[i];
  area[at] = found.area;
  mean[at] = found.mean;
}

// From maps to components at their roots.
template <class T>
cudaError_t label_chunk(const ComponentArguments& a, cudaStream_t stream) {
  const size_t bytes = static_cast<size_t>(a.largest + a.maps - a.peaks) * sizeof(unsigned long long);
  MOLT_CHECK(cudaMemsetAsync(a.peaks, 0, bytes, stream));
  const dim3 grid(grid_for(a.maps * divide_up(divide_up(a.pixels, 32), kPixelThreads / 32)));
  const dim3 block(kPixelThreads);
  MOLT_LAUNCH(peak_kernel<T>, grid, block, stream, a);
  MOLT_CHECK_LAUNCH();
  MOLT_LAUNCH(run_kernel<T>, grid, block, stream, a);
  MOLT_CHECK_LAUNCH();
  MOLT_LAUNCH(unite_kernel, grid, block, stream, a);
  MOLT_CHECK_LAUNCH();
  MOLT_LAUNCH(flatten_kernel, grid, block, stream, a);
  MOLT_CHECK_LAUNCH();
  MOLT_LAUNCH(gather_kernel<T>, grid, block, stream, a);
  MOLT_CHECK_LAUNCH();
  if (a.largest_only) {
    MOLT_LAUNCH(largest_kernel, grid, block, stream, a);
    MOLT_CHECK_LAUNCH();
  }
  return cudaSuccess;
}

inline cudaError_t label_chunk(MapType type, const ComponentArguments& a, cudaStream_t stream) {
  switch (type) {
    case MapType::float16:
      return label_chunk<half>(a, stream);
    case MapType::bfloat16:
      return label_chunk<bfloat16>(a, stream);
    case MapType::float32:
      return label_chunk<float>(a, stream);
    default:
      return label_chunk<double>(a, stream);
  }
}

// Labels chunk after chunk of maps and gives each to `use`.
template <class Use>
cudaError_t for_each_chunk(const Components& job, bool largest_only, Scratch& scratch, cudaStream_t stream, Use use) {
  ComponentArguments a{};
  a.values = job.maps;
  a.pixels = job.height * job.width;
  a.width = job.width;
  a.threshold = job.threshold;
  a.diagonal = job.connectivity == 8;
  a.largest_only = largest_only;
  const int64_t maps = job.batch * job.channels;
  const int64_t each = a.pixels * static_cast<int64_t>(sizeof(int) + sizeof(Gathered));
  int64_t chunk = scratch.most() / each;
  chunk = chunk < 1 ? 1 : chunk < maps ? chunk : maps;
  a.peaks = scratch.get_array<unsigned long long>(2 * chunk);
  a.largest = a.peaks + chunk;
  a.found = scratch.get_array<unsigned long long>(1);
  a.parents = scratch.get_array<int>(chunk * a.pixels);
  a.gathered = scratch.get_array<Gathered>(chunk * a.pixels);
  for (a.first_map = 0; a.first_map < maps; a.first_map += chunk) {
    a.maps = maps - a.first_map < chunk ? maps - a.first_map : chunk;
    MOLT_CHECK(label_chunk(job.type, a, stream));
    MOLT_CHECK(use(a));
  }
  return cudaSuccess;
}

inline cudaError_t run_largest_box(
    const Components& job, float* boxes, int64_t* area, float* mean, Scratch& scratch, cudaStream_t stream) {
  return for_each_chunk(job, true, scratch, stream, [&](const ComponentArguments& a) {
    const dim3 grid(static_cast<unsigned>(divide_up(a.maps, kPixelThreads)));
    MOLT_LAUNCH(box_kernel, grid, dim3(kPixelThreads), stream, a, boxes, area, mean);
    MOLT_CHECK_LAUNCH();
    return cudaSuccess;
  });
}

inline cudaError_t run_list_components(
    const Components& job, bool largest, std::vector<Component>& found, Scratch& scratch, cudaStream_t stream) {
  const auto add = [&](ComponentArguments a) -> cudaError_t {
    const dim3 grid(grid_for(a.maps * divide_up(divide_up(a.pixels, 32), kPixelThreads / 32)));
    unsigned long long count = 0;
    for (const bool write : {false, true}) {
      if (write && count == 0) break;
      if (write) a.list = scratch.get_array<Component>(static_cast<int64_t>(count));
      MOLT_CHECK(cudaMemsetAsync(a.found, 0, sizeof(count), stream));
      MOLT_LAUNCH(list_kernel, grid, dim3(kPixelThreads), stream, a);
      MOLT_CHECK_LAUNCH();
      if (!write) {
        MOLT_CHECK(cudaMemcpyAsync(&count, a.found, sizeof(count), cudaMemcpyDeviceToHost, stream));
        MOLT_CHECK(cudaStreamSynchronize(stream));
      }
    }
    if (count == 0) return cudaSuccess;
    const size_t before = found.size();
    found.resize(before + count);
    MOLT_CHECK(
        cudaMemcpyAsync(&found[before], a.list, count * sizeof(Component), cudaMemcpyDeviceToHost, stream));
    return cudaStreamSynchronize(stream);
  };
  MOLT_CHECK(for_each_chunk(job, largest, scratch, stream, add));
  std::sort(found.begin(), found.end(), [](const Component& one, const Component& other) {
    if (one.map != other.map) return one.map < other.map;
    return one.area != other.area ? one.area > other.area : one.root < other.root;
  });
  return cudaSuccess;
}

}  // namespace molt::cuda
