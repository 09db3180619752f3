// SPDX-License-Identifier: MIT
#include "key.h"

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

template <typename T>
void pick_elements(const Strided& x, const int64_t* position, int64_t n, void* out) {
  T* to = static_cast<T*>(out);
  if (x.contiguous()) {
    const T* from = static_cast<const T*>(x.data);
    for (int64_t i = 0; i < n; ++i) to[i] = from[position[i]];
  } else {
    for (int64_t i = 0; i < n; ++i) elements(x, position[i], 1, to + i);
  }
}

}  // namespace

template <typename Key>
Keys<Key>::Keys(const Source& source, ScaledNorms<Float> norms)
    : source_(source),
      norms_(std::move(norms)),
      kernel_(key_kernels<Key>(source.x.dtype)),
      decide_(decide_kernels<Key>()) {}

template <typename Key>
Key Keys<Key>::fill(int64_t begin, int64_t n, Scratch* scratch, Key* keys) const {
  Key top = 0;
  if (source_.is_scores()) {
    top = kernel_.scores(elements(source_.x, begin, n, scratch->gathered), n, keys) - 1;
  } else {
    for_each_with_norms(
        source_.x, source_.layout, norms_, begin, n, scratch,
        [&](const void* x, const Float* col, Float row, int64_t first, int64_t count) {
          top = std::max(top, kernel_.weights(x, col, row, count, keys + first));
        });
  }
  if (source_.eligible != nullptr) decide_.restrict_to(source_.eligible + begin, n, keys);
  return top;
}

template <typename Key>
void Keys<Key>::pick(const int64_t* position, int64_t n, Scratch* scratch, Key* keys) const {
  // Independent loads first, so that their waits for memory overlap; then all keys at once.
  switch (item_size(source_.x.dtype)) {
    case 2:
      pick_elements<uint16_t>(source_.x, position, n, scratch->gathered);
      break;
    case 4:
      pick_elements<uint32_t>(source_.x, position, n, scratch->gathered);
      break;
    default:
      pick_elements<uint64_t>(source_.x, position, n, scratch->gathered);
  }
  if (source_.is_scores()) {
    kernel_.scores(scratch->gathered, n, keys);
  } else {
    const Layout& layout = source_.layout;
    const int64_t row_size = layout.row_size();
    const int64_t repeat = norms_.expanded ? 1 : layout.window;
    Float* lined_up = reinterpret_cast<Float*>(scratch->norms);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t row = position[i] / row_size;
      const int64_t entry = position[i] % row_size / repeat;
      const int64_t first = layout.group_of(row) * (row_size / repeat);
      lined_up[i] = product(norms_.row[row], norms_.col[first + entry]);
    }
    kernel_.weights(scratch->gathered, lined_up, Float{1}, n, keys);
  }
  for (int64_t i = 0; source_.eligible != nullptr && i < n; ++i) {
    if (!source_.eligible[position[i]]) keys[i] = KeyTraits<Key>::kNever;
  }
}

template <typename Key>
Key Keys<Key>::classify(int64_t begin,
                        int64_t n,
                        const Interval<Key>& interval,
                        int64_t base,
                        Scratch* scratch,
                        uint8_t* mask,
                        Candidates<Key>* candidates,
                        int64_t* above) const {
  if (source_.eligible != nullptr) {
    Key keys[kTile];
    const Key top = fill(begin, n, scratch, keys);
    decide_.classify(keys, n, interval, base, mask, candidates, above);
    return top;
  }
  if (source_.is_scores()) {
    return kernel_.classify_scores(elements(source_.x, begin, n, scratch->gathered), n, interval,
                                   base, mask, candidates, above) -
           1;
  }
  Key top = 0;
  for_each_with_norms(
      source_.x, source_.layout, norms_, begin, n, scratch,
      [&](const void* x, const Float* col, Float row, int64_t first, int64_t count) {
        const Key size = kernel_.classify_weights(x, col, row, count, interval, base + first,
                                                  mask + first, candidates, above);
        top = std::max(top, size);
      });
  return top;
}

template <typename Key>
bool Keys<Key>::underflows(int64_t begin, int64_t n, Scratch* scratch) const {
  bool found = false;
  if (source_.is_scores() || source_.absolute) return found;
  for_each_with_norms(source_.x, source_.layout, norms_, begin, n, scratch,
                      [&](const void* x, const Float* col, Float row, int64_t, int64_t count) {
                        found = found || kernel_.underflows(x, col, row, count);
                      });
  return found;
}

template class Keys<int32_t>;
template class Keys<int64_t>;

}  // namespace lap::cpu
