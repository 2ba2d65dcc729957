#include "refine_launch.cuh"

namespace molt::cuda {

cudaError_t refine_bfloat16(const Refine& job, Scratch& scratch, int processors, cudaStream_t stream) {
  return refine_as<bfloat16>(job, scratch, processors, stream);
}

}  // namespace molt::cuda
