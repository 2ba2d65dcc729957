#include "deep_steps.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "clones.h"
#include "scratch.h"

namespace molt {
namespace {

constexpr int64_t kStrip = 128;    // rows summed in float before they join the total in double
constexpr int64_t kSmall = 16384;  // numbers under which threads cost more than they save

MOLT_INLINE float positive(float x, bool relu) { return relu && !(x > 0.0f || x != x) ? 0.0f : x; }

// Sums of a strip, then of squared distances from the strip's mean, which does not cancel as a sum of squares would.
template <bool kRelu>
MOLT_INLINE void moments_of(const float* x, int64_t rows, int64_t channels, float* sums, float* squares) {
  std::memset(sums, 0, channels * sizeof(float));
  std::memset(squares, 0, channels * sizeof(float));
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = x + r * channels;
    for (int64_t c = 0; c < channels; ++c) sums[c] += positive(row[c], kRelu);
  }
  const float share = 1.0f / static_cast<float>(rows);
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = x + r * channels;
    for (int64_t c = 0; c < channels; ++c) {
      const float off = positive(row[c], kRelu) - sums[c] * share;
      squares[c] += off * off;
    }
  }
}

// The mean goes off first: a product with 1 / deviation before it would cancel where a channel hardly varies.
template <bool kRelu>
MOLT_INLINE void normalize_of(const float* __restrict x, const float* __restrict mean, const float* __restrict factor,
                              const float* __restrict shift, int64_t rows, int64_t channels, float* __restrict out) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < channels; ++c) {
      out[r * channels + c] = (positive(x[r * channels + c], kRelu) - mean[c]) * factor[c] + shift[c];
    }
  }
}

template <bool kRelu>
MOLT_INLINE void products_of(const float* gradient, const float* x, const float* mean, int64_t rows, int64_t channels,
                             float* sums, float* products) {
  std::memset(sums, 0, channels * sizeof(float));
  std::memset(products, 0, channels * sizeof(float));
  for (int64_t r = 0; r < rows; ++r) {
    const float* g = gradient + r * channels;
    const float* row = x + r * channels;
    for (int64_t c = 0; c < channels; ++c) {
      sums[c] += g[c];
      products[c] += g[c] * (positive(row[c], kRelu) - mean[c]);
    }
  }
}

struct Slopes {
  const float* factor;    // scale / deviation
  const float* mean;
  const float* shared;    // mean of the gradient
  const float* together;  // mean of gradient and normalized value, over the deviation
};

template <bool kRelu>
MOLT_INLINE void slope_of(const float* __restrict gradient, const float* __restrict x, const Slopes& by, int64_t rows,
                          int64_t channels, float* __restrict dx, float* __restrict sums) {
  std::memset(sums, 0, channels * sizeof(float));
  const float* __restrict factor = by.factor;
  const float* __restrict mean = by.mean;
  const float* __restrict shared = by.shared;
  const float* __restrict together = by.together;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t i = r * channels + c;
      const float value = positive(x[i], kRelu);
      float slope = factor[c] * (gradient[i] - shared[c] - (value - mean[c]) * together[c]);
      if (kRelu && x[i] <= 0.0f) slope = 0.0f;
      dx[i] = slope;
      sums[c] += slope;
    }
  }
}

// target_clones does not take templates, hence one plain function each.
#define MOLT_ROW_LOOPS(kRelu, name)                                                                                   \
  MOLT_CLONES void moments_##name(const float* x, int64_t rows, int64_t channels, float* sums, float* squares) {      \
    moments_of<kRelu>(x, rows, channels, sums, squares);                                                              \
  }                                                                                                                   \
  MOLT_CLONES void normalize_##name(const float* x, const float* mean, const float* factor, const float* shift,       \
                                    int64_t rows, int64_t channels, float* out) {                                     \
    normalize_of<kRelu>(x, mean, factor, shift, rows, channels, out);                                                 \
  }                                                                                                                   \
  MOLT_CLONES void products_##name(const float* gradient, const float* x, const float* mean, int64_t rows,            \
                                   int64_t channels, float* sums, float* products) {                                  \
    products_of<kRelu>(gradient, x, mean, rows, channels, sums, products);                                            \
  }                                                                                                                   \
  MOLT_CLONES void slope_##name(const float* gradient, const float* x, const Slopes& by, int64_t rows,                \
                                int64_t channels, float* dx, float* sums) {                                           \
    slope_of<kRelu>(gradient, x, by, rows, channels, dx, sums);                                                       \
  }
MOLT_ROW_LOOPS(true, relu)
MOLT_ROW_LOOPS(false, plain)
#undef MOLT_ROW_LOOPS

// e to the power of x <= 0, to a few roundings; 0 below -87, NaN for NaN.
MOLT_INLINE float power_of_e(float x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which then lies in the low bits
  const float kept = x < -87.0f ? -87.0f : x;
  const float shifted = kept * 1.44269504f + kMagic;
  const float whole = shifted - kMagic;
  const float rest = (kept - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float series = 1.0f / 720.0f;
  series = series * rest + 1.0f / 120.0f;
  series = series * rest + 1.0f / 24.0f;
  series = series * rest + 1.0f / 6.0f;
  series = series * rest + 0.5f;
  series = series * rest + 1.0f;
  series = series * rest + 1.0f;
  int32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return x < -87.0f ? 0.0f : series * power;
}

MOLT_CLONES void strongest(const float* responses, int64_t rows, int64_t channels, int32_t* labels) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* row = responses + r * channels;
    float best = row[0];
    float poisoned = 0.0f;
    for (int64_t c = 0; c < channels; ++c) best = row[c] > best ? row[c] : best;
    for (int64_t c = 0; c < channels; ++c) poisoned += row[c] - row[c];
    int64_t at = 0;
    if (poisoned == 0.0f) {
      while (row[at] != best) ++at;
    } else {
      for (int64_t c = 1; c < channels && row[at] == row[at]; ++c) {
        if (!(row[c] <= row[at])) at = c;
      }
    }
    labels[r] = static_cast<int32_t>(at);
  }
}

MOLT_CLONES void softmax_less_one(const float* __restrict responses, const int32_t* labels, int64_t rows,
                                  int64_t channels, float* __restrict gradient) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* __restrict row = responses + r * channels;
    float* __restrict out = gradient + r * channels;
    float most = row[0];
    for (int64_t c = 0; c < channels; ++c) most = row[c] > most ? row[c] : most;
    for (int64_t c = 0; c < channels; ++c) out[c] = power_of_e(row[c] - most);
    float sum = 0.0f;
    for (int64_t c = 0; c < channels; ++c) sum += out[c];
    const float share = 1.0f / sum;
    for (int64_t c = 0; c < channels; ++c) out[c] *= share;
    out[labels[r]] -= 1.0f;
  }
}

struct Strips {
  explicit Strips(const Rows& rows) : rows(rows), number((rows.pixels + kStrip - 1) / kStrip) {}

  int64_t begin(int64_t strip) const { return strip * kStrip; }
  int64_t size(int64_t strip) const { return std::min(kStrip, rows.pixels - begin(strip)); }
  int64_t at(int64_t strip) const { return begin(strip) * rows.channels; }
  Parallel with(const Parallel& given) const {
    return rows.pixels * rows.channels < kSmall ? given.alone() : given;
  }

  Rows rows;
  int64_t number;
};

}  // namespace

void deep_norm(const DeepNorm& job, const Parallel& given) {
  const Strips strips(job.rows);
  const Parallel parallel = strips.with(given);
  const int64_t channels = job.rows.channels;
  Scratch<float> sums(strips.number * channels);
  Scratch<float> squares(strips.number * channels);
  parallel.for_each(strips.number, [&](int64_t s) {
    (job.relu ? moments_relu : moments_plain)(job.x + strips.at(s), strips.size(s), channels,
                                              sums.data() + s * channels, squares.data() + s * channels);
  });
  Scratch<float> factor(channels);
  const double pixels = static_cast<double>(job.rows.pixels);
  for (int64_t c = 0; c < channels; ++c) {
    double total = 0.0;
    for (int64_t s = 0; s < strips.number; ++s) total += sums[s * channels + c];
    const double mean = total / pixels;
    double apart = 0.0;
    for (int64_t s = 0; s < strips.number; ++s) {
      const double size = static_cast<double>(strips.size(s));
      const double off = sums[s * channels + c] / size - mean;
      apart += squares[s * channels + c] + size * off * off;
    }
    const double spread = 1.0 / std::sqrt(apart / pixels + static_cast<double>(job.epsilon));
    job.mean[c] = static_cast<float>(mean);
    job.spread[c] = static_cast<float>(spread);
    factor[c] = static_cast<float>(spread * job.scale[c]);
  }
  parallel.for_each(strips.number, [&](int64_t s) {
    (job.relu ? normalize_relu : normalize_plain)(job.x + strips.at(s), job.mean, factor.data(), job.shift,
                                                  strips.size(s), channels, job.out + strips.at(s));
  });
}

void deep_norm_backward(const DeepNormBackward& job, const Parallel& given) {
  const Strips strips(job.rows);
  const Parallel parallel = strips.with(given);
  const int64_t channels = job.rows.channels;
  Scratch<float> sums(strips.number * channels);
  Scratch<float> products(strips.number * channels);
  parallel.for_each(strips.number, [&](int64_t s) {
    (job.relu ? products_relu : products_plain)(job.gradient + strips.at(s), job.x + strips.at(s), job.mean,
                                                strips.size(s), channels, sums.data() + s * channels,
                                                products.data() + s * channels);
  });
  Scratch<float> factor(channels);
  Scratch<float> shared(channels);
  Scratch<float> together(channels);
  const double pixels = static_cast<double>(job.rows.pixels);
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0.0;
    double product = 0.0;
    for (int64_t s = 0; s < strips.number; ++s) {
      sum += sums[s * channels + c];
      product += products[s * channels + c];
    }
    const double spread = job.spread[c];
    job.dshift[c] = static_cast<float>(sum);
    job.dscale[c] = static_cast<float>(product * spread);
    factor[c] = static_cast<float>(spread * job.scale[c]);
    shared[c] = static_cast<float>(sum / pixels);
    together[c] = static_cast<float>(product / pixels * spread * spread);
  }
  const Slopes by{factor.data(), job.mean, shared.data(), together.data()};
  parallel.for_each(strips.number, [&](int64_t s) {
    (job.relu ? slope_relu : slope_plain)(job.gradient + strips.at(s), job.x + strips.at(s), by, strips.size(s),
                                          channels, job.dx + strips.at(s), sums.data() + s * channels);
  });
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0.0;
    for (int64_t s = 0; s < strips.number; ++s) sum += sums[s * channels + c];
    job.dbias[c] = static_cast<float>(sum);
  }
}

void deep_answers(const Rows& rows, const float* responses, int32_t* labels, const Parallel& given) {
  const Strips strips(rows);
  strips.with(given).for_each(strips.number, [&](int64_t s) {
    strongest(responses + strips.at(s), strips.size(s), rows.channels, labels + strips.begin(s));
  });
}

void deep_gradient(const Rows& rows, const float* responses, const int32_t* labels, float* gradient,
                   const Parallel& given) {
  const Strips strips(rows);
  strips.with(given).for_each(strips.number, [&](int64_t s) {
    softmax_less_one(responses + strips.at(s), labels + strips.begin(s), strips.size(s), rows.channels,
                     gradient + strips.at(s));
  });
}

}  // namespace molt
