#pragma once

#include <vector>

#include "sweep.cuh"

// Launches the sweep, and makes of its nodes what is asked for.
namespace molt::cuda {

constexpr int kRowThreads = 256;
constexpr int kScanThreads = 1024;

struct SweptRow {
  Node node;
  int64_t map;
};

// The largest component at every cut. It is the largest of all nodes begun so far: one that has ended lies within a
// larger one.
__global__ void __launch_bounds__(kRowThreads) sweep_largest_kernel(
    const SweepArguments a, float* boxes, double* area) {
  // Of the nodes that begin at a cut: area above, complement of the number below. Numbers follow the roots.
  MOLT_SHARED(unsigned long long, best, kBins);
  const int thread = static_cast<int>(threadIdx.x);
  const Node* nodes = a.nodes + int64_t{blockIdx.x} * a.pixels;
  const int count = a.counts[blockIdx.x];
  for (int c = thread; c < kBins; c += kRowThreads) best[c] = 0;
  __syncthreads();
  for (int i = thread; i < count; i += kRowThreads) {
    const auto rank = static_cast<unsigned long long>(nodes[i].area) << 32 | (kFull - static_cast<unsigned>(i));
    atomicMax(best + nodes[i].cuts / 256, rank);
  }
  __syncthreads();
  const int64_t row = (a.first_map + blockIdx.x) * (kBins - 1);
  for (int cut = thread; cut < kBins - 1; cut += kRowThreads) {
    Node node{0, 0, 0, 0, 0, 0};
    for (int c = cut; c < kBins - 1; ++c) {
      const int size = static_cast<int>(best[c] >> 32);
      if (size == 0 || size < node.area) continue;
      const Node& other = nodes[kFull - static_cast<unsigned>(best[c])];
      if (size > node.area || other.root < node.root) node = other;
    }
    float* box = boxes + (row + cut) * 4;
    box[0] = static_cast<float>(node.left);
    box[1] = static_cast<float>(node.root / a.width);
    box[2] = static_cast<float>(node.right);
    box[3] = static_cast<float>(node.bottom);
    area[row + cut] = node.area;
  }
}

// Where each map's rows begin, and after the last map's how many there are. One block.
__global__ void __launch_bounds__(kScanThreads) sweep_offsets_kernel(
    const int* counts, int64_t maps, long long* offsets) {
  MOLT_SHARED(long long, sums, 64);
  long long begin = 0;
  int turn = 0;
  for (int64_t base = 0; base < maps; base += kScanThreads, ++turn) {
    const int64_t map = base + threadIdx.x;
    long long total = 0;
    const long long count = map < maps ? counts[map] : 0;
    const long long before = begin + scan_block<kScanThreads>(count, sums + turn % 2 * 32, total);
    if (map < maps) offsets[map] = before;
    begin += total;
  }
  if (threadIdx.x == 0) offsets[maps] = begin;
}

__global__ void __launch_bounds__(kRowThreads) sweep_gather_kernel(
    const SweepArguments a, const long long* offsets, SweptRow* rows) {
  const Node* nodes = a.nodes + int64_t{blockIdx.x} * a.pixels;
  const int count = a.counts[blockIdx.x];
  SweptRow* own = rows + offsets[blockIdx.x];
  for (int i = static_cast<int>(threadIdx.x); i < count; i += kRowThreads) {
    own[i] = {nodes[i], a.first_map + blockIdx.x};
  }
}

__global__ void __launch_bounds__(kRowThreads) sweep_write_kernel(
    const SweptRow* rows, int64_t count, int64_t channels, int width, const SweptBoxes to) {
  for (int64_t i = int64_t{blockIdx.x} * kRowThreads + threadIdx.x; i < count; i += int64_t{gridDim.x} * kRowThreads) {
    const Node node = rows[i].node;
    to.boxes[4 * i] = static_cast<float>(node.left);
    to.boxes[4 * i + 1] = static_cast<float>(node.root / width);
    to.boxes[4 * i + 2] = static_cast<float>(node.right);
    to.boxes[4 * i + 3] = static_cast<float>(node.bottom);
    to.area[i] = node.area;
    to.first[i] = node.cuts % 256;
    to.last[i] = node.cuts / 256;
    to.image[i] = rows[i].map / channels;
    to.channel[i] = rows[i].map % channels;
  }
}

template <class Size>
cudaError_t sweep_chunk(const SweepArguments& a, cudaStream_t stream) {
  MOLT_LAUNCH(sweep_kernel<Size>, dim3(static_cast<unsigned>(a.maps)), dim3(Size::kThreads), stream, a);
  MOLT_CHECK_LAUNCH();
  return cudaSuccess;
}

// Sweeps chunk after chunk of maps, as many as have room for their nodes, and gives each to `use`.
template <class Use>
cudaError_t for_each_swept(const Sweep& job, Scratch& scratch, cudaStream_t stream, Use use) {
  SweepArguments a{};
  a.levels = job.levels;
  a.pixels = job.height * job.width;
  a.words = static_cast<int>(divide_up(a.pixels, 32));
  a.width = job.width;
  a.diagonal = job.connectivity == 8;
  const int64_t maps = job.batch * job.channels;
  const int64_t fit = scratch.most() / (a.pixels * static_cast<int64_t>(sizeof(Node)));
  const int64_t chunk = fit < 1 ? 1 : fit < maps ? fit : maps;
  a.parents = scratch.get_array<int>(chunk * a.pixels);
  a.order = scratch.get_array<int>(chunk * a.pixels);
  a.slots = scratch.get_array<int>(chunk * a.pixels);
  a.nodes = scratch.get_array<Node>(chunk * a.pixels);
  a.counts = scratch.get_array<int>(chunk);
  if (a.words > MiddleMap::kMarks) a.marks = scratch.get_array<unsigned>(chunk * a.words);
  for (a.first_map = 0; a.first_map < maps; a.first_map += chunk) {
    a.maps = maps - a.first_map < chunk ? maps - a.first_map : chunk;
    if (a.words <= SmallMap::kMarks) {
      MOLT_CHECK(sweep_chunk<SmallMap>(a, stream));
    } else if (a.words <= MiddleMap::kMarks) {
      MOLT_CHECK(sweep_chunk<MiddleMap>(a, stream));
    } else {
      MOLT_CHECK(sweep_chunk<LargeMap>(a, stream));
    }
    MOLT_CHECK(use(a));
  }
  return cudaSuccess;
}

inline cudaError_t run_largest_at_cuts(
    const Sweep& job, float* boxes, double* area, Scratch& scratch, cudaStream_t stream) {
  return for_each_swept(job, scratch, stream, [&](const SweepArguments& a) {
    const dim3 grid(static_cast<unsigned>(a.maps));
    MOLT_LAUNCH(sweep_largest_kernel, grid, dim3(kRowThreads), stream, a, boxes, area);
    MOLT_CHECK_LAUNCH();
    return cudaSuccess;
  });
}

inline cudaError_t run_list_swept(
    const Sweep& job, std::vector<SweptChunk>& found, Scratch& scratch, cudaStream_t stream) {
  long long* offsets = nullptr;
  return for_each_swept(job, scratch, stream, [&](const SweepArguments& a) -> cudaError_t {
    // The first chunk is the largest.
    if (offsets == nullptr) offsets = scratch.get_array<long long>(a.maps + 1);
    MOLT_LAUNCH(sweep_offsets_kernel, dim3(1), dim3(kScanThreads), stream, a.counts, a.maps, offsets);
    MOLT_CHECK_LAUNCH();
    long long count = 0;
    MOLT_CHECK(cudaMemcpyAsync(&count, offsets + a.maps, sizeof(count), cudaMemcpyDeviceToHost, stream));
    MOLT_CHECK(cudaStreamSynchronize(stream));
    if (count == 0) return cudaSuccess;
    auto* rows = scratch.get_array<SweptRow>(count);
    const dim3 grid(static_cast<unsigned>(a.maps));
    MOLT_LAUNCH(sweep_gather_kernel, grid, dim3(kRowThreads), stream, a, offsets, rows);
    MOLT_CHECK_LAUNCH();
    found.push_back({rows, count});
    return cudaSuccess;
  });
}

inline cudaError_t run_write_swept(
    const Sweep& job, const std::vector<SweptChunk>& found, SweptBoxes to, cudaStream_t stream) {
  for (const SweptChunk& chunk : found) {
    const dim3 grid(grid_for(divide_up(chunk.count, kRowThreads)));
    const auto* rows = static_cast<const SweptRow*>(chunk.rows);
    MOLT_LAUNCH(sweep_write_kernel, grid, dim3(kRowThreads), stream, rows, chunk.count, job.channels, job.width, to);
    MOLT_CHECK_LAUNCH();
    to = {to.boxes + 4 * chunk.count, to.area + chunk.count,  to.first + chunk.count,
          to.last + chunk.count,      to.image + chunk.count, to.channel + chunk.count};
  }
  return cudaSuccess;
}

}  // namespace molt::cuda
