#pragma once

// What the kernels see of CUDA. The same kernels compile for the CPU with MOLT_EMULATE, see tests/cuda_emulator.
#ifdef MOLT_EMULATE
#include "emulator.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define MOLT_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#define MOLT_SHARED(type, name, count) __shared__ type name[count]
#endif

#include <cstddef>
#include <cstdint>

#include "launch.h"

namespace molt::cuda {

struct half {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

// What a map is summed in.
template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

constexpr unsigned kFull = 0xffffffffu;

__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(half value) { return __half2float(__ushort_as_half(value.bits)); }
__device__ inline float widen(bfloat16 value) { return __bfloat162float(__ushort_as_bfloat16(value.bits)); }

__device__ inline void narrow(float value, float& to) { to = value; }
__device__ inline void narrow(double value, double& to) { to = value; }
__device__ inline void narrow(float value, half& to) { to.bits = __half_as_ushort(__float2half_rn(value)); }
__device__ inline void narrow(float value, bfloat16& to) { to.bits = __bfloat16_as_ushort(__float2bfloat16_rn(value)); }

#ifndef MOLT_EMULATE
// Counters that order what blocks write for each other, at the GPU's scope: an acquire sees all that came before the
// release it reads from. A barrier passes both on to the block's other threads.
__device__ inline unsigned add_acq_rel(unsigned* at, unsigned value) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before) : "l"(__cvta_generic_to_global(at)), "r"(value) : "memory");
  return before;
}

__device__ inline void add_release(unsigned* at, unsigned value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;"
               : : "l"(__cvta_generic_to_global(at)), "r"(value) : "memory");
}

__device__ inline unsigned load_acquire(const unsigned* at) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
               : "=r"(value) : "l"(__cvta_generic_to_global(at)) : "memory");
  return value;
}
#endif

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Blocks of a kernel that strides over its work: enough to fill any GPU, never beyond a grid's limit.
inline unsigned grid_for(int64_t units) {
  constexpr int64_t kMost = int64_t{1} << 16;
  return static_cast<unsigned>(units < 1 ? 1 : units < kMost ? units : kMost);
}

}  // namespace molt::cuda

#define MOLT_CHECK_LAUNCH()                                                  \
  do {                                                                       \
    const cudaError_t error_ = cudaGetLastError();                           \
    if (error_ != cudaSuccess) return error_;                                \
  } while (0)
#define MOLT_CHECK(call)                                                     \
  do {                                                                       \
    const cudaError_t error_ = (call);                                       \
    if (error_ != cudaSuccess) return error_;                                \
  } while (0)
