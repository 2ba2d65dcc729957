#include "sweep_launch.cuh"

namespace molt::cuda {

cudaError_t largest_at_cuts(const Sweep& job, float* boxes, double* area, Scratch& scratch, cudaStream_t stream) {
  return run_largest_at_cuts(job, boxes, area, scratch, stream);
}

cudaError_t list_swept(const Sweep& job, std::vector<SweptChunk>& found, Scratch& scratch, cudaStream_t stream) {
  return run_list_swept(job, found, scratch, stream);
}

cudaError_t write_swept(
    const Sweep& job, const std::vector<SweptChunk>& found, const SweptBoxes& to, cudaStream_t stream) {
  return run_write_swept(job, found, to, stream);
}

}  // namespace molt::cuda
