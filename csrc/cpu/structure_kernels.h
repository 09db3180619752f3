// SPDX-License-Identifier: MIT
// The inner loops of structures (structures.inc), which isa.h holds beside the others.
#pragma once

#include <cstdint>

#include "../math/dtype.h"
#include "../math/key.h"
#include "../math/structures.h"

namespace lap::cpu {

// The patterns that keep two of four in every row and column of a tile, in the order of their rows'
// pairs (math/structures.h).
constexpr int kPatternCount = 90;
struct Patterns {
  uint8_t pairs[kPatternCount][kTileSide] = {};  // of each row
  uint8_t after[kPairs * kPairs] = {};           // patterns that begin with the same two pairs
  uint8_t low[kPairs] = {};                      // the columns of a pair
  uint8_t high[kPairs] = {};
};

constexpr Patterns all_patterns() {
  Patterns out;
  int count = 0;
  for (int begin = 0; begin < kPairs * kPairs; ++begin) {
    for (int third = 0; third < kPairs; ++third) {
      const int fourth = fourth_pair(begin / kPairs, begin % kPairs, third);
      if (fourth < 0) continue;
      const int pairs[] = {begin / kPairs, begin % kPairs, third, fourth};
      for (int row = 0; row < kTileSide; ++row) {
        out.pairs[count][row] = static_cast<uint8_t>(pairs[row]);
      }
      ++count;
      ++out.after[begin];
    }
  }
  for (int pair = 0; pair < kPairs; ++pair) {
    for (int column = kTileSide - 1; column >= 0; --column) {
      if ((pair_columns(pair) >> (4 * column) & 1) == 0) continue;
      if (out.high[pair] == 0) {
        out.high[pair] = static_cast<uint8_t>(column);
      } else {
        out.low[pair] = static_cast<uint8_t>(column);
      }
    }
  }
  return out;
}
constexpr Patterns kPatterns = all_patterns();
static_assert(kPatterns.pairs[kPatternCount - 1][0] == kPairs - 1, "all are found");

constexpr int kTilesPadded = 32;  // lines of tiles are as long as a multiple of it

// The weights whose float scores have the bits of the wide form: zero, and those whose |w| has a
// key from least to below most.
struct WeightRange {
  int32_t least;
  int32_t most;
};

// What is done with keys of scores, whatever they were made from.
template <typename Key>
struct StructureKernels {
  // Entry j of line i is at [i * step + j]. marks = 1 where a key is among the `keep` largest of
  // the `of` keys that have its j, and 0 elsewhere; of equal keys the lower lines come first.
  void (*keep_best)(const Key* keys,
                    int64_t step,
                    int64_t of,
                    int64_t keep,
                    int64_t n,
                    uint8_t* marks,
                    int64_t mark_step);

  // out[j] = the score that has keys[j], or its square; 0 for kNever
  void (*values)(const Key* keys, int64_t n, bool squared, double* out);
};

// Empty for f64: narrow keys, which are in float.
struct Structures {
  StructureKernels<int32_t> narrow;
  StructureKernels<int64_t> wide;

  // keys[j] = key(|w[j]| * (row_norm * col_norm[j])) in float; false where a w[j] is out of range
  bool (*keys_within[kDTypes])(const void* w,
                               const float* col_norm,
                               float row_norm,
                               int64_t n,
                               const WeightRange& range,
                               int32_t* keys);

  // The same, but out[j] = the score, or its square.
  bool (*values_within[kDTypes])(const void* w,
                                 const float* col_norm,
                                 float row_norm,
                                 int64_t n,
                                 const WeightRange& range,
                                 bool squared,
                                 double* out);

  // The same, but mask[j] = whether the key is among the best two of its four; 4 divides n.
  bool (*two_of_four_weights[kDTypes])(const void* w,
                                       const float* col_norm,
                                       float row_norm,
                                       int64_t n,
                                       const WeightRange& range,
                                       uint8_t* mask);

  // mask[j] = whether keys[j] is among the best two of its four; 4 divides n
  void (*two_of_four)(const int32_t* keys, int64_t n, uint8_t* mask);

  // patterns[j] = the number of the best pattern in tile j, whose 16 values are at
  // lines[i * step + j]: those that keep the most of what is 1 at the same places of named (null:
  // all), of these the one with the largest sum. Lines and patterns are as long as the next
  // multiple of kTilesPadded.
  void (*best_patterns)(
      const double* lines, const double* named, int64_t step, int64_t n, uint8_t* patterns);

  // Sum of at most kSegment values in the order of math/sums.h.
  double (*sum_segment)(const double* values, int64_t n);

  // sums[b] += sum_segment(values + b * width, width) for each of so many blocks, whose values are
  // at most kSegment in all
  void (*add_blocks)(const double* values, int64_t width, int64_t blocks, double* sums);
};

}  // namespace lap::cpu
