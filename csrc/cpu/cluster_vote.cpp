#include "cluster_vote.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "index_loops.h"
#include "pack.h"
#include "scratch.h"

namespace molt {
namespace {

constexpr int64_t kSmall = 16384;     // pixels under which threads cost more than they save
constexpr int64_t kTable = 1 << 18;   // votes that a table may hold whatever the size of the image
constexpr int64_t kStrip = 1024;

// Votes of a segment's leading label above that label's complement: more votes win, of as many the lower label.
using Lead = uint64_t;

MOLT_INLINE Lead lead_of(int32_t votes, int32_t label) {
  return static_cast<uint64_t>(votes) << 32 | ~static_cast<uint32_t>(label);
}

MOLT_INLINE int32_t label_of(Lead lead) { return static_cast<int32_t>(~static_cast<uint32_t>(lead)); }

template <class L>
MOLT_INLINE void cells_of(const int32_t* parts, const L* labels, int64_t n, int64_t low, int32_t clusters,
                          int32_t* cells) {
  for (int64_t i = 0; i < n; ++i) {
    cells[i] = parts[i] * clusters + static_cast<int32_t>(static_cast<int64_t>(labels[i]) - low);
  }
}

// Where runs of one cell begin, and n after the last. Inside a group without a branch on the cells, which would be
// guessed wrong at every end of a run.
MOLT_INLINE int64_t runs_of(const int32_t* cells, int64_t n, int32_t* begins) {
  int64_t number = 1;
  int32_t last = cells[0];
  begins[0] = 0;
  for (int64_t i = 0; i < n; i += kGroup) {
    const int64_t group = i + kGroup <= n ? kGroup : n - i;
    const int64_t looked_at = group == kGroup && uniform(cells + i) ? 1 : group;
    for (int64_t l = 0; l < looked_at; ++l) {
      begins[number] = static_cast<int32_t>(i + l);
      number += cells[i + l] != last;
      last = cells[i + l];
    }
  }
  begins[number] = static_cast<int32_t>(n);
  return number;
}

MOLT_INLINE void cast_runs(const int32_t* cells, const int32_t* parts, const int32_t* begins, int64_t runs,
                           int32_t clusters, int32_t* table, Lead* leads) {
  for (int64_t r = 0; r < runs; ++r) {
    const int32_t at = begins[r];
    const int32_t cell = cells[at];
    const int32_t part = parts[at];
    table[cell] += begins[r + 1] - at;
    const Lead lead = lead_of(table[cell], cell - part * clusters);
    leads[part] = lead > leads[part] ? lead : leads[part];
  }
}

template <class L>
MOLT_INLINE void write_of(const L* winners, const int32_t* parts, int64_t n, L* out) {
  int64_t i = 0;
  for (; i + kGroup <= n; i += kGroup) {
    if (uniform(parts + i)) {
      pack(out + i) = winners[parts[i]] + Pack<L>{};
    } else {
      for (int64_t l = 0; l < kGroup; ++l) out[i + l] = winners[parts[i + l]];
    }
  }
  for (; i < n; ++i) out[i] = winners[parts[i]];
}

// target_clones does not take templates, hence one plain function a type.
#define MOLT_VOTE_LOOPS(L)                                                                                \
  MOLT_CLONES void cells(const int32_t* parts, const L* labels, int64_t n, int64_t low, int32_t clusters, \
                         int32_t* to) {                                                                   \
    cells_of(parts, labels, n, low, clusters, to);                                                        \
  }                                                                                                       \
  MOLT_CLONES void write(const L* winners, const int32_t* parts, int64_t n, L* out) {                     \
    write_of(winners, parts, n, out);                                                                     \
  }
MOLT_VOTE_LOOPS(uint8_t)
MOLT_VOTE_LOOPS(int32_t)
MOLT_VOTE_LOOPS(int64_t)
#undef MOLT_VOTE_LOOPS

MOLT_CLONES int64_t runs(const int32_t* cells, int64_t n, int32_t* begins) { return runs_of(cells, n, begins); }
MOLT_CLONES void cast(const int32_t* cells, const int32_t* parts, const int32_t* begins, int64_t runs,
                      int32_t clusters, int32_t* table, Lead* leads) {
  cast_runs(cells, parts, begins, runs, clusters, table, leads);
}

template <class L, class S>
class Voter {
 public:
  Voter(const ClusterVote& job, const Parallel& parallel)
      : job_(job), parallel_(parallel), labels_(job.batch), segments_(job.batch) {}

  void run() {
    parallel_.for_each(job_.batch, [&](int64_t image) {
      labels_[image] = bounds(labels(image), job_.pixels, job_.num_clusters);
      segments_[image] = bounds(segments(image), job_.pixels, job_.num_segments);
      if (inside(labels_[image], job_.num_clusters) && inside(segments_[image], job_.num_segments)) one_image(image);
    });
    for (int64_t image = 0; image < job_.batch; ++image) {
      check("labels", image, labels_[image], job_.num_clusters);
      check("segments", image, segments_[image], job_.num_segments);
    }
  }

 private:
  const L* labels(int64_t image) const { return static_cast<const L*>(job_.labels) + image * job_.pixels; }
  const S* segments(int64_t image) const { return static_cast<const S*>(job_.segments) + image * job_.pixels; }

  static bool inside(const Range& all, int64_t limit) { return all.low >= 0 && (limit < 0 || all.high < limit); }

  // Asked before the size is, which overflows where the whole of int64 is spanned.
  static bool wide(const Range& all) { return all.high - all.low >= kTable; }

  static void check(const char* name, int64_t image, const Range& all, int64_t limit) {
    if (!inside(all, limit)) throw std::invalid_argument(out_of_range(name, image, all, limit));
  }

  void one_image(int64_t image) const {
    L* out = static_cast<L*>(job_.out) + image * job_.pixels;
    if (wide(labels_[image]) || wide(segments_[image])) return by_sorting(image, out);
    const int64_t clusters = labels_[image].size();
    const int64_t parts = segments_[image].size();
    const int64_t most = std::min<int64_t>(std::max(4 * job_.pixels, kTable), std::numeric_limits<int32_t>::max());
    if (clusters * parts > most) return by_sorting(image, out);
    // In strips, whose cells and runs stay in the cache.
    Scratch<int32_t> part(kStrip);
    Scratch<int32_t> cell(kStrip);
    Scratch<int32_t> begins(kStrip + 1);
    Scratch<int32_t> table(clusters * parts);
    Scratch<Lead> leads(parts);
    table.zero();
    leads.zero();
    const int32_t width = static_cast<int32_t>(clusters);
    for (int64_t i = 0; i < job_.pixels; i += kStrip) {
      const int64_t n = std::min(kStrip, job_.pixels - i);
      narrow(segments(image) + i, n, segments_[image].low, part.data());
      cells(part.data(), labels(image) + i, n, labels_[image].low, width, cell.data());
      const int64_t number = runs(cell.data(), n, begins.data());
      cast(cell.data(), part.data(), begins.data(), number, width, table.data(), leads.data());
    }
    Scratch<L> winners(parts);
    for (int64_t p = 0; p < parts; ++p) winners[p] = static_cast<L>(label_of(leads[p]) + labels_[image].low);
    for (int64_t i = 0; i < job_.pixels; i += kStrip) {
      const int64_t n = std::min(kStrip, job_.pixels - i);
      narrow(segments(image) + i, n, segments_[image].low, part.data());
      write(winners.data(), part.data(), n, out + i);
    }
  }

  // Numbers spread so wide that a table of votes would dwarf the image.
  void by_sorting(int64_t image, L* out) const {
    std::vector<std::pair<S, L>> pairs(job_.pixels);
    for (int64_t i = 0; i < job_.pixels; ++i) pairs[i] = {segments(image)[i], labels(image)[i]};
    std::sort(pairs.begin(), pairs.end());
    std::vector<std::pair<S, L>> winners;
    int64_t most = 0;
    for (int64_t i = 0; i < job_.pixels;) {
      int64_t end = i + 1;
      while (end < job_.pixels && pairs[end] == pairs[i]) ++end;
      if (winners.empty() || winners.back().first != pairs[i].first) {
        winners.push_back(pairs[i]);
        most = end - i;
      } else if (end - i > most) {
        winners.back().second = pairs[i].second;
        most = end - i;
      }
      i = end;
    }
    for (int64_t i = 0; i < job_.pixels; ++i) {
      const S segment = segments(image)[i];
      const auto before = [](const std::pair<S, L>& winner, S wanted) { return winner.first < wanted; };
      out[i] = std::lower_bound(winners.begin(), winners.end(), segment, before)->second;
    }
  }

  const ClusterVote& job_;
  const Parallel parallel_;
  std::vector<Range> labels_;
  std::vector<Range> segments_;
};

template <class L>
void with_segments(const ClusterVote& job, const Parallel& parallel) {
  switch (job.segment_type) {
    case LabelType::uint8:
      return Voter<L, uint8_t>(job, parallel).run();
    case LabelType::int32:
      return Voter<L, int32_t>(job, parallel).run();
    case LabelType::int64:
      return Voter<L, int64_t>(job, parallel).run();
  }
}

}  // namespace

void cluster_vote(const ClusterVote& job, const Parallel& given) {
  if (job.batch == 0 || job.pixels == 0) return;
  if (job.pixels > kMaxPixels) throw std::invalid_argument(too_many_pixels("labels", job.pixels));
  const Parallel parallel = job.batch * job.pixels < kSmall ? given.alone() : given;
  switch (job.label_type) {
    case LabelType::uint8:
      return with_segments<uint8_t>(job, parallel);
    case LabelType::int32:
      return with_segments<int32_t>(job, parallel);
    case LabelType::int64:
      return with_segments<int64_t>(job, parallel);
  }
}

}  // namespace molt
