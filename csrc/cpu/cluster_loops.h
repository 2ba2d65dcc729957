#pragma once

// The inner loops of the cluster operators. An index is a label less the lowest one, as uint8 where that fits: eight of
// them are then one word, and a run of one cluster is seen by comparing words.

#include <algorithm>
#include <cstdint>

#include "clones.h"
#include "convert.h"
#include "index_loops.h"
#include "pack.h"

namespace molt {
namespace {

// The order of every sum: pixel i of a strip goes to lane i % kLanes, lanes are added pairwise, strips from first to
// last. Strips start at multiples of kStrip, so neither threads nor the batch nor the number of clusters matter.
constexpr int64_t kStrip = 8192;
static_assert(kLanes == kGroup);

// Adds values to the lanes of their clusters and, where kCount, ones to counts.
template <bool kCount, class A, class I>
MOLT_INLINE void add_values(const A* values, const I* index, int64_t n, A* table, int32_t* counts) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    if (uniform(index + i)) {
      pack(table + static_cast<int64_t>(index[i]) * kLanes) += pack(values + i);
      if (kCount) counts[index[i]] += kLanes;
    } else {
      for (int64_t l = 0; l < kLanes; ++l) {
        const int64_t k = index[i + l];
        table[k * kLanes + l] += values[i + l];
        if (kCount) ++counts[k];
      }
    }
  }
  for (int64_t l = 0; i < n; ++i, ++l) {
    table[static_cast<int64_t>(index[i]) * kLanes + l] += values[i];
    if (kCount) ++counts[index[i]];
  }
}

template <class A>
MOLT_INLINE void fold_lanes(const A* table, int64_t size, A* sums) {
  for (int64_t k = 0; k < size; ++k) {
    const A* t = table + k * kLanes;
    sums[k] += ((t[0] + t[1]) + (t[2] + t[3])) + ((t[4] + t[5]) + (t[6] + t[7]));
  }
}

// keep * value + blend of the cluster; kFill: the blend alone.
template <bool kFill, bool kFar, class A, class I>
MOLT_INLINE void paint_values(const A* values, const I* index, int64_t n, A keep, const A* blend, A* out) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Pack<A> mean;
    if (uniform(index + i)) {
      mean = blend[index[i]] - Pack<A>{};
    } else {
      for (int64_t l = 0; l < kLanes; ++l) mean[l] = blend[index[i + l]];
    }
    if (!kFill) mean += keep * pack(values + i);
    put<kFar>(mean, out + i);
  }
  for (; i < n; ++i) out[i] = kFill ? blend[index[i]] : keep * values[i] + blend[index[i]];
}

// target_clones does not take templates, hence one plain function a type.
#define MOLT_INDEX_LOOPS(A, I)                                                                     \
  MOLT_CLONES void add(const A* values, const I* index, int64_t n, A* table, int32_t* counts) {    \
    if (counts != nullptr) {                                                                       \
      add_values<true>(values, index, n, table, counts);                                           \
    } else {                                                                                       \
      add_values<false>(values, index, n, table, counts);                                          \
    }                                                                                              \
  }                                                                                                \
  MOLT_CLONES void paint(const A* values, const I* index, int64_t n, A keep, const A* b, A* out) { \
    paint_values<false, false>(values, index, n, keep, b, out);                                           \
  }                                                                                                \
  MOLT_CLONES void fill(const I* index, int64_t n, const A* b, A* out) {                           \
    paint_values<true, false>(static_cast<const A*>(nullptr), index, n, A{0}, b, out);                    \
  }
MOLT_INDEX_LOOPS(float, uint8_t)
MOLT_INDEX_LOOPS(float, int32_t)
MOLT_INDEX_LOOPS(double, uint8_t)
MOLT_INDEX_LOOPS(double, int32_t)
#undef MOLT_INDEX_LOOPS

#define MOLT_STREAM_LOOPS(I)                                                                                          \
  MOLT_CLONES void paint_far(const float* v, const I* index, int64_t n, float keep, const float* b, float* out) {     \
    paint_values<false, true>(v, index, n, keep, b, out);                                                             \
    end_streaming();                                                                                                  \
  }
MOLT_STREAM_LOOPS(uint8_t)
MOLT_STREAM_LOOPS(int32_t)
#undef MOLT_STREAM_LOOPS

MOLT_CLONES void fold(const float* table, int64_t size, float* sums) { fold_lanes(table, size, sums); }
MOLT_CLONES void fold(const double* table, int64_t size, double* sums) { fold_lanes(table, size, sums); }

// Half-precision maps pass through a small buffer: conversions and look-ups vectorise apart, not together.
constexpr int64_t kBuffer = 512;
static_assert(kBuffer % kLanes == 0);

template <class T, class I>
void add(const T* values, const I* index, int64_t n, float* table, int32_t* counts) {
  float wide[kBuffer];
  for (int64_t i = 0; i < n; i += kBuffer) {
    const int64_t part = std::min(kBuffer, n - i);
    widen_values(values + i, part, wide);
    add(wide, index + i, part, table, counts);
  }
}

template <class T, class I>
void paint(const T* values, const I* index, int64_t n, float keep, const float* blend, T* out) {
  float wide[kBuffer];
  for (int64_t i = 0; i < n; i += kBuffer) {
    const int64_t part = std::min(kBuffer, n - i);
    widen_values(values + i, part, wide);
    paint(wide, index + i, part, keep, blend, wide);
    shorten_values(wide, part, out + i);
  }
}

template <class T, class I>
void fill(const I* index, int64_t n, const float* blend, T* out) {
  float wide[kBuffer];
  for (int64_t i = 0; i < n; i += kBuffer) {
    const int64_t part = std::min(kBuffer, n - i);
    fill(index + i, part, blend, wide);
    shorten_values(wide, part, out + i);
  }
}

}  // namespace
}  // namespace molt
