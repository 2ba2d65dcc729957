#include "refine_launch.cuh"

namespace molt::cuda {

cudaError_t refine_float32(const Refine& job, Scratch& scratch, int processors, cudaStream_t stream) {
  return refine_as<float>(job, scratch, processors, stream);
}

}  // namespace molt::cuda
