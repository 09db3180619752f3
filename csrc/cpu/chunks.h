// SPDX-License-Identifier: MIT
// Ranking scores >= 0 that are never all in memory: what is asked of each chunk of them, by keys
// (isa.h, ScoreChunk), and of each chunk of weights. No result depends on the threads.
#pragma once

#include <vector>

#include "isa.h"
#include "parallel.h"

namespace lap::cpu {

// What a first pass finds.
struct Counted {
  KeyCount total = {};
  std::vector<int64_t> pieces;   // keys inside of each kPiece scores
  std::vector<uint64_t> inside;  // a bit for each key
};

template <typename Key>
Counted count_keys(const ScoreChunk<Key>& chunk, const Interval<Key>& interval, const Pool& pool);

// Writes the keys inside in order.
template <typename Key>
void take_keys(const ScoreChunk<Key>& chunk, const Counted& counted, const Pool& pool, Key* out);

// counts[b] = keys inside with (key - low) >> shift == b, for all 0 <= b < bins
template <typename Key>
void key_histogram(const ScoreChunk<Key>& chunk,
                   const Interval<Key>& interval,
                   int shift,
                   int64_t bins,
                   const Pool& pool,
                   int64_t* counts);

// Sums both parts (math/squares.h) of the squares of scores above key. Returns false where any that
// counts is not below 2^exponent.
template <typename Key>
bool squares_above(
    const ScoreChunk<Key>& chunk, Key key, int exponent, const Pool& pool, int64_t* sums);

// Marks the scores above key, and the first `ties` of those at it. Returns how many at it.
template <typename Key>
int64_t threshold_mask(
    const ScoreChunk<Key>& chunk, Key key, int64_t ties, const Pool& pool, uint8_t* kept);

// out[j] = the random score (math/random.h) of start + (first + j * step) * kGolden; float, double
template <typename Float>
void random_scores(
    uint64_t start, uint64_t first, uint64_t step, int64_t n, const Pool& pool, Float* out);

// live[j] = w[j] is not zero, and mask[j] (null: all) is not 0. Returns how many are.
int64_t nonzero_mask(
    const void* w, DType dtype, int64_t n, const uint8_t* mask, const Pool& pool, uint8_t* live);

}  // namespace lap::cpu
