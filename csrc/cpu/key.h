// SPDX-License-Identifier: MIT
// Turns the elements of a source into keys, a tile at a time, or decides them at once: elements and
// norms are lined up (source.h), and the inner loops of isa.h do the rest. Nothing of the weights'
// size is ever stored.
#pragma once

#include "isa.h"
#include "source.h"

namespace lap::cpu {

// The keys of one source.
template <typename Key>
class Keys {
 public:
  using Float = typename KeyTraits<Key>::Float;

  Keys(const Source& source, ScaledNorms<Float> norms);

  // keys[0 .. n-1] of elements [begin, begin + n), n <= kTile. Returns the largest |x| as a key,
  // for scores one less: what reaches kInfinity is not finite, or, among scores, not a number.
  Key fill(int64_t begin, int64_t n, Scratch* scratch, Key* keys) const;

  // keys[i] of element position[i], n <= kTile
  void pick(const int64_t* position, int64_t n, Scratch* scratch, Key* keys) const;

  // Decides elements [begin, begin + n) as isa.h's classify does, offsets from base.
  Key classify(int64_t begin,
               int64_t n,
               const Interval<Key>& interval,
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
  ScaledNorms<Float> norms_;
  KeyKernels<Key> kernel_;
  DecideKernels<Key> decide_;
};

extern template class Keys<int32_t>;
extern template class Keys<int64_t>;

}  // namespace lap::cpu
