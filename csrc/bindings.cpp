#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>

#include "cpu/clones.h"
#include "cpu/cluster_refine.h"
#include "cpu/one_cut.h"
#include "cpu/sweep.h"
#include "torch_parallel.h"

namespace py = pybind11;

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#elif defined(_MSC_VER)
constexpr const char* kCompiler = "msvc";
#else
constexpr const char* kCompiler = "unknown";
#endif

py::dict build_config() {
  py::dict config;
  config["molt"] = MOLT_VERSION;
  config["compiler"] = kCompiler;
  config["cxx_standard"] = static_cast<int64_t>(__cplusplus);
  config["torch"] = MOLT_BUILD_TORCH;
  config["torch_abi_target"] = std::to_string(TORCH_TARGET_VERSION >> 56) + "." +
                               std::to_string((TORCH_TARGET_VERSION >> 48) & 0xff);
  config["cpu_clones"] = MOLT_CLONES_NAME;
  config["flags"] = MOLT_BUILD_FLAGS;
  const std::string archs = MOLT_CUDA_ARCHS;
  config["cuda"] = MOLT_CUDA_NOTE;
  config["cuda_archs"] = archs.empty() ? py::object(py::none()) : py::object(py::str(archs));
  return config;
}

std::string text(const py::handle& value) { return py::str(value).cast<std::string>(); }

molt::MapType map_type(const py::array& maps) {
  if (maps.dtype().equal(py::dtype("float16"))) return molt::MapType::float16;
  if (maps.dtype().equal(py::dtype::of<float>())) return molt::MapType::float32;
  if (maps.dtype().equal(py::dtype::of<double>())) return molt::MapType::float64;
  throw py::type_error("maps: got dtype " + text(maps.dtype()) + ", expected float16, float32 or float64");
}

molt::LabelType label_type(const py::array& labels) {
  if (labels.dtype().equal(py::dtype::of<uint8_t>())) return molt::LabelType::uint8;
  if (labels.dtype().equal(py::dtype::of<int32_t>())) return molt::LabelType::int32;
  if (labels.dtype().equal(py::dtype::of<int64_t>())) return molt::LabelType::int64;
  throw py::type_error("labels: got dtype " + text(labels.dtype()) + ", expected uint8, int32 or int64");
}

py::array contiguous(const py::array& given) {
  py::array array = py::array::ensure(given, py::array::c_style);
  if (!array) throw py::error_already_set();
  return array;
}

py::array cluster_refine(const py::array& given_maps, const py::array& given_labels, double alpha,
                         const py::object& num_clusters) {
  const molt::MapType maps_are = map_type(given_maps);
  const molt::LabelType labels_are = label_type(given_labels);
  const py::array maps = contiguous(given_maps);
  const py::array labels = contiguous(given_labels);
  if (maps.ndim() != 4) {
    throw py::value_error("maps: got shape " + text(maps.attr("shape")) + ", expected (B, C, H, W)");
  }
  if (labels.ndim() != 3 || labels.shape(0) != maps.shape(0) || labels.shape(1) != maps.shape(2) ||
      labels.shape(2) != maps.shape(3)) {
    throw py::value_error("labels: got shape " + text(labels.attr("shape")) + ", expected (B, H, W) of maps " +
                          text(maps.attr("shape")));
  }
  if (!(alpha >= 0.0 && alpha <= 1.0)) {
    throw py::value_error("alpha: got " + text(py::float_(alpha)) + ", expected a number in [0, 1]");
  }
  py::array_t<int64_t> counts;
  int64_t limit = -1;
  bool ragged = false;
  if (py::isinstance<py::array>(num_clusters)) {
    if (num_clusters.attr("dtype").attr("kind").cast<std::string>() != "i" &&
        num_clusters.attr("dtype").attr("kind").cast<std::string>() != "u") {
      throw py::type_error("num_clusters: got dtype " + text(num_clusters.attr("dtype")) + ", expected integers");
    }
    counts = py::array_t<int64_t, py::array::c_style | py::array::forcecast>::ensure(num_clusters);
    if (counts.ndim() != 1 || counts.shape(0) != maps.shape(0)) {
      throw py::value_error("num_clusters: got shape " + text(counts.attr("shape")) + ", expected one number an image");
    }
    for (py::ssize_t i = 0; i < counts.shape(0); ++i) {
      if (counts.at(i) < 0) {
        throw py::value_error("num_clusters: got " + std::to_string(counts.at(i)) + ", expected numbers >= 0");
      }
    }
    ragged = true;
  } else if (!num_clusters.is_none()) {
    limit = num_clusters.cast<int64_t>();
    if (limit < 0) throw py::value_error("num_clusters: got " + std::to_string(limit) + ", expected a number >= 0");
  }

  py::array out(maps.dtype(), std::vector<py::ssize_t>(maps.shape(), maps.shape() + maps.ndim()));
  molt::Clusters job{};
  job.maps = maps.data();
  job.labels = labels.data();
  job.map_type = maps_are;
  job.label_type = labels_are;
  job.batch = maps.shape(0);
  job.channels = maps.shape(1);
  job.pixels = maps.shape(2) * maps.shape(3);
  job.num_clusters = limit;
  job.counts = ragged ? counts.data() : nullptr;
  job.out = out.mutable_data();
  job.alpha = alpha;
  {
    py::gil_scoped_release release;
    molt::cluster_refine(job, molt::torch_parallel());
  }
  return out;
}

py::tuple box_curves(const py::array& given, const py::array_t<double, py::array::c_style | py::array::forcecast>& truths,
                     const py::array_t<int64_t, py::array::c_style | py::array::forcecast>& offsets, bool contours,
                     bool clip, double extra, const std::array<double, 4>& empty, bool any, bool largest) {
  if (!given.dtype().equal(py::dtype::of<uint8_t>())) {
    throw py::type_error("levels: got dtype " + text(given.dtype()) + ", expected uint8");
  }
  if (given.ndim() != 3) {
    throw py::value_error("levels: got shape " + text(given.attr("shape")) + ", expected (B, H, W)");
  }
  if (truths.ndim() != 2 || truths.shape(1) != 4) {
    throw py::value_error("truths: got shape " + text(truths.attr("shape")) + ", expected (M, 4)");
  }
  const py::ssize_t batch = given.shape(0);
  bool rising = offsets.ndim() == 1 && offsets.shape(0) == batch + 1 && offsets.at(0) == 0;
  for (py::ssize_t i = 0; rising && i < batch; ++i) rising = offsets.at(i) <= offsets.at(i + 1);
  if (!rising || offsets.at(batch) != truths.shape(0)) {
    throw py::value_error("offsets: expected B + 1 rising numbers from 0 to the number of boxes");
  }
  const py::array levels = contiguous(given);
  py::array_t<double> of_any({any ? batch : 0, static_cast<py::ssize_t>(molt::kCuts)});
  py::array_t<double> of_largest({largest ? batch : 0, static_cast<py::ssize_t>(molt::kCuts)});
  py::array_t<int64_t> peak(batch);
  const molt::BoxCurves job{{static_cast<const uint8_t*>(levels.data()), batch, levels.shape(1), levels.shape(2),
                             contours, true},
                            truths.data(),
                            offsets.data(),
                            clip,
                            extra,
                            {empty[0], empty[1], empty[2], empty[3]},
                            any ? of_any.mutable_data() : nullptr,
                            largest ? of_largest.mutable_data() : nullptr,
                            peak.mutable_data()};
  if (batch > 0) {
    py::gil_scoped_release release;
    molt::box_curves(job, molt::torch_parallel());
  }
  return py::make_tuple(of_any, of_largest, peak);
}

py::array_t<int32_t> largest_at_one_cut(const py::array& given, double threshold, bool relative, bool contours) {
  const molt::MapType kind = map_type(given);
  if (given.ndim() != 3 || kind == molt::MapType::float16) {
    throw py::value_error("maps: got shape " + text(given.attr("shape")) + ", expected (N, H, W) of float32 or float64");
  }
  if (!(threshold >= 0.0 && threshold < 1.0)) throw py::value_error("threshold: expected a number in [0, 1)");
  const py::array maps = contiguous(given);
  py::array_t<int32_t> boxes({maps.shape(0), py::ssize_t{4}});
  const molt::OneCut job{maps.data(),   kind,      maps.shape(0), maps.shape(1),
                         maps.shape(2), threshold, relative,      contours};
  int32_t* to = boxes.mutable_data();
  if (job.count > 0) {
    py::gil_scoped_release release;
    molt::largest_at_one_cut(job, to, molt::torch_parallel());
  }
  return boxes;
}

py::array_t<int64_t> count_scores(const py::array_t<double, py::array::c_style | py::array::forcecast>& scores,
                                  const py::array_t<uint8_t, py::array::c_style | py::array::forcecast>& mask,
                                  const py::array_t<double, py::array::c_style | py::array::forcecast>& edges) {
  if (scores.size() != mask.size() || scores.size() > INT32_MAX) {
    throw py::value_error("mask: expected as many pixels as there are scores");
  }
  if (edges.ndim() != 1 || edges.size() < 2 || !(edges.at(0) <= 0.0) || !(edges.at(edges.size() - 1) > 1.0)) {
    throw py::value_error("edges: expected rising numbers from 0 to above 1");
  }
  const py::ssize_t bins = edges.size() - 1;
  py::array_t<int64_t> counts({py::ssize_t{2}, bins});
  int64_t* to = counts.mutable_data();
  std::fill(to, to + 2 * bins, 0);
  bool inside = true;
  {
    py::gil_scoped_release release;
    inside = molt::count_scores(scores.data(), mask.data(), scores.size(), edges.data(), bins, to);
  }
  if (!inside) throw py::value_error("scores: expected numbers in [0, 1]");
  return counts;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled half of molt: registers torch.ops.molt.* when imported; the functions here are for NumPy.";
  m.def("build_config", &build_config, "How this file was compiled.");
  m.def("cluster_refine_numpy", &cluster_refine, py::arg("maps"), py::arg("labels"), py::arg("alpha") = 0.5,
        py::arg("num_clusters") = py::none(),
        "cluster_refine for NumPy arrays, on the same core as the operator; contiguous arrays are not copied.");
  m.def("box_curves_numpy", &box_curves, py::arg("levels"), py::arg("truths"), py::arg("offsets"),
        py::arg("contours") = true, py::arg("clip") = true, py::arg("extra") = 1.0,
        py::arg("empty") = std::array<double, 4>{}, py::arg("any") = true, py::arg("largest") = true,
        "box_curves for NumPy arrays, on the same core as the operator; contiguous arrays are not copied.");
  m.def("largest_at_one_cut_numpy", &largest_at_one_cut, py::arg("maps"), py::arg("threshold"), py::arg("relative"),
        py::arg("contours"), "The largest component's box of each map at one threshold; zeros for nothing.");
  m.def("count_scores_numpy", &count_scores, py::arg("scores"), py::arg("mask"), py::arg("edges"),
        "How many scores lie between the edges, where the mask is 1 and where it is 0.");
}
