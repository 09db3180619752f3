// SPDX-License-Identifier: MIT
// Structures within a weight [rows, cols, window]: how it is cut into blocks, and the patterns that
// keep two of four along rows and along columns of a tile. lap_ext/ops/reference/structured.py is
// the definition.
#pragma once

#include "host_device.h"

namespace lap {

// --- blocks -----------------------------------------------------------------------------------

// A matrix whose groups have `height` rows each, cut into blocks of `rows` by `cols` that end where
// a group ends. A weight has the rows first, first + 1, ... of the matrix.
struct Blocks {
  int64_t rows = 1;
  int64_t cols = 1;
  int64_t height = 1;
  int64_t first = 0;

  LAP_HOST_DEVICE int64_t down() const { return ceil_div(height, rows); }  // in a group
  LAP_HOST_DEVICE int64_t across(int64_t all_cols) const { return ceil_div(all_cols, cols); }
  // The row of blocks in which the weight's row lies.
  LAP_HOST_DEVICE int64_t unit_of(int64_t row) const {
    const int64_t at = first + row;
    return at / height * down() + at % height / rows;
  }
};

// --- tiles of 4 by 4 --------------------------------------------------------------------------

constexpr int kTileSide = 4;
constexpr int kPairs = 6;

// The columns of pair 0 to 5, those with lower columns first: digit c of four bits is 1 for c.
LAP_HOST_DEVICE constexpr uint32_t pair_columns(int pair) {
  return pair == 0   ? 0x0011u
         : pair == 1 ? 0x0101u
         : pair == 2 ? 0x1001u
         : pair == 3 ? 0x0110u
         : pair == 4 ? 0x1010u
                     : 0x1100u;
}

// The same, digits of one bit.
LAP_HOST_DEVICE constexpr uint32_t pair_bits(int pair) {
  const uint32_t digits = pair_columns(pair);
  return (digits & 1) | (digits >> 3 & 2) | (digits >> 6 & 4) | (digits >> 9 & 8);
}

// The pair of the last row that makes a pattern of three others; -1: there is none. The 90 patterns
// come in the order of their rows' pairs.
LAP_HOST_DEVICE constexpr int fourth_pair(int first, int second, int third) {
  const uint32_t taken = pair_columns(first) + pair_columns(second) + pair_columns(third);
  for (int pair = 0; pair < kPairs; ++pair) {
    if (taken + pair_columns(pair) == 0x2222u) return pair;
  }
  return -1;
}

}  // namespace lap
