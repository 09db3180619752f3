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

// A tile in a thread's hands.
struct Tile {
  const void* data;         // of the source, as the next two
  const uint8_t* eligible;  //
  uint8_t* mask;            //
  int source;               // its number in the list
  int64_t begin;            // of the tile, in the source
  int64_t position;         // ... and among all
  Reach reach;
};

// Ranks of raw scores.
template <typename T>
struct ScoreRanks {
  using Key = typename std::conditional<sizeof(T) == 8, int64_t, int32_t>::type;
  using Rank = typename RankTraits<Key>::Rank;
  static constexpr bool kWeights = false;
  static constexpr bool kVectors = false;
  static constexpr int kResident = sizeof(T) == 8 ? 1 : 3;  // scan_kernel's blocks

  __device__ ScoreRanks(const ScaledNorms&, const Places&) {}

  __device__ Rank rank_at(int64_t, T x) const { return rank_of(ordered_key(widen(x))); }
  __device__ void rank_tile(
      const Tile&, const T (&x)[kPerThread], uint32_t, Rank (&rank)[kPerThread], bool*) const {
    LAP_UNROLL
    for (int e = 0; e < kPerThread; ++e) rank[e] = rank_of(ordered_key(widen(x[e])));
  }
  __device__ static bool bad(T x) { return widen(x) != widen(x); }
};

// Ranks of weights by their scores: in the weights' own precision (Key = int32, or int64 for
// double), or float scores with double's range (WIDE: float weights, Key = int64). kRows: vectors
// lie in rows and norms are read in vectors, too (ScaledNorms::along); else element by element.
template <typename T, typename KeyType, bool kRows>
struct WeightRanks {
  using Key = KeyType;
  using Rank = typename RankTraits<Key>::Rank;
  using Float = typename KeyTraits<Key>::Float;
  static constexpr bool kWeights = true;
  static constexpr bool kVectors = kRows;
  static constexpr int kResident = sizeof(T) == 8                           ? 1
                                   : kRows && !std::is_same<T, Half>::value ? 3
                                                                            : 2;
  static constexpr bool kWide = sizeof(Float) == 8 && sizeof(T) < 8;

  __device__ WeightRanks(const ScaledNorms& norms, const Places& where) : places(where) {
    if constexpr (sizeof(Float) == 4) {
      row = norms.row_narrow;
      col = norms.col_narrow;
    } else {
      row = norms.row;
      col = norms.col;
    }
    if constexpr (kRows) along = static_cast<const Float*>(norms.along);
  }

  __device__ static Rank rank(T x, Float row_norm, Float col_norm) {
    const Float w = static_cast<Float>(widen(x));
    if constexpr (kWide) {
      return rank_of(score_key(wide_score(w, row_norm, col_norm)));
    } else {
      return rank_of(score_key(score(w, row_norm, col_norm)));
    }
  }
  __device__ Rank rank_at(int64_t index, T x) const {
    const Place place(places, index);
    return rank(x, row[place.row], col[place.channel()]);
  }

  // Ranks of x, the thread's elements of a tile; what does not live may get any. *underflow is set
  // when nonzero factors of a live one gave a product that left the normal range.
  __device__ void rank_tile(const Tile& tile,
                            const T (&x)[kPerThread],
                            uint32_t live,
                            Rank (&rank)[kPerThread],
                            bool* underflow) const {
    if constexpr (kRows) {
      rank_rows(tile, x, live, rank, underflow);
    } else {
      rank_steps(tile, x, live, rank, underflow);
    }
  }
  __device__ static bool bad(T x) { return !is_finite(widen(x)); }

 private:
  static constexpr int V = kVector<T>;

  __device__ static bool underflows(Rank rank, T x, Float row_norm, Float col_norm) {
    return rank >= RankTraits<Key>::kDoubtful && widen(x) != 0 && row_norm != 0 && col_norm != 0;
  }

  __device__ void rank_rows(const Tile& tile,
                            const T (&x)[kPerThread],
                            uint32_t live,
                            Rank (&rank)[kPerThread],
                            bool* underflow) const {
    constexpr int kAtOnce = sizeof(T) == 8 ? 4 : 8;  // what the registers hold
    const TileRows rows(places, tile.begin);
    const uint32_t last = tile.reach.count - V;  // vectors beyond the last one read its norms
    LAP_UNROLL
    for (int first = 0; first < kPerThread; first += kAtOnce) {
      Float row_norm[kAtOnce / V];
      Float col_norm[kAtOnce / V][V];
      LAP_UNROLL
      for (int v = 0; v < kAtOnce / V; ++v) {
        const uint32_t offset = offset_of<T>(first + v * V);
        uint32_t place = 0;
        row_norm[v] = row[rows.row_at(offset < last ? offset : last, &place)];
        load_vector(along + place, col_norm[v]);
      }
      Rank worst = 0;
      LAP_UNROLL
      for (int j = 0; j < kAtOnce; ++j) {
        const Rank found = WeightRanks::rank(x[first + j], row_norm[j / V], col_norm[j / V][j % V]);
        worst = found > worst ? found : worst;
        rank[first + j] = found;
      }
      if (worst < RankTraits<Key>::kDoubtful) continue;
      LAP_UNROLL
      for (int j = 0; j < kAtOnce; ++j) {
        const int e = first + j;
        const bool doubt = underflows(rank[e], x[e], row_norm[j / V], col_norm[j / V][j % V]);
        if (doubt && ((live >> e) & 1)) *underflow = true;
      }
    }
  }

  // Each vector's first place by division, then steps.
  __device__ void rank_steps(const Tile& tile,
                             const T (&x)[kPerThread],
                             uint32_t live,
                             Rank (&rank)[kPerThread],
                             bool* underflow) const {
    LAP_UNROLL
    for (int v = 0; v < kPerThread / V; ++v) {
      Place place(places, tile.begin + offset_of<T>(v * V));
      LAP_UNROLL
      for (int j = 0; j < V; ++j) {
        const int e = v * V + j;
        rank[e] = 0;
        if ((live >> e) & 1) {
          const Float row_norm = row[place.row];
          const Float col_norm = col[place.channel()];
          rank[e] = WeightRanks::rank(x[e], row_norm, col_norm);
          if (underflows(rank[e], x[e], row_norm, col_norm)) *underflow = true;
        }
        place.step();
      }
    }
  }

  const Float* row = nullptr;
  const Float* col = nullptr;
  const Float* along = nullptr;
  const Places& places;
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

// The tiles of a list, one after the other by rising numbers: the search for a tile's source starts
// at the last one's, which most often is it.
class TileFinder {
 public:
  __device__ TileFinder(const Source* sources, int count)
      : sources_(sources), count_(count), at_(0) {
    if (count > 1) {
      at_ = last_starting(count, blockIdx.x, [&](int i) { return sources[i].first_tile; });
    }
  }
  template <typename T>
  __device__ Tile find(int64_t number) {
    while (at_ + 1 < count_ && sources_[at_ + 1].first_tile <= number) ++at_;
    const Source& source = sources_[at_];
    const int64_t begin = (number - source.first_tile) * kTile;
    const Reach reach = reach_of<T>(begin, source.size, source.aligned != 0);
    return {source.data, source.eligible, source.mask, at_, begin, source.first + begin, reach};
  }

 private:
  const Source* sources_;
  int count_;
  int at_;
};

// Bit j: bad(x[j]). Elements that do not exist are zeros.
template <typename T, typename Ranks>
__device__ uint32_t bad_set(const T (&x)[kPerThread]) {
  decltype(widen(T{})) trapped = 0;
  LAP_UNROLL
  for (int e = 0; e < kPerThread; ++e) trapped = trap(widen(x[e]), trapped);
  if (trapped == 0) return 0;
  uint32_t bad = 0;
  LAP_UNROLL
  for (int e = 0; e < kPerThread; ++e) bad |= static_cast<uint32_t>(Ranks::bad(x[e])) << e;
  return bad;
}

// rank[j] of the thread's elements, kWorst for those that do not exist or are not eligible.
// Returns the set of bad values among all that exist.
template <typename T, typename Ranks>
__device__ uint32_t load_ranks(const Ranks& ranks,
                               const Tile& tile,
                               typename Ranks::Rank (&rank)[kPerThread],
                               bool* underflow) {
  T x[kPerThread];
  uint32_t live =
      load_values<Ranks::kVectors>(static_cast<const T*>(tile.data) + tile.begin, tile.reach, x);
  if (tile.eligible != nullptr) {
    live &= load_bytes<Ranks::kVectors, T>(tile.eligible + tile.begin, tile.reach);
  }
  const uint32_t bad = bad_set<T, Ranks>(x);
  ranks.rank_tile(tile, x, live, rank, underflow);
  if (live != kAllPresent) {
    LAP_UNROLL
    for (int e = 0; e < kPerThread; ++e) {
      if (!((live >> e) & 1)) rank[e] = RankTraits<typename Ranks::Key>::kWorst;
    }
  }
  return bad;
}

}  // namespace lap::cuda
