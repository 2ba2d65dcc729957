// The steps of deep clustering's training on the CPU; molt/clustering/_network.py calls them, users do not.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/deep_steps.h"
#include "tensors.h"
#include "torch_parallel.h"

namespace {

using namespace molt;
using torch::stable::contiguous;

Rows rows_of(const Tensor& x, const char* message) {
  require(x.dim() == 2 && x.is_cpu() && x.scalar_type() == ScalarType::Float && x.size(0) > 0 && x.size(1) > 0,
          message);
  return {x.size(0), x.size(1)};
}

const float* channel_values(const Tensor& values, const Rows& rows) {
  require(values.is_cpu() && values.scalar_type() == ScalarType::Float && values.dim() == 1 &&
              values.size(0) == rows.channels && values.stride(0) == 1,
          "scale, shift, mean, spread: expected (C,) contiguous float32 on the CPU");
  return static_cast<const float*>(values.const_data_ptr());
}

std::tuple<Tensor, Tensor, Tensor> deep_norm_cpu(const Tensor& given, const Tensor& scale, const Tensor& shift,
                                                 bool relu, double epsilon) {
  const Rows rows = rows_of(given, "x: expected (P, C) float32 on the CPU, with a value");
  const Tensor x = contiguous(given);
  const Tensor out = torch::stable::new_empty(x, x.sizes());
  const Tensor mean = empty_like(x, {rows.channels}, ScalarType::Float);
  const Tensor spread = empty_like(x, {rows.channels}, ScalarType::Float);
  const DeepNorm job{rows,
                     x.const_data_ptr<float>(),
                     channel_values(scale, rows),
                     channel_values(shift, rows),
                     relu,
                     static_cast<float>(epsilon),
                     out.mutable_data_ptr<float>(),
                     mean.mutable_data_ptr<float>(),
                     spread.mutable_data_ptr<float>()};
  deep_norm(job, torch_parallel());
  return {out, mean, spread};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> deep_norm_backward_cpu(const Tensor& given_gradient, const Tensor& given,
                                                                  const Tensor& scale, const Tensor& mean,
                                                                  const Tensor& spread, bool relu) {
  const Rows rows = rows_of(given, "x: expected (P, C) float32 on the CPU, with a value");
  const Rows same = rows_of(given_gradient, "gradient: expected (P, C) float32 on the CPU, with a value");
  require(same.pixels == rows.pixels && same.channels == rows.channels, "gradient: expected x's shape");
  const Tensor x = contiguous(given);
  const Tensor gradient = contiguous(given_gradient);
  const Tensor dx = torch::stable::new_empty(x, x.sizes());
  const Tensor dscale = empty_like(x, {rows.channels}, ScalarType::Float);
  const Tensor dshift = empty_like(x, {rows.channels}, ScalarType::Float);
  const Tensor dbias = empty_like(x, {rows.channels}, ScalarType::Float);
  const DeepNormBackward job{rows,
                             gradient.const_data_ptr<float>(),
                             x.const_data_ptr<float>(),
                             channel_values(scale, rows),
                             channel_values(mean, rows),
                             channel_values(spread, rows),
                             relu,
                             dx.mutable_data_ptr<float>(),
                             dscale.mutable_data_ptr<float>(),
                             dshift.mutable_data_ptr<float>(),
                             dbias.mutable_data_ptr<float>()};
  deep_norm_backward(job, torch_parallel());
  return {dx, dscale, dshift, dbias};
}

Tensor deep_answers_cpu(const Tensor& given) {
  const Rows rows = rows_of(given, "responses: expected (P, C) float32 on the CPU, with a value");
  const Tensor responses = contiguous(given);
  const Tensor labels = empty_like(responses, {rows.pixels}, ScalarType::Int);
  deep_answers(rows, responses.const_data_ptr<float>(), labels.mutable_data_ptr<int32_t>(), torch_parallel());
  return labels;
}

Tensor deep_gradient_cpu(const Tensor& given, const Tensor& given_labels) {
  const Rows rows = rows_of(given, "responses: expected (P, C) float32 on the CPU, with a value");
  require(given_labels.dim() == 1 && given_labels.is_cpu() && given_labels.scalar_type() == ScalarType::Int &&
              given_labels.size(0) == rows.pixels,
          "labels: expected (P,) int32 on the CPU");
  const Tensor responses = contiguous(given);
  const Tensor labels = contiguous(given_labels);
  const int32_t* values = labels.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < rows.pixels; ++i) {
    require(values[i] >= 0 && values[i] < rows.channels, "labels: expected numbers from 0 to C - 1");
  }
  const Tensor gradient = torch::stable::new_empty(responses, responses.sizes());
  deep_gradient(rows, responses.const_data_ptr<float>(), values, gradient.mutable_data_ptr<float>(),
                torch_parallel());
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(molt, m) {
  m.def("deep_norm(Tensor x, Tensor scale, Tensor shift, bool relu, float epsilon) -> (Tensor, Tensor, Tensor)");
  m.def(
      "deep_norm_backward(Tensor gradient, Tensor x, Tensor scale, Tensor mean, Tensor spread, bool relu) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def("deep_answers(Tensor responses) -> Tensor");
  m.def("deep_gradient(Tensor responses, Tensor labels) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(molt, CPU, m) {
  m.impl("deep_norm", TORCH_BOX(&deep_norm_cpu));
  m.impl("deep_norm_backward", TORCH_BOX(&deep_norm_backward_cpu));
  m.impl("deep_answers", TORCH_BOX(&deep_answers_cpu));
  m.impl("deep_gradient", TORCH_BOX(&deep_gradient_cpu));
}
