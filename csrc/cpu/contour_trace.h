#pragma once

#include <cstdint>
#include <cstdlib>

namespace molt {

// The area that OpenCV's contourArea gives for the border of the pixels above `cut`, followed from `start` (Suzuki and
// Abe 1985, algorithm 1), whose neighbour to the west (an outer border) or to the east (a hole's) is not kept. `level`
// is a map with a frame of zeros, `s` the length of its rows.
inline double traced_area(const uint8_t* level, int64_t s, int64_t start, int32_t cut, bool hole) {
  const int64_t step[8] = {-s, -s + 1, 1, s + 1, s, s - 1, -1, -s - 1};
  constexpr int kX[8] = {0, 1, 1, 1, 0, -1, -1, -1};
  constexpr int kY[8] = {-1, -1, 0, 1, 1, 1, 0, -1};
  const auto kept = [&](int64_t at) { return level[at] > cut; };

  // Clockwise from the pixel that is not kept: where the border would come from.
  int from = hole ? 2 : 6;
  int turn = 0;
  while (turn < 8 && !kept(start + step[from])) {
    from = (from + 1) & 7;
    ++turn;
  }
  if (turn == 8) return 0.0;  // a lone pixel
  const int64_t last = start + step[from];

  int64_t at = start;
  int64_t x = 0, y = 0, twice = 0;
  int behind = from;
  for (;;) {
    int next = (behind + 7) & 7;  // counterclockwise from where it came
    while (!kept(at + step[next])) next = (next + 7) & 7;
    twice += x * kY[next] - y * kX[next];
    const int64_t was = at;
    at += step[next];
    x += kX[next];
    y += kY[next];
    if (at == start && was == last) return static_cast<double>(std::llabs(twice)) / 2;
    behind = (next + 4) & 7;
  }
}

}  // namespace molt
