// SPDX-License-Identifier: MIT
// Which norms the elements of a weight have: one a row, one a column, a row of columns per group.
//
//   element p of the flat C order of [rows, cols, window]
//     -> row p / (cols * window), column group_of(row) * cols + (p / window) % cols
//
// A transposed convolution swaps the roles of rows and columns, and so do its norms.
#pragma once

#include "host_device.h"

namespace lap {

struct Layout {
  int64_t rows = 0;
  int64_t cols = 1;
  int64_t window = 1;
  int64_t groups = 1;

  LAP_HOST_DEVICE int64_t row_size() const { return cols * window; }
  int64_t size() const { return rows * row_size(); }
  int64_t channels() const { return groups * cols; }  // norms of columns
  int64_t group_rows() const { return rows / groups; }
  int64_t group_of(int64_t row) const { return row / group_rows(); }
};

// A layer's norms as they are given. Both null: the weight holds scores.
struct Norms {
  const double* row = nullptr;  // [rows]
  const double* col = nullptr;  // [groups * cols]

  bool given() const { return row != nullptr || col != nullptr; }
};

}  // namespace lap
