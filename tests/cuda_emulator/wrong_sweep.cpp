// The sweep with one of its barriers left out, by line (of sweep_launch.cuh: 1000 + line): results must show it.
#include "device.cuh"

namespace {

unsigned left_out = 0;

void barrier_at(unsigned line) {
  if (line != left_out) emulator::barrier();
}

}  // namespace

#define __syncthreads() barrier_at(__LINE__)
#include "sweep.cuh"
#undef __syncthreads
#define __syncthreads() barrier_at(1000 + __LINE__)
#include "sweep_launch.cuh"
#include "memory.h"

using namespace molt::cuda;

extern "C" {

// The sum of all rows and of the largest boxes, weighed by their places; minus the error where there is one.
double run_without(unsigned line, uint64_t seed, const uint8_t* levels, int64_t maps, int height, int width) {
  left_out = line;
  emulator::reset(seed, 2);
  Memory memory;
  const Sweep job{levels, maps, 1, height, width, 8};
  std::vector<SweptChunk> found;
  int error = run_list_swept(job, found, memory, nullptr);
  double sum = 0;
  for (const SweptChunk& chunk : found) {
    for (int64_t i = 0; i < chunk.count; ++i) {
      const SweptRow& row = static_cast<const SweptRow*>(chunk.rows)[i];
      const Node& node = row.node;
      for (const int64_t part : {int64_t{node.root}, int64_t{node.area}, int64_t{node.left}, int64_t{node.right},
                                 int64_t{node.bottom}, int64_t{node.cuts}, row.map}) {
        sum = sum * 0.999 + static_cast<double>(part);
      }
    }
  }
  const auto size = static_cast<size_t>(maps) * 255;
  auto* boxes = static_cast<float*>(memory.get(4 * size * sizeof(float)));
  auto* area = static_cast<double*>(memory.get(size * sizeof(double)));
  if (error == 0) error = run_largest_at_cuts(job, boxes, area, memory, nullptr);
  if (error != 0) return -error;
  for (size_t i = 0; i < 4 * size; ++i) sum = sum * 0.999 + boxes[i];
  for (size_t i = 0; i < size; ++i) sum = sum * 0.999 + area[i];
  return sum;
}

}  // extern "C"
