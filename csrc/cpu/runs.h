#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace molt {

// Pixels begin to end of one row; `parent` is a run of the same component, never a later one.
struct Run {
  int64_t row, begin, end;
  int64_t parent;
};

inline int64_t root_of(std::vector<Run>& runs, int64_t at) {
  while (runs[at].parent != at) {
    runs[at].parent = runs[runs[at].parent].parent;
    at = runs[at].parent;
  }
  return at;
}

inline void join(std::vector<Run>& runs, int64_t a, int64_t b) {
  a = root_of(runs, a);
  b = root_of(runs, b);
  if (a < b) {
    runs[b].parent = a;
  } else {
    runs[a].parent = b;
  }
}

// Adds the runs of a row and joins them with those of the row above, which begin at `above`: `kept` holds 1 where a
// pixel is kept, else 0, and one 0 more than it is wide. Returns where the row's own runs begin.
inline size_t add_row(std::vector<Run>& runs, size_t above, const uint8_t* kept, int64_t width, int64_t y,
                      bool diagonal) {
  const int64_t reach = diagonal ? 1 : 0;
  const size_t first = runs.size();
  for (int64_t x = 0; x < width;) {
    if (!kept[x]) {
      const void* next = std::memchr(kept + x, 1, width - x);
      if (next == nullptr) break;
      x = static_cast<const uint8_t*>(next) - kept;
    }
    const auto* end = static_cast<const uint8_t*>(std::memchr(kept + x, 0, width + 1 - x));
    runs.push_back({y, x, end - kept, static_cast<int64_t>(runs.size())});
    x = end - kept;
  }
  size_t a = above;
  for (size_t b = first; b < runs.size(); ++b) {
    while (a < first && runs[a].end + reach <= runs[b].begin) ++a;
    for (size_t c = a; c < first && runs[c].begin < runs[b].end + reach; ++c) {
      join(runs, static_cast<int64_t>(c), static_cast<int64_t>(b));
    }
  }
  return first;
}

}  // namespace molt
