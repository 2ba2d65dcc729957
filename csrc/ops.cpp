#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>

#include "cpu/cluster_refine.h"
#include "torch_parallel.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

molt::MapType map_type(const Tensor& maps) {
  switch (maps.scalar_type()) {
    case ScalarType::Half:
      return molt::MapType::float16;
    case ScalarType::BFloat16:
      return molt::MapType::bfloat16;
    case ScalarType::Float:
      return molt::MapType::float32;
    case ScalarType::Double:
      return molt::MapType::float64;
    default:
      throw std::runtime_error("maps: expected float16, bfloat16, float32 or float64");
  }
}

molt::LabelType label_type(const Tensor& labels) {
  switch (labels.scalar_type()) {
    case ScalarType::Byte:
      return molt::LabelType::uint8;
    case ScalarType::Int:
      return molt::LabelType::int32;
    case ScalarType::Long:
      return molt::LabelType::int64;
    default:
      throw std::runtime_error("labels: expected uint8, int32 or int64");
  }
}

// The public function checks more, in words; these keep a direct call of the operator inside its memory.
void require(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(message);
}

Tensor cluster_refine(
    const Tensor& maps, const Tensor& labels, double alpha, int64_t num_clusters, const std::optional<Tensor>& counts) {
  require(maps.dim() == 4, "maps: expected (B, C, H, W)");
  require(labels.dim() == 3 && labels.size(0) == maps.size(0) && labels.size(1) == maps.size(2) &&
              labels.size(2) == maps.size(3),
          "labels: expected (B, H, W), like maps");
  require(labels.is_cpu() && (!counts || counts->is_cpu()), "labels, counts: expected on the CPU, like maps");
  require(!counts || (counts->dim() == 1 && counts->size(0) == maps.size(0) &&
                      counts->scalar_type() == ScalarType::Long),
          "counts: expected (B,) int64");

  const Tensor values = torch::stable::contiguous(maps);
  const Tensor index = torch::stable::contiguous(labels);
  std::optional<Tensor> limits;
  if (counts) limits = torch::stable::contiguous(*counts);
  const Tensor out = torch::stable::new_empty(values, values.sizes());
  const molt::ClusterRefine job{
      values.const_data_ptr(),
      index.const_data_ptr(),
      out.mutable_data_ptr(),
      map_type(values),
      label_type(index),
      maps.size(0),
      maps.size(1),
      maps.size(2) * maps.size(3),
      alpha,
      num_clusters,
      limits ? limits->const_data_ptr<int64_t>() : nullptr,
  };
  try {
    molt::cluster_refine(job, molt::torch_parallel());
  } catch (const std::invalid_argument& error) {
    // Which Python error other types become differs between versions of torch.
    throw std::runtime_error(error.what());
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(molt, m) {
  m.def("cluster_refine(Tensor maps, Tensor labels, float alpha, SymInt num_clusters, Tensor? counts=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(molt, CPU, m) { m.impl("cluster_refine", TORCH_BOX(&cluster_refine)); }
