#pragma once

#include <cstdint>
#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "clones.h"

namespace molt {

constexpr int64_t kLanes = 8;

// Eight numbers that the compiler keeps in vector registers; it does not find them by itself where pointers may alias.
template <class A>
struct PackOf {
  typedef A type __attribute__((vector_size(kLanes * sizeof(A)), aligned(sizeof(A)), may_alias));
};
template <class A>
using Pack = typename PackOf<A>::type;

template <class A>
MOLT_INLINE Pack<A>& pack(A* at) {
  return *reinterpret_cast<Pack<A>*>(at);
}

template <class A>
MOLT_INLINE const Pack<A>& pack(const A* at) {
  return *reinterpret_cast<const Pack<A>*>(at);
}

constexpr int64_t kFarBytes = int64_t{4} << 20;  // results larger than this do not stay in the cores' own caches

#if defined(__SSE2__)
constexpr bool kCanStream = true;
#else
constexpr bool kCanStream = false;
#endif

// Stores past the caches, which saves reading what is overwritten; `to` is aligned to 16 bytes.
MOLT_INLINE void stream(const Pack<float>& value, float* to) {
#if defined(__SSE2__)
  const float* from = reinterpret_cast<const float*>(&value);
  _mm_stream_ps(to, _mm_loadu_ps(from));
  _mm_stream_ps(to + 4, _mm_loadu_ps(from + 4));
#else
  pack(to) = value;
#endif
}

template <bool kFar, class A>
MOLT_INLINE void put(const Pack<A>& value, A* to) {
  if constexpr (kFar) {
    stream(value, to);
  } else {
    pack(to) = value;
  }
}

// To be called after the last of a thread's streaming stores, before other threads read.
inline void end_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace molt
