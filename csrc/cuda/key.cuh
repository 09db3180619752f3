// SPDX-License-Identifier: MIT
// Turns the elements of a tile into keys (math/key.h), and keys into ranks. A rank is the key
// turned around, rank = 0x7f..f - key, so that the best element has the lowest rank and "better" is
// one unsigned comparison everywhere:
//
//   score   inf         1.0         +0.0        -1.0 (raw)   not eligible (kNever)
//   key     0x7f800000  0x3f800000  0x00000000  0xc07fffff   0x80000000
//   rank    0x007fffff  0x407fffff  0x7fffffff  0xbf800000   0xffffffff = kWorst
//
// Among equal ranks the lower position (source.cuh) is better, so (rank, position) is a strict
// order.
#pragma once

#include <type_traits>

#include "scale.cuh"
#include "source.cuh"

namespace lap::cuda {

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
  return static_cast<Rank>(KeyTraits<Key>::kMagnitude) - static_cast<Rank>(key);
}

template <typename Key>
__device__ Key key_of_rank(typename RankTraits<Key>::Rank rank) {
  return static_cast<Key>(rank_of(static_cast<Key>(rank)));  // its own inverse
}

// The keys of raw scores.
template <typename T>
struct ScoreKeys {
  using Key = typename std::conditional<sizeof(T) == 8, int64_t, int32_t>::type;
  using Rank = typename RankTraits<Key>::Rank;
  static constexpr bool kWeights = false;
  static constexpr bool kVectors = false;
  static constexpr int kResident = sizeof(T) == 8 ? 2 : 4;  // scan_kernel's blocks

  __device__ ScoreKeys(const ScaledNorms&, const LayoutDividers&) {}

  __device__ Key key_at(int64_t, T x) const { return ordered_key(widen(x)); }
  __device__ void key_tile(const Tile&,
                           const T (&x)[kPerThread],
                           uint32_t,
                           uint32_t,
                           Key (&key)[kPerThread],
                           bool*) const {
    LAP_UNROLL
    for (int e = 0; e < kPerThread; ++e) key[e] = ordered_key(widen(x[e]));
  }
  __device__ static bool bad(T x) { return widen(x) != widen(x); }
  static constexpr Key kLeastBad = KeyTraits<Key>::kMagnitude;  // NaN's key
};

// The keys of weights by their scores: in the weights' own precision (Key = int32, or int64 for
// double), or float scores with double's range (WIDE: float weights, Key = int64). kRows: vectors
// lie in rows and norms are read in vectors, too (ScaledNorms::along); else element by element.
template <typename T, typename KeyType, bool kRows>
struct WeightKeys {
  using Key = KeyType;
  using Rank = typename RankTraits<Key>::Rank;
  using Float = typename KeyTraits<Key>::Float;
  static constexpr bool kWeights = true;
  static constexpr bool kVectors = kRows;
  static constexpr int kResident = sizeof(T) == 8 ? 2 : 4;  // scan_kernel's blocks
  static constexpr bool kWide = sizeof(Float) == 8 && sizeof(T) < 8;

  __device__ WeightKeys(const ScaledNorms& norms, const LayoutDividers& dividers)
      : layout(dividers) {
    if constexpr (sizeof(Float) == 4) {
      row = norms.row_narrow;
      col = norms.col_narrow;
    } else {
      row = norms.row;
      col = norms.col;
    }
    if constexpr (kRows) along = static_cast<const Float*>(norms.along);
  }

  __device__ static Key key_of(T x, Float row_norm, Float col_norm) {
    const Float w = static_cast<Float>(widen(x));
    if constexpr (kWide) {
      return score_key(wide_score(w, row_norm, col_norm));
    } else {
      return score_key(score(w, row_norm, col_norm));
    }
  }
  __device__ Key key_at(int64_t index, T x) const {
    const Coordinates at(layout, index);
    return key_of(x, row[at.row], col[at.channel()]);
  }

  // Keys of x, the thread's elements of a tile; those that are not present may get any. *underflow
  // is set when nonzero factors of a live one gave a product that left the normal range.
  __device__ void key_tile(const Tile& tile,
                           const T (&x)[kPerThread],
                           uint32_t present,
                           uint32_t live,
                           Key (&key)[kPerThread],
                           bool* underflow) const {
    if constexpr (kRows) {
      key_rows(tile, x, live, key, underflow);
    } else {
      key_steps(tile, x, present, live, key, underflow);
    }
  }
  __device__ static bool bad(T x) { return !is_finite(widen(x)); }
  // A bad weight times any two norms that are finite: infinity, or NaN where one is zero.
  static constexpr Key kLeastBad = KeyTraits<Key>::kInfinity;

 private:
  static constexpr int V = kVector<T>;
  static constexpr int kVectorsPerThread = kPerThread / V;

  // Below the normal numbers, or the least of them, which a smaller product may have been rounded
  // to.
  __device__ static bool doubtful(Key key) { return key <= KeyTraits<Key>::kSmallestNormal; }
  __device__ static bool underflows(Key key, T x, Float row_norm, Float col_norm) {
    return doubtful(key) && widen(x) != 0 && row_norm != 0 && col_norm != 0;
  }

  __device__ void key_rows(const Tile& tile,
                           const T (&x)[kPerThread],
                           uint32_t live,
                           Key (&key)[kPerThread],
                           bool* underflow) const {
    const TileRows rows(layout, tile.begin);
    const uint32_t last = tile.reach.count - V;  // vectors beyond the last one read its norms
    Float row_norm[kVectorsPerThread];
    Float col_norm[kVectorsPerThread][V];
    LAP_UNROLL
    for (int v = 0; v < kVectorsPerThread; ++v) {
      const uint32_t offset = offset_of<T>(v * V);
      uint32_t in_row = 0;
      row_norm[v] = row[rows.row_at(offset < last ? offset : last, &in_row)];
      load_vector(along + in_row, col_norm[v]);
    }
    Key least = KeyTraits<Key>::kMagnitude;
    LAP_UNROLL
    for (int e = 0; e < kPerThread; ++e) {
      key[e] = key_of(x[e], row_norm[e / V], col_norm[e / V][e % V]);
      least = key[e] < least ? key[e] : least;
    }
    if (!doubtful(least) || *underflow) return;
    uint32_t doubts = 0;  // a weight or a row's norm that is zero is none
    LAP_UNROLL
    for (int e = 0; e < kPerThread; ++e) {
      const bool doubt = doubtful(key[e]) && widen(x[e]) != 0 && row_norm[e / V] != 0;
      doubts |= static_cast<uint32_t>(doubt) << e;
    }
    if ((doubts & live) != 0) *underflow = any_underflow(tile, doubts & live);
  }

  // Does one of the set underflow? Reads them and their norms again: the columns' norms need not
  // stay in registers for it.
  __device__ bool any_underflow(const Tile& tile, uint32_t set) const {
    const T* values = static_cast<const T*>(tile.data) + tile.begin;
    LAP_NO_UNROLL
    for (; set != 0; set &= set - 1) {
      const uint32_t offset = offset_of<T>(__ffs(static_cast<int>(set)) - 1);
      const Coordinates at(layout, tile.begin + offset);
      const Float row_norm = row[at.row];
      const Float col_norm = col[at.channel()];
      const T x = values[offset];
      if (underflows(key_of(x, row_norm, col_norm), x, row_norm, col_norm)) return true;
    }
    return false;
  }

  // Each vector's first coordinates by division, then steps.
  __device__ void key_steps(const Tile& tile,
                            const T (&x)[kPerThread],
                            uint32_t present,
                            uint32_t live,
                            Key (&key)[kPerThread],
                            bool* underflow) const {
    LAP_UNROLL
    for (int v = 0; v < kPerThread / V; ++v) {
      Coordinates at(layout, tile.begin + offset_of<T>(v * V));
      LAP_UNROLL
      for (int j = 0; j < V; ++j) {
        const int e = v * V + j;
        key[e] = 0;
        if ((present >> e) & 1) {
          const Float row_norm = row[at.row];
          const Float col_norm = col[at.channel()];
          key[e] = key_of(x[e], row_norm, col_norm);
          const bool doubt = underflows(key[e], x[e], row_norm, col_norm);
          if (doubt && ((live >> e) & 1)) *underflow = true;
        }
        at.step();
      }
    }
  }

  const Float* row = nullptr;
  const Float* col = nullptr;
  const Float* along = nullptr;
  const LayoutDividers& layout;
};

// Bit j: element j of the thread's is bad. Reads the tile again: rare.
template <typename T, typename Keys>
__device__ uint32_t bad_set(const Tile& tile) {
  const T* values = static_cast<const T*>(tile.data) + tile.begin;
  uint32_t bad = 0;
  LAP_NO_UNROLL
  for (int e = 0; e < kPerThread; ++e) {
    const uint32_t offset = offset_of<T>(e);
    if (offset < tile.reach.count && Keys::bad(values[offset])) bad |= 1u << e;
  }
  return bad;
}

// key[j] of x, the thread's elements of a tile, of which `present` exist; kNever for those that do
// not exist or are not eligible. Returns the set of bad values among all that exist.
template <typename T, typename Keys>
__device__ uint32_t keys_of(const Keys& keys,
                            const Tile& tile,
                            const T (&x)[kPerThread],
                            uint32_t present,
                            typename Keys::Key (&key)[kPerThread],
                            bool* underflow) {
  uint32_t live = present;
  if (tile.eligible != nullptr) {
    live &= load_bytes<Keys::kVectors, T>(tile.eligible + tile.begin, tile.reach);
  }
  keys.key_tile(tile, x, present, live, key, underflow);
  typename Keys::Key most = 0;
  LAP_UNROLL
  for (int e = 0; e < kPerThread; ++e) most = key[e] > most ? key[e] : most;
  const uint32_t bad = most < Keys::kLeastBad ? 0 : bad_set<T, Keys>(tile);
  if (live != kAllPresent) {
    LAP_UNROLL
    for (int e = 0; e < kPerThread; ++e) {
      if (!((live >> e) & 1)) key[e] = KeyTraits<typename Keys::Key>::kNever;
    }
  }
  return bad;
}

}  // namespace lap::cuda
