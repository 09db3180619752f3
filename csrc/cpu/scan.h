// SPDX-License-Identifier: MIT
// The passes over all keys that select.cpp is made of. Each reads the weights once, in chunks that
// workers draw from a counter; none depends on the order in which chunks are taken.
#pragma once

#include <memory>
#include <vector>

#include "candidates.h"
#include "key.h"
#include "parallel.h"

namespace lap::cpu {

template <typename Key>
struct Scanned {
  int64_t above = 0;       // keys above Interval::high
  int64_t candidates = 0;  // keys from low to high
  Key top = 0;             // largest |x|, as Keys::fill tells it
  bool overflow = false;   // more candidates than the capacity: the rest means nothing
  std::vector<CandidateList<Key>> lists;
};

template <typename Key>
struct Marked {
  int64_t above = 0;
  int64_t ties = 0;
  Key top = 0;
  std::vector<int64_t> chunk_ties;  // in order of the chunks
};

struct Chunk {
  int source;
  int64_t begin;  // within the source
  int64_t end;
};

template <typename Key>
class Scanner {
 public:
  Scanner(std::vector<Keys<Key>> keys, const Pool& pool);

  // Writes the masks (zero for candidates) and collects the candidates.
  Scanned<Key> scan(const Interval<Key>& interval);

  // Writes 1 above the threshold, 2 at it, 0 below.
  Marked<Key> mark_ties(Key threshold);

  // Turns the first `ties` marks in order into 1, the rest into 0.
  void finalize_ties(const std::vector<int64_t>& chunk_ties, int64_t ties);

  // counts[b] = keys with (biased(key) - low) >> shift == b, for 0 <= b < 2^11
  std::vector<int64_t> histogram(typename std::make_unsigned<Key>::type low, int shift);

  // The largest |x|, as Keys::fill tells it; nothing is written.
  Key top();

  // True when some product of nonzero factors left the normal range.
  bool underflows();

  const std::vector<Keys<Key>>& keys() const { return keys_; }
  const Chunk& chunk(int64_t c) const { return chunks_[c]; }
  uint8_t* mask_of(const Chunk& chunk) const;
  const Pool& pool() const { return pool_; }
  int64_t capacity() const;  // candidates that there is memory for

 private:
  // visit(worker, chunk number, first element in the chunk, n, scratch) -> largest |x| as a key,
  // once per tile; returns the largest of all. Stops early once stop is true.
  template <typename Visit>
  Key for_each_tile(const std::atomic<bool>& stop, const Visit& visit);

  // The same with the tile's keys made: visit(worker, chunk number, first element, n, keys)
  template <typename Visit>
  Key for_each_keys(const Visit& visit);

  std::vector<Keys<Key>> keys_;
  const Pool& pool_;
  std::vector<Chunk> chunks_;
  int64_t bytes_ = 0;
  std::unique_ptr<char[]> candidates_;  // memory of the last scan's, until the next
};

// Keys as unsigned numbers in the same order.
template <typename Key>
typename std::make_unsigned<Key>::type biased(Key key) {
  using Unsigned = typename std::make_unsigned<Key>::type;
  return static_cast<Unsigned>(key) ^ (Unsigned{1} << (KeyTraits<Key>::kBits - 1));
}
template <typename Key>
Key unbiased(typename std::make_unsigned<Key>::type bits) {
  using Unsigned = typename std::make_unsigned<Key>::type;
  return static_cast<Key>(bits ^ (Unsigned{1} << (KeyTraits<Key>::kBits - 1)));
}

constexpr int kHistogramBits = 11;
constexpr int64_t kBins = 1 << kHistogramBits;

// The workers' histograms added up.
std::vector<int64_t> sum_of(std::vector<std::vector<int64_t>> counts);

extern template class Scanner<int32_t>;
extern template class Scanner<int64_t>;

}  // namespace lap::cpu
