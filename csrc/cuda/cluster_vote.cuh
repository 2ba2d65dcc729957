#pragma once

#include "quads.cuh"

// The majority label of each segment: votes are counted in a (segments, clusters) table of integers in global memory,
// where no order of counting shows, then each segment takes its winner and each pixel its segment's.
namespace molt::cuda {

constexpr int kVoteThreads = 256;
constexpr int kRunPixels = 8;                        // a thread counts runs of equal votes before it adds them
constexpr int kTile = 8 * kVoteThreads;

struct VoteArguments {
  Labels labels;
  Labels segments;
  void* out;
  int* votes;         // (images, num_segments, num_clusters)
  int64_t* winners;   // (images, num_segments)
  int64_t pixels;
  int64_t num_clusters;
  int64_t num_segments;
  int64_t first_image;
  int64_t images;
};

__device__ inline bool has_vote(const VoteArguments& a, int64_t label, int64_t segment) {
  return label >= 0 && label < a.num_clusters && segment >= 0 && segment < a.num_segments;
}

// The cell of a pixel's vote within its image's table, -1 where a value is out of range.
__device__ inline int64_t vote_of(const VoteArguments& a, int64_t at) {
  const int64_t label = load_label(a.labels, at);
  const int64_t segment = load_label(a.segments, at);
  return has_vote(a, label, segment) ? segment * a.num_clusters + label : -1;
}

__global__ void __launch_bounds__(kVoteThreads) vote_kernel(const VoteArguments a) {
  const int64_t runs = (a.pixels + kRunPixels - 1) / kRunPixels;
  const int64_t stride = int64_t{gridDim.x} * kVoteThreads;
  for (int64_t i = int64_t{blockIdx.x} * kVoteThreads + threadIdx.x; i < a.images * runs; i += stride) {
    const int64_t own = i / runs;
    const int64_t begin = i % runs * kRunPixels;
    const int64_t end = begin + kRunPixels < a.pixels ? begin + kRunPixels : a.pixels;
    const int64_t row = (a.first_image + own) * a.pixels;
    int* votes = a.votes + own * a.num_segments * a.num_clusters;
    int64_t cell = -1;
    int count = 0;
    for (int64_t p = begin; p < end; ++p) {
      const int64_t next = vote_of(a, row + p);
      if (next != cell) {
        if (cell >= 0) atomicAdd(votes + cell, count);
        cell = next;
        count = 0;
      }
      ++count;
    }
    if (cell >= 0) atomicAdd(votes + cell, count);
  }
}

// One warp a segment; the lowest of equal labels wins.
__global__ void __launch_bounds__(kVoteThreads) winner_kernel(const VoteArguments a) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int64_t stride = int64_t{gridDim.x} * (kVoteThreads / 32);
  const int64_t first = int64_t{blockIdx.x} * (kVoteThreads / 32) + threadIdx.x / 32;
  for (int64_t segment = first; segment < a.images * a.num_segments; segment += stride) {
    const int* votes = a.votes + segment * a.num_clusters;
    // Votes above, the label's complement below: the largest key is the winner.
    unsigned long long best = 0;
    for (int64_t k = lane; k < a.num_clusters; k += 32) {
      const unsigned long long key =
          static_cast<unsigned long long>(votes[k]) << 32 | (kNone - static_cast<unsigned>(k));
      best = key > best ? key : best;
    }
    for (int step = 16; step > 0; step /= 2) {
      const unsigned long long other = __shfl_xor_sync(kFull, best, step);
      best = other > best ? other : best;
    }
    if (lane == 0) a.winners[segment] = kNone - static_cast<unsigned>(best);
  }
}

__global__ void __launch_bounds__(kVoteThreads) elect_kernel(const VoteArguments a) {
  const int64_t tiles = (a.pixels + kTile - 1) / kTile;
  for (int64_t tile = blockIdx.x; tile < a.images * tiles; tile += gridDim.x) {
    const int64_t own = tile / tiles;
    const int64_t begin = tile % tiles * kTile;
    const int64_t end = begin + kTile < a.pixels ? begin + kTile : a.pixels;
    const int64_t row = (a.first_image + own) * a.pixels;
    const int64_t* winners = a.winners + own * a.num_segments;
    for (int64_t p = begin + threadIdx.x; p < end; p += kVoteThreads) {
      int64_t label = load_label(a.labels, row + p);
      const int64_t segment = load_label(a.segments, row + p);
      if (has_vote(a, label, segment)) label = winners[segment];
      switch (a.labels.type) {
        case LabelType::uint8:
          static_cast<uint8_t*>(a.out)[row + p] = static_cast<uint8_t>(label);
          break;
        case LabelType::int32:
          static_cast<int32_t*>(a.out)[row + p] = static_cast<int32_t>(label);
          break;
        default:
          static_cast<int64_t*>(a.out)[row + p] = label;
      }
    }
  }
}

// num_clusters * num_segments at most 2^31.
inline cudaError_t run_vote(const Vote& job, Scratch& scratch, cudaStream_t stream) {
  VoteArguments a{};
  a.labels = {job.labels, job.label_type};
  a.segments = {job.segments, job.segment_type};
  a.out = job.out;
  a.pixels = job.pixels;
  a.num_clusters = job.num_clusters;
  a.num_segments = job.num_segments;
  const int64_t cells = job.num_clusters * job.num_segments;
  int64_t chunk = cells > 0 ? scratch.most() / (cells * 4) : job.batch;
  chunk = chunk < 1 ? 1 : chunk < job.batch ? chunk : job.batch;
  a.votes = scratch.get_array<int>(chunk * cells);
  // A segment nobody can vote in has no winner, and nobody asks for it.
  a.winners = scratch.get_array<int64_t>(cells > 0 ? chunk * job.num_segments : 0);
  for (a.first_image = 0; a.first_image < job.batch; a.first_image += chunk) {
    a.images = job.batch - a.first_image < chunk ? job.batch - a.first_image : chunk;
    if (cells > 0) {
      MOLT_CHECK(cudaMemsetAsync(a.votes, 0, static_cast<size_t>(a.images * cells) * sizeof(int), stream));
      const int64_t runs = a.images * divide_up(a.pixels, kRunPixels);
      MOLT_LAUNCH(vote_kernel, dim3(grid_for(divide_up(runs, kVoteThreads))), dim3(kVoteThreads), stream, a);
      MOLT_CHECK_LAUNCH();
      const int64_t warps = a.images * a.num_segments;
      MOLT_LAUNCH(winner_kernel, dim3(grid_for(divide_up(warps, kVoteThreads / 32))), dim3(kVoteThreads), stream, a);
      MOLT_CHECK_LAUNCH();
    }
    const int64_t tiles = a.images * divide_up(a.pixels, kTile);
    MOLT_LAUNCH(elect_kernel, dim3(grid_for(tiles)), dim3(kVoteThreads), stream, a);
    MOLT_CHECK_LAUNCH();
  }
  return cudaSuccess;
}

}  // namespace molt::cuda
