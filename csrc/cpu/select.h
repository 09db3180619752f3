// SPDX-License-Identifier: MIT
// Exact selection of the k largest scores over one or several sources, without storing a score.
//
//   1. sample     keys at hashed positions estimate an interval [low, high] around the threshold
//   2. scan       one reading: above high is kept, below low is dropped (the mask is written), the
//                 few between are collected as (key, position)
//   3. finish     the threshold among the collected, by histograms of their keys; the mask bytes of
//                 those above it are set, and of those equal to it the first in order
//   If the sample misled (the interval misses the threshold, or holds too many): histograms over
//   all keys, 11 bits a reading, give an interval that cannot; if one single key holds too many,
//   its ties are marked in the mask and the first of them kept.
//
// Equal keys: the lower (source, flat position) first. The result does not depend on the sample,
// the thread count or the instruction set. Memory: about 1 % of the weights' bytes, at most 4.5 %
// (or 1 MB).
#pragma once

#include <vector>

#include "parallel.h"
#include "source.h"

namespace lap::cpu {

enum class Outcome {
  ok,
  not_finite,  // an infinity or NaN among the weights (a NaN among the scores)
  range,       // products of double weights leave double's range where it matters
};

struct Selection {
  Outcome outcome = Outcome::ok;
  double threshold = 0;  // the smallest kept score, when 1 <= keep <= eligible (raw scores only)
};

// Marks exactly min(keep, eligible) elements in the sources' masks.
Selection select(const std::vector<Source>& sources,
                 int64_t keep,
                 bool check_finite,
                 const Pool& pool);

// How many elements are not finite (raw scores: NaN), and the first one's flat index.
struct NotFinite {
  int64_t count = 0;
  int64_t first = -1;
};
NotFinite find_not_finite(const Strided& x, bool infinity_is_fine);

}  // namespace lap::cpu
