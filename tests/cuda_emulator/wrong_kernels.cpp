// Kernels with one mistake each: what the emulator must not let pass.
#include "emulator.h"

namespace {

void beyond_shared() {
  MOLT_SHARED(int, numbers, 64);
  numbers[threadIdx.x + 1] = 1;
}

void beyond_global(int* data) { data[threadIdx.x + 1] = 1; }

void misaligned(const float* data, float* out) {
  out[0] = __ldcg(reinterpret_cast<const float4*>(data + 1)).x;
}

void divergent_barrier() {
  if (threadIdx.x < 32) __syncthreads();
}

void divergent_warp() {
  if (threadIdx.x % 2 == 0) __syncwarp();
}

void waits_for_ever(unsigned* flag) {
  while (load_acquire(flag) == 0) __nanosleep(1);
}

// Two ints are no 8-byte word.
void misaligned_shared(int* out) {
  MOLT_SHARED(int, numbers, 64);
  numbers[threadIdx.x] = 0;
  out[0] = static_cast<int>(__ldcg(reinterpret_cast<const unsigned long long*>(numbers)));
}

// The other block's number, waited for without an acquire.
void unordered(int* out) {
  auto* flag = reinterpret_cast<unsigned*>(out);
  if (blockIdx.x == 0) {
    if (threadIdx.x == 0) __stcg(out + 1, 5);
    __syncthreads();
    if (threadIdx.x == 0) add_release(flag, 1);
  } else if (threadIdx.x == 0) {
    while (atomicAdd(flag, 0) == 0) __nanosleep(1);
    out[2] = __ldcg(out + 1);
  }
}

// The neighbour's number, waited for, but with no barrier between.
void unordered_within(int* out) {
  __stcg(out + threadIdx.x, 1);
  if (threadIdx.x == 5) __ldcg(out + 4);
}

// The neighbour's number is read without a barrier.
void race(int* out) {
  MOLT_SHARED(int, numbers, 64);
  numbers[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = numbers[63 - threadIdx.x];
}

// Nothing wrong here.
void fair(int* out) {
  MOLT_SHARED(int, numbers, 64);
  numbers[threadIdx.x] = static_cast<int>(threadIdx.x);
  __syncthreads();
  out[threadIdx.x] = numbers[63 - threadIdx.x] + static_cast<int>(__popc(__ballot_sync(0xffffffffu, 1)));
}

}  // namespace

extern "C" {

int run_wrong(int which, uint64_t seed, int* out) {
  emulator::reset(seed, 2);
  auto* data = static_cast<int*>(emulator::allocate(64 * sizeof(int), 16));
  *data = 0;
  const dim3 grid(2);
  const dim3 block(64);
  void* stream = nullptr;
  switch (which) {
    case 0:
      MOLT_LAUNCH(beyond_shared, grid, block, stream);
      break;
    case 1:
      MOLT_LAUNCH(beyond_global, grid, block, stream, data);
      break;
    case 2:
      MOLT_LAUNCH(misaligned, grid, block, stream, reinterpret_cast<const float*>(data), reinterpret_cast<float*>(data));
      break;
    case 3:
      MOLT_LAUNCH(divergent_barrier, grid, block, stream);
      break;
    case 4:
      MOLT_LAUNCH(divergent_warp, grid, block, stream);
      break;
    case 5:
      MOLT_LAUNCH(waits_for_ever, grid, block, stream, reinterpret_cast<unsigned*>(data));
      break;
    case 8:
      MOLT_LAUNCH(misaligned_shared, grid, block, stream, data);
      break;
    case 9:
      MOLT_LAUNCH(unordered, grid, block, stream, data);
      break;
    case 10:
      MOLT_LAUNCH(unordered_within, dim3(1), block, stream, data);
      break;
    case 6:
      MOLT_LAUNCH(race, dim3(1), block, stream, data);
      break;
    default:
      MOLT_LAUNCH(fair, grid, block, stream, data);
  }
  std::memcpy(out, data, 64 * sizeof(int));
  emulator::release(data);
  return emulator::last_error();
}

const char* wrong_message() { return emulator::last_message(); }

}  // extern "C"
