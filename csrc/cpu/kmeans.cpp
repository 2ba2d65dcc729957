#include "kmeans.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "clones.h"
#include "convert.h"
#include "pack.h"

namespace molt {
namespace {

constexpr int64_t kSmall = 16384;  // numbers under which threads cost more than they save
constexpr int64_t kPoints = 4;     // points that share one load of a centre

template <class A>
MOLT_INLINE A fold_pack(const Pack<A>& t) {
  return ((t[0] + t[1]) + (t[2] + t[3])) + ((t[4] + t[5]) + (t[6] + t[7]));
}

// Affinity 2 x.c - |c|^2 of kPoints points to every centre; dims is a multiple of kLanes.
template <class A>
MOLT_INLINE void nearest_of(const A* points, const A* centres, const A* lengths, int64_t clusters, int64_t dims,
                            int32_t* labels, A* best) {
  for (int64_t k = 0; k < clusters; k += 2) {
    const A* first = centres + k * dims;
    const A* second = k + 1 < clusters ? first + dims : first;
    Pack<A> sums[2][kPoints] = {};
    for (int64_t d = 0; d < dims; d += kLanes) {
      for (int64_t p = 0; p < kPoints; ++p) {
        sums[0][p] += pack(points + p * dims + d) * pack(first + d);
        sums[1][p] += pack(points + p * dims + d) * pack(second + d);
      }
    }
    for (int64_t e = 0; e < 2 && k + e < clusters; ++e) {
      for (int64_t p = 0; p < kPoints; ++p) {
        const A affinity = A{2} * fold_pack<A>(sums[e][p]) - lengths[k + e];
        if (k + e > 0 && !(affinity > best[p])) continue;
        best[p] = affinity;
        labels[p] = static_cast<int32_t>(k + e);
      }
    }
  }
}

// Of two centres the nearer one, by one product instead of two: `way` leads from the first to the second, and a point
// beyond `bias` along it is nearer to the second.
template <class A>
MOLT_INLINE void side_of(const A* points, const A* way, A bias, int64_t dims, int32_t* labels) {
  Pack<A> sums[kPoints] = {};
  for (int64_t d = 0; d < dims; d += kLanes) {
    for (int64_t p = 0; p < kPoints; ++p) sums[p] += pack(points + p * dims + d) * pack(way + d);
  }
  for (int64_t p = 0; p < kPoints; ++p) labels[p] = fold_pack<A>(sums[p]) > bias ? 1 : 0;
}

template <class A>
MOLT_INLINE void add_point(const A* point, int64_t dims, double sign, double* total) {
  for (int64_t d = 0; d < dims; ++d) total[d] += sign * static_cast<double>(point[d]);
}

// target_clones does not take templates, hence one plain function a type.
#define MOLT_POINT_LOOPS(A)                                                                                     \
  MOLT_CLONES void nearest(const A* points, const A* centres, const A* lengths, int64_t clusters, int64_t dims, \
                           int32_t* labels, A* best) {                                                          \
    nearest_of(points, centres, lengths, clusters, dims, labels, best);                                         \
  }                                                                                                             \
  MOLT_CLONES void side(const A* points, const A* way, A bias, int64_t dims, int32_t* labels) {                 \
    side_of(points, way, bias, dims, labels);                                                                   \
  }                                                                                                             \
  MOLT_CLONES void add(const A* point, int64_t dims, double* total) { add_point(point, dims, 1.0, total); }     \
  MOLT_CLONES void subtract(const A* point, int64_t dims, double* total) { add_point(point, dims, -1.0, total); }
MOLT_POINT_LOOPS(float)
MOLT_POINT_LOOPS(double)
#undef MOLT_POINT_LOOPS

template <class T>
class Lloyd {
  using A = Acc<T>;

 public:
  Lloyd(const KMeans& job, int64_t unit)
      : job_(job),
        padded_((job.dims + kLanes - 1) / kLanes * kLanes),
        points_(static_cast<const T*>(job.features) + unit / job.restarts * job.points * job.dims),
        labels_(job.labels + unit * job.points),
        centres_(job.clusters * padded_),
        lengths_(job.clusters),
        way_(padded_),
        block_(kPoints * padded_) {
    const A* starts = static_cast<const A*>(job.starts) + unit * job.clusters * job.dims;
    for (int64_t k = 0; k < job.clusters; ++k) {
      std::copy(starts + k * job.dims, starts + (k + 1) * job.dims, centres_.begin() + k * padded_);
    }
  }

  // Returns the score.
  A run(A* centres) {
    std::fill(labels_, labels_ + job_.points, -1);
    totals_.assign(job_.clusters * padded_, 0.0);
    members_.assign(job_.clusters, 0);
    bool settled = false;
    for (int64_t i = 0; i < job_.iterations && !settled; ++i) {
      // Unchanged labels would give the same centres again, in every later round too.
      settled = !sweep(true);
      if (!settled) average();
    }
    // Two centres are told apart without the score, which is found last.
    if (!settled || job_.clusters == 2) sweep(false);
    for (int64_t k = 0; k < job_.clusters; ++k) {
      std::copy_n(centres_.begin() + k * padded_, job_.dims, centres + k * job_.dims);
    }
    return static_cast<A>(score_);
  }

 private:
  // Points from `at` on, padded with zeros to whole packs where need be.
  const A* block(int64_t at, int64_t number) {
    if constexpr (std::is_same_v<T, A>) {
      if (padded_ == job_.dims && number == kPoints) return points_ + at * job_.dims;
    }
    for (int64_t p = 0; p < number; ++p) {
      widen_values(points_ + (at + p) * job_.dims, job_.dims, block_.data() + p * padded_);
    }
    return block_.data();
  }

  // Labels every point and, where asked, moves it between the clusters' totals if its label changed. Totals are in
  // double precision, so that what comes and goes leaves nothing behind. Says whether a label changed.
  bool sweep(bool move) {
    for (int64_t k = 0; k < job_.clusters; ++k) {
      A length = 0;
      for (int64_t d = 0; d < padded_; ++d) length += centres_[k * padded_ + d] * centres_[k * padded_ + d];
      lengths_[k] = length;
    }
    const bool two = move && job_.clusters == 2;
    if (two) {
      for (int64_t d = 0; d < padded_; ++d) way_[d] = centres_[padded_ + d] - centres_[d];
    }
    const A bias = two ? (lengths_[1] - lengths_[0]) / A{2} : A{0};
    score_ = 0;
    bool changed = false;
    for (int64_t at = 0; at < job_.points; at += kPoints) {
      const int64_t number = std::min(kPoints, job_.points - at);
      const A* points = block(at, number);
      int32_t labels[kPoints];
      A best[kPoints] = {};
      if (two) {
        side(points, way_.data(), bias, padded_, labels);
      } else {
        nearest(points, centres_.data(), lengths_.data(), job_.clusters, padded_, labels, best);
      }
      for (int64_t p = 0; p < number; ++p) {
        score_ += static_cast<double>(best[p]);
        const int32_t before = labels_[at + p];
        if (labels[p] == before) continue;
        changed = true;
        labels_[at + p] = labels[p];
        if (!move) continue;
        const A* point = points + p * padded_;
        if (before >= 0) {
          --members_[before];
          subtract(point, padded_, totals_.data() + before * padded_);
        }
        ++members_[labels[p]];
        add(point, padded_, totals_.data() + labels[p] * padded_);
      }
    }
    return changed;
  }

  void average() {
    for (int64_t k = 0; k < job_.clusters; ++k) {
      if (members_[k] == 0) continue;
      const double* total = totals_.data() + k * padded_;
      double scale = 1.0 / static_cast<double>(members_[k]);
      if (job_.cosine) {
        double length = 0;
        for (int64_t d = 0; d < job_.dims; ++d) length += total[d] * scale * (total[d] * scale);
        scale /= std::max(std::sqrt(length), 1e-12);
      }
      for (int64_t d = 0; d < job_.dims; ++d) centres_[k * padded_ + d] = static_cast<A>(total[d] * scale);
    }
  }

  const KMeans& job_;
  int64_t padded_;
  const T* points_;
  int32_t* labels_;
  std::vector<A> centres_;
  std::vector<A> lengths_;
  std::vector<A> way_;
  std::vector<A> block_;
  std::vector<double> totals_;
  std::vector<int64_t> members_;
  double score_ = 0;
};

template <class T>
void run(const KMeans& job, const Parallel& parallel) {
  using A = Acc<T>;
  parallel.for_each(job.batch * job.restarts, [&](int64_t unit) {
    A* centres = static_cast<A*>(job.centres) + unit * job.clusters * job.dims;
    static_cast<A*>(job.score)[unit] = Lloyd<T>(job, unit).run(centres);
  });
}

}  // namespace

void kmeans(const KMeans& job, const Parallel& given) {
  if (job.batch == 0 || job.restarts == 0 || job.points == 0 || job.clusters == 0) return;
  const Parallel parallel = job.batch * job.points * job.dims < kSmall ? given.alone() : given;
  switch (job.type) {
    case MapType::float16:
      return run<half>(job, parallel);
    case MapType::bfloat16:
      return run<bfloat16>(job, parallel);
    case MapType::float32:
      return run<float>(job, parallel);
    case MapType::float64:
      return run<double>(job, parallel);
  }
}

}  // namespace molt
