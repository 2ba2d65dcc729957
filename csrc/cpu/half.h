#pragma once

#include <cstdint>

#include "clones.h"

namespace molt {

struct half {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

// A union, not memcpy, which keeps GCC from vectorising.
MOLT_INLINE float as_float(uint32_t bits) {
  union {
    uint32_t bits;
    float value;
  } both = {bits};
  return both.value;
}

MOLT_INLINE uint32_t as_bits(float value) {
  union {
    float value;
    uint32_t bits;
  } both = {value};
  return both.bits;
}

MOLT_INLINE float to_float(bfloat16 value) { return as_float(static_cast<uint32_t>(value.bits) << 16); }

MOLT_INLINE float to_float(half value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  const uint32_t sign = bits & 0x80000000u;
  const uint32_t doubled = bits + bits;
  // Normal: rebias the exponent by a multiplication, which also carries inf and NaN. Subnormal: let the FPU normalise.
  const float normal = as_float((doubled >> 4) + 0x70000000u) * 0x1p-112f;
  const float subnormal = as_float((doubled >> 17) | 0x3f000000u) - 0.5f;
  return as_float(sign | as_bits(doubled < 0x08000000u ? subnormal : normal));
}

// Round to nearest, ties to even.
MOLT_INLINE void store(float value, bfloat16* to) {
  const uint32_t bits = as_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to->bits = static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

MOLT_INLINE void store(float value, half* to) {
  const uint32_t bits = as_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t doubled = bits + bits;
  // Scaling up then down turns too large into inf; adding a power of two cuts the mantissa at the right bit.
  const float magnitude = as_float(bits & 0x7fffffffu) * 0x1p+112f * 0x1p-110f;
  uint32_t bias = doubled & 0xff000000u;
  bias = bias < 0x71000000u ? 0x71000000u : bias;
  const uint32_t sum = as_bits(as_float((bias >> 1) + 0x07800000u) + magnitude);
  const uint32_t nonsign = ((sum >> 13) & 0x7c00u) + (sum & 0x0fffu);
  to->bits = static_cast<uint16_t>(sign | (doubled > 0xff000000u ? 0x7e00u : nonsign));
}

}  // namespace molt
