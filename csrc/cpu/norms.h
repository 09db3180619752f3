// SPDX-License-Identifier: MIT
// Squared norms of a weight's channels, in the order of math/sums.h.
#pragma once

#include "../math/layout.h"
#include "../math/strided.h"
#include "parallel.h"

namespace lap::cpu {

// squared_norm[r] = sum of squares of row r of x [rows, row_size], each element first times scale
void row_squared_norms(
    const Strided& x, int64_t rows, double scale, const Pool& pool, double* squared_norm);

// squared_norm[g * cols + c] = sum over n and k of x[g * (rows / groups) + n, c, k]^2, likewise
void col_squared_norms(
    const Strided& x, const Layout& layout, double scale, const Pool& pool, double* squared_norm);

// Both, with the same bits (for scale 1), from one reading of x.
void squared_norms(const Strided& x,
                   const Layout& layout,
                   const Pool& pool,
                   double* row,   // [rows] out
                   double* col);  // [groups * cols] out

}  // namespace lap::cpu
