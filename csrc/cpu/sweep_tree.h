#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "clones.h"

namespace molt {

constexpr int32_t kLevels = 256;

struct Spot {
  int32_t x, y;  // of the framed map
};

// A map of levels with a frame of zeros one pixel wide, and its pixels by level, in reading order within one.
struct LevelMap {
  int64_t height, width, stride;  // without, without and with the frame
  std::vector<uint8_t> level;
  std::vector<Spot> spots;
  std::array<int64_t, kLevels + 1> begin;

  int64_t at(const Spot& spot) const { return spot.y * stride + spot.x; }

  void shape(int64_t rows, int64_t columns) {
    height = rows;
    width = columns;
    stride = columns + 2;
    level.assign(static_cast<size_t>((rows + 2) * stride), 0);
    spots.resize(static_cast<size_t>(rows * columns));
  }

  void sort() {
    std::array<int64_t, kLevels> next{};
    for (int64_t y = 1; y <= height; ++y) {
      for (int64_t x = 1; x <= width; ++x) ++next[level[y * stride + x]];
    }
    int64_t total = 0;
    for (int32_t l = 0; l < kLevels; ++l) {
      begin[l] = total;
      total += next[l];
      next[l] = begin[l];
    }
    begin[kLevels] = total;
    for (int64_t y = 1; y <= height; ++y) {
      for (int64_t x = 1; x <= width; ++x) {
        spots[next[level[y * stride + x]]++] = {static_cast<int32_t>(x), static_cast<int32_t>(y)};
      }
    }
  }
};

// Which neighbours of each pixel of a row joined before it, as bits, clockwise from the north: N NE E SE S SW W NW.
// Of one level those before it in reading order did. `up`, `row` and `down` begin one pixel before the row.
MOLT_CLONES inline void falling_masks(const uint8_t* up, const uint8_t* row, const uint8_t* down, int64_t width,
                                      uint8_t* masks) {
  for (int64_t x = 1; x <= width; ++x) {
    const uint8_t own = row[x];
    masks[x] = static_cast<uint8_t>((up[x] >= own) | (up[x + 1] >= own) << 1 | (row[x + 1] > own) << 2 |
                                    (down[x + 1] > own) << 3 | (down[x] > own) << 4 | (down[x - 1] > own) << 5 |
                                    (row[x - 1] >= own) << 6 | (up[x - 1] >= own) << 7);
  }
}

MOLT_CLONES inline void rising_masks(const uint8_t* up, const uint8_t* row, const uint8_t* down, int64_t width,
                                     uint8_t* masks) {
  for (int64_t x = 1; x <= width; ++x) {
    const uint8_t own = row[x];
    masks[x] = static_cast<uint8_t>((up[x] <= own) | (up[x + 1] <= own) << 1 | (row[x + 1] < own) << 2 |
                                    (down[x + 1] < own) << 3 | (down[x] < own) << 4 | (down[x - 1] < own) << 5 |
                                    (row[x - 1] <= own) << 6 | (up[x - 1] <= own) << 7);
  }
}

// What a pixel has to do, by the neighbours that joined before it.
struct Around {
  struct Entry {
    uint8_t count;
    uint8_t pick[4];  // one neighbour of every group that is connected without the pixel
    uint8_t corners;  // blocks of 2x2 pixels in which the pixel is the third or fourth
  };
  std::array<Entry, 256> eight, four;

  Around() {
    for (int mask = 0; mask < 256; ++mask) {
      const auto has = [&](int i) { return (mask >> (i & 7)) & 1; };
      eight[mask] = four[mask] = {};
      // Of a run of neighbours side by side one speaks for all. Seen with diagonals, sides next but one touch too.
      for (int i = 0; i < 8; ++i) {
        if (!has(i)) continue;
        if (!has(i - 1) && !(i % 2 == 0 && has(i - 2))) add(eight[mask], i);
        if (i % 2 == 0 && !(has(i - 1) && has(i - 2))) add(four[mask], i);
      }
      // A run that closes has no beginning.
      if (eight[mask].count == 0 && mask != 0) add(eight[mask], has(0) ? 0 : 1);
      if (mask == 255) add(four[mask], 0);
      for (int i = 0; i < 8; i += 2) eight[mask].corners += has(i) + has(i + 1) + has(i + 2) >= 2;
    }
  }

 private:
  static void add(Entry& entry, int i) { entry.pick[entry.count++] = static_cast<uint8_t>(i); }
};

inline const Around& around() {
  static const Around tables;
  return tables;
}

struct Grown {
  int32_t parent;
  int32_t node;                      // what the visitor gave it, or -1 once it has changed
  int32_t left, top, right, bottom;  // inside
  int64_t start;                     // first pixel in reading order
  int64_t size;                      // pixels, or twice the area that its outer contour encloses if it has no holes
};

struct Merge {
  int32_t lost, kept, level;
};

// What growing works in, kept from map to map.
struct GrowthSpace {
  std::vector<uint8_t> masks;
  std::vector<int32_t> label;  // the component that a pixel joined, for those that are in
  std::vector<Grown> grown;
  std::vector<int32_t> touched;
  std::vector<Merge> merges;  // as the cut rises only
};

enum class Grows {
  pixels4,   // what is kept as the cut falls, 4 neighbours
  pixels8,   // 8 neighbours
  enclosed,  // 8 neighbours, measuring area instead of counting pixels
  dropped,   // what is dropped as the cut rises, 4 neighbours; the frame is component 0
};

// Pixels join level by level; after each the components that changed are told.
template <Grows kind>
class Growth {
 public:
  Growth(const LevelMap& map, GrowthSpace& space)
      : map_(map),
        picks_(kWide ? around().eight : around().four),
        masks_(space.masks),
        label_(space.label),
        grown_(space.grown),
        touched_(space.touched),
        merges_(space.merges) {
    const auto s = static_cast<int32_t>(map.stride);
    step_ = {-s, -s + 1, 1, s + 1, s, s - 1, -1, -s - 1};
    label_.assign(map.level.size(), 0);
    grown_.clear();
    merges_.clear();
    if (kRising) grown_.push_back({0, -1, 0, 0, 0, 0, 0, 0});
    find_masks();
  }

  // visitor.close(node, level): a component with a node changed; visitor.open(level, component) gives the new node.
  template <class Visitor>
  void run(Visitor& visitor) {
    for (int32_t step = 0; step < kLevels - 1; ++step) {
      const int32_t level = kRising ? step : kLevels - 1 - step;
      touched_.clear();
      for (int64_t i = map_.begin[level]; i < map_.begin[level + 1]; ++i) add(map_.spots[i], level, visitor);
      for (const int32_t which : touched_) {
        const int32_t root = find(which);
        if ((kRising && root == 0) || grown_[root].node >= 0) continue;
        grown_[root].node = visitor.open(level, grown_[root]);
      }
    }
  }

 private:
  static constexpr bool kRising = kind == Grows::dropped;
  static constexpr bool kWide = kind == Grows::pixels8 || kind == Grows::enclosed;

  void find_masks() {
    masks_.resize(map_.level.size());
    const int64_t s = map_.stride;
    for (int64_t y = 1; y <= map_.height; ++y) {
      const uint8_t* row = map_.level.data() + y * s;
      (kRising ? rising_masks : falling_masks)(row - s, row, row + s, map_.width, masks_.data() + y * s);
      if (!kRising) continue;
      // The frame is in from the start, also beside level 0.
      masks_[y * s + 1] |= 0b11100000;
      masks_[y * s + map_.width] |= 0b00001110;
    }
    if (!kRising) return;
    for (int64_t x = 1; x <= map_.width; ++x) {
      masks_[s + x] |= 0b10000011;
      masks_[map_.height * s + x] |= 0b00111000;
    }
  }

  int32_t find(int32_t at) {
    while (grown_[at].parent != at) {
      grown_[at].parent = grown_[grown_[at].parent].parent;
      at = grown_[at].parent;
    }
    return at;
  }

  template <class Visitor>
  void touch(int32_t which, int32_t level, Visitor& visitor) {
    if (grown_[which].node < 0) return;
    visitor.close(grown_[which].node, level);
    grown_[which].node = -1;
    touched_.push_back(which);
  }

  template <class Visitor>
  void add(const Spot& spot, int32_t level, Visitor& visitor) {
    const int64_t at = map_.at(spot);
    const Around::Entry& entry = picks_[masks_[at]];
    if (entry.count == 0) {
      const auto own = static_cast<int32_t>(grown_.size());
      // Of the blocks around it a first pixel is the first; diagonal neighbours count where only sides connect.
      grown_.push_back({own, -1, spot.x, spot.y, spot.x, spot.y, at, kind == Grows::enclosed ? 0 : 1});
      touched_.push_back(own);
      label_[at] = own;
      return;
    }
    int32_t root = find(label_[at + step_[entry.pick[0]]]);
    touch(root, level, visitor);
    for (int i = 1; i < entry.count; ++i) {
      const int32_t other = find(label_[at + step_[entry.pick[i]]]);
      if (other == root) continue;
      touch(other, level, visitor);
      root = unite(root, other, level);
    }
    label_[at] = root;
    if (kRising && root == 0) return;  // nobody asks how large the outside is
    Grown& own = grown_[root];
    own.left = std::min(own.left, spot.x);
    own.right = std::max(own.right, spot.x);
    own.top = std::min(own.top, spot.y);
    own.bottom = std::max(own.bottom, spot.y);
    own.start = std::min(own.start, at);
    own.size += kind == Grows::enclosed ? entry.corners : 1;
  }

  int32_t unite(int32_t a, int32_t b, int32_t level) {
    // Component 0 is the oldest, and stays on top where it stands for the outside.
    if (b < a) std::swap(a, b);
    Grown& kept = grown_[a];
    const Grown& lost = grown_[b];
    kept.left = std::min(kept.left, lost.left);
    kept.right = std::max(kept.right, lost.right);
    kept.top = std::min(kept.top, lost.top);
    kept.bottom = std::max(kept.bottom, lost.bottom);
    kept.start = std::min(kept.start, lost.start);
    kept.size += lost.size;
    grown_[b].parent = a;
    if (kRising) merges_.push_back({b, a, level});
    return a;
  }

  const LevelMap& map_;
  const std::array<Around::Entry, 256>& picks_;
  std::array<int64_t, 8> step_;
  std::vector<uint8_t>& masks_;
  std::vector<int32_t>& label_;
  std::vector<Grown>& grown_;
  std::vector<int32_t>& touched_;
  std::vector<Merge>& merges_;
};

}  // namespace molt
