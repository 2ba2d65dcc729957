#pragma once

#include <cstdint>

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

}  // namespace molt
