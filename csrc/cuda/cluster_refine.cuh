#pragma once

#include "strip_sum.cuh"

// Means of clusters blended into their pixels, in one launch that reads the maps from memory once.
//
// Each map is summed strip by strip and painted strip by strip; blocks take these items by ticket, in an order in which
// a map is painted `lookahead` maps after it was summed, while it is still in the L2 cache. A painter waits for its
// map's sums. That cannot deadlock: an item waits only for items of lower tickets, and the block that holds the lowest
// unfinished ticket runs and waits for nothing.
namespace molt::cuda {

// Between a strip's first and second reading. Half of the 792 blocks an H100 or H200 holds sum 4096 pixels each at
// any time, 8 to 13 MB of float32 maps and labels; less would leave painters waiting.
constexpr int64_t kInFlight = int64_t{16} << 20;  // bytes
constexpr int64_t kTickets = int64_t{1} << 30;     // strips of a launch, so that twice as many tickets fit 32 bits

// Blocks whose tables an SM's shared memory holds, which is what registers have to leave room for.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
constexpr int kBlocks = 4;
#else
constexpr int kBlocks = 6;
#endif

template <class T, class Source>
struct RefineArguments {
  using A = Acc<T>;

  Source source;
  Labels labels;
  const int64_t* counts;
  T* out;           // null: no painting
  A* sums;          // (maps, strips, rows)
  int* members;     // (maps, strips, rows)
  A* blend;         // (maps, rows)
  int64_t* totals;  // (batch, rows) or null
  unsigned* done;   // (maps): strips summed, then one more when `blend` is there
  unsigned* ticket;
  int64_t pixels;
  int64_t limit;
  unsigned channels;
  unsigned first_map;
  unsigned maps;  // of this launch
  unsigned strips;
  unsigned lookahead;
  int rows;
  bool paint_alone;  // alpha or limit is 0: no sums
  Blend<A> how;
};

struct Item {
  unsigned map;
  unsigned strip;
  bool paints;
};

// Item of a ticket: first the sums of `lookahead` maps, then sums and paints in turn, then the last maps' paints.
__device__ inline Item item_of(unsigned ticket, unsigned maps, unsigned strips, unsigned lookahead) {
  const unsigned head = lookahead * strips;
  if (ticket < head) return {ticket / strips, ticket % strips, false};
  ticket -= head;
  const unsigned paired = (maps - lookahead) * strips;
  if (ticket < 2 * paired) {
    const unsigned pair = ticket / 2;
    const bool paints = ticket % 2 == 1;
    return {pair / strips + (paints ? 0 : lookahead), pair % strips, paints};
  }
  ticket -= 2 * paired;
  return {maps - lookahead + ticket / strips, ticket % strips, true};
}

// Adds a map's strips in their order. The block whose strip was the last to be summed does it.
template <class T, class Source>
__device__ void finish_map(const RefineArguments<T, Source>& a, unsigned map, int64_t image, int limit) {
  using A = Acc<T>;
  const bool counts = a.totals != nullptr && (a.first_map + map) % a.channels == 0;
  for (int k = threadIdx.x; k < a.rows; k += kThreads) {
    A sum = 0;
    int64_t count = 0;
    if (k < limit) {
      const int64_t at = int64_t{map} * a.strips * a.rows + k;
#pragma unroll 4
      for (unsigned s = 0; s < a.strips; ++s) {
        sum += __ldcg(a.sums + at + int64_t{s} * a.rows);
        count += __ldcg(a.members + at + int64_t{s} * a.rows);
      }
    }
    __stcg(a.blend + int64_t{map} * a.rows + k, a.how.of_mean(mean_of(sum, count)));
    if (counts) a.totals[image * a.rows + k] = count;
  }
}

template <class T, class Source>
__device__ void sum_item(const RefineArguments<T, Source>& a, const Item& item, Cell<Acc<T>>* tables, unsigned* flag) {
  using A = Acc<T>;
  const int64_t image = (a.first_map + item.map) / a.channels;
  const int limit = static_cast<int>(image_limit(a.labels, a.counts, a.limit, image));
  const int shift = column_shift<A>(limit);
  const int begin = static_cast<int>(item.strip) * kStrip;
  const int end = strip_end(begin, a.pixels);
  sum_strip<A>(a.source, a.labels, a.first_map + item.map, image, a.pixels, begin, end, 0, limit, shift, tables);
  __syncthreads();
  const int64_t at = (int64_t{item.map} * a.strips + item.strip) * a.rows;
  for (int k = threadIdx.x; k < limit; k += kThreads) {
    const Cell<A> total = fold_warps<A>(tables, k, shift);
    __stcg(a.sums + at + k, total.sum);
    __stcg(a.members + at + k, total.count);
  }
  __syncthreads();
  // Gives away this strip's sums; the last to come has everybody's.
  if (threadIdx.x == 0) *flag = add_acq_rel(a.done + item.map, 1u) + 1;
  __syncthreads();
  if (*flag != a.strips) return;
  finish_map(a, item.map, image, limit);
  __syncthreads();
  if (threadIdx.x == 0) add_release(a.done + item.map, 1u);
}

// Brings a map's table to shared memory once its sums are complete.
template <class T, class Source>
__device__ void wait_for_blend(const RefineArguments<T, Source>& a, unsigned map, int limit, Acc<T>* blend) {
  if (threadIdx.x == 0) {
    while (load_acquire(a.done + map) <= a.strips) __nanosleep(100);
  }
  __syncthreads();
  for (int k = static_cast<int>(threadIdx.x); k < limit; k += kThreads) {
    blend[k] = __ldcg(a.blend + int64_t{map} * a.rows + k);
  }
  __syncthreads();
}

template <class T, class Source>
__device__ void paint_item(const RefineArguments<T, Source>& a, const Item& item, Acc<T>* blend) {
  using A = Acc<T>;
  constexpr int kSteps = Source::kSteps;
  const int64_t image = (a.first_map + item.map) / a.channels;
  unsigned limit = 0;
  if (!a.paint_alone) limit = static_cast<unsigned>(image_limit(a.labels, a.counts, a.limit, image));
  const int begin = static_cast<int>(item.strip) * kStrip;
  const int end = strip_end(begin, a.pixels);
  T* row = a.out + int64_t{a.first_map + item.map} * a.pixels;
  for (int base = begin; base < end; base += kSteps * kThreads * 4) {
    const int at = base + static_cast<int>(threadIdx.x) * 4;
    A values[kSteps][4];
    unsigned ids[kSteps][4];
    a.source.template load<true>(a.first_map + item.map, at, kThreads * 4, end, values);
    if (limit > 0) {
      load_ids<kSteps>(a.labels, image * a.pixels, at, kThreads * 4, end, 0, limit, ids);
      if (base == begin) wait_for_blend(a, item.map, static_cast<int>(limit), blend);
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          if (ids[s][j] != kNone) values[s][j] = a.how.pixel(values[s][j], blend[ids[s][j]]);
        }
      }
    }
    store_values<kSteps>(row, at, kThreads * 4, end, values);
  }
}

template <class T, class Source>
__global__ void __launch_bounds__(kThreads, kBlocks) refine_kernel(const RefineArguments<T, Source> a) {
  using A = Acc<T>;
  MOLT_SHARED(Cell<A>, tables, kWarps * kCells<A>);
  MOLT_SHARED(unsigned, taken, 1);
  MOLT_SHARED(unsigned, flag, 1);
  const unsigned items = a.maps * a.strips * (a.out != nullptr && !a.paint_alone ? 2 : 1);
  if (threadIdx.x == 0) taken[0] = atomicAdd(a.ticket, 1u);
  __syncthreads();
  unsigned ticket = taken[0];
  while (ticket < items) {
    // The next ticket is drawn early, so that its latency hides behind this item's work.
    unsigned next = 0;
    if (threadIdx.x == 0) next = atomicAdd(a.ticket, 1u);
    Item item;
    if (a.paint_alone || a.out == nullptr) {
      item = {ticket / a.strips, ticket % a.strips, a.paint_alone};
    } else {
      item = item_of(ticket, a.maps, a.strips, a.lookahead);
    }
    if (item.paints) {
      paint_item(a, item, reinterpret_cast<A*>(tables));
    } else {
      sum_item(a, item, tables, flag);
    }
    __syncthreads();
    if (threadIdx.x == 0) taken[0] = next;
    __syncthreads();
    ticket = taken[0];
  }
}

template <class T>
Blend<Acc<T>> blend_of(double alpha) {
  return {static_cast<Acc<T>>(1.0 - alpha), static_cast<Acc<T>>(alpha), alpha == 1.0};
}

// For limits up to kCells. With alpha 0 nothing is summed and `maps` come out as they are.
template <class T, class Source>
cudaError_t refine_narrow(
    const Refine& job, const Source& source, Scratch& scratch, int processors, cudaStream_t stream) {
  using A = Acc<T>;
  RefineArguments<T, Source> a{};
  a.source = source;
  a.labels = {job.labels, job.label_type};
  a.counts = job.counts;
  a.out = static_cast<T*>(job.out);
  a.totals = job.totals;
  a.pixels = job.pixels;
  a.channels = static_cast<unsigned>(job.channels);
  const int64_t strips = divide_up(job.pixels, kStrip);
  a.strips = static_cast<unsigned>(strips);
  a.limit = job.limit;
  a.rows = static_cast<int>(job.limit);
  a.paint_alone = job.out != nullptr && (job.alpha == 0.0 || job.limit == 0);
  a.how = blend_of<T>(job.out != nullptr ? job.alpha : 1.0);

  const int64_t label_bytes = job.label_type == LabelType::uint8 ? 1 : job.label_type == LabelType::int32 ? 4 : 8;
  const int64_t map_bytes = job.pixels * static_cast<int64_t>(Source::kBytes + label_bytes);
  const int64_t maps = job.batch * job.channels;
  const int64_t rows = a.paint_alone ? 0 : a.rows;
  const int64_t partials = strips * rows * static_cast<int64_t>(sizeof(A) + sizeof(int));
  int64_t chunk = kTickets / strips;
  if (partials > 0 && chunk > scratch.most() / partials) chunk = scratch.most() / partials;
  chunk = chunk < 1 ? 1 : chunk < maps ? chunk : maps;
  a.sums = scratch.get_array<A>(chunk * strips * rows);
  a.members = scratch.get_array<int>(chunk * strips * rows);
  A* means = job.means != nullptr ? static_cast<A*>(job.means) : scratch.get_array<A>(chunk * rows);
  unsigned* counters = scratch.get_array<unsigned>(chunk + 1);
  a.ticket = counters;
  a.done = counters + 1;

  // Enough to fill the cache, and no less than the strips that half of the blocks sum at a time.
  int64_t ahead = kInFlight / map_bytes;
  const int64_t least = divide_up(int64_t{processors} * kBlocks / 2, strips);
  ahead = ahead < least ? least : ahead;
  ahead = job.look_ahead > 0 ? job.look_ahead : ahead < 1 ? 1 : ahead;
  const auto kernel = refine_kernel<T, Source>;
  // Shared memory, not L1, is what limits the blocks of an SM.
  MOLT_CHECK(cudaFuncSetAttribute(
      kernel, cudaFuncAttributePreferredSharedMemoryCarveout, static_cast<int>(cudaSharedmemCarveoutMaxShared)));
  for (int64_t first = 0; first < maps; first += chunk) {
    const int64_t count = maps - first < chunk ? maps - first : chunk;
    a.first_map = static_cast<unsigned>(first);
    a.maps = static_cast<unsigned>(count);
    a.blend = job.means != nullptr ? means + first * rows : means;
    a.lookahead = static_cast<unsigned>(ahead < count ? ahead : count);
    MOLT_CHECK(cudaMemsetAsync(counters, 0, static_cast<size_t>(chunk + 1) * sizeof(unsigned), stream));
    const int64_t items = count * strips * 2;
    const int64_t resident = int64_t{processors} * 8;
    const dim3 grid(static_cast<unsigned>(items < resident ? items : resident));
    MOLT_LAUNCH(kernel, grid, dim3(kThreads), stream, a);
    MOLT_CHECK_LAUNCH();
  }
  return cudaSuccess;
}

}  // namespace molt::cuda
