#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "cpu/cluster_refine.h"
#include "cpu/cluster_vote.h"
#include "cpu/component_boxes.h"
#include "cpu/fuse_and_refine.h"
#include "cpu/fuse_maps.h"
#include "cpu/index_loops.h"
#include "cpu/kmeans.h"
#include "cpu/slic.h"
#include "tensors.h"
#include "torch_parallel.h"

namespace {

using namespace molt;
using torch::stable::contiguous;
using Maybe = std::optional<Tensor>;

// A batch of labelled maps, contiguous; the tensors live as long as the job does.
struct Labelled {
  Labelled(const Tensor& given_maps, const Tensor& given_labels, int64_t num_clusters, const Maybe& given_counts) {
    require(given_maps.dim() == 4, "maps: expected (B, C, H, W)");
    check_labels(given_labels, given_maps.size(0), given_maps.size(2), given_maps.size(3), given_counts);
    maps = contiguous(given_maps);
    labels = contiguous(given_labels);
    if (given_counts) counts = contiguous(*given_counts);
    job = {};
    job.maps = maps->const_data_ptr();
    job.labels = labels->const_data_ptr();
    job.map_type = map_type(*maps, "maps");
    job.label_type = label_type(*labels, "labels");
    job.batch = maps->size(0);
    job.channels = maps->size(1);
    job.pixels = maps->size(2) * maps->size(3);
    job.num_clusters = num_clusters;
    job.counts = counts ? counts->const_data_ptr<int64_t>() : nullptr;
  }

  static void check_labels(const Tensor& labels, int64_t batch, int64_t height, int64_t width, const Maybe& counts) {
    require(labels.dim() == 3 && labels.size(0) == batch && labels.size(1) == height && labels.size(2) == width,
            "labels: expected (B, H, W), like maps");
    require(labels.is_cpu() && (!counts || counts->is_cpu()), "labels, counts: expected on the CPU, like maps");
    require(!counts || (counts->dim() == 1 && counts->size(0) == batch && counts->scalar_type() == ScalarType::Long),
            "counts: expected (B,) int64");
  }

  std::optional<Tensor> maps, labels, counts;
  Clusters job;
};

// The scales of a fusion, contiguous.
struct Scales {
  Scales(const std::vector<Tensor>& maps, int64_t height, int64_t width, const std::vector<double>& weights) {
    require(!maps.empty() && maps.size() == weights.size(), "maps, weights: expected as many of both, and not none");
    require(height > 0 && width > 0, "height, width: expected numbers above 0");
    for (size_t s = 0; s < maps.size(); ++s) {
      require(maps[s].dim() == 4 && maps[s].size(0) == maps[0].size(0) && maps[s].size(1) == maps[0].size(1) &&
                  maps[s].size(2) > 0 && maps[s].size(3) > 0,
              "maps: expected (B, C, h, w) with one B and C, and a pixel each");
      require(maps[s].scalar_type() == maps[0].scalar_type(), "maps: expected one dtype");
      require(maps[s].is_cpu(), "maps: expected all on the CPU");
      kept.push_back(contiguous(maps[s]));
      job.scales.push_back({kept[s].const_data_ptr(), maps[s].size(2), maps[s].size(3), weights[s]});
    }
    batch = maps[0].size(0);
    channels = maps[0].size(1);
    job.map_type = job.out_type = map_type(maps[0], "maps");
    job.maps = batch * channels;
    job.height = height;
    job.width = width;
  }

  std::vector<Tensor> kept;
  int64_t batch, channels;
  FuseMaps job;
};

Tensor fuse_maps_cpu(std::vector<Tensor> maps, int64_t height, int64_t width, std::vector<double> weights) {
  Scales scales(maps, height, width, weights);
  const Tensor out = empty_like(maps[0], {scales.batch, scales.channels, height, width}, maps[0].scalar_type());
  scales.job.out = out.mutable_data_ptr();
  run_core([&] { fuse_maps(scales.job, torch_parallel()); });
  return out;
}

Tensor upsample_normalize_cpu(const Tensor& maps, int64_t height, int64_t width) {
  return fuse_maps_cpu({maps}, height, width, {1.0});
}

Tensor cluster_refine_cpu(
    const Tensor& maps, const Tensor& labels, double alpha, int64_t num_clusters, const Maybe& counts) {
  Labelled given(maps, labels, num_clusters, counts);
  const Tensor out = torch::stable::new_empty(*given.maps, given.maps->sizes());
  given.job.out = out.mutable_data_ptr();
  given.job.alpha = alpha;
  run_core([&] { cluster_refine(given.job, torch_parallel()); });
  return out;
}

std::tuple<Tensor, Tensor> cluster_mean_cpu(
    const Tensor& values, const Tensor& labels, int64_t num_clusters, const Maybe& counts) {
  if (values.dim() == 4 && values.size(1) == 0 && values.size(0) * values.size(2) * values.size(3) > 0) {
    // Without a channel the pixels are still counted.
    const Tensor one = torch::stable::new_zeros(values, {values.size(0), 1, values.size(2), values.size(3)});
    const auto [means, members] = cluster_mean_cpu(one, labels, num_clusters, counts);
    return {empty_like(means, {values.size(0), 0, num_clusters}, means.scalar_type()), members};
  }
  Labelled given(values, labels, num_clusters, counts);
  require(num_clusters >= 0 && num_clusters <= kMaxPixels, "num_clusters: expected a number from 0 to 2^30");
  Clusters& job = given.job;
  const Tensor means = empty_like(values, {job.batch, job.channels, num_clusters}, wide_type(job.map_type));
  const Tensor members = empty_like(values, {job.batch, num_clusters}, ScalarType::Long);
  for (int64_t i = 0; counts && i < job.batch; ++i) {
    require(job.counts[i] <= num_clusters, "counts: expected numbers up to num_clusters");
  }
  job.size = num_clusters;
  job.means = means.mutable_data_ptr();
  job.members = members.mutable_data_ptr<int64_t>();
  if (job.batch * job.channels * job.pixels == 0) {
    return {torch::stable::new_zeros(means, means.sizes()), torch::stable::new_zeros(members, members.sizes())};
  }
  run_core([&] { cluster_refine(job, torch_parallel()); });
  return {means, members};
}

Tensor fuse_and_refine_cpu(std::vector<Tensor> maps, const Tensor& labels, std::vector<double> weights, double alpha,
                           int64_t num_clusters, const Maybe& counts) {
  require(labels.dim() == 3, "labels: expected (B, H, W)");
  Scales scales(maps, labels.size(1), labels.size(2), weights);
  Labelled::check_labels(labels, scales.batch, labels.size(1), labels.size(2), counts);
  const Tensor index = contiguous(labels);
  Maybe limits;
  if (counts) limits = contiguous(*counts);
  const Tensor out =
      empty_like(maps[0], {scales.batch, scales.channels, labels.size(1), labels.size(2)}, maps[0].scalar_type());
  scales.job.out = out.mutable_data_ptr();
  Clusters job{};
  job.labels = index.const_data_ptr();
  job.label_type = label_type(index, "labels");
  job.batch = scales.batch;
  job.channels = scales.channels;
  job.num_clusters = num_clusters;
  job.counts = limits ? limits->const_data_ptr<int64_t>() : nullptr;
  job.alpha = alpha;
  run_core([&] { fuse_and_refine(scales.job, job, torch_parallel()); });
  return out;
}

Tensor cluster_vote_cpu(const Tensor& labels, const Tensor& segments, int64_t num_clusters, int64_t num_segments) {
  require(labels.dim() == 3 && segments.dim() == 3 && labels.size(0) == segments.size(0) &&
              labels.size(1) == segments.size(1) && labels.size(2) == segments.size(2),
          "labels, segments: expected (B, H, W) both");
  require(segments.is_cpu(), "segments: expected on the CPU, like labels");
  const Tensor votes = contiguous(labels);
  const Tensor parts = contiguous(segments);
  const Tensor out = torch::stable::new_empty(votes, votes.sizes());
  const ClusterVote job{votes.const_data_ptr(),
                        parts.const_data_ptr(),
                        out.mutable_data_ptr(),
                        label_type(votes, "labels"),
                        label_type(parts, "segments"),
                        votes.size(0),
                        votes.size(1) * votes.size(2),
                        num_clusters,
                        num_segments};
  run_core([&] { cluster_vote(job, torch_parallel()); });
  return out;
}

std::vector<std::vector<Component>> components(const Tensor& maps, double threshold, int64_t connectivity,
                                               bool largest) {
  require(maps.dim() == 4, "maps: expected (B, C, H, W)");
  require(connectivity == 4 || connectivity == 8, "connectivity: expected 4 or 8");
  const Tensor values = contiguous(maps);
  const ComponentBoxes job{values.const_data_ptr(), map_type(values, "maps"), maps.size(0) * maps.size(1),
                           maps.size(2),            maps.size(3),             threshold,
                           connectivity == 8,       largest};
  std::vector<std::vector<Component>> found;
  run_core([&] { found = component_boxes(job, torch_parallel()); });
  return found;
}

void put_box(const Component& from, float* box) {
  box[0] = static_cast<float>(from.left);
  box[1] = static_cast<float>(from.top);
  box[2] = static_cast<float>(from.right);
  box[3] = static_cast<float>(from.bottom);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> component_boxes_cpu(
    const Tensor& maps, double threshold, int64_t connectivity, bool largest) {
  const auto found = components(maps, threshold, connectivity, largest);
  int64_t total = 0;
  for (const auto& own : found) total += static_cast<int64_t>(own.size());
  const Tensor boxes = empty_like(maps, {total, 4}, ScalarType::Float);
  const Tensor area = empty_like(maps, {total}, ScalarType::Long);
  const Tensor mean = empty_like(maps, {total}, ScalarType::Float);
  const Tensor image = empty_like(maps, {total}, ScalarType::Long);
  const Tensor channel = empty_like(maps, {total}, ScalarType::Long);
  int64_t row = 0;
  for (size_t map = 0; map < found.size(); ++map) {
    for (const Component& own : found[map]) {
      put_box(own, boxes.mutable_data_ptr<float>() + 4 * row);
      area.mutable_data_ptr<int64_t>()[row] = own.area;
      mean.mutable_data_ptr<float>()[row] = static_cast<float>(own.mean);
      image.mutable_data_ptr<int64_t>()[row] = static_cast<int64_t>(map) / maps.size(1);
      channel.mutable_data_ptr<int64_t>()[row] = static_cast<int64_t>(map) % maps.size(1);
      ++row;
    }
  }
  return {boxes, area, mean, image, channel};
}

std::tuple<Tensor, Tensor, Tensor> largest_box_cpu(const Tensor& maps, double threshold, int64_t connectivity) {
  const auto found = components(maps, threshold, connectivity, true);
  const int64_t batch = maps.size(0);
  const int64_t channels = maps.size(1);
  const Tensor boxes = empty_like(maps, {batch, channels, 4}, ScalarType::Float);
  const Tensor area = empty_like(maps, {batch, channels}, ScalarType::Long);
  const Tensor mean = empty_like(maps, {batch, channels}, ScalarType::Float);
  for (size_t map = 0; map < found.size(); ++map) {
    const Component own = found[map].empty() ? Component{0, 0, 0, 0, 0, 0.0} : found[map][0];
    put_box(own, boxes.mutable_data_ptr<float>() + 4 * map);
    area.mutable_data_ptr<int64_t>()[map] = own.area;
    mean.mutable_data_ptr<float>()[map] = static_cast<float>(own.mean);
  }
  return {boxes, area, mean};
}

std::tuple<Tensor, Tensor, Tensor> kmeans_cpu(const Tensor& features, const Tensor& starts, int64_t iterations,
                                              bool cosine) {
  require(features.dim() == 3, "features: expected (B, N, D)");
  require(starts.dim() == 4 && starts.size(0) == features.size(0) && starts.size(3) == features.size(2) &&
              starts.is_cpu(),
          "centres: expected (B, R, k, D) on the CPU, B and D as features have");
  require(features.size(1) > 0 && starts.size(2) > 0, "features, centres: expected a point and a cluster");
  const MapType type = map_type(features, "features");
  require(starts.scalar_type() == wide_type(type), "centres: expected float32, or float64 for float64 features");
  const Tensor points = contiguous(features);
  const Tensor from = contiguous(starts);
  const int64_t batch = starts.size(0);
  const int64_t restarts = starts.size(1);
  const Tensor labels = empty_like(points, {batch, restarts, points.size(1)}, ScalarType::Int);
  const Tensor centres = torch::stable::new_empty(from, from.sizes());
  const Tensor score = empty_like(from, {batch, restarts}, from.scalar_type());
  const KMeans job{points.const_data_ptr(),
                   type,
                   from.const_data_ptr(),
                   batch,
                   points.size(1),
                   points.size(2),
                   restarts,
                   from.size(2),
                   iterations,
                   cosine,
                   labels.mutable_data_ptr<int32_t>(),
                   centres.mutable_data_ptr(),
                   score.mutable_data_ptr()};
  run_core([&] { kmeans(job, torch_parallel()); });
  return {labels, centres, score};
}

std::tuple<Tensor, Tensor> slic_cpu(const Tensor& images, int64_t num_segments, double compactness, int64_t iterations,
                                    bool lab, bool connected, double min_size, double max_size) {
  require(images.dim() == 4 && images.size(1) > 0 && images.size(2) > 0 && images.size(3) > 0,
          "images: expected (B, D, H, W) with a channel and a pixel");
  require(!lab || images.size(1) == 3, "images: expected 3 channels for lab");
  require(num_segments > 0 && iterations > 0, "num_segments, iterations: expected numbers above 0");
  require(compactness > 0 && min_size >= 0 && max_size >= 0,
          "compactness, min_size, max_size: expected a number above 0 and two of at least 0");
  const int64_t pixels = images.size(2) * images.size(3);
  if (pixels > kMaxPixels) throw std::runtime_error(too_many_pixels("images", pixels));
  // Places are counted in 32 bits, in a frame that is wide also where the image is narrow.
  const int64_t framed = slic_stride(images.size(3)) * (images.size(2) + 2);
  if (framed > std::numeric_limits<int32_t>::max()) {
    throw std::runtime_error("images: got " + std::to_string(images.size(2)) + " x " + std::to_string(images.size(3)) +
                             " pixels, expected at most 2147483647 with each row padded to " +
                             std::to_string(slic_stride(images.size(3))));
  }
  const Tensor values = contiguous(images);
  const Tensor labels = empty_like(values, {values.size(0), values.size(2), values.size(3)}, ScalarType::Int);
  const Tensor counts = empty_like(values, {values.size(0)}, ScalarType::Long);
  const Slic job{values.const_data_ptr(),
                 map_type(values, "images"),
                 values.size(0),
                 values.size(1),
                 values.size(2),
                 values.size(3),
                 num_segments,
                 compactness,
                 iterations,
                 lab,
                 connected,
                 min_size,
                 max_size,
                 labels.mutable_data_ptr<int32_t>(),
                 counts.mutable_data_ptr<int64_t>()};
  run_core([&] { slic(job, torch_parallel()); });
  return {labels, counts};
}

}  // namespace

STABLE_TORCH_LIBRARY(molt, m) {
  m.def("upsample_normalize(Tensor maps, SymInt height, SymInt width) -> Tensor");
  m.def("fuse_maps(Tensor[] maps, SymInt height, SymInt width, float[] weights) -> Tensor");
  m.def("cluster_mean(Tensor values, Tensor labels, SymInt num_clusters, Tensor? counts) -> (Tensor, Tensor)");
  m.def("cluster_refine(Tensor maps, Tensor labels, float alpha, SymInt num_clusters, Tensor? counts) -> Tensor");
  m.def(
      "fuse_and_refine(Tensor[] maps, Tensor labels, float[] weights, float alpha, SymInt num_clusters, "
      "Tensor? counts) -> Tensor");
  m.def("cluster_vote(Tensor labels, Tensor segments, SymInt num_clusters, SymInt num_segments) -> Tensor");
  m.def(
      "component_boxes(Tensor maps, float threshold, int connectivity, bool largest) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("largest_box(Tensor maps, float threshold, int connectivity) -> (Tensor, Tensor, Tensor)");
  m.def("kmeans(Tensor features, Tensor centres, int iterations, bool cosine) -> (Tensor, Tensor, Tensor)");
  m.def(
      "slic(Tensor images, SymInt num_segments, float compactness, int iterations, bool lab, bool connected, "
      "float min_size, float max_size) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(molt, CPU, m) {
  m.impl("upsample_normalize", TORCH_BOX(&upsample_normalize_cpu));
  m.impl("fuse_maps", TORCH_BOX(&fuse_maps_cpu));
  m.impl("cluster_mean", TORCH_BOX(&cluster_mean_cpu));
  m.impl("cluster_refine", TORCH_BOX(&cluster_refine_cpu));
  m.impl("fuse_and_refine", TORCH_BOX(&fuse_and_refine_cpu));
  m.impl("cluster_vote", TORCH_BOX(&cluster_vote_cpu));
  m.impl("component_boxes", TORCH_BOX(&component_boxes_cpu));
  m.impl("largest_box", TORCH_BOX(&largest_box_cpu));
  m.impl("kmeans", TORCH_BOX(&kmeans_cpu));
  m.impl("slic", TORCH_BOX(&slic_cpu));
}
