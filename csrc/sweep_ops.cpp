#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cpu/sweep.h"
#include "tensors.h"
#include "torch_parallel.h"

namespace {

using namespace molt;
using torch::stable::contiguous;

Sweep sweep_of(const Tensor& levels, int64_t count, int64_t height, int64_t width, bool contours, int64_t connectivity) {
  require(levels.scalar_type() == ScalarType::Byte, "levels: expected uint8");
  require(connectivity == 4 || connectivity == 8, "connectivity: expected 4 or 8");
  return {levels.const_data_ptr<uint8_t>(), count, height, width, contours, connectivity == 8};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sweep_boxes_cpu(const Tensor& levels, bool contours,
                                                                                   int64_t connectivity) {
  require(levels.dim() == 4, "levels: expected (B, C, H, W)");
  const Tensor values = contiguous(levels);
  const int64_t channels = values.size(1);
  const Sweep job =
      sweep_of(values, values.size(0) * channels, values.size(2), values.size(3), contours, connectivity);
  std::vector<std::vector<SweptBox>> found;
  if (job.count > 0) run_core([&] { found = sweep_boxes(job, torch_parallel()); });
  int64_t total = 0;
  for (const auto& own : found) total += static_cast<int64_t>(own.size());
  const Tensor boxes = empty_like(levels, {total, 4}, ScalarType::Float);
  const Tensor area = empty_like(levels, {total}, ScalarType::Double);
  const Tensor first = empty_like(levels, {total}, ScalarType::Long);
  const Tensor last = empty_like(levels, {total}, ScalarType::Long);
  const Tensor hole = empty_like(levels, {total}, ScalarType::Bool);
  const Tensor image = empty_like(levels, {total}, ScalarType::Long);
  const Tensor channel = empty_like(levels, {total}, ScalarType::Long);
  // Asking a tensor for its pointer costs more than writing a row.
  auto* to_box = boxes.mutable_data_ptr<float>();
  auto* to_area = area.mutable_data_ptr<double>();
  auto* to_first = first.mutable_data_ptr<int64_t>();
  auto* to_last = last.mutable_data_ptr<int64_t>();
  auto* to_hole = hole.mutable_data_ptr<bool>();
  auto* to_image = image.mutable_data_ptr<int64_t>();
  auto* to_channel = channel.mutable_data_ptr<int64_t>();
  for (size_t map = 0; map < found.size(); ++map) {
    for (const SweptBox& own : found[map]) {
      *to_box++ = static_cast<float>(own.left);
      *to_box++ = static_cast<float>(own.top);
      *to_box++ = static_cast<float>(own.right);
      *to_box++ = static_cast<float>(own.bottom);
      *to_area++ = own.area;
      *to_first++ = own.first;
      *to_last++ = own.last;
      *to_hole++ = own.hole;
      *to_image++ = static_cast<int64_t>(map) / channels;
      *to_channel++ = static_cast<int64_t>(map) % channels;
    }
  }
  return {boxes, area, first, last, hole, image, channel};
}

std::tuple<Tensor, Tensor> largest_at_cuts_cpu(const Tensor& levels, bool contours, int64_t connectivity) {
  require(levels.dim() == 4, "levels: expected (B, C, H, W)");
  const Tensor values = contiguous(levels);
  const int64_t batch = values.size(0);
  const int64_t channels = values.size(1);
  const Sweep job = sweep_of(values, batch * channels, values.size(2), values.size(3), contours, connectivity);
  const Tensor boxes = empty_like(levels, {batch, channels, kCuts, 4}, ScalarType::Float);
  const Tensor area = empty_like(levels, {batch, channels, kCuts}, ScalarType::Double);
  if (job.count > 0) {
    run_core([&] {
      largest_at_cuts(job, boxes.mutable_data_ptr<float>(), area.mutable_data_ptr<double>(), torch_parallel());
    });
  }
  return {boxes, area};
}

std::tuple<Tensor, Tensor, Tensor> box_curves_cpu(const Tensor& levels, const Tensor& truths, const Tensor& offsets,
                                                  bool contours, bool clip, double extra,
                                                  const std::vector<double>& empty, bool any, bool largest) {
  require(levels.dim() == 3, "levels: expected (B, H, W)");
  require(truths.is_cpu() && truths.dim() == 2 && truths.size(1) == 4 && truths.scalar_type() == ScalarType::Double,
          "truths: expected (M, 4) float64 on the CPU");
  require(offsets.is_cpu() && offsets.dim() == 1 && offsets.size(0) == levels.size(0) + 1 &&
              offsets.scalar_type() == ScalarType::Long,
          "offsets: expected (B + 1,) int64 on the CPU");
  require(empty.size() == 4, "empty: expected 4 numbers");
  const Tensor values = contiguous(levels);
  const Tensor rows = contiguous(truths);
  const Tensor starts = contiguous(offsets);
  const int64_t batch = values.size(0);
  const auto* at = starts.const_data_ptr<int64_t>();
  require(at[0] == 0 && at[batch] == rows.size(0), "offsets: expected from 0 to the number of boxes");
  for (int64_t i = 0; i < batch; ++i) require(at[i] <= at[i + 1], "offsets: expected rising numbers");
  const Tensor of_any = empty_like(levels, {any ? batch : 0, kCuts}, ScalarType::Double);
  const Tensor of_largest = empty_like(levels, {largest ? batch : 0, kCuts}, ScalarType::Double);
  const Tensor peak = empty_like(levels, {batch}, ScalarType::Long);
  const BoxCurves job{sweep_of(values, batch, values.size(1), values.size(2), contours, 8),
                      rows.const_data_ptr<double>(),
                      at,
                      clip,
                      extra,
                      {empty[0], empty[1], empty[2], empty[3]},
                      any ? of_any.mutable_data_ptr<double>() : nullptr,
                      largest ? of_largest.mutable_data_ptr<double>() : nullptr,
                      peak.mutable_data_ptr<int64_t>()};
  if (batch > 0) run_core([&] { box_curves(job, torch_parallel()); });
  return {of_any, of_largest, peak};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(molt, m) {
  m.def(
      "sweep_boxes(Tensor levels, bool contours, int connectivity) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("largest_at_cuts(Tensor levels, bool contours, int connectivity) -> (Tensor, Tensor)");
  m.def(
      "box_curves(Tensor levels, Tensor truths, Tensor offsets, bool contours, bool clip, float extra, float[] empty, "
      "bool any, bool largest) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(molt, CPU, m) {
  m.impl("sweep_boxes", TORCH_BOX(&sweep_boxes_cpu));
  m.impl("largest_at_cuts", TORCH_BOX(&largest_at_cuts_cpu));
  m.impl("box_curves", TORCH_BOX(&box_curves_cpu));
}
