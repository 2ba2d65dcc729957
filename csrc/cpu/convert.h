#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "clones.h"
#include "half.h"

namespace molt {

// What a map is computed in.
template <class T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

namespace {

#define MOLT_CONVERT(T)                                                                   \
  [[maybe_unused]] MOLT_CLONES void widen_values(const T* from, int64_t n, float* to) {   \
    for (int64_t i = 0; i < n; ++i) to[i] = to_float(from[i]);                            \
  }                                                                                       \
  [[maybe_unused]] MOLT_CLONES void shorten_values(const float* from, int64_t n, T* to) { \
    for (int64_t i = 0; i < n; ++i) store(from[i], to + i);                               \
  }
MOLT_CONVERT(half)
MOLT_CONVERT(bfloat16)
#undef MOLT_CONVERT

template <class A>
void widen_values(const A* from, int64_t n, A* to) {
  std::copy(from, from + n, to);
}

template <class A>
void shorten_values(const A* from, int64_t n, A* to) {
  std::copy(from, from + n, to);
}

}  // namespace
}  // namespace molt
