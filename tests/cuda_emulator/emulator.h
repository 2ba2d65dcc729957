#pragma once

// Runs CUDA kernels on the CPU, for tests: every thread of a block is a fiber, several blocks are resident at once, and
// a seed decides who runs next. What waits for others (barriers, warp intrinsics) or touches what others see (atomics,
// sleeps) may hand over to any of them. Arrays end at pages that must not be touched.
//
// Memory itself is in order here, unlike a GPU's. So what blocks write for each other with __stcg is kept track of: who
// reads it with __ldcg must have it by barriers, releases and acquires. Plain accesses are not looked at, and the
// union-find kernels read integers that race, on purpose.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <type_traits>

#include "../../csrc/cpu/half.h"

using cudaStream_t = void*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorIllegalAddress = 700,
  cudaErrorLaunchFailure = 719
};
enum cudaFuncAttribute { cudaFuncAttributePreferredSharedMemoryCarveout };
enum cudaSharedCarveout { cudaSharedmemCarveoutMaxShared = 100 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace emulator {

// Of blocks, how many of their barriers' epochs came before.
using Clock = std::map<unsigned, unsigned>;

// What a fiber stops for.
enum class Wait { none, block, warp, done };

struct Thread {
  dim3 index;
  dim3 block;
  unsigned lane;
  Wait wait = Wait::none;
  unsigned mask = 0;
  uint64_t value = 0;
  uint64_t values[32];  // of all lanes, after a warp intrinsic
  Clock acquired;       // since the last barrier
  void* stack_pointer = nullptr;
};

extern Thread* current;
extern dim3 grid_size;
extern dim3 block_size;

void reset(uint64_t seed, unsigned resident);
const char* last_message();
void launch(dim3 grid, dim3 block, const std::function<void()>& body);
cudaError_t last_error();
void fail(const char* what, cudaError_t code = cudaErrorLaunchFailure);
// Lets the scheduler run others; `sleeping` where the thread can do nothing but wait.
void give_way(bool sleeping = false);
void barrier();
const uint64_t* exchange(unsigned mask, uint64_t value);
void* shared_array(const void* site, size_t bytes, size_t alignment);
// Where `tight`, as close to the page behind as `alignment` allows; else on an address of no more than that alignment.
void* allocate(size_t bytes, size_t alignment, bool tight = true);
void release(void* data);

// What a thread wrote or reads; an error where another thread's write does not come before.
void note_access(const void* at, bool writes);
// Gives to `counter` what this block's barriers and its own acquires brought together; takes what was given.
void publish(const void* counter);
void acquire(const void* counter);

template <class T>
T* aligned(T* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % sizeof(T) != 0) fail("misaligned access");
  return pointer;
}

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulator

#define __global__
#define __device__
#define __launch_bounds__(...)
#define threadIdx (emulator::current->index)
#define blockIdx (emulator::current->block)
#define blockDim (emulator::block_size)
#define gridDim (emulator::grid_size)
#define MOLT_LAUNCH(kernel, grid, block, stream, ...) \
  (static_cast<void>(stream), emulator::launch(grid, block, [=] { kernel(__VA_ARGS__); }))
#define MOLT_SHARED(type, name, count)  \
  static const char name##_site = 0;    \
  type* const name = static_cast<type*>(    \
      emulator::shared_array(&name##_site, sizeof(type) * static_cast<size_t>(count), alignof(type)))

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) longlong2 {
  long long x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};

using __half = molt::half;
using __nv_bfloat16 = molt::bfloat16;
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline __nv_bfloat16 __ushort_as_bfloat16(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half value) { return value.bits; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }
inline float __half2float(__half value) { return molt::to_float(value); }
inline float __bfloat162float(__nv_bfloat16 value) { return molt::to_float(value); }
inline __half __float2half_rn(float value) {
  __half to;
  molt::store(value, &to);
  return to;
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  __nv_bfloat16 to;
  molt::store(value, &to);
  return to;
}
inline double __longlong_as_double(long long bits) { return std::bit_cast<double>(bits); }
inline long long __double_as_longlong(double value) { return std::bit_cast<long long>(value); }

inline int __clz(int value) { return std::countl_zero(static_cast<unsigned>(value)); }
inline int __popc(unsigned value) { return std::popcount(value); }
inline int __ffs(int value) { return value == 0 ? 0 : std::countr_zero(static_cast<unsigned>(value)) + 1; }

inline void __syncthreads() { emulator::barrier(); }
inline void __nanosleep(unsigned) { emulator::give_way(true); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::exchange(mask, 0); }

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const uint64_t* values = emulator::exchange(mask, predicate != 0);
  unsigned found = 0;
  for (unsigned lane = 0; lane < 32; ++lane) found |= (mask >> lane & 1u) && values[lane] ? 1u << lane : 0u;
  return found;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  const uint64_t own = emulator::to_bits(value);
  const uint64_t* values = emulator::exchange(mask, own);
  unsigned found = 0;
  for (unsigned lane = 0; lane < 32; ++lane) found |= (mask >> lane & 1u) && values[lane] == own ? 1u << lane : 0u;
  return found;
}
template <class T>
T shuffle(unsigned mask, T value, unsigned from) {
  const uint64_t* values = emulator::exchange(mask, emulator::to_bits(value));
  return from < 32 && (mask >> from & 1u) ? emulator::from_bits<T>(values[from]) : value;
}
template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  return shuffle(mask, value, static_cast<unsigned>(from) % 32);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return shuffle(mask, value, emulator::current->lane ^ static_cast<unsigned>(bits));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned step) {
  return shuffle(mask, value, emulator::current->lane + step);
}

// The way to read what other blocks write, so others may be faster.
template <class T>
T __ldcg(const T* from) {
  if constexpr (std::is_integral_v<T>) emulator::give_way();
  emulator::note_access(from, false);
  return *emulator::aligned(from);
}
template <class T>
void __stcg(T* to, std::type_identity_t<T> value) {
  emulator::note_access(to, true);
  *emulator::aligned(to) = value;
}
template <class T>
T __ldcs(const T* from) {
  return *emulator::aligned(from);
}
template <class T>
T __ldg(const T* from) {
  return *emulator::aligned(from);
}
template <class T>
void __stcs(T* to, T value) {
  *emulator::aligned(to) = value;
}

// Integers alone: an atomic of floating-point numbers in a kernel does not compile here.
template <class T, class Change>
T atomic_change(T* at, Change change) {
  static_assert(std::is_integral_v<T>);
  emulator::give_way();
  const T old = *emulator::aligned(at);
  *at = change(old);
  return old;
}
template <class T>
T atomicAdd(T* at, std::type_identity_t<T> value) {
  return atomic_change(at, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicMin(T* at, std::type_identity_t<T> value) {
  return atomic_change(at, [=](T old) { return std::min(old, value); });
}
template <class T>
T atomicMax(T* at, std::type_identity_t<T> value) {
  return atomic_change(at, [=](T old) { return std::max(old, value); });
}
template <class T>
T atomicOr(T* at, std::type_identity_t<T> value) {
  return atomic_change(at, [=](T old) { return static_cast<T>(old | value); });
}
template <class T>
T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return atomic_change(at, [=](T old) { return old == expected ? value : old; });
}

// What device.cuh has in PTX.
inline unsigned ordered_add(unsigned* at, unsigned value, bool acquires, bool releases) {
  const unsigned before = atomicAdd(at, value);
  if (acquires) emulator::acquire(at);
  if (releases) emulator::publish(at);
  return before;
}
inline unsigned add_acq_rel(unsigned* at, unsigned value) { return ordered_add(at, value, true, true); }
inline void add_release(unsigned* at, unsigned value) { ordered_add(at, value, false, true); }
inline unsigned load_acquire(const unsigned* at) {
  emulator::acquire(at);
  return *emulator::aligned(at);
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return emulator::last_error(); }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  if (bytes > 0) std::memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  if (bytes > 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
