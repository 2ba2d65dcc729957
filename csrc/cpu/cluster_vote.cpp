#include "cluster_vote.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "index_loops.h"

namespace molt {
namespace {

constexpr int64_t kSmall = 16384;     // pixels under which threads cost more than they save
constexpr int64_t kTable = 1 << 18;   // votes that a table may hold whatever the size of the image

struct Winner {
  int32_t votes;
  int32_t label;
};

// A label takes the lead with more votes, or with as many and a lower number, so that no table need be searched.
MOLT_INLINE void cast(int32_t total, int32_t label, Winner* winner) {
  if (total > winner->votes || (total == winner->votes && label < winner->label)) *winner = {total, label};
}

MOLT_INLINE void cast_all(const int32_t* labels, const int32_t* segments, int64_t n, int64_t clusters, int32_t* table,
                          Winner* winners) {
  int64_t i = 0;
  for (; i + kGroup <= n; i += kGroup) {
    const int64_t run = uniform(labels + i) && uniform(segments + i) ? kGroup : 1;
    for (int64_t l = 0; l < kGroup; l += run) {
      int32_t* votes = table + segments[i + l] * clusters + labels[i + l];
      *votes += static_cast<int32_t>(run);
      cast(*votes, labels[i + l], winners + segments[i + l]);
    }
  }
  for (; i < n; ++i) cast(++table[segments[i] * clusters + labels[i]], labels[i], winners + segments[i]);
}

MOLT_CLONES void vote(const int32_t* labels, const int32_t* segments, int64_t n, int64_t clusters, int32_t* table,
                      Winner* winners) {
  cast_all(labels, segments, n, clusters, table, winners);
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
    if (clusters * parts > std::max(4 * job_.pixels, kTable)) return by_sorting(image, out);
    std::vector<int32_t> label(job_.pixels);
    std::vector<int32_t> segment(job_.pixels);
    narrow(labels(image), job_.pixels, labels_[image].low, label.data());
    narrow(segments(image), job_.pixels, segments_[image].low, segment.data());
    std::vector<int32_t> table(clusters * parts);
    std::vector<Winner> winners(parts, Winner{0, 0});
    vote(label.data(), segment.data(), job_.pixels, clusters, table.data(), winners.data());
    const L low = static_cast<L>(labels_[image].low);
    for (int64_t i = 0; i < job_.pixels; ++i) out[i] = static_cast<L>(winners[segment[i]].label + low);
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
