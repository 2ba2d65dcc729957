#pragma once

#include <torch/csrc/stable/ops.h>

#include "cpu/parallel.h"

namespace molt {

// Torch's own threads, so that torch.set_num_threads rules the cores too.
inline Parallel torch_parallel() {
  auto run = [](int64_t count, Parallel::Body body, void* context) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
  };
  return {run, static_cast<int64_t>(torch::stable::get_num_threads())};
}

}  // namespace molt
