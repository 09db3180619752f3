// SPDX-License-Identifier: MIT
#include "select.h"

#include <optional>

#include "../math/host_device.h"
#include "sample.h"
#include "scan.h"

namespace lap::cpu {
namespace {

constexpr int64_t kAhead = 24;  // candidates whose mask bytes are on their way from memory

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
      : scanner_(std::move(keys), pool), check_(check_finite) {}

  // The keep-th largest key, 1 <= keep <= eligible; nothing when an element is not finite.
  std::optional<Key> run(int64_t keep) {
    keep_ = keep;
    const int64_t capacity = scanner_.capacity();
    const auto [guess, candidates] = estimate(scanner_.keys(), keep, capacity, scanner_.pool());
    bool finite = true;
    std::optional<Key> found;
    if (candidates <= kCapacityShare * static_cast<double>(capacity)) {
      found = scan(guess, &finite);
    } else if (guess.low == guess.high) {
      found = mark_ties(guess.low, &finite);
    }
    if (found || !finite) return found;
    const Interval<Key> certain = bracket();
    return certain.low == certain.high ? mark_ties(certain.low, &finite) : scan(certain, &finite);
  }

  bool underflows() { return scanner_.underflows(); }

 private:
  using Lists = std::vector<CandidateList<Key>>;
  static constexpr Key kLimit = KeyTraits<Key>::kInfinity;

  std::optional<Key> scan(Interval<Key> interval, bool* finite) {
    const Scanned<Key> scanned = scanner_.scan(interval);
    *finite = scanned.overflow || !check_ || scanned.top < kLimit;
    const bool missed = keep_ <= scanned.above || keep_ > scanned.above + scanned.candidates;
    if (scanned.overflow || !*finite || missed) return std::nullopt;
    return finish(scanned, interval, keep_ - scanned.above);
  }

  std::optional<Key> mark_ties(Key threshold, bool* finite) {
    const Marked<Key> marked = scanner_.mark_ties(threshold);
    *finite = !check_ || marked.top < kLimit;
    const bool missed = keep_ <= marked.above || keep_ > marked.above + marked.ties;
    if (!*finite || missed) return std::nullopt;
    scanner_.finalize_ties(marked.chunk_ties, keep_ - marked.above);
    return threshold;
  }

  // The rank-th largest of the candidates; sets the mask of those above it and of the first equals.
  Key finish(const Scanned<Key>& scanned, Interval<Key> interval, int64_t rank) {
    Unsigned<Key> low = biased(interval.low);
    int shift = 0;
    while (((biased(interval.high) - low) >> shift) >= static_cast<Unsigned<Key>>(kBins)) ++shift;
    int64_t bins = kBins;
    int64_t ties = 0;
    while (true) {
      const std::vector<int64_t> counts = histogram(scanned.lists, low, shift);
      const int64_t bin = pick_bin(counts, bins, &rank);
      low += static_cast<Unsigned<Key>>(bin) << shift;
      ties = counts[bin];
      if (shift == 0) break;
      const int next = std::max(0, shift - kHistogramBits);
      bins = int64_t{1} << (shift - next);
      shift = next;
    }
    const Key threshold = unbiased<Key>(low);
    finalize_masks(scanned.lists, threshold, rank, ties);
    return threshold;
  }

  std::vector<int64_t> histogram(const Lists& lists, Unsigned<Key> low, int shift) {
    const Pool& pool = scanner_.pool();
    std::vector<std::vector<int64_t>> counts(pool.threads, std::vector<int64_t>(kBins));
    for_each_chunk(pool, static_cast<int64_t>(lists.size()), [&](int worker, int64_t l) {
      int64_t* mine = counts[worker].data();
      for (int64_t j = 0; j < lists[l].count; ++j) {
        const Unsigned<Key> bin = (biased(lists[l].keys[j]) - low) >> shift;
        if (bin < static_cast<Unsigned<Key>>(kBins)) ++mine[bin];  // below low: wraps, far above
      }
    });
    return sum_of(std::move(counts));
  }

  // One of the elements whose key is the threshold.
  struct Tie {
    int64_t chunk;
    uint16_t offset;
    bool operator<(const Tie& other) const {
      return chunk != other.chunk ? chunk < other.chunk : offset < other.offset;
    }
  };

  // The masks of the candidates: those above the threshold, and the first `wanted` of its ties.
  void finalize_masks(const Lists& lists, Key threshold, int64_t wanted, int64_t ties) {
    const Pool& pool = scanner_.pool();
    const bool all = wanted == ties;
    const Key dropped = all ? threshold - 1 : threshold;  // the largest key that may be dropped
    std::vector<std::vector<Tie>> open(pool.threads);
    for_each_chunk(pool, static_cast<int64_t>(lists.size()), [&](int worker, int64_t l) {
      const CandidateList<Key>& list = lists[l];
      uint8_t* mask = scanner_.mask_of(scanner_.chunk(list.chunk));
      if (mask == nullptr) return;
      for (int64_t j = 0; j < list.count; ++j) {
        if (j + kAhead < list.count) __builtin_prefetch(mask + list.offsets[j + kAhead], 1);
        mask[list.offsets[j]] = list.keys[j] > dropped;  // no branch: every second would be wrong
        if (list.keys[j] != threshold || all) continue;
        open[worker].push_back({list.chunk, list.offsets[j]});
      }
    });
    for (size_t w = 1; w < open.size(); ++w) {
      open[0].insert(open[0].end(), open[w].begin(), open[w].end());
    }
    std::vector<Tie>& found = open[0];
    if (found.empty()) return;
    std::nth_element(found.begin(), found.begin() + (wanted - 1), found.end());
    for (int64_t i = 0; i < wanted; ++i) {
      scanner_.mask_of(scanner_.chunk(found[i].chunk))[found[i].offset] = 1;
    }
  }

  // An interval that holds the threshold for certain: one key, or few enough candidates.
  Interval<Key> bracket() {
    Unsigned<Key> low = 0;
    int shift = KeyTraits<Key>::kBits - kHistogramBits;
    int64_t bins = kBins;
    int64_t rank = keep_;
    while (true) {
      const std::vector<int64_t> counts = scanner_.histogram(low, shift);
      const int64_t bin = pick_bin(counts, bins, &rank);
      low += static_cast<Unsigned<Key>>(bin) << shift;
      const Unsigned<Key> high = low + ((Unsigned<Key>{1} << shift) - 1);
      if (shift == 0 || counts[bin] <= scanner_.capacity() / 2) {
        return {std::max(Interval<Key>::full().low, unbiased<Key>(low)), unbiased<Key>(high)};
      }
      const int next = std::max(0, shift - kHistogramBits);
      bins = int64_t{1} << (shift - next);
      shift = next;
    }
  }

  Scanner<Key> scanner_;
  bool check_;
  int64_t keep_ = 0;
};

int64_t count_eligible(const Source& source, const Pool& pool) {
  if (source.eligible == nullptr) return source.x.size;
  constexpr int64_t kChunk = 1 << 20;
  std::atomic<int64_t> total{0};
  for_each_chunk(pool, ceil_div(source.x.size, kChunk), [&](int, int64_t c) {
    const int64_t end = std::min(source.x.size, (c + 1) * kChunk);
    int64_t count = 0;
    for (int64_t j = c * kChunk; j < end; ++j) count += source.eligible[j] != 0;
    total += count;
  });
  return total;
}

// Keeps nothing (value 0) or everything eligible (value 1).
void fill_mask(const Source& source, uint8_t value, const Pool& pool) {
  constexpr int64_t kChunk = 1 << 20;
  for_each_chunk(pool, ceil_div(source.x.size, kChunk), [&](int, int64_t c) {
    const int64_t end = std::min(source.x.size, (c + 1) * kChunk);
    for (int64_t j = c * kChunk; j < end; ++j) {
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
    ScaledNorms<Float> norms;
    if (!source.is_scores()) {
      const bool rounded = source.x.dtype != DType::f64;
      norms = scale_norms<Float>(source.norms, source.layout, rounded);
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
    source.norms = {};
    if (Scanner<Key>(*make_keys<Key>({source}), pool).top() >= limit) return false;
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
  int64_t keys[kTile];
  for (int64_t begin = 0; begin < x.size; begin += kTile) {
    const int64_t n = std::min(kTile, x.size - begin);
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
