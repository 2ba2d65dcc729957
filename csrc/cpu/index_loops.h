#pragma once

// Labels as indices into a table: their range, narrower types, and groups that are all alike.

#include <cstdint>
#include <cstring>
#include <string>

#include "clones.h"

namespace molt {

constexpr int64_t kMaxPixels = int64_t{1} << 30;  // keeps the widest table within an int32 index
constexpr int64_t kGroup = 8;                     // labels looked at together
constexpr int64_t kNarrow = 1024;                 // tables up to this width need not fit exactly

struct Range {
  int64_t low;
  int64_t high;
  int64_t size() const { return high - low + 1; }
};

inline std::string out_of_range(const char* name, int64_t image, const Range& all, int64_t limit) {
  const std::string expected = limit < 0 ? "values >= 0" : "values in [0, " + std::to_string(limit) + ")";
  return std::string(name) + ": got " + std::to_string(all.low < 0 ? all.low : all.high) + " in image " +
         std::to_string(image) + ", expected " + expected;
}

inline std::string too_many_pixels(const char* name, int64_t pixels) {
  return std::string(name) + ": got " + std::to_string(pixels) + " pixels an image, expected at most " +
         std::to_string(kMaxPixels);
}

namespace {

template <class L>
MOLT_INLINE Range range_of(const L* labels, int64_t n) {
  L low = labels[0];
  L high = labels[0];
  for (int64_t i = 1; i < n; ++i) {
    low = labels[i] < low ? labels[i] : low;
    high = labels[i] > high ? labels[i] : high;
  }
  return {static_cast<int64_t>(low), static_cast<int64_t>(high)};
}

// All bits that any label has: no label lies above it, and it is negative where a label is. Cheaper than a range.
template <class L>
MOLT_INLINE int64_t bits_of(const L* labels, int64_t n) {
  L bits = 0;
  for (int64_t i = 0; i < n; ++i) bits |= labels[i];
  return static_cast<int64_t>(bits);
}

template <class L, class I>
MOLT_INLINE void narrow_to(const L* labels, int64_t n, int64_t low, I* index) {
  for (int64_t i = 0; i < n; ++i) index[i] = static_cast<I>(static_cast<int64_t>(labels[i]) - low);
}

// Whether kGroup labels from here are the same.
MOLT_INLINE bool uniform(const uint8_t* index) {
  static_assert(kGroup == 8);
  uint64_t word;
  std::memcpy(&word, index, sizeof(word));
  return word == index[0] * uint64_t{0x0101010101010101};
}

MOLT_INLINE bool uniform(const int32_t* index) {
  // Four words, not an array: GCC 12 copies an array through a stack slot that it does not always align.
  uint64_t first, second, third, fourth;
  std::memcpy(&first, index, sizeof(first));
  std::memcpy(&second, index + 2, sizeof(second));
  std::memcpy(&third, index + 4, sizeof(third));
  std::memcpy(&fourth, index + 6, sizeof(fourth));
  const uint64_t swapped = first << 32 | first >> 32;
  return ((first ^ swapped) | (first ^ second) | (first ^ third) | (first ^ fourth)) == 0;
}

// target_clones does not take templates, hence one plain function a type.
#define MOLT_LABEL_LOOPS(L)                                                                            \
  [[maybe_unused]] MOLT_CLONES Range range(const L* labels, int64_t n) { return range_of(labels, n); } \
  [[maybe_unused]] MOLT_CLONES int64_t bits(const L* labels, int64_t n) { return bits_of(labels, n); } \
  [[maybe_unused]] MOLT_CLONES void narrow(const L* labels, int64_t n, int64_t low, int32_t* index) {  \
    narrow_to(labels, n, low, index);                                                                  \
  }                                                                                                    \
  [[maybe_unused]] MOLT_CLONES void narrow(const L* labels, int64_t n, int64_t low, uint8_t* index) {  \
    narrow_to(labels, n, low, index);                                                                  \
  }
MOLT_LABEL_LOOPS(uint8_t)
MOLT_LABEL_LOOPS(int32_t)
MOLT_LABEL_LOOPS(int64_t)
#undef MOLT_LABEL_LOOPS

// A range that holds the labels; exact where one of them may lie outside [0, limit).
template <class L>
Range bounds(const L* labels, int64_t n, int64_t limit) {
  const int64_t above = bits(labels, n);
  if (above >= 0 && above < kNarrow && (limit < 0 || above < limit)) return {0, above};
  return range(labels, n);
}

}  // namespace
}  // namespace molt
