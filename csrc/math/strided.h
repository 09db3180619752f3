// SPDX-License-Identifier: MIT
// Where element p of a tensor's flat C order lies in memory, for any strides.
#pragma once

#include "dtype.h"

namespace lap {

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
inline bool make_strided(const void* data,
                         DType dtype,
                         int dims,
                         const int64_t* shape,
                         const int64_t* stride,
                         Strided* out) {
  Strided x;
  x.data = data;
  x.dtype = dtype;
  x.size = 1;
  for (int d = 0; d < dims; ++d) x.size *= shape[d];
  for (int d = 0; d < dims && x.size > 0; ++d) {
    if (shape[d] == 1) continue;
    const int last = x.dims - 1;
    if (last >= 0 && x.stride[last] == shape[d] * stride[d]) {
      x.shape[last] *= shape[d];
      x.stride[last] = stride[d];
    } else {
      if (x.dims == kMaxDims) return false;
      x.shape[x.dims] = shape[d];
      x.stride[x.dims] = stride[d];
      ++x.dims;
    }
  }
  *out = x;
  return true;
}

}  // namespace lap
