// SPDX-License-Identifier: MIT
// Elements to be ranked, and their ranks.
//
// A rank is math/key.h's ordered key turned around, rank = unsigned(key) ^ 0x7f..f, so that the
// best element has the lowest rank and "better" is one unsigned comparison everywhere:
//
//   score   inf         1.0         +0.0        -1.0 (raw)   not eligible (kNever)
//   key     0x7f800000  0x3f800000  0x00000000  0xc07fffff   0x80000000
//   rank    0x007fffff  0x407fffff  0x7fffffff  0xbf800000   0xffffffff = kWorst
//
// A position counts through all tensors of a list: position = source.first + flat index. Among
// equal ranks the lower position is better, so (rank, position) is a strict order.
#pragma once

#include <type_traits>

#include "scale.cuh"
#include "tile.cuh"

namespace lap::cuda {

// One tensor of the ranking, in the workspace.
struct Source {
  const void* data;
  const uint8_t* eligible;
  uint8_t* mask;
  int64_t size;
  int64_t first;       // position of element 0
  int64_t first_tile;  // number of its first tile among all
  Count bad_count;
  Count bad_first_inverted;
  int aligned;
};

template <typename Key>
struct RankTraits {
  using Rank = typename std::make_unsigned<Key>::type;
  static constexpr Rank kWorst = ~Rank{0};
  // A weight's rank from here on may be decided by underflow.
  static constexpr Rank kDoubtful = static_cast<Rank>(KeyTraits<Key>::kSmallestNormal) ^
                                    static_cast<Rank>(KeyTraits<Key>::kMagnitude);
};

template <typename Key>
__device__ typename RankTraits<Key>::Rank rank_of(Key key) {
  using Rank = typename RankTraits<Key>::Rank;
  return static_cast<Rank>(key) ^ static_cast<Rank>(KeyTraits<Key>::kMagnitude);
}

// Ranks of raw scores.
template <typename T>
struct ScoreRanks {
  using Key = typename std::conditional<sizeof(T) == 8, int64_t, int32_t>::type;
  using Rank = typename RankTraits<Key>::Rank;
  static constexpr bool kWeights = false;

  __device__ ScoreRanks(const ScaledNorms&, const Places&) {}

  class Cursor {
   public:
    __device__ Cursor(const ScoreRanks&, int64_t) {}
    __device__ void step() {}
    __device__ Rank rank(T x, bool*) const { return rank_of(ordered_key(widen(x))); }
  };
  __device__ static bool bad(T x) { return widen(x) != widen(x); }
};

// Ranks of weights by their scores: in the weights' own precision (Key = int32, or int64 for
// double), or float scores with double's range (WIDE: float weights, Key = int64).
template <typename T, typename KeyType>
struct WeightRanks {
  using Key = KeyType;
  using Rank = typename RankTraits<Key>::Rank;
  using Float = typename KeyTraits<Key>::Float;
  static constexpr bool kWeights = true;
  static constexpr bool kWide = sizeof(Float) == 8 && sizeof(T) < 8;

  __device__ WeightRanks(const ScaledNorms& norms, const Places& where) : places(where) {
    if constexpr (sizeof(Float) == 4) {
      row = norms.row_narrow;
      col = norms.col_narrow;
    } else {
      row = norms.row;
      col = norms.col;
    }
  }

  // Walks along neighbors.
  class Cursor {
   public:
    __device__ Cursor(const WeightRanks& ranks, int64_t index)
        : ranks_(ranks), place_(ranks.places, index) {}
    __device__ void step() { place_.step(); }
    // *underflow is set when nonzero factors gave a product that left the normal range.
    __device__ Rank rank(T x, bool* underflow) const {
      const Float w = static_cast<Float>(widen(x));
      const Float row_norm = ranks_.row[place_.row];
      const Float col_norm = ranks_.col[place_.channel()];
      Key key = 0;
      if constexpr (kWide) {
        key = score_key(wide_score(w, row_norm, col_norm));
      } else {
        key = score_key(score(w, row_norm, col_norm));
      }
      if (key <= KeyTraits<Key>::kSmallestNormal && w != 0 && row_norm != 0 && col_norm != 0) {
        *underflow = true;
      }
      return rank_of(key);
    }

   private:
    const WeightRanks& ranks_;
    Place place_;
  };
  __device__ static bool bad(T x) { return !is_finite(widen(x)); }

  const Float* row = nullptr;
  const Float* col = nullptr;
  const Places& places;
};

// A source's tile in a thread's hands.
struct Tile {
  const Source* source;
  int64_t begin;  // of the tile, in the source
  bool whole;
};

// The last i with start(i) <= x; start rises and start(0) = 0. Skips empty sources.
template <typename Start>
__device__ int last_starting(int count, int64_t x, const Start& start) {
  int low = 0;
  int high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (start(middle) <= x) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

__device__ inline const Source& source_at(const Source* sources, int count, int64_t position) {
  return sources[last_starting(count, position, [&](int i) { return sources[i].first; })];
}

__device__ inline Tile tile_at(const Source* sources, int count, int64_t number) {
  const int i = last_starting(count, number, [&](int s) { return sources[s].first_tile; });
  const int64_t begin = (number - sources[i].first_tile) * kTile;
  return {sources + i, begin, sources[i].aligned && begin + kTile <= sources[i].size};
}

// rank[j] of the thread's elements, kWorst for those that do not exist or are not eligible.
// Returns the set of bad values among all that exist.
template <typename T, typename Ranks>
__device__ uint32_t load_ranks(const Ranks& ranks,
                               const Tile& tile,
                               typename Ranks::Rank (&rank)[kPerThread],
                               bool* underflow) {
  constexpr int V = kVector<T>;
  const Source& source = *tile.source;
  T x[kPerThread];
  const uint32_t present =
      load_values(static_cast<const T*>(source.data), tile.begin, source.size, tile.whole, x);
  uint32_t live = present;
  if (source.eligible != nullptr) {
    live &= load_bytes<T>(source.eligible, tile.begin, source.size, tile.whole);
  }
  uint32_t bad = 0;
  LAP_UNROLL
  for (int v = 0; v < kPerThread / V; ++v) {
    typename Ranks::Cursor cursor(ranks, tile.begin + offset_of<T>(v * V));
    LAP_UNROLL
    for (int j = 0; j < V; ++j) {
      const int e = v * V + j;
      rank[e] = RankTraits<typename Ranks::Key>::kWorst;
      if ((live >> e) & 1) rank[e] = cursor.rank(x[e], underflow);
      bad |= static_cast<uint32_t>(Ranks::bad(x[e])) << e;  // elements that don't exist are zeros
      cursor.step();
    }
  }
  return bad;
}

}  // namespace lap::cuda
