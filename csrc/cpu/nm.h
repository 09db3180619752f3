// SPDX-License-Identifier: MIT
// N:M masks from one reading of the weights, no score of which is stored.
#pragma once

#include "parallel.h"
#include "source.h"

namespace lap::cpu {

// Writes the mask of the best `keep` of every `of` consecutive columns, or rows, at the same kernel
// position; of equal ones the lower index comes first. `of` divides the columns, or the rows of a
// group. Returns whether all weights are finite (scores: numbers).
bool nm_mask(const Source& source, int64_t keep, int64_t of, bool rows, const Pool& pool);

}  // namespace lap::cpu
