#pragma once

#include "device.cuh"

// Every connected component at every cut of 8-bit maps. One block takes one map and adds its pixels from the highest
// level down. Union-find as in components.cuh: the root is the component's first pixel, so its row is the box's top.
// Each component that a level changes becomes a node, and the nodes it grew from end there. All sums are of integers,
// so no order of threads shows.
namespace molt::cuda {

struct Node {
  int root;
  int area;
  int left;
  int right;
  int bottom;
  int cuts;  // first + 256 * last
};

// Arrays are (maps, pixels) where nothing else is said. A map has no more nodes than pixels above level 0.
struct SweepArguments {
  const uint8_t* levels;
  int* parents;
  int* order;       // pixels above 0 from the highest level down; where they are done with, roots just absorbed
  int* slots;       // at roots: the component's node
  unsigned* marks;  // (maps, words): a bit a pixel; null where they are in shared memory
  Node* nodes;      // by last cut from the highest, then by root
  int* counts;      // (maps): nodes
  int64_t first_map;
  int64_t maps;
  int pixels;
  int words;
  int width;
  bool diagonal;
};

// Threads of a block, blocks that an SM is to hold at least, words of marks in shared memory.
struct SmallMap {
  static constexpr int kThreads = 64;
  static constexpr int kBlocks = 16;
  static constexpr int kMarks = 64;
};
struct MiddleMap {
  static constexpr int kThreads = 512;
  static constexpr int kBlocks = 2;
  static constexpr int kMarks = 2048;
};
struct LargeMap {
  static constexpr int kThreads = 1024;
  static constexpr int kBlocks = 1;
  static constexpr int kMarks = 0;
};

constexpr int kBins = 256;  // the last is level 0, which no cut keeps
constexpr int kWordsEach = 4;

template <class T>
__device__ inline T scan_warp(T value) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int step = 1; step < 32; step *= 2) {
    const T other = __shfl_sync(kFull, value, lane - step);
    if (lane >= step) value += other;
  }
  return value;
}

// The sum of `value` over the threads before this one, and over all. `sums` holds a number a warp and must not be used
// again before another barrier.
template <int kThreads, class T>
__device__ inline T scan_block(T value, T* sums, T& total) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp = static_cast<int>(threadIdx.x / 32);
  const T upto = scan_warp(value);
  if (lane == 31) sums[warp] = upto;
  __syncthreads();
  const T own = lane < kThreads / 32 ? sums[lane] : T{0};
  const T warps = scan_warp(own);
  total = __shfl_sync(kFull, warps, 31);
  return upto - value + __shfl_sync(kFull, warps - own, warp);
}

__device__ inline int lower(int one, int other) { return one < other ? one : other; }
__device__ inline int higher(int one, int other) { return one < other ? other : one; }

// One map within its block.
struct SweptMap {
  const uint8_t* levels;
  int* parents;
  int* order;
  int* slots;
  Node* nodes;
  int pixels;
  int width;

  // Links on the way are shortened. Only atomics write links, and only towards lower pixels of the same component.
  __device__ int root_of(int pixel) const {
    int next = __ldcg(parents + pixel);
    while (next != pixel) {
      const int beyond = __ldcg(parents + next);
      if (beyond != next) atomicMin(parents + pixel, beyond);
      pixel = next;
      next = beyond;
    }
    return pixel;
  }

  // Links the higher root to the lower. Who ends a root of an earlier level, lists it: its node has to be added up.
  __device__ void join(int one, int other, int level, int* absorbed) const {
    one = root_of(one);
    other = root_of(other);
    while (one != other) {
      if (one < other) {
        const int swap = one;
        one = other;
        other = swap;
      }
      const int before = atomicMin(parents + one, other);
      if (before == one) {
        if (__ldg(levels + one) > level) order[atomicAdd(absorbed, 1)] = one;
        return;
      }
      one = before;
    }
  }

  // Joins a new pixel to its kept neighbours. Of two pixels of one level the later does it. A vertical step is left out
  // where the two pixels to the left are kept, a diagonal one where a pixel beside it is: others join these anyway.
  __device__ void join_neighbours(int p, int level, bool diagonal, int* absorbed) const {
    const int x = p % width;
    const bool has_left = x > 0;
    const bool has_right = x + 1 < width;
    const bool has_up = p >= width;
    const bool has_down = p < pixels - width;
    const auto at = [&](bool there, int pixel) { return there ? static_cast<int>(__ldg(levels + pixel)) : -1; };
    const int left = at(has_left, p - 1);
    const int right = at(has_right, p + 1);
    const int up = at(has_up, p - width);
    const int down = at(has_down, p + width);
    const int up_left = at(has_up && has_left, p - width - 1);
    const int down_left = at(has_down && has_left, p + width - 1);
    if (left >= level) join(p, p - 1, level, absorbed);
    if (right > level) join(p, p + 1, level, absorbed);
    if (up >= level && !(left >= level && up_left >= level)) join(p, p - width, level, absorbed);
    if (down > level && !(left >= level && down_left >= level)) join(p, p + width, level, absorbed);
    if (!diagonal) return;
    const int up_right = at(has_up && has_right, p - width + 1);
    const int down_right = at(has_down && has_right, p + width + 1);
    if (up_left >= level && up < level && left < level) join(p, p - width - 1, level, absorbed);
    if (up_right >= level && up < level && right < level) join(p, p - width + 1, level, absorbed);
    if (down_left > level && down < level && left < level) join(p, p + width - 1, level, absorbed);
    if (down_right > level && down < level && right < level) join(p, p + width + 1, level, absorbed);
  }

  __device__ void end(Node* node, int level) const { node->cuts = __ldcg(&node->cuts) | level; }

  __device__ void add(Node* to, int area, int left, int right, int bottom) const {
    atomicAdd(&to->area, area);
    atomicMin(&to->left, left);
    atomicMax(&to->right, right);
    atomicMax(&to->bottom, bottom);
  }

  // A changed component's new node, which goes on from its root's old one.
  __device__ void open(int root, int slot, int level) const {
    Node node{root, 0, width, 0, 0, (level - 1) * 256};
    if (__ldg(levels + root) > level) {
      Node* old = nodes + slots[root];
      node.area = __ldcg(&old->area);
      node.left = __ldcg(&old->left);
      node.right = __ldcg(&old->right);
      node.bottom = __ldcg(&old->bottom);
      end(old, level);
    }
    nodes[slot] = node;
    slots[root] = slot;
  }

  // Adds the pixels of a warp, -1 where a lane has none, to their components' nodes. Where all go to one, as in smooth
  // maps, one lane does it for all: atomics at one address wait for each other.
  __device__ void add_pixels(int p) const {
    const int slot = p < 0 ? -1 : slots[__ldcg(parents + p)];
    const unsigned there = __ballot_sync(kFull, slot >= 0);
    const int leader = __ffs(static_cast<int>(there)) - 1;
    const int common = __shfl_sync(kFull, slot, leader);
    const bool mixed = __any_sync(kFull, slot >= 0 && slot != common);
    int left = p < 0 ? width : p % width;
    int right = p < 0 ? 0 : left + 1;
    int bottom = p < 0 ? 0 : p / width + 1;
    if (mixed) {
      if (slot >= 0) add(nodes + slot, 1, left, right, bottom);
      return;
    }
    for (int step = 16; step > 0; step /= 2) {
      left = lower(left, __shfl_xor_sync(kFull, left, step));
      right = higher(right, __shfl_xor_sync(kFull, right, step));
      bottom = higher(bottom, __shfl_xor_sync(kFull, bottom, step));
    }
    if (static_cast<int>(threadIdx.x % 32) == leader) add(nodes + slot, __popc(there), left, right, bottom);
  }

  __device__ void add_absorbed(int root, int level) const {
    Node* from = nodes + slots[root];
    add(nodes + slots[root_of(root)], __ldcg(&from->area), __ldcg(&from->left), __ldcg(&from->right),
        __ldcg(&from->bottom));
    end(from, level);
  }
};

// Lists the pixels above 0 by level; starts[b] is where those of level 255 - b begin.
template <class Size>
__device__ inline void sort_pixels(const SweptMap& map, int* starts, int* cursors, int* sums) {
  const int thread = static_cast<int>(threadIdx.x);
  const unsigned lane = threadIdx.x % 32;
  for (int b = thread; b < kBins; b += Size::kThreads) cursors[b] = 0;
  __syncthreads();
  for (int pass = 0; pass < 2; ++pass) {
    const bool list = pass == 1;
    for (int base = 0; base < map.pixels; base += Size::kThreads) {
      const int p = base + thread;
      const int bin = p < map.pixels ? kBins - 1 - __ldg(map.levels + p) : kBins - 1;
      // One atomic for all pixels of a level that the warp holds.
      const unsigned same = __match_any_sync(kFull, bin);
      const int leader = __ffs(static_cast<int>(same)) - 1;
      int at = 0;
      if (static_cast<int>(lane) == leader && bin < kBins - 1) at = atomicAdd(cursors + bin, __popc(same));
      if (!list) continue;
      at = __shfl_sync(kFull, at, leader) + __popc(same & ((1u << lane) - 1));
      if (bin < kBins - 1) map.order[at] = p;
    }
    __syncthreads();
    if (list) break;
    int begin = 0;
    for (int base = 0; base < kBins; base += Size::kThreads) {
      const int b = base + thread;
      const int count = b < kBins ? cursors[b] : 0;
      int total = 0;
      const int before = begin + scan_block<Size::kThreads>(count, sums + base / Size::kThreads % 2 * 32, total);
      if (b < kBins) starts[b] = cursors[b] = before;
      begin += total;
    }
    __syncthreads();
  }
}

template <class Size>
__global__ void __launch_bounds__(Size::kThreads, Size::kBlocks) sweep_kernel(const SweepArguments a) {
  MOLT_SHARED(int, starts, kBins);
  MOLT_SHARED(int, cursors, kBins);
  MOLT_SHARED(int, sums, 64);
  MOLT_SHARED(int, absorbed, 2);
  MOLT_SHARED(unsigned, shared_marks, Size::kMarks > 0 ? Size::kMarks : 1);
  const int64_t offset = int64_t{blockIdx.x} * a.pixels;
  const SweptMap map{a.levels + a.first_map * a.pixels + offset,
                     a.parents + offset,
                     a.order + offset,
                     a.slots + offset,
                     a.nodes + offset,
                     a.pixels,
                     a.width};
  unsigned* const marks = Size::kMarks > 0 ? shared_marks : a.marks + int64_t{blockIdx.x} * a.words;
  const int thread = static_cast<int>(threadIdx.x);
  for (int p = thread; p < a.pixels; p += Size::kThreads) map.parents[p] = p;
  for (int w = thread; w < a.words; w += Size::kThreads) marks[w] = 0;
  if (thread < 2) absorbed[thread] = 0;
  sort_pixels<Size>(map, starts, cursors, sums);

  int nodes = 0;
  int round = 0;
  for (int b = 0; b < kBins - 1; ++b) {
    const int level = kBins - 1 - b;
    const int begin = starts[b];
    const int end = starts[b + 1];
    if (begin == end) continue;
    int* const gone = absorbed + round % 2;
    for (int i = begin + thread; i < end; i += Size::kThreads) {
      map.join_neighbours(map.order[i], level, a.diagonal, gone);
    }
    __syncthreads();

    for (int i = begin + thread; i < end; i += Size::kThreads) {
      const int p = map.order[i];
      const int root = map.root_of(p);
      if (root != p) atomicMin(map.parents + p, root);
      atomicOr(marks + root / 32, 1u << (root % 32));
    }
    __syncthreads();

    // Roots in reading order get the next nodes.
    int turn = 0;
    for (int base = 0; base < a.words; base += Size::kThreads * kWordsEach, ++turn) {
      const int own = base + thread * kWordsEach;
      unsigned bits[kWordsEach];
      int count = 0;
#pragma unroll
      for (int i = 0; i < kWordsEach; ++i) {
        bits[i] = 0;
        if (own + i >= a.words) continue;
        bits[i] = Size::kMarks > 0 ? marks[own + i] : __ldcg(marks + own + i);
        if (bits[i] != 0) marks[own + i] = 0;
        count += __popc(bits[i]);
      }
      int total = 0;
      int slot = nodes + scan_block<Size::kThreads>(count, sums + turn % 2 * 32, total);
#pragma unroll
      for (int i = 0; i < kWordsEach; ++i) {
        for (unsigned left = bits[i]; left != 0; left &= left - 1) {
          map.open((own + i) * 32 + __ffs(static_cast<int>(left)) - 1, slot++, level);
        }
      }
      nodes += total;
    }
    if (thread == 0) absorbed[(round + 1) % 2] = 0;
    __syncthreads();

    for (int i = begin + thread; i - thread % 32 < end; i += Size::kThreads) {
      map.add_pixels(i < end ? map.order[i] : -1);
    }
    for (int i = thread; i < *gone; i += Size::kThreads) map.add_absorbed(map.order[i], level);
    __syncthreads();
    ++round;
  }
  if (thread == 0) a.counts[blockIdx.x] = nodes;
}

}  // namespace molt::cuda
