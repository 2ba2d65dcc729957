#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

namespace molt {

// A thread keeps what it worked in: malloc would give the memory back to the system after each call and fetch it anew,
// page by page, in the next, which can take longer than the work.
struct ScratchBlock {
  std::unique_ptr<std::byte[]> data;
  size_t size = 0;
};

constexpr size_t kScratchBlocks = 16;

inline std::vector<ScratchBlock>& scratch_shelf() {
  thread_local std::vector<ScratchBlock> shelf = [] {
    std::vector<ScratchBlock> empty;
    empty.reserve(kScratchBlocks);  // so that giving back does not allocate
    return empty;
  }();
  return shelf;
}

// Uninitialised numbers of type T, for as long as this lives.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : bytes_(static_cast<size_t>(count) * sizeof(T)) {
    std::vector<ScratchBlock>& shelf = scratch_shelf();
    size_t best = shelf.size();
    for (size_t i = 0; i < shelf.size(); ++i) {
      if (shelf[i].size >= bytes_ && (best == shelf.size() || shelf[i].size < shelf[best].size)) best = i;
    }
    if (best < shelf.size()) {
      std::swap(shelf[best], shelf.back());
      block_ = std::move(shelf.back());
      shelf.pop_back();
    } else {
      block_ = {std::unique_ptr<std::byte[]>(new std::byte[bytes_ + 1]), bytes_};
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  ~Scratch() {
    std::vector<ScratchBlock>& shelf = scratch_shelf();
    if (block_.size > kKeptBytes) return;
    if (shelf.size() == kScratchBlocks) shelf.erase(shelf.begin());  // the one that was given back first
    shelf.push_back(std::move(block_));
  }

  T* data() { return reinterpret_cast<T*>(block_.data.get()); }
  T& operator[](int64_t i) { return data()[i]; }
  void zero() { std::memset(block_.data.get(), 0, bytes_); }

 private:
  static constexpr size_t kKeptBytes = size_t{1} << 20;
  size_t bytes_;
  ScratchBlock block_;
};

}  // namespace molt
