// SPDX-License-Identifier: MIT
// The inner loops of structures (structures.inc), which isa.h holds beside the others.
#pragma once

#include <cstdint>

#include "../math/dtype.h"
#include "../math/key.h"

namespace lap::cpu {

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

  // The same, but mask[j] = whether the key is among the best two of its four; 4 divides n.
  bool (*two_of_four_weights[kDTypes])(const void* w,
                                       const float* col_norm,
                                       float row_norm,
                                       int64_t n,
                                       const WeightRange& range,
                                       uint8_t* mask);

  // mask[j] = whether keys[j] is among the best two of its four; 4 divides n
  void (*two_of_four)(const int32_t* keys, int64_t n, uint8_t* mask);

  // Sum of at most kSegment values in the order of math/sums.h.
  double (*sum_segment)(const double* values, int64_t n);

  // sums[b] += sum_segment(values + b * width, width) for each of so many blocks, whose values are
  // at most kSegment in all
  void (*add_blocks)(const double* values, int64_t width, int64_t blocks, double* sums);
};

}  // namespace lap::cpu
