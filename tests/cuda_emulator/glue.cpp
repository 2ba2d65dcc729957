// The stable-ABI side of the CUDA operators, on CPU tensors: ops_cuda.cu and call.h of csrc/cuda as they are, but for
// the names of what only a device has. Registered as molt_emulated::*.
#include <Python.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "../../csrc/cuda/cluster_vote.cuh"
#include "../../csrc/cuda/components.cuh"
#include "../../csrc/cuda/refine_launch.cuh"
#include "../../csrc/cuda/sweep_launch.cuh"

namespace molt::cuda {

cudaError_t refine_float16(const Refine& job, Scratch& scratch, int processors, cudaStream_t stream) {
  return refine_as<half>(job, scratch, processors, stream);
}
cudaError_t refine_bfloat16(const Refine& job, Scratch& scratch, int processors, cudaStream_t stream) {
  return refine_as<bfloat16>(job, scratch, processors, stream);
}
cudaError_t refine_float32(const Refine& job, Scratch& scratch, int processors, cudaStream_t stream) {
  return refine_as<float>(job, scratch, processors, stream);
}
cudaError_t refine_float64(const Refine& job, Scratch& scratch, int processors, cudaStream_t stream) {
  return refine_as<double>(job, scratch, processors, stream);
}
cudaError_t cluster_vote(const Vote& job, Scratch& scratch, cudaStream_t stream) {
  return run_vote(job, scratch, stream);
}
cudaError_t largest_box(
    const Components& job, float* boxes, int64_t* area, float* mean, Scratch& scratch, cudaStream_t stream) {
  return run_largest_box(job, boxes, area, mean, scratch, stream);
}
cudaError_t list_components(
    const Components& job, bool largest, std::vector<Component>& found, Scratch& scratch, cudaStream_t stream) {
  return run_list_components(job, largest, found, scratch, stream);
}
cudaError_t largest_at_cuts(const Sweep& job, float* boxes, double* area, Scratch& scratch, cudaStream_t stream) {
  return run_largest_at_cuts(job, boxes, area, scratch, stream);
}
cudaError_t list_swept(const Sweep& job, std::vector<SweptChunk>& found, Scratch& scratch, cudaStream_t stream) {
  return run_list_swept(job, found, scratch, stream);
}
cudaError_t write_swept(
    const Sweep& job, const std::vector<SweptChunk>& found, const SweptBoxes& to, cudaStream_t stream) {
  return run_write_swept(job, found, to, stream);
}

}  // namespace molt::cuda

// What the device is to pretend.
static cudaError_t launch_error = cudaSuccess;
static bool capturing = false;
extern "C" void pretend(int error, bool captures) {
  launch_error = static_cast<cudaError_t>(error);
  capturing = captures;
}

namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int64_t) {
    emulator::reset(7, 5);
    if (launch_error != cudaSuccess) emulator::fail("as asked", launch_error);
  }
};
}  // namespace torch::stable::accelerator

namespace {

AOTITorchError no_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}

enum { one_attribute };
cudaError_t two_processors(int* count, int, int64_t) {
  *count = 2;
  return cudaSuccess;
}
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus* status) {
  *status = capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
const char* error_name(cudaError_t) { return "emulated"; }

}  // namespace

#define MOLT_CUDA_ARCHS "8.0;9.0+PTX"
#define DeviceGuard NoGuard
#define aoti_torch_get_current_cuda_stream no_stream
#define cudaDeviceGetAttribute two_processors
#define cudaDevAttrMultiProcessorCount one_attribute
#define cudaGetErrorName error_name
#define cudaGetErrorString error_name
#define is_cuda is_cpu
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) _STABLE_TORCH_LIBRARY_IMPL(molt_emulated, CPU, m, emulated)

#include "../../csrc/cuda/ops_cuda.cu"

STABLE_TORCH_LIBRARY(molt_emulated, m) {
  m.def("cluster_mean(Tensor values, Tensor labels, SymInt num_clusters, Tensor? counts=None) -> (Tensor, Tensor)");
  m.def("cluster_refine(Tensor maps, Tensor labels, float alpha, SymInt num_clusters, Tensor? counts=None) -> Tensor");
  m.def(
      "fuse_and_refine(Tensor[] maps, Tensor labels, float[] weights, float alpha, SymInt num_clusters, "
      "Tensor? counts=None) -> Tensor");
  m.def("cluster_vote(Tensor labels, Tensor segments, SymInt num_clusters, SymInt num_segments) -> Tensor");
  m.def(
      "component_boxes(Tensor maps, float threshold, int connectivity, bool largest) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("largest_box(Tensor maps, float threshold, int connectivity) -> (Tensor, Tensor, Tensor)");
  m.def(
      "sweep_boxes(Tensor levels, bool contours, int connectivity) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("largest_at_cuts(Tensor levels, bool contours, int connectivity) -> (Tensor, Tensor)");
}
