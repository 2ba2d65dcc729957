#pragma once

#include <vector>

#include "../../csrc/cuda/launch.h"
#include "emulator.h"

// Scratch of one call, each array before a page that faults.
class Memory final : public molt::cuda::Scratch {
 public:
  static inline int64_t most_bytes = int64_t{256} << 20;

  ~Memory() {
    for (void* data : kept_) emulator::release(data);
  }
  int64_t most() const override { return most_bytes; }
  void* get(size_t bytes) override {
    kept_.push_back(emulator::allocate(bytes, 16));
    return kept_.back();
  }

 private:
  std::vector<void*> kept_;
};
