// SPDX-License-Identifier: MIT
// Reads a tensor of any strides in the flat C order.
#pragma once

#include "../math/strided.h"

namespace lap::cpu {

// Elements begin .. begin + n - 1 of the flat order: in place when contiguous, else copied to
// buffer (which holds n elements).
const void* elements(const Strided& x, int64_t begin, int64_t n, void* buffer);

// Calls visit(offset in memory, stride, first, count) for each part of the innermost dimension in
// [begin, begin + n); first counts from begin.
template <typename Visit>
void for_each_inner(const Strided& x, int64_t begin, int64_t n, const Visit& visit) {
  if (x.dims == 0) {
    visit(begin, int64_t{1}, int64_t{0}, n);
    return;
  }
  int64_t at[kMaxDims];
  int64_t offset = 0;
  int64_t rest = begin;
  for (int d = x.dims - 1; d >= 0; --d) {
    at[d] = rest % x.shape[d];
    rest /= x.shape[d];
    offset += at[d] * x.stride[d];
  }
  const int inner = x.dims - 1;
  for (int64_t done = 0; done < n;) {
    const int64_t left = x.shape[inner] - at[inner];
    const int64_t count = left < n - done ? left : n - done;
    visit(offset, x.stride[inner], done, count);
    done += count;
    offset += count * x.stride[inner];
    at[inner] += count;
    for (int d = inner; d > 0 && at[d] == x.shape[d]; --d) {
      offset += x.stride[d - 1] - x.shape[d] * x.stride[d];
      at[d] = 0;
      ++at[d - 1];
    }
  }
}

}  // namespace lap::cpu
