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

// Thread: kPerThread elements of a tile. Bytes per element: sizeof(T) read (+ 1 eligible), 1 mask
// byte written, sizeof(rank) + 8 for a candidate.
template <typename T, typename Keys>
__global__ void __launch_bounds__(kThreads, Keys::kResident) scan_kernel(SelectArgs args) {
  using Rank = typename Keys::Rank;
  LAP_SHARED(WarpLists<Rank>, lists);
  Collector<Rank> candidates(args, &lists.of[threadIdx.x / kWarp]);
  const Keys keys(args.scaled, args.layout);
  const Rank first = static_cast<Rank>(args.state->first);
  const Rank middle = static_cast<Rank>(args.state->middle);
  const Rank length = static_cast<Rank>(args.state->last + 1) - first;  // last is not the worst
  Count above_count = 0;
  bool underflow = false;
  TileFinder tiles(args.sources, args.count);
  for (int64_t number = blockIdx.x; number < args.tiles; number += gridDim.x) {
    const Tile tile = tiles.find<T>(number);
    Rank rank[kPerThread];
    const uint32_t bad = load_ranks<T>(keys, tile, rank, &underflow);
    if (args.check && bad != 0) note_bad_in<T>(args, tile, bad);
    const ByteSet open =
        byte_set([&](int e) { return static_cast<Rank>(rank[e] - first) < length; });
    const ByteSet guess = byte_set([&](int e) { return rank[e] < middle; });
    ByteSet above;
    LAP_UNROLL
    for (int q = 0; q < ByteSet::kWords; ++q) above.words[q] = guess.words[q] & ~open.words[q];
    above_count += static_cast<Count>(__popc(above.folded()));
    if (tile.mask != nullptr) {
      store_bytes<Keys::kVectors, T>(tile.mask + tile.begin, tile.reach, guess);
    }
    candidates.template add<T>(tile, open, rank);
  }
  candidates.flush();
  Count total = 0;
  block_exclusive_sum(above_count, &total);
  if (threadIdx.x == 0 && total != 0) atomicAdd(&args.state->above, total);
  if (underflow) args.state->underflow = 1;
}

}  // namespace lap::cuda
