#include "components.cuh"

namespace molt::cuda {

cudaError_t largest_box(
    const Components& job, float* boxes, int64_t* area, float* mean, Scratch& scratch, cudaStream_t stream) {
  return run_largest_box(job, boxes, area, mean, scratch, stream);
}

cudaError_t list_components(
    const Components& job, bool largest, std::vector<Component>& found, Scratch& scratch, cudaStream_t stream) {
  return run_list_components(job, largest, found, scratch, stream);
}

}  // namespace molt::cuda
