#pragma once

#ifndef MOLT_EMULATE
#include <cuda_runtime_api.h>
#endif

#include <cstddef>
#include <cstdint>
#include <vector>

// The launchers: device pointers, contiguous tensors and a stream in, an error code out. None waits for the device
// but list_components and list_swept, none allocates but through Scratch. Sizes are checked by the caller.
namespace molt::cuda {

enum class MapType : int { float16, bfloat16, float32, float64 };
enum class LabelType : int { uint8, int32, int64 };

// Device memory that lives until the stream has used it.
class Scratch {
 public:
  virtual void* get(size_t bytes) = 0;
  // Bytes that tables of one kind may take: more images than fit go one after another.
  virtual int64_t most() const { return int64_t{256} << 20; }

  template <class T>
  T* get_array(int64_t count) {
    return static_cast<T*>(get(static_cast<size_t>(count) * sizeof(T)));
  }

 protected:
  ~Scratch() = default;
};

constexpr int kMaxScales = 8;
constexpr int64_t kMaxPixels = int64_t{1} << 30;  // of one map, and
constexpr int64_t kMaxMaps = int64_t{1} << 30;    // maps of one call: keep their numbers in 32 bits

// Small maps (batch * channels, height, width) of one scale.
struct Scale {
  const void* maps;
  int height;
  int width;
  double weight;
};

struct Refine {
  const void* maps;  // null: the maps are `scales`, upsampled to height x width
  std::vector<Scale> scales;
  int height;
  int width;
  const void* labels;
  const int64_t* counts;  // limit of each image's labels, or null
  void* out;              // null: only means and totals are wanted
  void* means;            // (batch * channels, limit), float32 or float64; null where out is wanted
  int64_t* totals;        // (batch, limit)
  MapType type;
  LabelType label_type;
  int64_t batch;
  int64_t channels;
  int64_t pixels;
  int64_t limit;  // labels are in [0, limit)
  double alpha;
  int64_t look_ahead;  // maps summed before the first is painted; 0: as many as fill the cache
};

// cluster_refine, cluster_mean and fuse_and_refine. `processors` and `look_ahead` set the order of work
// and no bit of the result.
cudaError_t cluster_refine(const Refine& job, Scratch& scratch, int processors, cudaStream_t stream);

struct Vote {
  const void* labels;
  const void* segments;
  void* out;
  LabelType label_type;
  LabelType segment_type;
  int64_t batch;
  int64_t pixels;
  int64_t num_clusters;
  int64_t num_segments;
};

cudaError_t cluster_vote(const Vote& job, Scratch& scratch, cudaStream_t stream);

struct Components {
  const void* maps;
  MapType type;
  int64_t batch;
  int64_t channels;
  int height;
  int width;
  double threshold;
  int connectivity;
};

// One component, or none where area is 0.
struct Component {
  float box[4];
  float mean;
  int root;
  int64_t area;
  int64_t map;
};

// The largest component of every map: boxes (maps, 4), area (maps), mean (maps).
cudaError_t largest_box(
    const Components& job, float* boxes, int64_t* area, float* mean, Scratch& scratch, cudaStream_t stream);

// All components, or the largest of every map, on the host: by map, area from the largest, first pixel.
cudaError_t list_components(
    const Components& job, bool largest, std::vector<Component>& found, Scratch& scratch, cudaStream_t stream);

// At cut c, 0 to 254, the pixels above c are kept.
struct Sweep {
  const uint8_t* levels;
  int64_t batch;
  int64_t channels;
  int height;
  int width;
  int connectivity;
};

// Components that a number of maps have, in device memory.
struct SweptChunk {
  const void* rows;
  int64_t count;
};

struct SweptBoxes {
  float* boxes;  // (rows, 4)
  double* area;
  int64_t* first;
  int64_t* last;
  int64_t* image;
  int64_t* channel;
};

// The largest component of every map at every cut: boxes (maps, 255, 4), area (maps, 255).
cudaError_t largest_at_cuts(const Sweep& job, float* boxes, double* area, Scratch& scratch, cudaStream_t stream);

// Every component once for the cuts over which it does not change: by map, last cut from the highest, first pixel.
// Listed first, as only then is their number known; waits for the device once a chunk of maps.
cudaError_t list_swept(const Sweep& job, std::vector<SweptChunk>& found, Scratch& scratch, cudaStream_t stream);
cudaError_t write_swept(
    const Sweep& job, const std::vector<SweptChunk>& found, const SweptBoxes& to, cudaStream_t stream);

}  // namespace molt::cuda
