#include "refine_launch.cuh"

namespace molt::cuda {

cudaError_t refine_float64(const Refine& job, Scratch& scratch, int processors, cudaStream_t stream) {
  return refine_as<double>(job, scratch, processors, stream);
}

}  // namespace molt::cuda
