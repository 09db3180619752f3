// SPDX-License-Identifier: MIT
// The inner loops, compiled once per instruction set from kernels.inc and chosen when the library
// loads. LAP_EXT_ISA=baseline|v3|v4 forces a level (an unknown or unsupported one is an error), so
// that every level is tested on one machine. All levels give the same bits.
#pragma once

#include <cstdint>

#include "../math/dtype.h"
#include "../math/key.h"
#include "../math/squares.h"
#include "structure_kernels.h"

namespace lap::cpu {

// Keys above high are kept, keys below low dropped, those from low to high are candidates.
template <typename Key>
struct Interval {
  Key low;
  Key high;

  // All keys but kNever.
  static constexpr Interval full() {
    return {KeyTraits<Key>::kNever + 1, KeyTraits<Key>::kMagnitude};
  }
};

// Where classify puts the weights it cannot decide: their keys, and their offsets in the chunk. It
// must hold as many as classify is given, and kSpareCandidates that may be written in vain.
constexpr int kSpareCandidates = 2;
template <typename Key>
struct Candidates {
  Key* keys;
  uint16_t* offsets;
  int64_t count;
};

// What turns the elements of one dtype into keys. Each returns the largest |x| as a key, by which
// an infinity or a NaN is noticed.
template <typename Key>
struct KeyKernels {
  using Float = typename KeyTraits<Key>::Float;

  // keys[j] = key(|w[j]| * (row_norm * col_norm[j]))
  Key (*weights)(const void* w, const Float* col_norm, Float row_norm, int64_t n, Key* keys);

  // keys[j] = key of a score that may be negative
  Key (*scores)(const void* scores, int64_t n, Key* keys);

  // The keys of weights (of scores), decided at once: mask[j] = key > high; candidates get base + j
  // as offsets; *above grows by the number kept.
  Key (*classify_weights)(const void* w,
                          const Float* col_norm,
                          Float row_norm,
                          int64_t n,
                          const Interval<Key>& interval,
                          int64_t base,
                          uint8_t* mask,
                          Candidates<Key>* candidates,
                          int64_t* above);
  Key (*classify_scores)(const void* scores,
                         int64_t n,
                         const Interval<Key>& interval,
                         int64_t base,
                         uint8_t* mask,
                         Candidates<Key>* candidates,
                         int64_t* above);

  // true when a product of nonzero factors came out at or below the smallest normal number
  bool (*underflows)(const void* w, const Float* col_norm, Float row_norm, int64_t n);
};

// What decides ready keys, whatever they were made from.
template <typename Key>
struct DecideKernels {
  // keys[j] = kNever where eligible[j] is 0
  void (*restrict_to)(const uint8_t* eligible, int64_t n, Key* keys);

  void (*classify)(const Key* keys,
                   int64_t n,
                   const Interval<Key>& interval,
                   int64_t base,
                   uint8_t* mask,
                   Candidates<Key>* candidates,
                   int64_t* above);

  // mask[j] = 1 above the threshold, 2 at it, 0 below. Returns how many are above; adds to ties.
  int64_t (*mark_ties)(const Key* keys, int64_t n, Key threshold, uint8_t* mask, int64_t* ties);
};

// Scores >= 0 in flat order, and which of them count (null: all). The key of a score is its bits,
// -1 where it does not count.
template <typename Key>
struct ScoreChunk {
  const typename KeyTraits<Key>::Float* scores;
  const uint8_t* live;
  int64_t size;
};

struct KeyCount {
  int64_t above;   // keys above Interval::high
  int64_t inside;  // keys from low to high
};

// What ranks scores chunk by chunk (chunks.h). No chunk has more than kPiece scores, so that counts
// fit in a key.
constexpr int64_t kPiece = int64_t{1} << 14;
template <typename Key>
struct ChunkKernels {
  using Float = typename KeyTraits<Key>::Float;

  // Bit j % 64 of inside[j / 64]: whether key j is inside.
  KeyCount (*count)(const ScoreChunk<Key>& chunk, const Interval<Key>& interval, uint64_t* inside);

  // Writes the keys inside, which count has found, in order.
  void (*take)(const ScoreChunk<Key>& chunk, const uint64_t* inside, Key* out);

  // ++counts[(key - low) >> shift] for the keys inside
  void (*histogram)(const ScoreChunk<Key>& chunk,
                    const Interval<Key>& interval,
                    int shift,
                    int64_t* counts);

  // sums += both parts of the squares of the scores inside; false where a key is above
  bool (*squares)(const ScoreChunk<Key>& chunk,
                  const Interval<Key>& interval,
                  const SquareScale& scale,
                  int64_t* sums);

  // kept[j] = key above threshold, or at it where ties are kept; returns how many are at it
  int64_t (*mark)(const ScoreChunk<Key>& chunk, Key threshold, bool ties, uint8_t* kept);

  // out[j] = the random score of x + j * step
  void (*random)(uint64_t x, uint64_t step, int64_t n, Float* out);
};

constexpr int kRowsAtOnce = 4;

struct Kernels {
  const char* name;

  KeyKernels<int32_t> narrow[kDTypes];  // float products; empty for f64
  KeyKernels<int64_t> wide[kDTypes];    // 24-bit products in double; plain double for f64
  DecideKernels<int32_t> decide32;
  DecideKernels<int64_t> decide64;
  ChunkKernels<int32_t> chunk32;
  ChunkKernels<int64_t> chunk64;
  Structures structures;

  // live[j] = w[j] is not zero (a NaN is not), and mask[j] (null: all) is not 0; at most kPiece
  // elements. Returns how many are.
  int64_t (*nonzero[kDTypes])(const void* w, const uint8_t* mask, int64_t n, uint8_t* live);

  // out[j] = |w[j]| * (row_norm * col_norm[j]), as float (double for f64). The wide form multiplies
  // by scale twice at the end, so that any power of two can be undone. Returns the largest |w|.
  int32_t (*score[kDTypes])(
      const void* w, const float* col_norm, float row_norm, int64_t n, float* out);
  int64_t (*wide_score[kDTypes])(
      const void* w, const double* col_norm, double row_norm, double scale, int64_t n, void* out);

  // Sum of the squares of scale * x, over at most kSegment elements, in the order of math/sums.h.
  double (*row_segment[kDTypes])(const void* x, int64_t n, double scale);

  // sums[m] += (scale * rows[r][m])^2 for r = 0, 1, .. kRowsAtOnce - 1, for each of n columns
  void (*add_squares[kDTypes])(const void* const* rows, int64_t n, double scale, double* sums);

  // Both at once for scale 1: row_sums[r] = row_segment of rows[r], and sums as add_squares. What
  // lies ahead elements behind each row is fetched into the cache on the way (0: nothing). Empty in
  // the baseline, whose 16 small registers make it slower than both apart.
  void (*add_squared_norms[kDTypes])(
      const void* const* rows, int64_t n, int64_t ahead, double* row_sums, double* sums);
};

// Throws std::runtime_error when LAP_EXT_ISA names what this CPU lacks: ask level_is_usable first.
const Kernels& kernels();
bool level_is_usable();

}  // namespace lap::cpu
