// SPDX-License-Identifier: MIT
#include "keys.h"

#include <utility>

namespace lap::cpu {
namespace {

template <typename Key>
const KeyKernels<Key>& key_kernels(DType dtype);
template <>
const KeyKernels<int32_t>& key_kernels<int32_t>(DType dtype) {
  return kernels().narrow[static_cast<int>(dtype)];
}
template <>
const KeyKernels<int64_t>& key_kernels<int64_t>(DType dtype) {
  return kernels().wide[static_cast<int>(dtype)];
}

template <typename Key>
const DecideKernels<Key>& decide_kernels();
template <>
const DecideKernels<int32_t>& decide_kernels<int32_t>() {
  return kernels().decide32;
}
template <>
const DecideKernels<int64_t>& decide_kernels<int64_t>() {
  return kernels().decide64;
}

}  // namespace

template <typename Key>
Keys<Key>::Keys(const Source& source, Norms<Float> norms)
    : source_(source),
      norms_(std::move(norms)),
      kernel_(key_kernels<Key>(source.x.dtype)),
      decide_(decide_kernels<Key>()) {}

template <typename Key>
Key Keys<Key>::fill(int64_t begin, int64_t n, Scratch* scratch, Key* keys) const {
  Key top = 0;
  if (source_.row_norm == nullptr) {
    top = kernel_.scores(elements(source_.x, begin, n, scratch->gathered), n, keys);
  } else {
    for_each_piece(source_.x, source_.layout, norms_, begin, n, scratch,
                   [&](const void* x, const Float* col, Float row, int64_t first, int64_t count) {
                     top = std::max(top, kernel_.weights(x, col, row, count, keys + first));
                   });
  }
  if (source_.eligible != nullptr) decide_.restrict_to(source_.eligible + begin, n, keys);
  return top;
}

template <typename Key>
Key Keys<Key>::classify(int64_t begin,
                        int64_t n,
                        const Decision<Key>& to,
                        int64_t base,
                        Scratch* scratch,
                        uint8_t* mask,
                        Candidates<Key>* candidates,
                        int64_t* above) const {
  if (source_.eligible != nullptr) {
    Key keys[kBlock];
    const Key top = fill(begin, n, scratch, keys);
    decide_.classify(keys, n, to, base, mask, candidates, above);
    return top;
  }
  if (source_.row_norm == nullptr) {
    return kernel_.classify_scores(elements(source_.x, begin, n, scratch->gathered), n, to, base,
                                   mask, candidates, above);
  }
  Key top = 0;
  for_each_piece(source_.x, source_.layout, norms_, begin, n, scratch,
                 [&](const void* x, const Float* col, Float row, int64_t first, int64_t count) {
                   const Key size = kernel_.classify_weights(x, col, row, count, to, base + first,
                                                             mask + first, candidates, above);
                   top = std::max(top, size);
                 });
  return top;
}

template <typename Key>
bool Keys<Key>::underflows(int64_t begin, int64_t n, Scratch* scratch) const {
  bool found = false;
  for_each_piece(source_.x, source_.layout, norms_, begin, n, scratch,
                 [&](const void* x, const Float* col, Float row, int64_t, int64_t count) {
                   found = found || kernel_.underflows(x, col, row, count);
                 });
  return found;
}

template class Keys<int32_t>;
template class Keys<int64_t>;

}  // namespace lap::cpu
