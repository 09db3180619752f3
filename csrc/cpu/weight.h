// SPDX-License-Identifier: MIT
// A weight as the core sees it: elements in logical C order, wherever they lie in memory.
//
//   Strided   where element p of the flat C order lies (any strides)
//   Layout    [rows, cols, window]: one norm a row, one a column, a row of columns per group
//             element p -> row p / (cols * window), column group(row) * cols + (p / window) % cols
//             A transposed convolution swaps the roles of rows and columns, so do its norms.
#pragma once

#include <cstdint>
#include <cstring>

#include "parallel.h"

namespace lap::cpu {

enum class DType { f32, f16, bf16, f64 };
constexpr int kDTypes = 4;

constexpr int64_t item_size(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

constexpr int kMaxDims = 8;

struct Strided {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t size = 0;  // elements
  int dims = 0;      // dimensions that did not merge; 0 and 1 with stride 1: contiguous
  int64_t shape[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};  // in elements

  bool contiguous() const { return dims == 0 || (dims == 1 && stride[0] == 1); }
};

// Merges neighboring dimensions that advance as one. Returns false when more than kMaxDims remain.
bool make_strided(const void* data,
                  DType dtype,
                  int dims,
                  const int64_t* shape,
                  const int64_t* stride,
                  Strided* out);

// Elements begin .. begin + n - 1 of the flat order: in place when contiguous, else copied to
// buffer (room for n elements).
const void* elements(const Strided& x, int64_t begin, int64_t n, void* buffer);

// Writes zero to every element whose mask byte is 0. x.data must be writable.
void zero_dropped(const Strided& x, const uint8_t* mask, const Pool& pool);

struct Layout {
  int64_t rows = 0;
  int64_t cols = 1;
  int64_t window = 1;
  int64_t groups = 1;

  int64_t row_size() const { return cols * window; }
  int64_t group_of(int64_t row) const { return row / (rows / groups); }
};

}  // namespace lap::cpu
