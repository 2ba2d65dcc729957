#pragma once

#include "cluster_refine.cuh"
#include "cluster_wide.cuh"
#include "fuse.cuh"

namespace molt::cuda {

template <class T>
cudaError_t refine_as(const Refine& job, Scratch& scratch, int processors, cudaStream_t stream) {
  const bool narrow = job.limit <= kCells<Acc<T>> || (job.out != nullptr && job.alpha == 0.0);
  const T* maps = static_cast<const T*>(job.maps);
  if (maps == nullptr) {
    Fused<T> fused{};
    MOLT_CHECK(prepare_fused<T>(job, scratch, stream, fused));
    if (narrow) return refine_narrow<T>(job, fused, scratch, processors, stream);
    // Too many clusters for one table: write the maps down, then refine them in place.
    Refine plain = job;
    plain.alpha = 0.0;
    MOLT_CHECK(refine_narrow<T>(plain, fused, scratch, processors, stream));
    return refine_wide<T>(job, static_cast<const T*>(job.out), scratch, stream);
  }
  if (narrow) return refine_narrow<T>(job, Stored<T>{maps, job.pixels}, scratch, processors, stream);
  return refine_wide<T>(job, maps, scratch, stream);
}

}  // namespace molt::cuda
