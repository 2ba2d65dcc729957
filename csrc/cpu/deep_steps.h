#pragma once

#include <cstdint>

#include "parallel.h"

namespace molt {

// What a training step of a small network does between its matrix products, on rows of channels: pixels x channels,
// contiguous float. Sums run in fixed strips of rows, so the bits do not depend on the threads.
struct Rows {
  int64_t pixels;
  int64_t channels;
};

// Batch normalization over the rows, of max(x, 0) where `relu`: out = (x - mean) / sqrt(variance + epsilon) * scale +
// shift. Writes out, and mean and 1 / sqrt(variance + epsilon) a channel.
struct DeepNorm {
  Rows rows;
  const float* x;
  const float* scale;
  const float* shift;
  bool relu;
  float epsilon;

  float* out;
  float* mean;
  float* spread;
};
void deep_norm(const DeepNorm& job, const Parallel& parallel);

// Its gradient: `dx` of x, a row, and a channel `dscale`, `dshift` and `dbias`, the sum of dx over the rows.
struct DeepNormBackward {
  Rows rows;
  const float* gradient;
  const float* x;
  const float* scale;
  const float* mean;
  const float* spread;
  bool relu;

  float* dx;
  float* dscale;
  float* dshift;
  float* dbias;
};
void deep_norm_backward(const DeepNormBackward& job, const Parallel& parallel);

// The strongest channel of each row, the first of equals; a row with NaN answers with its first NaN.
void deep_answers(const Rows& rows, const float* responses, int32_t* labels, const Parallel& parallel);

// The gradient of the rows' summed cross-entropy: softmax of the row, less one at its label.
void deep_gradient(const Rows& rows, const float* responses, const int32_t* labels, float* gradient,
                   const Parallel& parallel);

}  // namespace molt
