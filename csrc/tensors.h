#pragma once

// What the operators share between torch's tensors and the cores' plain pointers.

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/types.h"

namespace molt {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The public functions check more, in words; these keep a direct call of an operator inside its memory.
inline void require(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(message);
}

inline MapType map_type(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return MapType::float16;
    case ScalarType::BFloat16:
      return MapType::bfloat16;
    case ScalarType::Float:
      return MapType::float32;
    case ScalarType::Double:
      return MapType::float64;
    default:
      throw std::runtime_error(std::string(name) + ": expected float16, bfloat16, float32 or float64");
  }
}

inline LabelType label_type(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Byte:
      return LabelType::uint8;
    case ScalarType::Int:
      return LabelType::int32;
    case ScalarType::Long:
      return LabelType::int64;
    default:
      throw std::runtime_error(std::string(name) + ": expected uint8, int32 or int64");
  }
}

// What maps of a type are computed in.
inline ScalarType wide_type(MapType type) { return type == MapType::float64 ? ScalarType::Double : ScalarType::Float; }

inline Tensor empty_like(const Tensor& like, const std::vector<int64_t>& shape, ScalarType type) {
  return torch::stable::new_empty(like, shape, type);
}

// Which Python error other types become differs between versions of torch.
template <class F>
void run_core(const F& core) {
  try {
    core();
  } catch (const std::invalid_argument& error) {
    throw std::runtime_error(error.what());
  }
}

}  // namespace molt
