#include "cluster_vote.cuh"

namespace molt::cuda {

cudaError_t cluster_vote(const Vote& job, Scratch& scratch, cudaStream_t stream) {
  return run_vote(job, scratch, stream);
}

}  // namespace molt::cuda
