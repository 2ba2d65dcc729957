#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>
#include <vector>

namespace molt {

constexpr int32_t kLevels = 256;
constexpr uint16_t kOutside = 256;  // level of the frame where it belongs to what is kept

struct Spot {
  int32_t x, y;  // of the padded map
};

// A map of levels with a frame one pixel wide, and its pixels by level, in reading order within one.
struct LevelMap {
  int64_t height, width, stride;  // without, without and with the frame
  std::vector<uint16_t> level;
  std::vector<Spot> spots;
  std::array<int64_t, kLevels + 1> begin;

  int64_t at(const Spot& spot) const { return spot.y * stride + spot.x; }

  void shape(int64_t rows, int64_t columns, uint16_t frame) {
    height = rows;
    width = columns;
    stride = columns + 2;
    level.assign(static_cast<size_t>((rows + 2) * stride), frame);
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

// The eight neighbours of a pixel as bits, clockwise from the north: N NE E SE S SW W NW.
struct Around {
  struct Entry {
    uint8_t count;
    uint8_t pick[4];  // one neighbour of every group that is connected without the pixel
  };
  std::array<Entry, 256> eight, four;
  std::array<uint8_t, 256> corners;  // blocks of 2x2 pixels in which the pixel is the third or fourth

  Around() {
    for (int mask = 0; mask < 256; ++mask) {
      const auto has = [&](int i) { return (mask >> (i & 7)) & 1; };
      corners[mask] = 0;
      for (int i = 0; i < 8; i += 2) corners[mask] += has(i) + has(i + 1) + has(i + 2) >= 2;
      eight[mask] = four[mask] = {0, {}};
      // Of a run of neighbours side by side one speaks for all. Seen with diagonals, sides next but one touch too.
      for (int i = 0; i < 8; ++i) {
        if (!has(i)) continue;
        const bool follows = has(i - 1) || (i % 2 == 0 && has(i - 2));
        if (!follows || (mask == 255 && i == 0)) add(eight[mask], i);
        if (i % 2 == 0 && (!(has(i - 1) && has(i - 2)) || (mask == 255 && i == 0))) add(four[mask], i);
      }
      if (eight[mask].count == 0 && mask != 0) add(eight[mask], lowest(mask));
    }
  }

 private:
  static void add(Entry& entry, int i) { entry.pick[entry.count++] = static_cast<uint8_t>(i); }
  static int lowest(int mask) {
    int i = 0;
    while (!((mask >> i) & 1)) ++i;
    return i;
  }
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

// Pixels join from the highest level to the lowest; level by level the components that changed are told.
class Growth {
 public:
  // `enclosed` measures area instead of counting pixels; a frame of kOutside is component 0.
  Growth(const LevelMap& map, bool diagonal, bool enclosed, bool outside)
      : map_(map), enclosed_(enclosed), outside_(outside), picks_(diagonal ? around().eight : around().four) {
    const auto s = static_cast<int32_t>(map.stride);
    step_ = {-s, -s + 1, 1, s + 1, s, s - 1, -1, -s - 1};
    label_.assign(map.level.size(), 0);
    if (outside) grown_.push_back({0, -1, 0, 0, 0, 0, 0, 0});
  }

  // visitor.close(node, level): a component with a node changed; visitor.open(level, component) gives the new node.
  template <class Visitor>
  void run(Visitor& visitor) {
    for (int32_t level = kLevels - 1; level > 0; --level) {
      touched_.clear();
      for (int64_t i = map_.begin[level]; i < map_.begin[level + 1]; ++i) add(map_.spots[i], level, visitor);
      for (const int32_t which : touched_) {
        const int32_t root = find(which);
        if ((outside_ && root == 0) || grown_[root].node >= 0) continue;
        grown_[root].node = visitor.open(level, grown_[root]);
      }
    }
  }

  const std::vector<int32_t>& labels() const { return label_; }
  const std::vector<Merge>& merges() const { return merges_; }
  size_t components() const { return grown_.size(); }

 private:
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
    const uint16_t* here = map_.level.data() + at;
    // Of the pixels of one level those before it in reading order are in already.
    const auto before = static_cast<uint16_t>(level);
    unsigned mask = 0;
    mask |= static_cast<unsigned>(here[step_[0]] >= before) << 0;
    mask |= static_cast<unsigned>(here[step_[1]] >= before) << 1;
    mask |= static_cast<unsigned>(here[step_[2]] > before) << 2;
    mask |= static_cast<unsigned>(here[step_[3]] > before) << 3;
    mask |= static_cast<unsigned>(here[step_[4]] > before) << 4;
    mask |= static_cast<unsigned>(here[step_[5]] > before) << 5;
    mask |= static_cast<unsigned>(here[step_[6]] >= before) << 6;
    mask |= static_cast<unsigned>(here[step_[7]] >= before) << 7;
    const Around::Entry& entry = picks_[mask];
    if (entry.count == 0) {
      const auto own = static_cast<int32_t>(grown_.size());
      grown_.push_back({own, -1, spot.x, spot.y, spot.x, spot.y, at, 0});
      touched_.push_back(own);
      label_[at] = own;
      grow(grown_[own], mask);
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
    Grown& own = grown_[root];
    own.left = std::min(own.left, spot.x);
    own.right = std::max(own.right, spot.x);
    own.top = std::min(own.top, spot.y);
    own.bottom = std::max(own.bottom, spot.y);
    own.start = std::min(own.start, at);
    grow(own, mask);
    label_[at] = root;
  }

  void grow(Grown& own, unsigned mask) const { own.size += enclosed_ ? around().corners[mask] : 1; }

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
    if (outside_) merges_.push_back({b, a, level});
    return a;
  }

  const LevelMap& map_;
  bool enclosed_, outside_;
  const std::array<Around::Entry, 256>& picks_;
  std::array<int64_t, 8> step_;
  std::vector<int32_t> label_;  // the component that a pixel joined, for those that are in
  std::vector<Grown> grown_;
  std::vector<int32_t> touched_;
  std::vector<Merge> merges_;
};

}  // namespace molt
