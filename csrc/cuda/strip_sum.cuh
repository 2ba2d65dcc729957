#pragma once

#include "quads.cuh"

// Sums and counts of the clusters of one strip, by one block, in an order that only the strip and the image's own
// number of clusters fix.
//
// Quad q of a strip belongs to lane q % 32 of warp q / 32 % kWarps. A lane adds up a run of equal labels in registers
// and flushes it to its warp's table when the label changes. A table is kCells cells: one row a cluster, as many columns
// (up to 32) as fit; lanes that share a column take turns. Then columns, then warps are added. With 32 columns 32 lanes
// hit 32 different banks whatever their labels; 8 KiB a warp leave 24 warps on an SM.
namespace molt::cuda {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;
constexpr int kStrip = 4096;  // pixels

__device__ inline int strip_end(int begin, int64_t pixels) {
  return static_cast<int>(begin + kStrip < pixels ? begin + kStrip : pixels);
}

// Aligned as add_run moves it: the sum and the count of float in one word.
template <class A>
struct alignas(8) Cell {
  A sum;
  int count;
};
static_assert(sizeof(Cell<float>) == 8 && sizeof(Cell<double>) == 16);

template <class A>
constexpr int kCells = 8192 / sizeof(Cell<A>);

// log2 of the columns a cluster gets.
template <class A>
__device__ inline int column_shift(int64_t clusters) {
  int shift = 5;
  while (shift > 0 && clusters > (kCells<A> >> shift)) --shift;
  return shift;
}

// Spreads the rows' first columns over the banks.
__device__ inline int rotation(int row, int shift) {
  return (row >> (shift < 4 ? 4 - shift : 0)) & ((1 << shift) - 1);
}

// An image's labels are in [0, this).
__device__ inline int64_t image_limit(const Labels& labels, const int64_t* counts, int64_t limit, int64_t image) {
  if (counts != nullptr && counts[image] < limit) limit = counts[image];
  // What the labels' type can hold, so that comparisons never wrap.
  const int64_t most = labels.type == LabelType::uint8    ? 256
                       : labels.type == LabelType::int32 ? int64_t{1} << 31
                                                         : limit;
  limit = limit < most ? limit : most;
  return limit > 0 ? limit : 0;
}

template <class A>
struct Run {
  unsigned id;
  A sum;
  int count;
};

// Where cells are in shared memory, as a number that stays in a register: through a pointer nvcc works out the base of
// shared memory anew before every access, which takes as long as the access.
#ifdef MOLT_EMULATE
template <class A>
using Address = Cell<A>*;

template <class A>
__device__ inline Address<A> address_of(Cell<A>* cells) {
  return cells;
}

template <class A>
__device__ inline void add_run(const Run<A>& run, Address<A> cells, unsigned at) {
  emulator::aligned(reinterpret_cast<const uint64_t*>(cells + at));  // as the instructions below
  cells[at] = {cells[at].sum + run.sum, cells[at].count + run.count};
}
#else
template <class A>
using Address = unsigned;

template <class A>
__device__ inline Address<A> address_of(Cell<A>* cells) {
  return static_cast<unsigned>(__cvta_generic_to_shared(cells));
}

__device__ inline void add_run(const Run<float>& run, Address<float> cells, unsigned at) {
  const unsigned address = cells + at * static_cast<unsigned>(sizeof(Cell<float>));
  float sum;
  int count;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=f"(sum), "=r"(count) : "r"(address) : "memory");
  sum += run.sum;
  count += run.count;
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" : : "r"(address), "f"(sum), "r"(count) : "memory");
}

__device__ inline void add_run(const Run<double>& run, Address<double> cells, unsigned at) {
  const unsigned address = cells + at * static_cast<unsigned>(sizeof(Cell<double>));
  double sum;
  int count;
  asm volatile("ld.shared.f64 %0, [%1];" : "=d"(sum) : "r"(address) : "memory");
  asm volatile("ld.shared.b32 %0, [%1+8];" : "=r"(count) : "r"(address) : "memory");
  sum += run.sum;
  count += run.count;
  asm volatile("st.shared.f64 [%0], %1;" : : "r"(address), "d"(sum) : "memory");
  asm volatile("st.shared.b32 [%0+8], %1;" : : "r"(address), "r"(count) : "memory");
}
#endif

// Adds the runs of the lanes that `change` to the warp's table. All 32 lanes come here together; with kTurns lanes
// share columns, else each has its own.
template <bool kTurns, class A>
__device__ inline void flush(const Run<A>& run, bool change, unsigned lane, int shift, Address<A> table) {
  const bool adds = change && run.id != kNone;
  if (!kTurns) {
    if (adds) add_run(run, table, run.id << 5 | lane);
    return;
  }
  unsigned waiting = __ballot_sync(kFull, adds);
  while (waiting != 0) {
    const unsigned turn = static_cast<unsigned>(__ffs(static_cast<int>(waiting)) - 1) >> shift;
    if (adds && lane >> shift == turn) add_run(run, table, run.id << shift | (lane & ((1u << shift) - 1u)));
    __syncwarp();
    waiting &= ~(((1u << (1 << shift)) - 1u) << (turn << shift));
  }
}

template <bool kTurns, int kSteps, class A>
__device__ inline void add_quads(const A (&values)[kSteps][4], const unsigned (&ids)[kSteps][4], Run<A>& run,
                                 unsigned lane, int shift, Address<A> table) {
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const bool change = ids[s][j] != run.id;
      flush<kTurns, A>(run, change, lane, shift, table);
      run.sum = change ? values[s][j] : run.sum + values[s][j];
      run.count = change ? 1 : run.count + 1;
      run.id = ids[s][j];
    }
  }
}

// Adds pixels [begin, end) of a map to the block's tables, labels [start, start + span), and folds each warp's columns.
// The block has to synchronise before fold_warps.
template <class A, class Source>
__device__ inline void sum_strip(const Source& source, const Labels& labels, int64_t map, int64_t image, int64_t pixels,
                                 int begin, int end, int64_t start, unsigned span, int shift, Cell<A>* tables) {
  constexpr int kSteps = Source::kSteps;
  const unsigned lane = threadIdx.x % 32;
  Cell<A>* table = tables + threadIdx.x / 32 * kCells<A>;
  const Address<A> cells_at = address_of(table);

  Run<A> run{kNone, A{0}, 0};
  for (int base = begin; base < end; base += kSteps * kThreads * 4) {
    const int at = base + static_cast<int>(threadIdx.x) * 4;
    A values[kSteps][4];
    unsigned ids[kSteps][4];
    source.template load<false>(map, at, kThreads * 4, end, values);
    if (base == begin) {  // while the first pixels are on their way
      const int cells = static_cast<int>(span) << shift;
      for (int i = static_cast<int>(lane); i < cells; i += 32) table[i] = {A{0}, 0};
      __syncwarp();
    }
    load_ids<kSteps>(labels, image * pixels, at, kThreads * 4, end, start, span, ids);
    if (shift == 5) {
      add_quads<false, kSteps, A>(values, ids, run, lane, shift, cells_at);
    } else {
      add_quads<true, kSteps, A>(values, ids, run, lane, shift, cells_at);
    }
  }
  if (shift == 5) {
    flush<false, A>(run, true, lane, shift, cells_at);
  } else {
    flush<true, A>(run, true, lane, shift, cells_at);
  }
  __syncwarp();

  // Lanes own rows and begin at rotated columns, which keeps them on different banks.
  if (shift == 0) return;
  const int columns = 1 << shift;
  for (int row = static_cast<int>(lane); row < static_cast<int>(span); row += 32) {
    Cell<A>* cells_of = table + (row << shift);
    const int turned = rotation(row, shift);
    Cell<A> total = cells_of[turned];
    for (int c = 1; c < columns; ++c) {
      const Cell<A> next = cells_of[(turned + c) & (columns - 1)];
      total = {total.sum + next.sum, total.count + next.count};
    }
    cells_of[turned] = total;
  }
}

// Sum and count of one row over the block's warps.
template <class A>
__device__ inline Cell<A> fold_warps(const Cell<A>* tables, int row, int shift) {
  const int at = row << shift | rotation(row, shift);
  Cell<A> total = tables[at];
  for (int w = 1; w < kWarps; ++w) {
    const Cell<A> next = tables[w * kCells<A> + at];
    total = {total.sum + next.sum, total.count + next.count};
  }
  return total;
}

template <class A>
__device__ inline A mean_of(A sum, int64_t count) {
  return count > 0 ? sum / static_cast<A>(count) : A{0};
}

// What happens to a pixel: keep * value + blend of its cluster, where blend is alpha * mean.
template <class A>
struct Blend {
  A keep;
  A alpha;
  bool mean_only;  // alpha is 1: an infinite value must not meet a factor of 0

  __device__ A of_mean(A mean) const { return mean_only ? mean : alpha * mean; }
  __device__ A pixel(A value, A blend) const { return mean_only ? blend : keep * value + blend; }
};

}  // namespace molt::cuda
