// SPDX-License-Identifier: MIT
#include "sample.h"

#include <cmath>
#include <functional>

#include "../math/host_device.h"
#include "../math/sample.h"

namespace lap::cpu {
namespace {

constexpr double kDeviations = 3.7;    // on random data the sample misleads once in 5000 times
constexpr double kMargin = 4;          // sample ranks added for small counts
constexpr double kSampleFactor = 1.0;  // m = n^(2/3) balances sampling against candidates
constexpr int64_t kLeastSample = 1024;
constexpr int64_t kMostSample = int64_t{1} << 18;
constexpr int64_t kPilot = 4096;  // of the sample, to find the part that matters
constexpr int64_t kSmall = 4096;  // below, everything is a candidate

// The keys at m positions of all sources.
template <typename Key>
std::vector<Key> sample(const std::vector<Keys<Key>>& keys,
                        int64_t m,
                        int64_t size,
                        const Pool& pool) {
  std::vector<int64_t> starts;  // position of each source's element 0 among all
  int64_t start = 0;
  for (const Keys<Key>& k : keys) {
    starts.push_back(start);
    start += k.source().x.size;
  }
  std::vector<Key> sampled(m);
  const SamplePositions position_of(m, size);
  for_each_chunk(pool, ceil_div(m, kTile), [&](int, int64_t tile) {
    Scratch scratch;
    int64_t position[kTile];
    const int64_t end = std::min(m, (tile + 1) * kTile);
    for (int64_t begin = tile * kTile; begin < end;) {  // once per source, mostly once
      const auto after = std::upper_bound(starts.begin(), starts.end(), position_of(begin));
      const int64_t source = after - starts.begin() - 1;  // of equal starts the last: not empty
      const int64_t stop = after == starts.end() ? size : *after;
      int64_t n = 0;
      for (; begin + n < end && position_of(begin + n) < stop; ++n) {
        position[n] = position_of(begin + n) - starts[source];
      }
      keys[source].pick(position, n, &scratch, &sampled[begin]);
      begin += n;
    }
  });
  return sampled;
}

// Enough that the candidates, 2 d sqrt(p (1 - p) / m) of all, fill no more than their share.
int64_t sample_size(int64_t size, double kept, int64_t capacity) {
  const double n = static_cast<double>(size);
  const double share = 0.9 * kCapacityShare * static_cast<double>(capacity) / n;
  const double fitting = kept * (1 - kept) * std::pow(2 * kDeviations / share, 2);
  const double wanted = std::max(kSampleFactor * std::pow(n, 2.0 / 3.0), fitting);
  const int64_t most = std::min(kMostSample, size / 4);
  return std::min(most, std::max(kLeastSample, static_cast<int64_t>(wanted)));
}

// The keys that lie `deviations` before and behind the wanted rank of the sample. A large sample
// is first reduced to what its own pilot says is near.
template <typename Key>
Interval<Key> around(std::vector<Key>& keys, double kept, double deviations) {
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
    const Interval<Key> rough = around(pilot, kept, deviations + 2);
    for (const Key key : keys) {
      above += key > rough.high;
      if (key >= rough.low && key <= rough.high) near.push_back(key);
    }
  }
  const int64_t end = above + static_cast<int64_t>(near.size());
  const bool holds = first >= above && last < end;
  std::vector<Key>& sorted = holds ? near : keys;
  if (!holds) above = 0;
  Interval<Key> interval = Interval<Key>::full();
  auto begin = sorted.begin();
  if (first >= 0) {
    std::nth_element(begin, sorted.begin() + (first - above), sorted.end(), std::greater<Key>());
    begin += first - above;
    interval.high = *begin;
  }
  if (last < m) {
    std::nth_element(begin, sorted.begin() + (last - above), sorted.end(), std::greater<Key>());
    interval.low = std::max(interval.low, sorted[last - above]);
  }
  return interval;
}

}  // namespace

template <typename Key>
Estimate<Key> estimate(const std::vector<Keys<Key>>& keys,
                       int64_t keep,
                       int64_t capacity,
                       const Pool& pool) {
  int64_t size = 0;
  for (const Keys<Key>& k : keys) size += k.source().x.size;
  const double n = static_cast<double>(size);
  if (size <= kSmall) return {Interval<Key>::full(), n};
  const double kept = static_cast<double>(keep) / n;
  std::vector<Key> sampled = sample(keys, sample_size(size, kept, capacity), size, pool);
  const Interval<Key> interval = around(sampled, kept, kDeviations);
  int64_t inside = 0;
  for (const Key key : sampled) inside += key >= interval.low && key <= interval.high;
  return {interval, n * (static_cast<double>(inside) / static_cast<double>(sampled.size()))};
}

template Estimate<int32_t> estimate(const std::vector<Keys<int32_t>>&,
                                    int64_t,
                                    int64_t,
                                    const Pool&);
template Estimate<int64_t> estimate(const std::vector<Keys<int64_t>>&,
                                    int64_t,
                                    int64_t,
                                    const Pool&);

}  // namespace lap::cpu
