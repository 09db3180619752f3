// SPDX-License-Identifier: MIT
// Turns any stretch of a source's flat order into keys (or scores), block by block: weights are
// gathered if they are strided, norms are lined up with them, and the inner loops of isa.h do the
// rest. Nothing of the weights' size is ever stored.
#pragma once

#include "../math/score.h"
#include "isa.h"
#include "norms.h"

namespace lap::cpu {

constexpr int64_t kBlock = 1024;   // keys of a block and weights fill a quarter of the L1 cache
constexpr int64_t kLongRow = 128;  // shorter rows are lined up with their norms in a buffer first

// One tensor to rank: weights with their norms, or ready scores (no norms). The keys of several
// weights can be compared only where they are absolute: made of the norms as they are, so that a
// key is its score's bits. For this the products of norms must be normal numbers
// (has_plain_scores).
struct Source {
  Strided x;
  Layout layout;
  const double* row_norm = nullptr;   // [rows]
  const double* col_norm = nullptr;   // [groups * cols]
  const uint8_t* eligible = nullptr;  // [size] or null: all
  uint8_t* mask = nullptr;            // [size] or null: only the threshold is wanted
  bool absolute = false;

  bool is_scores() const { return row_norm == nullptr; }
};

// Room for one block, one per worker.
struct Scratch {
  alignas(64) char gathered[kBlock * 8];
  alignas(64) char norms[kBlock * 8];
};

// Calls piece(x, col_norm, row_norm, first, count) for straight runs that cover elements
// [begin, begin + n), n <= kBlock: col_norm runs along with x, row_norm is constant.
template <typename Float, typename Piece>
void for_each_piece(const Strided& x,
                    const Layout& layout,
                    const Norms<Float>& norms,
                    int64_t begin,
                    int64_t n,
                    Scratch* scratch,
                    const Piece& piece) {
  const char* data = static_cast<const char*>(elements(x, begin, n, scratch->gathered));
  const int64_t item = item_size(x.dtype);
  const int64_t row_size = layout.row_size();
  const int64_t repeat = norms.expanded ? 1 : layout.window;  // elements that share a col entry
  const int64_t entries = row_size / repeat;                  // col entries of one group
  int64_t row = begin / row_size;
  int64_t at = begin % row_size;
  if (repeat == 1 && row_size >= kLongRow) {
    for (int64_t done = 0; done < n; ++row, at = 0) {
      const int64_t count = std::min(n - done, row_size - at);
      const Float* col = norms.col.data() + layout.group_of(row) * entries + at;
      piece(data + done * item, col, norms.row[row], done, count);
      done += count;
    }
    return;
  }
  Float* lined_up = reinterpret_cast<Float*>(scratch->norms);
  for (int64_t done = 0; done < n; ++row, at = 0) {
    const Float* col = norms.col.data() + layout.group_of(row) * entries;
    const Float row_norm = norms.row[row];
    const int64_t stop = std::min(n, done + row_size - at);
    int64_t entry = at / repeat;
    int64_t left = repeat - at % repeat;
    while (done < stop) {
      const Float c = product(row_norm, col[entry++]);
      for (const int64_t end = std::min(stop, done + left); done < end;) lined_up[done++] = c;
      left = repeat;
    }
  }
  piece(data, lined_up, Float{1}, int64_t{0}, n);  // product(1, c) is c
}

// The keys of one source.
template <typename Key>
class Keys {
 public:
  using Float = typename KeyTraits<Key>::Float;

  Keys(const Source& source, Norms<Float> norms);

  // keys[0 .. n-1] of elements [begin, begin + n), n <= kBlock. Returns the largest |x| as a key,
  // for scores one less: what reaches kInfinity is not finite, or, among scores, not a number.
  Key fill(int64_t begin, int64_t n, Scratch* scratch, Key* keys) const;

  // keys[i] of element position[i], n <= kBlock
  void pick(const int64_t* position, int64_t n, Scratch* scratch, Key* keys) const;

  // Decides elements [begin, begin + n) as isa.h's classify does, offsets from base.
  Key classify(int64_t begin,
               int64_t n,
               const Decision<Key>& to,
               int64_t base,
               Scratch* scratch,
               uint8_t* mask,
               Candidates<Key>* candidates,
               int64_t* above) const;

  // true when some product of nonzero factors in [begin, begin + n) left the normal range
  bool underflows(int64_t begin, int64_t n, Scratch* scratch) const;

  const Source& source() const { return source_; }

 private:
  Source source_;
  Norms<Float> norms_;
  KeyKernels<Key> kernel_;
  DecideKernels<Key> decide_;
};

extern template class Keys<int32_t>;
extern template class Keys<int64_t>;

}  // namespace lap::cpu
