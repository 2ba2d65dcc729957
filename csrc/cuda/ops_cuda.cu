#include <Python.h>

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "call.h"

// Fits tensors to the launchers. The public functions check more, in words; what is checked here keeps a direct call of
// an operator inside its memory.
namespace {

std::atomic<int64_t> look_ahead{0};  // of cluster_refine, see launch.h

void fill_job(cuda::Refine& job, const Tensor& maps, const Tensor& labels, const std::optional<Tensor>& counts,
              int64_t num_clusters, Call& call) {
  job.batch = labels.size(0);
  job.channels = maps.size(1);
  job.height = static_cast<int>(labels.size(1));
  job.width = static_cast<int>(labels.size(2));
  job.pixels = labels.size(1) * labels.size(2);
  job.type = map_type("maps", maps);
  job.labels = call.contiguous(labels).const_data_ptr();
  job.label_type = label_type("labels", labels);
  job.counts = check_counts(counts, maps, job.batch, call);
  job.limit = num_clusters;
  job.look_ahead = look_ahead;
}

void check_alpha(double alpha) {
  if (!(alpha >= 0.0 && alpha <= 1.0)) refuse("alpha", std::to_string(alpha), "a number in [0, 1]");
}

Tensor cluster_refine(const Tensor& maps, const Tensor& labels, double alpha, int64_t num_clusters,
                      const std::optional<Tensor>& counts) {
  check_dim("maps", maps, 4, "(B, C, H, W)");
  map_type("maps", maps);
  check_maps("maps", maps);
  check_pixels("maps", maps.size(2), maps.size(3));
  check_labels("labels", labels, maps, maps.size(0), maps.size(2), maps.size(3));
  check_alpha(alpha);
  check_limit("num_clusters", num_clusters);
  Call call(maps);
  const Tensor out = torch::stable::new_empty(maps, maps.sizes());
  if (maps.numel() == 0) return out;
  cuda::Refine job{};
  fill_job(job, maps, labels, counts, num_clusters, call);
  job.maps = call.contiguous(maps).const_data_ptr();
  job.out = out.mutable_data_ptr();
  job.alpha = alpha;
  Call::check(cuda::cluster_refine(job, call, call.processors(), call.stream()));
  return out;
}

std::tuple<Tensor, Tensor> cluster_mean(
    const Tensor& values, const Tensor& labels, int64_t num_clusters, const std::optional<Tensor>& counts) {
  check_dim("values", values, 4, "(B, C, H, W)");
  map_type("values", values);
  check_maps("values", values);
  check_pixels("values", values.size(2), values.size(3));
  check_labels("labels", labels, values, values.size(0), values.size(2), values.size(3));
  check_limit("num_clusters", num_clusters);
  Call call(values);
  // Without a channel the pixels are still counted: on one of zeros.
  const Tensor used = values.size(1) == 0 && labels.numel() > 0
                          ? torch::stable::new_zeros(values, {values.size(0), 1, values.size(2), values.size(3)})
                          : values;
  const int64_t batch = values.size(0);
  const bool filled = used.numel() > 0 && num_clusters > 0;
  const auto make = [&](std::initializer_list<int64_t> shape, ScalarType type) {
    return filled ? torch::stable::new_empty(values, shape, type) : torch::stable::new_zeros(values, shape, type);
  };
  const Tensor means = make({batch, used.size(1), num_clusters}, sum_type(values));
  const Tensor totals = make({batch, num_clusters}, ScalarType::Long);
  if (filled) {
    cuda::Refine job{};
    fill_job(job, used, labels, counts, num_clusters, call);
    job.maps = call.contiguous(used).const_data_ptr();
    job.means = means.mutable_data_ptr();
    job.totals = totals.mutable_data_ptr<int64_t>();
    job.alpha = 1.0;
    Call::check(cuda::cluster_refine(job, call, call.processors(), call.stream()));
  }
  if (used.size(1) == values.size(1)) return {means, totals};
  return {torch::stable::new_empty(means, {batch, 0, num_clusters}), totals};
}

Tensor fuse_and_refine(const std::vector<Tensor>& maps, const Tensor& labels, const std::vector<double>& weights,
                       double alpha, int64_t num_clusters, const std::optional<Tensor>& counts) {
  if (maps.empty() || maps.size() > cuda::kMaxScales) {
    refuse("maps", std::to_string(maps.size()) + " scales", "1 to " + std::to_string(cuda::kMaxScales));
  }
  if (weights.size() != maps.size()) {
    refuse("weights", std::to_string(weights.size()) + " numbers", std::to_string(maps.size()) + ", one a scale");
  }
  check_dim("labels", labels, 3, "(B, H, W)");
  check_pixels("labels", labels.size(1), labels.size(2));
  for (size_t s = 0; s < maps.size(); ++s) {
    const std::string name = "maps[" + std::to_string(s) + "]";
    check_dim(name, maps[s], 4, "(B, C, h, w)");
    map_type(name, maps[s]);
    check_device(name, maps[s], maps[0]);
    check_maps(name, maps[s]);
    check_pixels(name, maps[s].size(2), maps[s].size(3));
    if (maps[s].scalar_type() != maps[0].scalar_type()) refuse(name, type_number(maps[s]), type_number(maps[0]));
    if (maps[s].size(0) != maps[0].size(0) || maps[s].size(1) != maps[0].size(1)) {
      refuse(name, shape_of(maps[s]), "(B, C) as maps[0], which has " + shape_of(maps[0]));
    }
    if (maps[s].size(2) == 0 || maps[s].size(3) == 0) refuse(name, shape_of(maps[s]), "maps of at least one pixel");
  }
  check_labels("labels", labels, maps[0], maps[0].size(0), labels.size(1), labels.size(2));
  check_alpha(alpha);
  check_limit("num_clusters", num_clusters);
  Call call(maps[0]);
  const Tensor out =
      torch::stable::new_empty(maps[0], {maps[0].size(0), maps[0].size(1), labels.size(1), labels.size(2)});
  if (out.numel() == 0) return out;
  cuda::Refine job{};
  fill_job(job, maps[0], labels, counts, num_clusters, call);
  for (size_t s = 0; s < maps.size(); ++s) {
    job.scales.push_back({call.contiguous(maps[s]).const_data_ptr(), static_cast<int>(maps[s].size(2)),
                          static_cast<int>(maps[s].size(3)), weights[s]});
  }
  job.out = out.mutable_data_ptr();
  job.alpha = alpha;
  Call::check(cuda::cluster_refine(job, call, call.processors(), call.stream()));
  return out;
}

Tensor cluster_vote(const Tensor& labels, const Tensor& segments, int64_t num_clusters, int64_t num_segments) {
  check_dim("labels", labels, 3, "(B, H, W)");
  label_type("labels", labels);
  check_pixels("labels", labels.size(1), labels.size(2));
  check_labels("segments", segments, labels, labels.size(0), labels.size(1), labels.size(2));
  check_limit("num_clusters", num_clusters);
  check_limit("num_segments", num_segments);
  constexpr int64_t kMostCells = int64_t{1} << 31;
  if (num_clusters > 0 && num_segments > kMostCells / num_clusters) {
    refuse("num_segments", std::to_string(num_segments) + " x " + std::to_string(num_clusters) + " clusters",
           "at most 2^31 pairs of segment and cluster");
  }
  Call call(labels);
  const Tensor out = torch::stable::new_empty(labels, labels.sizes());
  if (labels.numel() == 0) return out;
  const cuda::Vote job{call.contiguous(labels).const_data_ptr(),
                       call.contiguous(segments).const_data_ptr(),
                       out.mutable_data_ptr(),
                       label_type("labels", labels),
                       label_type("segments", segments),
                       labels.size(0),
                       labels.size(1) * labels.size(2),
                       num_clusters,
                       num_segments};
  Call::check(cuda::cluster_vote(job, call, call.stream()));
  return out;
}

cuda::Components component_job(const Tensor& maps, double threshold, int64_t connectivity) {
  check_dim("maps", maps, 4, "(B, C, H, W)");
  check_maps("maps", maps);
  check_pixels("maps", maps.size(2), maps.size(3));
  if (!(threshold > 0.0 && threshold <= 1.0)) refuse("threshold", std::to_string(threshold), "a number in (0, 1]");
  if (connectivity != 4 && connectivity != 8) refuse("connectivity", std::to_string(connectivity), "4 or 8");
  return {nullptr,
          map_type("maps", maps),
          maps.size(0),
          maps.size(1),
          static_cast<int>(maps.size(2)),
          static_cast<int>(maps.size(3)),
          threshold,
          static_cast<int>(connectivity)};
}

std::tuple<Tensor, Tensor, Tensor> largest_box(const Tensor& maps, double threshold, int64_t connectivity) {
  cuda::Components job = component_job(maps, threshold, connectivity);
  Call call(maps);
  const bool empty = maps.numel() == 0;
  const auto make = [&](std::initializer_list<int64_t> shape, ScalarType type) {
    return empty ? torch::stable::new_zeros(maps, shape, type) : torch::stable::new_empty(maps, shape, type);
  };
  const Tensor boxes = make({job.batch, job.channels, 4}, ScalarType::Float);
  const Tensor area = make({job.batch, job.channels}, ScalarType::Long);
  const Tensor mean = make({job.batch, job.channels}, ScalarType::Float);
  if (!empty) {
    job.maps = call.contiguous(maps).const_data_ptr();
    Call::check(cuda::largest_box(job, boxes.mutable_data_ptr<float>(), area.mutable_data_ptr<int64_t>(),
                                  mean.mutable_data_ptr<float>(), call, call.stream()));
  }
  return {boxes, area, mean};
}

// Copies to the device; the caller waits for the stream before it lets go of `from`.
template <class T>
Tensor upload(const std::vector<T>& from, std::initializer_list<int64_t> shape, ScalarType type, const Call& call,
              const Tensor& like) {
  const Tensor to = torch::stable::new_empty(like, shape, type);
  if (!from.empty()) {
    Call::check(cudaMemcpyAsync(
        to.mutable_data_ptr(), from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice, call.stream()));
  }
  return to;
}

// How many there are depends on the values, so this one waits for the device.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> component_boxes(
    const Tensor& maps, double threshold, int64_t connectivity, bool largest) {
  cuda::Components job = component_job(maps, threshold, connectivity);
  Call call(maps);
  check_not_captured("component_boxes", "largest_box", call);
  std::vector<cuda::Component> found;
  if (maps.numel() > 0) {
    job.maps = call.contiguous(maps).const_data_ptr();
    Call::check(cuda::list_components(job, largest, found, call, call.stream()));
  }
  std::vector<float> boxes, means;
  std::vector<int64_t> areas, images, channels;
  for (const cuda::Component& one : found) {
    boxes.insert(boxes.end(), one.box, one.box + 4);
    means.push_back(one.mean);
    areas.push_back(one.area);
    images.push_back(one.map / job.channels);
    channels.push_back(one.map % job.channels);
  }
  const auto count = static_cast<int64_t>(found.size());
  const std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> tensors{
      upload(boxes, {count, 4}, ScalarType::Float, call, maps),
      upload(areas, {count}, ScalarType::Long, call, maps),
      upload(means, {count}, ScalarType::Float, call, maps),
      upload(images, {count}, ScalarType::Long, call, maps),
      upload(channels, {count}, ScalarType::Long, call, maps),
  };
  Call::check(cudaStreamSynchronize(call.stream()));
  return tensors;
}

cuda::Sweep sweep_job(const Tensor& levels, bool contours, int64_t connectivity) {
  check_dim("levels", levels, 4, "(B, C, h, w)");
  if (levels.scalar_type() != ScalarType::Byte) refuse("levels", type_number(levels), "uint8");
  check_maps("levels", levels);
  check_pixels("levels", levels.size(2), levels.size(3));
  if (contours) refuse("contours", "True", "False on CUDA (contours are followed on the CPU)");
  if (connectivity != 4 && connectivity != 8) refuse("connectivity", std::to_string(connectivity), "4 or 8");
  return {nullptr,
          levels.size(0),
          levels.size(1),
          static_cast<int>(levels.size(2)),
          static_cast<int>(levels.size(3)),
          static_cast<int>(connectivity)};
}

// How many rows there are depends on the values, so this one waits for the device.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sweep_boxes(
    const Tensor& levels, bool contours, int64_t connectivity) {
  cuda::Sweep job = sweep_job(levels, contours, connectivity);
  Call call(levels);
  check_not_captured("sweep_boxes", "largest_at_cuts", call);
  std::vector<cuda::SweptChunk> found;
  if (levels.numel() > 0) {
    job.levels = static_cast<const uint8_t*>(call.contiguous(levels).const_data_ptr());
    Call::check(cuda::list_swept(job, found, call, call.stream()));
  }
  int64_t count = 0;
  for (const cuda::SweptChunk& chunk : found) count += chunk.count;
  const auto integers = [&] { return torch::stable::new_empty(levels, {count}, ScalarType::Long); };
  const Tensor boxes = torch::stable::new_empty(levels, {count, 4}, ScalarType::Float);
  const Tensor area = torch::stable::new_empty(levels, {count}, ScalarType::Double);
  const Tensor first = integers();
  const Tensor last = integers();
  const Tensor hole = torch::stable::new_zeros(levels, {count}, ScalarType::Bool);
  const Tensor image = integers();
  const Tensor channel = integers();
  const cuda::SweptBoxes to{boxes.mutable_data_ptr<float>(),   area.mutable_data_ptr<double>(),
                            first.mutable_data_ptr<int64_t>(), last.mutable_data_ptr<int64_t>(),
                            image.mutable_data_ptr<int64_t>(), channel.mutable_data_ptr<int64_t>()};
  Call::check(cuda::write_swept(job, found, to, call.stream()));
  return {boxes, area, first, last, hole, image, channel};
}

std::tuple<Tensor, Tensor> largest_at_cuts(const Tensor& levels, bool contours, int64_t connectivity) {
  cuda::Sweep job = sweep_job(levels, contours, connectivity);
  Call call(levels);
  const bool empty = levels.numel() == 0;
  const auto make = [&](std::initializer_list<int64_t> shape, ScalarType type) {
    return empty ? torch::stable::new_zeros(levels, shape, type) : torch::stable::new_empty(levels, shape, type);
  };
  const Tensor boxes = make({job.batch, job.channels, 255, 4}, ScalarType::Float);
  const Tensor area = make({job.batch, job.channels, 255}, ScalarType::Double);
  if (!empty) {
    job.levels = static_cast<const uint8_t*>(call.contiguous(levels).const_data_ptr());
    Call::check(cuda::largest_at_cuts(job, boxes.mutable_data_ptr<float>(), area.mutable_data_ptr<double>(), call,
                                      call.stream()));
  }
  return {boxes, area};
}

}  // namespace

namespace molt::cuda {

cudaError_t refine_float16(const Refine& job, Scratch& scratch, int processors, cudaStream_t stream);
cudaError_t refine_bfloat16(const Refine& job, Scratch& scratch, int processors, cudaStream_t stream);
cudaError_t refine_float32(const Refine& job, Scratch& scratch, int processors, cudaStream_t stream);
cudaError_t refine_float64(const Refine& job, Scratch& scratch, int processors, cudaStream_t stream);

cudaError_t cluster_refine(const Refine& job, Scratch& scratch, int processors, cudaStream_t stream) {
  switch (job.type) {
    case MapType::float16:
      return refine_float16(job, scratch, processors, stream);
    case MapType::bfloat16:
      return refine_bfloat16(job, scratch, processors, stream);
    case MapType::float32:
      return refine_float32(job, scratch, processors, stream);
    default:
      return refine_float64(job, scratch, processors, stream);
  }
}

}  // namespace molt::cuda

STABLE_TORCH_LIBRARY_IMPL(molt, CUDA, m) {
  m.impl("cluster_refine", TORCH_BOX(&cluster_refine));
  m.impl("cluster_mean", TORCH_BOX(&cluster_mean));
  m.impl("fuse_and_refine", TORCH_BOX(&fuse_and_refine));
  m.impl("cluster_vote", TORCH_BOX(&cluster_vote));
  m.impl("component_boxes", TORCH_BOX(&component_boxes));
  m.impl("largest_box", TORCH_BOX(&largest_box));
  m.impl("sweep_boxes", TORCH_BOX(&sweep_boxes));
  m.impl("largest_at_cuts", TORCH_BOX(&largest_at_cuts));
}

// For tests, which starve it: sets how many maps cluster_refine sums before it paints the first, 0 for its own choice.
static PyObject* set_look_ahead(PyObject*, PyObject* maps) {
  const long long asked = PyLong_AsLongLong(maps);
  if (asked == -1 && PyErr_Occurred() != nullptr) return nullptr;
  look_ahead = asked;
  Py_RETURN_NONE;
}

// Importing the module is what registers the operators.
PyMODINIT_FUNC PyInit__C_cuda() {
  static PyMethodDef methods[] = {{"set_look_ahead", set_look_ahead, METH_O, nullptr}, {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C_cuda", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
