// SPDX-License-Identifier: MIT
#include "chunks.h"

#include <cmath>
#include <limits>

#include "../math/host_device.h"
#include "../math/random.h"

namespace lap::cpu {
namespace {

// Elements that are worth a thread: waking one takes as long as so many take.
constexpr int64_t kCounted = int64_t{1} << 19;
constexpr int64_t kComputed = int64_t{1} << 15;

template <typename Key>
const ChunkKernels<Key>& chunk_kernels() {
  if constexpr (sizeof(Key) == 4) {
    return kernels().chunk32;
  } else {
    return kernels().chunk64;
  }
}

// Calls body(worker, piece, first) for each kPiece elements.
template <typename Body>
void for_each_piece(int64_t size, int64_t grain, const Pool& pool, const Body& body) {
  for_each_chunk(pool_for(size, pool, grain), ceil_div(size, kPiece),
                 [&](int worker, int64_t piece) { body(worker, piece, piece * kPiece); });
}

template <typename Key>
ScoreChunk<Key> piece_at(const ScoreChunk<Key>& chunk, int64_t first) {
  const uint8_t* live = chunk.live == nullptr ? nullptr : chunk.live + first;
  return {chunk.scores + first, live, std::min(kPiece, chunk.size - first)};
}

// Keeps only the first `ties` of the scores at key.
template <typename Key>
void drop_ties(const ScoreChunk<Key>& piece, Key key, int64_t ties, uint8_t* kept) {
  for (int64_t j = 0; j < piece.size; ++j) {
    if (kept[j] && bit_cast<Key>(piece.scores[j]) == key) kept[j] = ties-- > 0;
  }
}

}  // namespace

template <typename Key>
Counted count_keys(const ScoreChunk<Key>& chunk, const Interval<Key>& interval, const Pool& pool) {
  Counted out;
  out.pieces.resize(ceil_div(chunk.size, kPiece));
  out.inside.resize(ceil_div(chunk.size, 64));
  std::atomic<int64_t> above{0};
  for_each_piece(chunk.size, kCounted, pool, [&](int, int64_t p, int64_t first) {
    const KeyCount count = chunk_kernels<Key>().count(piece_at(chunk, first), interval,
                                                      out.inside.data() + first / 64);
    above += count.above;
    out.pieces[p] = count.inside;
  });
  out.total.above = above;
  for (const int64_t inside : out.pieces) out.total.inside += inside;
  return out;
}

template <typename Key>
void take_keys(const ScoreChunk<Key>& chunk, const Counted& counted, const Pool& pool, Key* out) {
  std::vector<int64_t> begins(counted.pieces.size() + 1);
  for (size_t p = 0; p < counted.pieces.size(); ++p) begins[p + 1] = begins[p] + counted.pieces[p];
  const Pool few = pool_for(counted.total.inside, pool, kComputed);
  for_each_piece(chunk.size, kComputed, few, [&](int, int64_t p, int64_t first) {
    if (counted.pieces[p] == 0) return;
    chunk_kernels<Key>().take(piece_at(chunk, first), counted.inside.data() + first / 64,
                              out + begins[p]);
  });
}

template <typename Key>
void key_histogram(const ScoreChunk<Key>& chunk,
                   const Interval<Key>& interval,
                   int shift,
                   int64_t bins,
                   const Pool& pool,
                   int64_t* counts) {
  std::fill(counts, counts + bins, 0);
  std::vector<std::vector<int64_t>> others(pool.threads);
  for_each_piece(chunk.size, kCounted, pool, [&](int worker, int64_t, int64_t first) {
    std::vector<int64_t>& other = others[worker];
    if (worker > 0 && other.empty()) other.resize(bins);
    chunk_kernels<Key>().histogram(piece_at(chunk, first), interval, shift,
                                   worker > 0 ? other.data() : counts);
  });
  for (const std::vector<int64_t>& other : others) {
    for (size_t b = 0; b < other.size(); ++b) counts[b] += other[b];
  }
}

template <typename Key>
bool squares_above(
    const ScoreChunk<Key>& chunk, Key key, int exponent, const Pool& pool, int64_t* sums) {
  using Float = typename KeyTraits<Key>::Float;
  const SquareScale scale(exponent);
  const Key end = bit_cast<Key>(std::ldexp(Float{1}, exponent));
  const Key most = std::numeric_limits<Key>::max();  // of no number
  const Interval<Key> inside = {std::min<Key>(key, most - 1) + 1, std::max<Key>(end, 1) - 1};
  std::atomic<int64_t> upper{0};
  std::atomic<int64_t> lower{0};
  std::atomic<bool> below{true};
  for_each_piece(chunk.size, kComputed, pool, [&](int, int64_t, int64_t first) {
    int64_t own[2] = {};
    if (!chunk_kernels<Key>().squares(piece_at(chunk, first), inside, scale, own)) below = false;
    upper += own[0];
    lower += own[1];
  });
  sums[0] = upper;
  sums[1] = lower;
  return below;
}

template <typename Key>
int64_t threshold_mask(
    const ScoreChunk<Key>& chunk, Key key, int64_t ties, const Pool& pool, uint8_t* kept) {
  const auto mark = chunk_kernels<Key>().mark;
  const bool some = ties > 0 && key >= 0;  // -1 is the key of what does not count
  std::vector<int64_t> equal(ceil_div(chunk.size, kPiece));
  for_each_piece(chunk.size, kCounted, pool, [&](int, int64_t p, int64_t first) {
    equal[p] = mark(piece_at(chunk, first), key, some, kept + first);
  });
  if (!some) return 0;
  std::vector<int64_t> left(equal.size() + 1, ties);  // before each piece
  for (size_t p = 0; p < equal.size(); ++p) left[p + 1] = left[p] - std::min(left[p], equal[p]);
  const int64_t taken = ties - left.back();
  if (left.back() > 0) return taken;
  for_each_piece(chunk.size, kCounted, pool, [&](int, int64_t p, int64_t first) {
    if (equal[p] <= left[p]) return;
    if (left[p] == 0) {
      mark(piece_at(chunk, first), key, false, kept + first);
    } else {
      drop_ties(piece_at(chunk, first), key, left[p], kept + first);
    }
  });
  return taken;
}

template <typename Float>
void random_scores(
    uint64_t start, uint64_t first, uint64_t step, int64_t n, const Pool& pool, Float* out) {
  using Key = std::conditional_t<sizeof(Float) == 4, int32_t, int64_t>;
  for_each_piece(n, kComputed, pool, [&](int, int64_t, int64_t begin) {
    const uint64_t index = first + static_cast<uint64_t>(begin) * step;
    chunk_kernels<Key>().random(start + index * kGolden, step * kGolden,
                                std::min(kPiece, n - begin), out + begin);
  });
}

int64_t nonzero_mask(
    const void* w, DType dtype, int64_t n, const uint8_t* mask, const Pool& pool, uint8_t* live) {
  const auto nonzero = kernels().nonzero[static_cast<int>(dtype)];
  const char* bytes = static_cast<const char*>(w);
  std::atomic<int64_t> count{0};
  for_each_piece(n, kCounted, pool, [&](int, int64_t, int64_t first) {
    count += nonzero(bytes + first * item_size(dtype), mask == nullptr ? nullptr : mask + first,
                     std::min(kPiece, n - first), live + first);
  });
  return count;
}

#define LAP_CHUNKS(Key)                                                                         \
  template Counted count_keys(const ScoreChunk<Key>&, const Interval<Key>&, const Pool&);       \
  template void take_keys(const ScoreChunk<Key>&, const Counted&, const Pool&, Key*);           \
  template void key_histogram(const ScoreChunk<Key>&, const Interval<Key>&, int, int64_t,       \
                              const Pool&, int64_t*);                                           \
  template bool squares_above(const ScoreChunk<Key>&, Key, int, const Pool&, int64_t*);         \
  template int64_t threshold_mask(const ScoreChunk<Key>&, Key, int64_t, const Pool&, uint8_t*); \
  template void random_scores(uint64_t, uint64_t, uint64_t, int64_t, const Pool&,               \
                              KeyTraits<Key>::Float*);
LAP_CHUNKS(int32_t)
LAP_CHUNKS(int64_t)
#undef LAP_CHUNKS

}  // namespace lap::cpu
