// SPDX-License-Identifier: MIT
// The keys of one weight's scores, or of ready scores, as reference/structured.py has them: scores
// of true norms, rounded to 24 bits, whose exponent no product leaves (math/score.h: the wide
// form). Float keys are made where they are those; where a score might leave float's range, all
// keys that are compared with it are made in double. A worker holds the keys of a few lines.
#pragma once

#include <atomic>
#include <vector>

#include "isa.h"
#include "key.h"
#include "parallel.h"

namespace lap::cpu {

// count lines of n elements each: line i begins at element begin + i * step of the flat order.
struct Lines {
  int64_t begin;
  int64_t step;
  int64_t count;
  int64_t n;
};

// What one worker has at a time.
struct KeyBuffers {
  Scratch scratch;
  std::vector<int32_t> narrow;
  std::vector<int64_t> wide;
  bool finite = true;  // no weight so far was infinite or a NaN (of scores: none was a NaN)
};

inline bool all_finite(const std::vector<KeyBuffers>& workers) {
  bool finite = true;
  for (const KeyBuffers& worker : workers) finite = finite && worker.finite;
  return finite;
}

template <typename Key>
const StructureKernels<Key>& structure_kernels() {
  if constexpr (sizeof(Key) == 4) {
    return kernels().structures.narrow;
  } else {
    return kernels().structures.wide;
  }
}

class ExactKeys {
 public:
  explicit ExactKeys(const Source& source);

  const Source& source() const { return source_; }
  const Layout& layout() const { return source_.layout; }

  // Calls use(keys) with line i at keys + i * lines.n, int32_t or int64_t for all of them.
  template <typename Use>
  void with_keys(const Lines& lines, KeyBuffers* buffers, const Use& use) const {
    const size_t size = static_cast<size_t>(lines.count * lines.n);
    if (narrow_) {
      if (buffers->narrow.size() < size) buffers->narrow.resize(size);
      if (fill_narrow(lines, buffers)) {
        use(static_cast<const int32_t*>(buffers->narrow.data()));
        return;
      }
    }
    if (buffers->wide.size() < size) buffers->wide.resize(size);
    fill_wide(lines, buffers);
    use(static_cast<const int64_t*>(buffers->wide.data()));
  }

  // out = the scores of the lines, or their squares, in double; 0 where one is not eligible.
  void values(const Lines& lines, bool squared, KeyBuffers* buffers, double* out) const;

  // mask = the best two of every four of n elements from begin on, 4 divides both and a row.
  // Returns false where that must be found from with_keys.
  bool two_of_four(int64_t begin, int64_t n, KeyBuffers* buffers, uint8_t* mask) const;

  // mask[j] = 0 where element begin + j may not be kept
  void restrict_mask(int64_t begin, int64_t n, uint8_t* mask) const {
    if (source_.eligible == nullptr) return;
    const uint8_t* eligible = source_.eligible + begin;
    for (int64_t j = 0; j < n; ++j) mask[j] &= static_cast<uint8_t>(eligible[j] != 0);
  }

 private:
  // Returns false where a score might not be what the wide form says.
  bool fill_narrow(const Lines& lines, KeyBuffers* buffers) const;
  bool fill_narrow(int64_t begin, int64_t n, Scratch* scratch, int32_t* keys) const;
  bool narrow_values(const Lines& lines, bool squared, Scratch* scratch, double* out) const;
  void fill_wide(const Lines& lines, KeyBuffers* buffers) const;

  // Whether float kernels may read the weights and need to know nothing else.
  bool plain() const { return narrow_ && !source_.is_scores() && source_.eligible == nullptr; }

  Source source_;
  bool narrow_ = false;  // float keys may do
  WeightRange range_ = {0, 0};
  ScaledNorms<float> norms_;
  Keys<int64_t> wide_;
};

}  // namespace lap::cpu
