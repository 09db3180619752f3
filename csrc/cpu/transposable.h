// SPDX-License-Identifier: MIT
// Masks that keep two of four along rows and along columns, found exactly.
#pragma once

#include "parallel.h"
#include "source.h"

namespace lap::cpu {

// Writes the mask of the pattern with the largest sum, of squared scores or of scores, in every
// tile of 4 rows by 4 columns, of the patterns that keep the most of what is eligible; 4 divides
// the columns and the rows of a group. What is not eligible counts 0 and is not kept. Returns
// whether all weights are finite (scores: numbers).
bool transposable_mask(const Source& source, bool squared, const Pool& pool);

}  // namespace lap::cpu
