#pragma once

// RGB to CIELAB for many pixels at once: roots by Newton's and Halley's steps, which vectorise.

#include <cstdint>

#include "clones.h"
#include "half.h"

namespace molt {
namespace {

// A guess within some percent, by dividing the exponent.
MOLT_INLINE float root_guess(float value, float share, int32_t offset) {
  const int32_t bits = static_cast<int32_t>(as_bits(value));
  return as_float(static_cast<uint32_t>(static_cast<int32_t>(static_cast<float>(bits) * share) + offset));
}

MOLT_INLINE float cube_root(float value) {
  float root = root_guess(value, 1.0f / 3.0f, 709921077);
  for (int step = 0; step < 2; ++step) {
    const float cube = root * root * root;
    root *= (cube + 2.0f * value) / (2.0f * cube + value);
  }
  return root;
}

// From sRGB's curve to light; the power 2.4 is the square times the fifth root's square.
MOLT_INLINE float light(float value) {
  const float base = (value + 0.055f) * (1.0f / 1.055f);
  float root = root_guess(base, 0.2f, 851905971);
  for (int step = 0; step < 3; ++step) {
    const float square = root * root;
    root = 0.8f * root + 0.2f * base / (square * square);
  }
  const float curve = base * base * (root * root);
  const float line = value * (1.0f / 12.92f);
  return value > 0.04045f ? curve : line;
}

MOLT_INLINE float lab_curve(float value) {
  const float root = cube_root(value);
  const float line = 7.787037f * value + 16.0f / 116.0f;
  return value > 0.008856452f ? root : line;
}

// RGB in [0, 1] to CIELAB (D65, 2 degrees) times `scale`, in place.
[[maybe_unused]] MOLT_CLONES void to_lab(float* first, float* second, float* third, int64_t n, float scale) {
  for (int64_t i = 0; i < n; ++i) {
    const float r = light(first[i]);
    const float g = light(second[i]);
    const float b = light(third[i]);
    const float x = lab_curve((0.4124564f * r + 0.3575761f * g + 0.1804375f * b) * (1.0f / 0.95047f));
    const float y = lab_curve(0.2126729f * r + 0.7151522f * g + 0.0721750f * b);
    const float z = lab_curve((0.0193339f * r + 0.1191920f * g + 0.9503041f * b) * (1.0f / 1.08883f));
    first[i] = (116.0f * y - 16.0f) * scale;
    second[i] = 500.0f * (x - y) * scale;
    third[i] = 200.0f * (y - z) * scale;
  }
}

}  // namespace
}  // namespace molt
