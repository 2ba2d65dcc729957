// The CUDA kernels, compiled for the CPU, behind a C interface for ctypes. Types are numbers of molt::cuda's enums.
#include "../../csrc/cuda/cluster_vote.cuh"
#include "../../csrc/cuda/components.cuh"
#include "../../csrc/cuda/refine_launch.cuh"
#include "../../csrc/cuda/sweep_launch.cuh"
#include "memory.h"

using namespace molt::cuda;

extern "C" {

void* emulator_allocate(size_t bytes, size_t alignment) { return emulator::allocate(bytes, alignment); }
void emulator_release(void* data) { emulator::release(data); }
void emulator_reset(uint64_t seed, unsigned resident, int64_t most) {
  emulator::reset(seed, resident);
  Memory::most_bytes = most;
}
const char* emulator_message() { return emulator::last_message(); }

// `sizes`: height and width of each of `scales` small maps; 0 scales where `maps[0]` is the large map.
int emulator_refine(const void* const* maps, int scales, const int* sizes, const double* weights, const void* labels,
                    const int64_t* counts, void* out, void* means, int64_t* totals, int type, int label_type,
                    int64_t batch, int64_t channels, int height, int width, int64_t limit, double alpha,
                    int processors, int64_t look_ahead) {
  Refine job{};
  if (scales == 0) job.maps = maps[0];
  for (int s = 0; s < scales; ++s) job.scales.push_back({maps[s], sizes[2 * s], sizes[2 * s + 1], weights[s]});
  job.height = height;
  job.width = width;
  job.labels = labels;
  job.counts = counts;
  job.out = out;
  job.means = means;
  job.totals = totals;
  job.type = static_cast<MapType>(type);
  job.label_type = static_cast<LabelType>(label_type);
  job.batch = batch;
  job.channels = channels;
  job.pixels = int64_t{height} * width;
  job.limit = limit;
  job.alpha = alpha;
  job.look_ahead = look_ahead;
  Memory memory;
  switch (job.type) {
    case MapType::float16:
      return refine_as<half>(job, memory, processors, nullptr);
    case MapType::bfloat16:
      return refine_as<bfloat16>(job, memory, processors, nullptr);
    case MapType::float32:
      return refine_as<float>(job, memory, processors, nullptr);
    default:
      return refine_as<double>(job, memory, processors, nullptr);
  }
}

int emulator_vote(const void* labels, const void* segments, void* out, int label_type, int segment_type, int64_t batch,
                  int64_t pixels, int64_t num_clusters, int64_t num_segments) {
  Memory memory;
  return run_vote({labels, segments, out, static_cast<LabelType>(label_type), static_cast<LabelType>(segment_type),
                   batch, pixels, num_clusters, num_segments},
                  memory, nullptr);
}

int emulator_largest_box(const void* maps, int type, int64_t batch, int64_t channels, int height, int width,
                         double threshold, int connectivity, float* boxes, int64_t* area, float* mean) {
  Memory memory;
  return run_largest_box(
      {maps, static_cast<MapType>(type), batch, channels, height, width, threshold, connectivity}, boxes, area, mean,
      memory, nullptr);
}

// Rows of x0, y0, x1, y1, area, mean, map; returns their number, or minus the error.
int64_t emulator_list(const void* maps, int type, int64_t batch, int64_t channels, int height, int width,
                      double threshold, int connectivity, int largest, double* rows, int64_t room) {
  Memory memory;
  std::vector<Component> found;
  const int error =
      run_list_components({maps, static_cast<MapType>(type), batch, channels, height, width, threshold, connectivity},
                          largest != 0, found, memory, nullptr);
  if (error != 0) return -error;
  int64_t count = 0;
  for (const Component& one : found) {
    if (count == room) break;
    double* row = rows + 7 * count++;
    for (int i = 0; i < 4; ++i) row[i] = one.box[i];
    row[4] = static_cast<double>(one.area);
    row[5] = one.mean;
    row[6] = static_cast<double>(one.map);
  }
  return static_cast<int64_t>(found.size());
}

// Returns the number of rows, or minus the error; writes the rows where `room` is their number.
int64_t emulator_sweep(const uint8_t* levels, int64_t batch, int64_t channels, int height, int width, int connectivity,
                       int64_t room, float* boxes, double* area, int64_t* first, int64_t* last, int64_t* image,
                       int64_t* channel) {
  Memory memory;
  const Sweep job{levels, batch, channels, height, width, connectivity};
  std::vector<SweptChunk> found;
  int error = run_list_swept(job, found, memory, nullptr);
  int64_t count = 0;
  for (const SweptChunk& chunk : found) count += chunk.count;
  if (error == 0 && count == room) {
    error = run_write_swept(job, found, {boxes, area, first, last, image, channel}, nullptr);
  }
  return error != 0 ? -error : count;
}

int emulator_largest_at_cuts(const uint8_t* levels, int64_t batch, int64_t channels, int height, int width,
                             int connectivity, float* boxes, double* area) {
  Memory memory;
  return run_largest_at_cuts({levels, batch, channels, height, width, connectivity}, boxes, area, memory, nullptr);
}

}  // extern "C"
