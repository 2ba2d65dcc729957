#pragma once

#include "device.cuh"

// Four neighbouring pixels at a time: in 16 bytes of float32, so that a warp moves 512 bytes with one instruction.
namespace molt::cuda {

constexpr unsigned kNone = 0xffffffffu;  // in place of a label out of range

// Whether a row of pixels starting here allows the widest access.
template <class T>
__device__ inline bool wide_access(const T* row) {
  constexpr unsigned kBytes = sizeof(T) * 4 < 16 ? sizeof(T) * 4 : 16;
  return reinterpret_cast<uintptr_t>(row) % kBytes == 0;
}

// kLast: the line is not needed again.
template <bool kLast, class P>
__device__ inline P load_pack(const P* from) {
  return kLast ? __ldcs(from) : __ldcg(from);
}

template <bool kLast>
__device__ inline void load_quad(const float* from, float (&to)[4]) {
  const float4 pack = load_pack<kLast>(reinterpret_cast<const float4*>(from));
  to[0] = pack.x, to[1] = pack.y, to[2] = pack.z, to[3] = pack.w;
}

template <bool kLast>
__device__ inline void load_quad(const double* from, double (&to)[4]) {
  const double2 low = load_pack<kLast>(reinterpret_cast<const double2*>(from));
  const double2 high = load_pack<kLast>(reinterpret_cast<const double2*>(from) + 1);
  to[0] = low.x, to[1] = low.y, to[2] = high.x, to[3] = high.y;
}

template <bool kLast, class T>  // half and bfloat16
__device__ inline void load_quad(const T* from, float (&to)[4]) {
  const uint2 pack = load_pack<kLast>(reinterpret_cast<const uint2*>(from));
  to[0] = widen(T{static_cast<uint16_t>(pack.x)}), to[1] = widen(T{static_cast<uint16_t>(pack.x >> 16)});
  to[2] = widen(T{static_cast<uint16_t>(pack.y)}), to[3] = widen(T{static_cast<uint16_t>(pack.y >> 16)});
}

// Stores go past the cache's favourites: nothing here reads them again.
__device__ inline void store_quad(const float (&from)[4], float* to) {
  float4 pack;
  pack.x = from[0], pack.y = from[1], pack.z = from[2], pack.w = from[3];
  __stcs(reinterpret_cast<float4*>(to), pack);
}

__device__ inline void store_quad(const double (&from)[4], double* to) {
  double2 low, high;
  low.x = from[0], low.y = from[1], high.x = from[2], high.y = from[3];
  __stcs(reinterpret_cast<double2*>(to), low);
  __stcs(reinterpret_cast<double2*>(to) + 1, high);
}

template <class T>
__device__ inline void store_quad(const float (&from)[4], T* to) {
  T narrowed[4];
  for (int j = 0; j < 4; ++j) narrow(from[j], narrowed[j]);
  uint2 pack;
  pack.x = narrowed[0].bits | static_cast<unsigned>(narrowed[1].bits) << 16;
  pack.y = narrowed[2].bits | static_cast<unsigned>(narrowed[3].bits) << 16;
  __stcs(reinterpret_cast<uint2*>(to), pack);
}

struct Labels {
  const void* data;
  LabelType type;
};

__device__ inline int64_t load_label(const Labels& labels, int64_t at) {
  switch (labels.type) {
    case LabelType::uint8:
      return static_cast<const uint8_t*>(labels.data)[at];
    case LabelType::int32:
      return static_cast<const int32_t*>(labels.data)[at];
    default:
      return static_cast<const int64_t*>(labels.data)[at];
  }
}

// Labels as unsigned numbers: a negative one ends up beyond every limit, which is at most half of what W holds.
template <class L>
struct WideLabel {
  using type = unsigned;
};
template <>
struct WideLabel<int64_t> {
  using type = uint64_t;
};

__device__ inline void unpack_labels(const uint8_t* from, unsigned (&to)[4]) {
  const unsigned pack = __ldcg(reinterpret_cast<const unsigned*>(from));
  for (int j = 0; j < 4; ++j) to[j] = pack >> (8 * j) & 0xffu;
}

__device__ inline void unpack_labels(const int32_t* from, unsigned (&to)[4]) {
  const int4 pack = __ldcg(reinterpret_cast<const int4*>(from));
  to[0] = pack.x, to[1] = pack.y, to[2] = pack.z, to[3] = pack.w;
}

__device__ inline void unpack_labels(const int64_t* from, uint64_t (&to)[4]) {
  const longlong2 low = __ldcg(reinterpret_cast<const longlong2*>(from));
  const longlong2 high = __ldcg(reinterpret_cast<const longlong2*>(from) + 1);
  to[0] = low.x, to[1] = low.y, to[2] = high.x, to[3] = high.y;
}

// Pixels count from the map's first, below 2^30. Labels minus `start` of kSteps quads, `stride` pixels apart; kNone
// outside [start, start + span) and from pixel `end`.
template <int kSteps, class L>
__device__ inline void load_ids(
    const L* row, int at, int stride, int end, int64_t start, unsigned span, unsigned (&ids)[kSteps][4]) {
  using W = typename WideLabel<L>::type;
  constexpr int kGroup = sizeof(L) == 8 && kSteps > 2 ? 2 : kSteps;  // in flight together, as registers allow
  const auto to_id = [=](W label) {
    const W id = label - static_cast<W>(start);
    return id < span ? static_cast<unsigned>(id) : kNone;
  };
  if (wide_access(row) && at + (kSteps - 1) * stride + 4 <= end) {
#pragma unroll
    for (int first = 0; first < kSteps; first += kGroup) {
      W found[kGroup][4];
#pragma unroll
      for (int s = 0; s < kGroup; ++s) unpack_labels(row + at + (first + s) * stride, found[s]);
#pragma unroll
      for (int s = 0; s < kGroup; ++s) {
        for (int j = 0; j < 4; ++j) ids[first + s][j] = to_id(found[s][j]);
      }
    }
    return;
  }
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    if (wide_access(row) && at + s * stride + 4 <= end) {
      W found[4];
      unpack_labels(row + at + s * stride, found);
      for (int j = 0; j < 4; ++j) ids[s][j] = to_id(found[j]);
      continue;
    }
    for (int j = 0; j < 4; ++j) {
      const int p = at + s * stride + j;
      ids[s][j] = p < end ? to_id(static_cast<W>(row[p])) : kNone;
    }
  }
}

template <int kSteps>
__device__ inline void load_ids(const Labels& labels, int64_t row, int at, int stride, int end, int64_t start,
                                unsigned span, unsigned (&ids)[kSteps][4]) {
  switch (labels.type) {
    case LabelType::uint8:
      return load_ids<kSteps>(static_cast<const uint8_t*>(labels.data) + row, at, stride, end, start, span, ids);
    case LabelType::int32:
      return load_ids<kSteps>(static_cast<const int32_t*>(labels.data) + row, at, stride, end, start, span, ids);
    default:
      return load_ids<kSteps>(static_cast<const int64_t*>(labels.data) + row, at, stride, end, start, span, ids);
  }
}

// Maps that lie in memory.
template <class T>
struct Stored {
  using A = Acc<T>;
  static constexpr int kSteps = sizeof(T) == 8 ? 2 : 4;  // quads in flight
  static constexpr int kBytes = sizeof(T);  // read from memory for a pixel

  const T* maps;
  int64_t pixels;

  // Values of kSteps quads, `stride` pixels apart; 0 from pixel `end`.
  template <bool kLast>
  __device__ void load(int64_t map, int at, int stride, int end, A (&values)[kSteps][4]) const {
    const T* row = maps + map * pixels;
    if (wide_access(row) && at + (kSteps - 1) * stride + 4 <= end) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) load_quad<kLast>(row + at + s * stride, values[s]);
      return;
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (wide_access(row) && at + s * stride + 4 <= end) {
        load_quad<kLast>(row + at + s * stride, values[s]);
        continue;
      }
      for (int j = 0; j < 4; ++j) {
        const int p = at + s * stride + j;
        values[s][j] = p < end ? widen(row[p]) : A{0};
      }
    }
  }
};

template <int kSteps, class T>
__device__ inline void store_values(T* row, int at, int stride, int end, const Acc<T> (&values)[kSteps][4]) {
  if (wide_access(row) && at + (kSteps - 1) * stride + 4 <= end) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) store_quad(values[s], row + at + s * stride);
    return;
  }
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    if (wide_access(row) && at + s * stride + 4 <= end) {
      store_quad(values[s], row + at + s * stride);
      continue;
    }
    for (int j = 0; j < 4; ++j) {
      const int p = at + s * stride + j;
      if (p < end) narrow(values[s][j], row[p]);
    }
  }
}

}  // namespace molt::cuda
