// SPDX-License-Identifier: MIT
#include "elements.h"

namespace lap::cpu {
namespace {

template <typename T>
void gather(const Strided& x, int64_t begin, int64_t n, void* buffer) {
  const T* data = static_cast<const T*>(x.data);
  T* out = static_cast<T*>(buffer);
  for_each_inner(x, begin, n, [&](int64_t offset, int64_t stride, int64_t first, int64_t count) {
    const T* from = data + offset;
    for (int64_t j = 0; j < count; ++j) out[first + j] = from[j * stride];
  });
}

}  // namespace

const void* elements(const Strided& x, int64_t begin, int64_t n, void* buffer) {
  const int64_t item = item_size(x.dtype);
  if (x.contiguous()) return static_cast<const char*>(x.data) + begin * item;
  if (item == 2) gather<uint16_t>(x, begin, n, buffer);
  if (item == 4) gather<uint32_t>(x, begin, n, buffer);
  if (item == 8) gather<uint64_t>(x, begin, n, buffer);
  return buffer;
}

}  // namespace lap::cpu
