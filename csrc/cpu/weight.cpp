// SPDX-License-Identifier: MIT
#include "weight.h"

#include "../math/host_device.h"

namespace lap::cpu {
namespace {

// Calls run(pointer offset, stride, first index, count) for each straight run of the innermost
// dimension in [begin, begin + n); index counts from begin.
template <typename Run>
void for_each_run(const Strided& x, int64_t begin, int64_t n, const Run& run) {
  if (x.dims == 0) {
    run(begin, int64_t{1}, int64_t{0}, n);
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
    run(offset, x.stride[inner], done, count);
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

template <typename T>
void gather(const Strided& x, int64_t begin, int64_t n, T* out) {
  const T* data = static_cast<const T*>(x.data);
  for_each_run(x, begin, n, [&](int64_t offset, int64_t stride, int64_t first, int64_t count) {
    const T* from = data + offset;
    for (int64_t j = 0; j < count; ++j) out[first + j] = from[j * stride];
  });
}

template <typename T>
void zero(const Strided& x, const uint8_t* mask, int64_t begin, int64_t n) {
  T* data = static_cast<T*>(const_cast<void*>(x.data));
  for_each_run(x, begin, n, [&](int64_t offset, int64_t stride, int64_t first, int64_t count) {
    T* to = data + offset;
    if (stride == 1) {
      for (int64_t j = 0; j < count; ++j) to[j] = mask[first + j] ? to[j] : T{0};
    } else {
      for (int64_t j = 0; j < count; ++j) {
        if (!mask[first + j]) to[j * stride] = T{0};
      }
    }
  });
}

}  // namespace

bool make_strided(const void* data,
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

const void* elements(const Strided& x, int64_t begin, int64_t n, void* buffer) {
  const int64_t item = item_size(x.dtype);
  if (x.contiguous()) return static_cast<const char*>(x.data) + begin * item;
  if (item == 2) gather(x, begin, n, static_cast<uint16_t*>(buffer));
  if (item == 4) gather(x, begin, n, static_cast<uint32_t*>(buffer));
  if (item == 8) gather(x, begin, n, static_cast<uint64_t*>(buffer));
  return buffer;
}

void zero_dropped(const Strided& x, const uint8_t* mask, const Pool& pool) {
  constexpr int64_t kStretch = int64_t{1} << 16;
  const int64_t item = item_size(x.dtype);
  for_each_chunk(pool, ceil_div(x.size, kStretch), [&](int, int64_t c) {
    const int64_t begin = c * kStretch;
    const int64_t n = std::min(kStretch, x.size - begin);
    if (item == 2) zero<uint16_t>(x, mask + begin, begin, n);
    if (item == 4) zero<uint32_t>(x, mask + begin, begin, n);
    if (item == 8) zero<uint64_t>(x, mask + begin, begin, n);
  });
}

}  // namespace lap::cpu
