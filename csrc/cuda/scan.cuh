// SPDX-License-Identifier: MIT
// Step 3 of select.cuh: the one reading of all elements. See select_kernels.cuh for T and Keys.
#pragma once

#include "candidates.cuh"

namespace lap::cuda {

template <typename T>
__device__ void note_bad_in(const SelectArgs& args, const Tile& tile, uint32_t bad) {
  ListedSource& source = args.sources[tile.source];
  note_bad(&source.bad_count, &source.bad_first_inverted, __popc(bad),
           tile.begin + offset_of<T>(__ffs(static_cast<int>(bad)) - 1));
  atomicMax(&args.state->status.source_inverted, ~static_cast<uint32_t>(tile.source));
}

// Tiles on their way to shared memory while the one before is worked on. Each thread copies what it
// will itself read, so there is no barrier; it asks for a stage again only after it has used what
// it read there. Tiles that are not whole are read when it is their turn.
template <typename T>
struct TileBuffers {
  static constexpr bool kUsed = sizeof(T) < 8;  // double's would be larger than static memory
  static constexpr int kStages = 2;
  uint4 words[kUsed ? kStages : 1][kUsed ? kPerThread / kVector<T> : 1][kThreads];
};

template <typename T, bool kVectors>
class TileLoader {
 public:
  using Buffers = TileBuffers<T>;
  __device__ explicit TileLoader(Buffers* buffers) : buffers_(buffers) {}

  // Asks for a tile, or for none: each call is one stage.
  __device__ void ask(const Tile* tile) {
    if constexpr (Buffers::kUsed) {
      stage_ = (stage_ + 1) % Buffers::kStages;
      if (tile != nullptr && whole(*tile)) {
        const T* mine = static_cast<const T*>(tile->data) + tile->begin + threadIdx.x * V;
        LAP_UNROLL
        for (int v = 0; v < kPerThread / V; ++v) {
          copy_async(&buffers_->words[stage_][v][threadIdx.x], mine + v * kThreads * V);
        }
      }
      commit_async();
    }
  }
  // The values of the tile asked for before the last call of ask; the set of those that exist.
  __device__ uint32_t take(const Tile& tile, T (&x)[kPerThread]) {
    if (Buffers::kUsed && whole(tile)) {
      wait_async<Buffers::kStages - 1>();
      const int stage = (stage_ + 1) % Buffers::kStages;
      LAP_UNROLL
      for (int v = 0; v < kPerThread / V; ++v) {
        const Pack<T> pack = bit_cast<Pack<T>>(buffers_->words[stage][v][threadIdx.x]);
        LAP_UNROLL
        for (int j = 0; j < V; ++j) x[v * V + j] = pack.values[j];
      }
      return kAllPresent;
    }
    return load_values<kVectors>(static_cast<const T*>(tile.data) + tile.begin, tile.reach, x);
  }

 private:
  static constexpr int V = kVector<T>;
  __device__ static bool whole(const Tile& tile) {
    return tile.reach.count == kTile && (kVectors || tile.reach.vectors);
  }
  Buffers* buffers_;
  int stage_ = 0;
};

// Thread: kPerThread elements of a tile. Bytes per element: sizeof(T) read (+ 1 eligible), 1 mask
// byte written, sizeof(rank) + 8 for a candidate.
template <typename T, typename Keys>
__global__ void __launch_bounds__(kThreads, Keys::kResident) scan_kernel(SelectArgs args) {
  using Key = typename Keys::Key;
  using Rank = typename Keys::Rank;
  LAP_SHARED(WarpLists<Rank>, lists);
  LAP_SHARED(TileBuffers<T>, buffers);
  Collector<Key> candidates(args, &lists.of[threadIdx.x / kWarp]);
  TileLoader<T, Keys::kVectors> loader(&buffers);
  const Keys keys(args.scaled, args.layout);
  const Rank first = static_cast<Rank>(args.state->first);
  const Rank length = static_cast<Rank>(args.state->last + 1) - first;  // last is not the worst
  const Key first_key = key_of_rank<Key>(first);
  const Key middle = key_of_rank<Key>(static_cast<Rank>(args.state->middle));
  Count above_count = 0;
  bool underflow = false;
  TileFinder tiles(args.sources, args.count, args.sole);
  TileFinder ahead(args.sources, args.count, args.sole);
  int64_t number = blockIdx.x;
  if (number < args.tiles) {
    const Tile tile = ahead.find<T>(number);
    loader.ask(&tile);
  }
  for (; number < args.tiles; number += gridDim.x) {
    if (number + gridDim.x < args.tiles) {
      const Tile next = ahead.find<T>(number + gridDim.x);
      loader.ask(&next);
    } else {
      loader.ask(nullptr);
    }
    const Tile tile = tiles.find<T>(number);
    T x[kPerThread];
    Key key[kPerThread];
    const uint32_t present = loader.take(tile, x);
    const uint32_t bad = keys_of<T>(keys, tile, x, present, key, &underflow);
    if (args.check && bad != 0) note_bad_in<T>(args, tile, bad);
    // rank - first < length, and rank < middle, without ranks
    const ByteSet open = byte_set(
        [&](int e) { return static_cast<Rank>(first_key) - static_cast<Rank>(key[e]) < length; });
    const ByteSet guess = byte_set([&](int e) { return key[e] > middle; });
    ByteSet above;
    LAP_UNROLL
    for (int q = 0; q < ByteSet::kWords; ++q) above.words[q] = guess.words[q] & ~open.words[q];
    above_count += static_cast<Count>(__popc(above.folded()));
    if (tile.mask != nullptr) {
      store_bytes<Keys::kVectors, T>(tile.mask + tile.begin, tile.reach, guess);
    }
    candidates.template add<T>(tile, open, key);
  }
  candidates.flush();
  Count total = 0;
  block_exclusive_sum(above_count, &total);
  if (threadIdx.x == 0 && total != 0) atomicAdd(&args.state->above, total);
  if (underflow) args.state->underflow = 1;
}

}  // namespace lap::cuda
