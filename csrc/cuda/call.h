#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "launch.h"

// What ops_cuda.cu asks of tensors, and where a call gets its device, stream and memory.
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace cuda = molt::cuda;

[[noreturn]] void refuse(const std::string& name, const std::string& got, const std::string& expected) {
  throw std::runtime_error(name + ": got " + got + ", expected " + expected);
}

std::string shape_of(const Tensor& tensor) {
  std::string text = "shape (";
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i > 0 ? ", " : "") + std::to_string(tensor.size(i));
  return text + ")";
}

std::string type_number(const Tensor& tensor) {
  return "scalar type " + std::to_string(static_cast<int>(tensor.scalar_type()));
}

cuda::MapType map_type(const std::string& name, const Tensor& maps) {
  switch (maps.scalar_type()) {
    case ScalarType::Half:
      return cuda::MapType::float16;
    case ScalarType::BFloat16:
      return cuda::MapType::bfloat16;
    case ScalarType::Float:
      return cuda::MapType::float32;
    case ScalarType::Double:
      return cuda::MapType::float64;
    default:
      refuse(name, type_number(maps), "float16, bfloat16, float32 or float64");
  }
}

cuda::LabelType label_type(const std::string& name, const Tensor& labels) {
  switch (labels.scalar_type()) {
    case ScalarType::Byte:
      return cuda::LabelType::uint8;
    case ScalarType::Int:
      return cuda::LabelType::int32;
    case ScalarType::Long:
      return cuda::LabelType::int64;
    default:
      refuse(name, type_number(labels), "uint8, int32 or int64");
  }
}

void check_dim(const std::string& name, const Tensor& tensor, int64_t dim, const std::string& expected) {
  if (tensor.dim() != dim) refuse(name, shape_of(tensor), expected);
}

void check_device(const std::string& name, const Tensor& tensor, const Tensor& like) {
  if (tensor.is_cuda() && tensor.get_device_index() == like.get_device_index()) return;
  const std::string index = std::to_string(like.get_device_index());
  refuse(name, tensor.is_cuda() ? "a tensor on cuda:" + std::to_string(tensor.get_device_index()) : "a tensor not on CUDA",
         "cuda:" + index);
}

void check_limit(const std::string& name, int64_t limit) {
  if (limit < 0) refuse(name, std::to_string(limit), "a number >= 0 (on CUDA it is not taken from the labels)");
}

void check_pixels(const std::string& name, int64_t height, int64_t width) {
  if (height > 0 && width > cuda::kMaxPixels / height) {
    refuse(name, std::to_string(height) + " x " + std::to_string(width) + " pixels", "at most 2^30");
  }
}

void check_maps(const std::string& name, const Tensor& maps) {
  const int64_t batch = maps.size(0);
  if (batch > 0 && maps.size(1) > cuda::kMaxMaps / batch) refuse(name, shape_of(maps), "at most 2^30 maps");
}

void check_labels(const std::string& name, const Tensor& labels, const Tensor& like, int64_t batch, int64_t height,
                  int64_t width) {
  check_dim(name, labels, 3, "(B, H, W)");
  if (labels.size(0) != batch || labels.size(1) != height || labels.size(2) != width) {
    refuse(name, shape_of(labels),
           "shape (" + std::to_string(batch) + ", " + std::to_string(height) + ", " + std::to_string(width) + ")");
  }
  label_type(name, labels);
  check_device(name, labels, like);
}

// The device and stream of a call, and memory that the stream may still use when the call has returned.
class Call final : public cuda::Scratch {
 public:
  explicit Call(const Tensor& like) : like_(like), guard_(like.get_device_index()) {
    void* stream = nullptr;
    // By hand, as the headers' own check has another name in some versions of torch.
    if (aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream) != AOTI_TORCH_SUCCESS) {
      throw std::runtime_error("molt, CUDA: torch has no stream on cuda:" + std::to_string(like.get_device_index()));
    }
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

  bool captured() const {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    check(cudaStreamIsCapturing(stream_, &status));
    return status != cudaStreamCaptureStatusNone;
  }

  // Freed memory goes back to the stream's own pool, which reuses it in the stream's order.
  void* get(size_t bytes) override {
    if (bytes == 0) return nullptr;
    kept_.push_back(torch::stable::new_empty(like_, {static_cast<int64_t>(bytes)}, ScalarType::Byte));
    return kept_.back().mutable_data_ptr();
  }

  Tensor contiguous(const Tensor& tensor) {
    kept_.push_back(torch::stable::contiguous(tensor));
    return kept_.back();
  }

  int processors() const {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, like_.get_device_index()));
    return count;
  }

  static void check(cudaError_t error) {
    if (error == cudaSuccess) return;
    if (error == cudaErrorNoKernelImageForDevice) {
      throw std::runtime_error(
          "molt, CUDA: no kernel runs on this GPU, which is older than, or other than, what molt was compiled for "
          "(" MOLT_CUDA_ARCHS "); set TORCH_CUDA_ARCH_LIST to the GPU's compute capability and install molt again");
    }
    throw std::runtime_error(std::string("molt, CUDA: ") + cudaGetErrorName(error) + ": " + cudaGetErrorString(error));
  }

 private:
  Tensor like_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
  std::vector<Tensor> kept_;
};

ScalarType sum_type(const Tensor& maps) {
  return maps.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

const int64_t* check_counts(const std::optional<Tensor>& counts, const Tensor& like, int64_t batch, Call& call) {
  if (!counts) return nullptr;
  check_dim("counts", *counts, 1, "(B,)");
  if (counts->size(0) != batch) refuse("counts", shape_of(*counts), "shape (" + std::to_string(batch) + ",)");
  if (counts->scalar_type() != ScalarType::Long) refuse("counts", type_number(*counts), "int64");
  // Counts may stay on the CPU, where the public functions put them: the copy waits for nothing on the device. A graph
  // would read them again, when they are gone.
  if (counts->is_cpu()) {
    if (call.captured()) {
      refuse("counts", "a CPU tensor while a CUDA graph is captured", "a tensor on the maps' device");
    }
    const Tensor here = torch::stable::contiguous(*counts);
    int64_t* to = static_cast<int64_t*>(call.get(static_cast<size_t>(batch) * sizeof(int64_t)));
    Call::check(cudaMemcpyAsync(to, here.const_data_ptr(), static_cast<size_t>(batch) * sizeof(int64_t),
                                cudaMemcpyHostToDevice, call.stream()));
    return to;
  }
  check_device("counts", *counts, like);
  return static_cast<const int64_t*>(call.contiguous(*counts).const_data_ptr());
}

// Where the results' size has to be read back, which a graph cannot do.
void check_not_captured(const std::string& name, const std::string& instead, const Call& call) {
  if (call.captured()) {
    refuse(name, "a call while a CUDA graph is captured",
           instead + ", whose results' size does not depend on the values");
  }
}

}  // namespace
