// SPDX-License-Identifier: MIT
#include "zero.h"

#include "../math/host_device.h"
#include "elements.h"

namespace lap::cpu {
namespace {

template <typename T>
void zero_chunk(const Strided& w, const uint8_t* mask, int64_t begin, int64_t n) {
  T* data = static_cast<T*>(const_cast<void*>(w.data));
  for_each_inner(w, begin, n, [&](int64_t offset, int64_t stride, int64_t first, int64_t count) {
    T* to = data + offset;
    if (stride == 1) {
      for (int64_t j = 0; j < count; ++j) to[j] &= T{0} - T{mask[first + j] != 0};
    } else {
      for (int64_t j = 0; j < count; ++j) {
        if (!mask[first + j]) to[j * stride] = T{0};
      }
    }
  });
}

}  // namespace

void zero(const Strided& w, const uint8_t* mask, const Pool& pool) {
  constexpr int64_t kChunk = int64_t{1} << 16;
  const int64_t item = item_size(w.dtype);
  for_each_chunk(pool, ceil_div(w.size, kChunk), [&](int, int64_t c) {
    const int64_t begin = c * kChunk;
    const int64_t n = std::min(kChunk, w.size - begin);
    if (item == 2) zero_chunk<uint16_t>(w, mask + begin, begin, n);
    if (item == 4) zero_chunk<uint32_t>(w, mask + begin, begin, n);
    if (item == 8) zero_chunk<uint64_t>(w, mask + begin, begin, n);
  });
}

}  // namespace lap::cpu
