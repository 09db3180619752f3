// SPDX-License-Identifier: MIT
// Step 1 of select.h: keys at hashed positions, and the interval that they set.
#pragma once

#include <vector>

#include "key.h"
#include "parallel.h"

namespace lap::cpu {

template <typename Key>
struct Estimate {
  Interval<Key> interval;
  double candidates;  // keys of all sources that lie in it, by the sample
};

// Where the keep-th largest key of all sources should lie; capacity: candidates that there is
// memory for.
template <typename Key>
Estimate<Key> estimate(const std::vector<Keys<Key>>& keys,
                       int64_t keep,
                       int64_t capacity,
                       const Pool& pool);

// Of the capacity, what the expected candidates may fill.
constexpr double kCapacityShare = 0.8;

extern template Estimate<int32_t> estimate(const std::vector<Keys<int32_t>>&,
                                           int64_t,
                                           int64_t,
                                           const Pool&);
extern template Estimate<int64_t> estimate(const std::vector<Keys<int64_t>>&,
                                           int64_t,
                                           int64_t,
                                           const Pool&);

}  // namespace lap::cpu
