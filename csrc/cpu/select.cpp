// SPDX-License-Identifier: MIT
#include "select.h"

#include <cmath>
#include <optional>

#include "sweep.h"

namespace lap::cpu {
namespace {

constexpr double kDeviations = 3.7;    // on random data the sample misleads once in 5000 times
constexpr double kMargin = 4;          // sample ranks added for small counts
constexpr double kSampleFactor = 1.0;  // m = n^(2/3) balances sampling against candidates
constexpr int64_t kLeastSample = 1024;
constexpr int64_t kMostSample = int64_t{1} << 18;
constexpr int64_t kPilot = 4096;    // of the sample, to find the part that matters
constexpr int64_t kAhead = 24;      // candidates whose mask bytes are on their way from memory
constexpr int64_t kSmall = 4096;    // below, everything is a candidate
constexpr double kRoomShare = 0.8;  // of the room that the expected candidates may fill

template <typename Key>
using Unsigned = typename std::make_unsigned<Key>::type;

// Finds, from the top, the bin that holds the rank-th largest; rank becomes its rank in that bin.
int64_t pick_bin(const std::vector<int64_t>& counts, int64_t bins, int64_t* rank) {
  int64_t bin = bins - 1;
  for (; bin > 0 && *rank > counts[bin]; --bin) *rank -= counts[bin];
  return bin;
}

template <typename Key>
class Selector {
 public:
  Selector(std::vector<Keys<Key>> keys, bool check_finite, const Pool& pool)
      : sweeper_(std::move(keys), pool), check_(check_finite) {}

  // The keep-th largest key, 1 <= keep <= eligible; nothing when an element is not finite.
  std::optional<Key> run(int64_t keep) {
    keep_ = keep;
    const Decision<Key> guess = estimate();
    bool finite = true;
    std::optional<Key> found;
    if (expected_ <= kRoomShare * static_cast<double>(sweeper_.capacity())) {
      found = sweep(guess, &finite);
    } else if (guess.low == guess.high) {
      found = mark_ties(guess.low, &finite);
    }
    if (found || !finite) return found;
    const Decision<Key> sure = bracket();
    return sure.low == sure.high ? mark_ties(sure.low, &finite) : sweep(sure, &finite);
  }

  bool underflows() { return sweeper_.underflows(); }

 private:
  static constexpr Key kLeast = KeyTraits<Key>::kNever + 1;
  static constexpr Key kLimit = KeyTraits<Key>::kInfinity;
  static constexpr Key kMost = KeyTraits<Key>::kMagnitude;

  Decision<Key> estimate() {
    const int64_t n = sweeper_.size();
    expected_ = static_cast<double>(n);
    if (n <= kSmall) return {kLeast, kMost};
    const double kept = static_cast<double>(keep_) / static_cast<double>(n);
    std::vector<Key> keys = sweeper_.sample(sample_size(kept));
    Decision<Key> interval = around(keys, kept, kDeviations);
    int64_t inside = 0;
    for (const Key key : keys) inside += key >= interval.low && key <= interval.high;
    expected_ *= static_cast<double>(inside) / static_cast<double>(keys.size());
    return interval;
  }

  // Enough that the candidates, 2 d sqrt(p (1 - p) / m) of all, fill no more than their room.
  int64_t sample_size(double kept) const {
    const double n = static_cast<double>(sweeper_.size());
    const double share = 0.9 * kRoomShare * static_cast<double>(sweeper_.capacity()) / n;
    const double fitting = kept * (1 - kept) * std::pow(2 * kDeviations / share, 2);
    const double wanted = std::max(kSampleFactor * std::pow(n, 2.0 / 3.0), fitting);
    const int64_t most = std::min(kMostSample, sweeper_.size() / 4);
    return std::min(most, std::max(kLeastSample, static_cast<int64_t>(wanted)));
  }

  // The keys that lie `deviations` before and behind the wanted rank of the sample. A large sample
  // is first cut down to what its own pilot says is near.
  static Decision<Key> around(std::vector<Key>& keys, double kept, double deviations) {
    const int64_t m = static_cast<int64_t>(keys.size());
    const double center = kept * static_cast<double>(m);
    const double margin = deviations * std::sqrt(center * (1 - kept)) + kMargin;
    const int64_t first = static_cast<int64_t>(std::floor(center - margin));
    const int64_t last = static_cast<int64_t>(std::ceil(center + margin));
    int64_t above = 0;
    std::vector<Key> near;
    if (m >= 4 * kPilot) {
      std::vector<Key> pilot(kPilot);
      for (int64_t i = 0; i < kPilot; ++i) pilot[i] = keys[i * m / kPilot];
      const Decision<Key> rough = around(pilot, kept, deviations + 2);
      for (const Key key : keys) {
        above += key > rough.high;
        if (key >= rough.low && key <= rough.high) near.push_back(key);
      }
    }
    const int64_t end = above + static_cast<int64_t>(near.size());
    const bool holds = first >= above && last < end;
    std::vector<Key>& sorted = holds ? near : keys;
    if (!holds) above = 0;
    Decision<Key> interval = {kLeast, kMost};
    auto begin = sorted.begin();
    if (first >= 0) {
      std::nth_element(begin, sorted.begin() + (first - above), sorted.end(), std::greater<Key>());
      begin += first - above;
      interval.high = *begin;
    }
    if (last < m) {
      std::nth_element(begin, sorted.begin() + (last - above), sorted.end(), std::greater<Key>());
      interval.low = std::max(kLeast, sorted[last - above]);
    }
    return interval;
  }

  std::optional<Key> sweep(Decision<Key> interval, bool* finite) {
    const Swept<Key> swept = sweeper_.sweep(interval);
    *finite = swept.overflow || !check_ || swept.top < kLimit;
    const bool missed = keep_ <= swept.above || keep_ > swept.above + swept.candidates;
    if (swept.overflow || !*finite || missed) return std::nullopt;
    return resolve(swept, interval, keep_ - swept.above);
  }

  std::optional<Key> mark_ties(Key threshold, bool* finite) {
    const Marked<Key> marked = sweeper_.mark_ties(threshold);
    *finite = !check_ || marked.top < kLimit;
    const bool missed = keep_ <= marked.above || keep_ > marked.above + marked.ties;
    if (!*finite || missed) return std::nullopt;
    sweeper_.settle_ties(marked.chunk_ties, keep_ - marked.above);
    return threshold;
  }

  // The rank-th largest of the candidates; sets the mask of those above it and of the first equals.
  Key resolve(const Swept<Key>& swept, Decision<Key> interval, int64_t rank) {
    Unsigned<Key> low = biased(interval.low);
    int shift = 0;
    while (((biased(interval.high) - low) >> shift) >= static_cast<Unsigned<Key>>(kBins)) ++shift;
    int64_t bins = kBins;
    int64_t ties = 0;
    while (true) {
      const std::vector<int64_t> counts = histogram(swept.runs, low, shift);
      const int64_t bin = pick_bin(counts, bins, &rank);
      low += static_cast<Unsigned<Key>>(bin) << shift;
      ties = counts[bin];
      if (shift == 0) break;
      const int next = std::max(0, shift - kHistogramBits);
      bins = int64_t{1} << (shift - next);
      shift = next;
    }
    const Key threshold = unbiased<Key>(low);
    settle(swept.runs, threshold, rank, ties);
    return threshold;
  }

  std::vector<int64_t> histogram(const std::vector<Run<Key>>& runs, Unsigned<Key> low, int shift) {
    const Pool& pool = sweeper_.pool();
    std::vector<std::vector<int64_t>> counts(pool.threads, std::vector<int64_t>(kBins));
    for_each_chunk(pool, static_cast<int64_t>(runs.size()), [&](int worker, int64_t r) {
      int64_t* mine = counts[worker].data();
      for (int64_t j = 0; j < runs[r].count; ++j) {
        const Unsigned<Key> bin = (biased(runs[r].keys[j]) - low) >> shift;
        if (bin < static_cast<Unsigned<Key>>(kBins)) ++mine[bin];  // below low: wraps, far above
      }
    });
    for (size_t w = 1; w < counts.size(); ++w) {
      for (int64_t b = 0; b < kBins; ++b) counts[0][b] += counts[w][b];
    }
    return counts[0];
  }

  // Where an element stands among those with its key.
  struct Place {
    int64_t chunk;
    uint16_t offset;
    bool operator<(const Place& other) const {
      return chunk != other.chunk ? chunk < other.chunk : offset < other.offset;
    }
  };

  void settle(const std::vector<Run<Key>>& runs, Key threshold, int64_t wanted, int64_t ties) {
    const Pool& pool = sweeper_.pool();
    const bool all = wanted == ties;
    const Key dropped = all ? threshold - 1 : threshold;  // the largest key that may be dropped
    std::vector<std::vector<Place>> open(pool.threads);
    for_each_chunk(pool, static_cast<int64_t>(runs.size()), [&](int worker, int64_t r) {
      const Run<Key>& run = runs[r];
      uint8_t* mask = sweeper_.mask_of(sweeper_.chunk(run.chunk));
      if (mask == nullptr) return;
      for (int64_t j = 0; j < run.count; ++j) {
        if (j + kAhead < run.count) __builtin_prefetch(mask + run.offsets[j + kAhead], 1);
        mask[run.offsets[j]] = run.keys[j] > dropped;  // no branch: every second would be wrong
        if (run.keys[j] != threshold || all) continue;
        open[worker].push_back({run.chunk, run.offsets[j]});
      }
    });
    for (size_t w = 1; w < open.size(); ++w) {
      open[0].insert(open[0].end(), open[w].begin(), open[w].end());
    }
    std::vector<Place>& places = open[0];
    if (places.empty()) return;
    std::nth_element(places.begin(), places.begin() + (wanted - 1), places.end());
    for (int64_t i = 0; i < wanted; ++i) {
      sweeper_.mask_of(sweeper_.chunk(places[i].chunk))[places[i].offset] = 1;
    }
  }

  // An interval that holds the threshold for certain: one key, or few enough candidates.
  Decision<Key> bracket() {
    Unsigned<Key> low = 0;
    int shift = KeyTraits<Key>::kBits - kHistogramBits;
    int64_t bins = kBins;
    int64_t rank = keep_;
    while (true) {
      const std::vector<int64_t> counts = sweeper_.histogram(low, shift);
      const int64_t bin = pick_bin(counts, bins, &rank);
      low += static_cast<Unsigned<Key>>(bin) << shift;
      const Unsigned<Key> high = low + ((Unsigned<Key>{1} << shift) - 1);
      if (shift == 0 || counts[bin] <= sweeper_.capacity() / 2) {
        return {std::max(kLeast, unbiased<Key>(low)), unbiased<Key>(high)};
      }
      const int next = std::max(0, shift - kHistogramBits);
      bins = int64_t{1} << (shift - next);
      shift = next;
    }
  }

  Sweeper<Key> sweeper_;
  bool check_;
  int64_t keep_ = 0;
  double expected_ = 0;  // candidates, by the sample
};

int64_t count_eligible(const Source& source, const Pool& pool) {
  if (source.eligible == nullptr) return source.x.size;
  constexpr int64_t kStretch = 1 << 20;
  std::atomic<int64_t> total{0};
  for_each_chunk(pool, ceil_div(source.x.size, kStretch), [&](int, int64_t c) {
    const int64_t end = std::min(source.x.size, (c + 1) * kStretch);
    int64_t count = 0;
    for (int64_t j = c * kStretch; j < end; ++j) count += source.eligible[j] != 0;
    total += count;
  });
  return total;
}

// Keeps nothing (value 0) or everything eligible (value 1).
void fill_mask(const Source& source, uint8_t value, const Pool& pool) {
  constexpr int64_t kStretch = 1 << 20;
  for_each_chunk(pool, ceil_div(source.x.size, kStretch), [&](int, int64_t c) {
    const int64_t end = std::min(source.x.size, (c + 1) * kStretch);
    for (int64_t j = c * kStretch; j < end; ++j) {
      source.mask[j] = value && (source.eligible == nullptr || source.eligible[j]);
    }
  });
}

// The keys of all sources, or nothing when their products could leave the key's normal range.
template <typename Key>
std::optional<std::vector<Keys<Key>>> make_keys(const std::vector<Source>& sources) {
  using Float = typename KeyTraits<Key>::Float;
  std::vector<Keys<Key>> keys;
  for (const Source& source : sources) {
    Norms<Float> norms;
    if (!source.is_scores()) {
      const bool rounded = source.x.dtype != DType::f64;
      norms = scaled_norms<Float>(source.row_norm, source.col_norm, source.layout, rounded);
      if (!norms.normal()) return std::nullopt;
      if (source.absolute) norms.unscale();
    }
    keys.emplace_back(source, std::move(norms));
  }
  return keys;
}

// Whether no weight is infinite or NaN (no score is NaN), whatever the norms.
template <typename Key>
bool all_finite(const std::vector<Source>& sources, const Pool& pool) {
  for (Source source : sources) {
    const Key limit = KeyTraits<Key>::kInfinity - (source.is_scores() ? 0 : 1);  // see Keys::fill
    source.row_norm = source.col_norm = nullptr;
    if (Sweeper<Key>(*make_keys<Key>({source}), pool).top() >= limit) return false;
  }
  return true;
}

// Nothing when the products underflow where it matters.
template <typename Key>
std::optional<Selection> select_by(const std::vector<Source>& sources,
                                   int64_t keep,
                                   bool check_finite,
                                   const Pool& pool) {
  std::optional<std::vector<Keys<Key>>> keys = make_keys<Key>(sources);
  if (!keys) return std::nullopt;
  Selector<Key> selector(std::move(*keys), check_finite, pool);
  const std::optional<Key> threshold = selector.run(keep);
  if (!threshold) return Selection{Outcome::not_finite, 0};
  if (*threshold <= KeyTraits<Key>::kSmallestNormal && selector.underflows()) return std::nullopt;
  const Key bits = flip_negative(*threshold);
  return Selection{Outcome::ok, bit_cast<typename KeyTraits<Key>::Float>(bits)};
}

}  // namespace

Selection select(const std::vector<Source>& sources,
                 int64_t keep,
                 bool check_finite,
                 const Pool& pool) {
  int64_t eligible = 0;
  for (const Source& source : sources) eligible += count_eligible(source, pool);
  keep = std::min(keep, eligible);
  const bool wide = !sources.empty() && sources[0].x.dtype == DType::f64;
  const bool masks = std::any_of(sources.begin(), sources.end(),
                                 [](const Source& source) { return source.mask != nullptr; });
  if (keep == 0 || (keep == eligible && masks)) {  // nothing to rank
    const bool finite = !check_finite || (wide ? all_finite<int64_t>(sources, pool)
                                               : all_finite<int32_t>(sources, pool));
    if (!finite) return {Outcome::not_finite, 0};
    for (const Source& source : sources) fill_mask(source, keep != 0, pool);
    return {};
  }
  std::optional<Selection> selection;
  if (!wide) selection = select_by<int32_t>(sources, keep, check_finite, pool);
  if (!selection) selection = select_by<int64_t>(sources, keep, check_finite, pool);
  return selection ? *selection : Selection{Outcome::range, 0};
}

NotFinite find_not_finite(const Strided& x, bool infinity_is_fine) {
  const int64_t limit = KeyTraits<int64_t>::kInfinity + (infinity_is_fine ? 1 : 0);
  const auto top_of = kernels().wide[static_cast<int>(x.dtype)].scores;
  NotFinite found;
  Scratch scratch;
  int64_t keys[kBlock];
  for (int64_t begin = 0; begin < x.size; begin += kBlock) {
    const int64_t n = std::min(kBlock, x.size - begin);
    const char* data = static_cast<const char*>(elements(x, begin, n, scratch.gathered));
    if (top_of(data, n, keys) < limit) continue;
    for (int64_t j = 0; j < n; ++j) {
      if (top_of(data + j * item_size(x.dtype), 1, keys) < limit) continue;
      if (found.count++ == 0) found.first = begin + j;
    }
  }
  return found;
}

}  // namespace lap::cpu
