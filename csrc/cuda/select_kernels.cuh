// SPDX-License-Identifier: MIT
// Step 4 of select.cuh, and the launches of steps 2 to 4 for one element type T. Keys is
// ScoreKeys<T> or WeightKeys<T, Key, kRows> (key.cuh).
#pragma once

#include "sample.cuh"
#include "scan.cuh"

namespace lap::cuda {

template <typename T, typename Keys>
struct Everything {
  using Rank = typename Keys::Rank;
  static constexpr bool kVectors = Keys::kVectors;
  const SelectArgs& args;
  const Keys& keys;
  uint32_t* underflow;

  // visit_tile(tile, rank): once per tile that may hold elements of the prefix
  template <typename VisitTile>
  __device__ void for_each_tile(const Prefix<Rank>& prefix, const VisitTile& visit_tile) const {
    bool underflows = false;
    TileFinder tiles(args.sources, args.count, args.sole);
    for (int64_t number = blockIdx.x; number < args.tiles; number += gridDim.x) {
      const Tile tile = tiles.find<T>(number);
      const uint64_t first = static_cast<uint64_t>(tile.position);
      if (!prefix.may_lie_in(first, first + kTile - 1)) continue;
      T x[kPerThread];
      typename Keys::Key key[kPerThread];
      Rank rank[kPerThread];
      const T* values = static_cast<const T*>(tile.data) + tile.begin;
      const uint32_t present = load_values<kVectors>(values, tile.reach, x);
      keys_of<T>(keys, tile, x, present, key, &underflows);
      LAP_UNROLL
      for (int e = 0; e < kPerThread; ++e) rank[e] = rank_of(key[e]);
      visit_tile(tile, rank);
    }
    if (underflows) *underflow = 1;
  }

  template <typename Visit>
  __device__ void for_each(const Prefix<Rank>& prefix, const Visit& visit) const {
    for_each_tile(prefix, [&](const Tile& tile, const Rank(&rank)[kPerThread]) {
      LAP_UNROLL
      for (int j = 0; j < kPerThread; ++j) {
        if (rank[j] == RankTraits<typename Keys::Key>::kWorst) continue;
        visit(rank[j], static_cast<uint64_t>(tile.position + offset_of<T>(j)));
      }
    });
  }
  template <typename Visit>
  __device__ void for_each_rank(const Prefix<Rank>& prefix, const Visit& visit) const {
    for_each(prefix, visit);
  }
};

// All masks anew: 1 for what the bound keeps.
template <typename T, typename Elements, typename Rank>
__device__ void write_masks(const Elements& everything, const Bound<Rank>& bound) {
  everything.for_each_tile(Prefix<Rank>{}, [&](const Tile& tile, const Rank(&rank)[kPerThread]) {
    if (tile.mask == nullptr) return;
    const ByteSet kept = byte_set([&](int e) {
      const uint64_t position = static_cast<uint64_t>(tile.position + offset_of<T>(e));
      return rank[e] != static_cast<Rank>(~Rank{0}) && bound.keeps(rank[e], position);
    });
    store_bytes<Elements::kVectors, T>(tile.mask + tile.begin, tile.reach, kept);
  });
}

// Writes the mask byte of a candidate if scan_kernel has guessed it wrong.
template <typename Rank>
__device__ void mark(const SelectArgs& args, Rank rank, uint64_t position, bool kept) {
  if (kept == (rank < static_cast<Rank>(args.state->middle))) return;
  const int64_t at = static_cast<int64_t>(position);
  const ListedSource& source = source_at(args.sources, args.count, at);
  if (source.mask != nullptr) source.mask[at - source.first] = kept ? 1 : 0;
}

template <typename Rank, typename Elements>
__device__ void mark_all(const SelectArgs& args,
                         const Elements& candidates,
                         const Bound<Rank>& bound) {
  candidates.for_each(Prefix<Rank>{}, [&](Rank rank, uint64_t position) {
    mark(args, rank, position, bound.keeps(rank, position));
  });
}

// Marks the candidates whose ranks are decided and puts the others, those that match the prefix, on
// the list of few.
template <typename Rank>
__device__ void sort_out(const SelectArgs& args,
                         const Candidates<Rank>& candidates,
                         const Prefix<Rank>& prefix) {
  candidates.for_each(prefix, [&](Rank rank, uint64_t position) {
    if (!prefix.matches(rank)) return mark(args, rank, position, rank < prefix.rank);
    const uint32_t to = atomicAdd(&args.state->few, 1u);
    static_cast<Rank*>(args.few_ranks)[to] = rank;
    args.few_positions[to] = static_cast<int64_t>(position);
  });
}

// Could products that left the normal range have decided? (The bound's rank is that of the last
// element kept wherever that is doubtful.)
template <typename Key>
__device__ bool doubtful(const Selected<typename RankTraits<Key>::Rank>& selected,
                         uint32_t underflow) {
  return selected.ranked && underflow != 0 && selected.bound.rank >= RankTraits<Key>::kDoubtful;
}

// Is the bound among the candidates? Strictly inside, so that its rank is known.
template <typename Rank>
__device__ bool sampled_well(const SelectArgs& args) {
  const State& state = *args.state;
  if (args.plan == Plan::none || args.plan == Plan::all) return true;
  if (state.candidates > static_cast<Count>(args.capacity) || state.above >= args.keep)
    return false;
  const bool open = static_cast<Rank>(state.last) == static_cast<Rank>(~Rank{0}) - 1;
  return open || args.keep < state.above + state.candidates;
}

// By one thread.
template <typename Key>
__device__ void write_value(const SelectArgs& args, typename RankTraits<Key>::Rank rank) {
  using Float = typename KeyTraits<Key>::Float;
  if (args.value == nullptr) return;
  *static_cast<Float*>(args.value) = bit_cast<Float>(flip_negative(key_of_rank<Key>(rank)));
}

// Notes scores that leave double's range although they are ranked (float has wide ranks for them),
// and writes the value that kth_largest wants. By one thread.
template <typename Keys>
__device__ void conclude(const SelectArgs& args,
                         const Selected<typename Keys::Rank>& selected,
                         bool doubt) {
  using Float = typename KeyTraits<typename Keys::Key>::Float;
  const bool lost =
      Keys::kWeights && selected.ranked && !args.state->scale.template normal<Float>();
  if (doubt || lost) args.state->status.out_of_range = 1;
  write_value<typename Keys::Key>(args, selected.bound.rank);
}

// The narrow half of step 4 where the interval holds the bound: among the candidates. False: wide
// ranks must decide (nothing final is written then).
template <typename Keys, bool kHasWide>
__device__ bool finish_candidates(const SelectArgs& args,
                                  const Request& request,
                                  LocalHistogram* local,
                                  int* turn) {
  using Key = typename Keys::Key;
  using Rank = typename Keys::Rank;
  State& state = *args.state;
  const int64_t count = static_cast<int64_t>(
      state.candidates < static_cast<Count>(args.capacity) ? state.candidates : args.capacity);
  const Candidates<Rank> candidates = {static_cast<const Rank*>(args.ranks), args.positions, count};
  Request among = request;
  among.keep -= state.above;
  int bits = 0;
  const Prefix<Rank> shared =
      common_prefix(static_cast<Rank>(state.first), static_cast<Rank>(state.last), &bits);
  // What underflow may have decided is not left to the last block: the others would have gone.
  const bool doubts = Keys::kWeights && state.underflow != 0;
  const Rank limit = doubts ? RankTraits<Key>::kDoubtful - 1 : RankTraits<Key>::kWorst;
  Selected<Rank> selected = {{}, true, true, shared, among.keep};
  if (count > kFew || among.keep == 0 || (shared.rank | shared.rank_rest) > limit) {
    Selector<Key, GridTally> together(GridTally(&state.histograms, local, turn));
    selected = together.select(candidates, among, shared, bits, kFew, limit);
  }
  const bool doubt =
      !selected.pending && Keys::kWeights && doubtful<Key>(selected, state.underflow);
  if (doubt && kHasWide) return false;
  bool concludes = blockIdx.x == 0;
  if (selected.pending) {
    sort_out(args, candidates, selected.prefix);
    if (!last_block(&state.arrived)) return true;
    concludes = true;
    const Few<Rank> few = {static_cast<const Rank*>(args.few_ranks), args.few_positions,
                           static_cast<int>(state.few)};
    const Prefix<Rank> prefix = selected.prefix;
    int left = 0;
    while (left < KeyTraits<Key>::kBits && (prefix.rank_rest >> left) != 0) ++left;
    among.keep = selected.keep;
    Selector<Key, BlockTally> alone{BlockTally(local)};
    selected = alone.select(few, among, prefix, left);
    // if there are others than the few, those were ranked
    selected.ranked = selected.ranked || count > static_cast<int64_t>(state.few);
    mark_all(args, few, selected.bound);
  } else {
    mark_all(args, candidates, selected.bound);
  }
  if (concludes && threadIdx.x == 0) conclude<Keys>(args, selected, doubt);
  return true;
}

// ... and where it does not: among all elements.
template <typename T, typename Keys, bool kHasWide>
__device__ bool finish_all(const SelectArgs& args,
                           const Request& request,
                           LocalHistogram* local,
                           int* turn) {
  using Key = typename Keys::Key;
  State& state = *args.state;
  const Keys keys(args.scaled, args.layout);
  const Everything<T, Keys> everything = {args, keys, &state.underflow};
  Selector<Key, GridTally> together(GridTally(&state.histograms, local, turn));
  const auto selected = together.select(everything, request);
  const bool doubt = Keys::kWeights && doubtful<Key>(selected, state.underflow);
  if (doubt && kHasWide) return false;
  if (blockIdx.x == 0 && threadIdx.x == 0) conclude<Keys>(args, selected, doubt);
  write_masks<T>(everything, selected.bound);
  return true;
}

template <typename T>
__device__ void finish_wide(const SelectArgs& args,
                            const Request& request,
                            LocalHistogram* local,
                            int* turn) {
  using Keys = WeightKeys<T, int64_t, false>;
  State& state = *args.state;
  const Keys keys(args.scaled, args.layout);
  const Everything<T, Keys> everything = {args, keys, &state.wide_underflow};
  Selector<int64_t, GridTally> together(GridTally(&state.histograms, local, turn));
  const auto selected = together.select(everything, request);
  const bool doubt = doubtful<int64_t>(selected, state.wide_underflow);
  if (blockIdx.x == 0 && threadIdx.x == 0) conclude<Keys>(args, selected, doubt);
  write_masks<T>(everything, selected.bound);
}

// Launched with all blocks on the device. Bytes: those of the candidates, about 4 times; in the
// fallback each digit reads all elements once, and the masks are written once more.
template <typename T, typename Keys>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : kResident)
    finish_kernel(SelectArgs args) {
  constexpr bool kHasWide = Keys::kWeights && sizeof(T) < 8;
  LAP_SHARED(LocalHistogram, local);
  State& state = *args.state;
  if (blockIdx.x == 0 && threadIdx.x == 0 && state.status.source_inverted != 0) {
    const ListedSource& source = args.sources[~state.status.source_inverted];
    state.status.bad_count = source.bad_count;
    state.status.first_inverted = source.bad_first_inverted;
  }
  int turn = 0;
  const Request request = {args.keep, args.position_bits, args.value != nullptr};
  bool done = false;
  if (!kHasWide || state.scale.normal<float>()) {
    done = sampled_well<typename Keys::Rank>(args)
               ? finish_candidates<Keys, kHasWide>(args, request, &local, &turn)
               : finish_all<T, Keys, kHasWide>(args, request, &local, &turn);
  }
  if constexpr (kHasWide) {
    if (!done) finish_wide<T>(args, request, &local, &turn);
  }
}

// Steps 2 to 4 for one element type.
template <typename T, typename Keys>
cudaError_t launch_steps(const SelectArgs& args, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  if (args.plan == Plan::sample) {
    const int64_t blocks = ceil_div(int64_t{1} << args.sample_bits, kSampleThreads);
    error = launch_together(sample_kernel<T, Keys>, blocks, stream, args, kSampleThreads);
    if (error != cudaSuccess) return error;
  }
  unsigned blocks = 0;
  error = grid_for(scan_kernel<T, Keys>, args.tiles, &blocks);
  if (error != cudaSuccess) return error;
  error = launch(scan_kernel<T, Keys>, blocks, kThreads, stream, args);
  if (error != cudaSuccess) return error;
  return launch_together(finish_kernel<T, Keys>, args.tiles, stream, args);
}

// One .cu file instantiates each (compile time).
cudaError_t launch_row_steps(DType dtype, const SelectArgs& args, cudaStream_t stream);
cudaError_t launch_weight_steps(DType dtype, const SelectArgs& args, cudaStream_t stream);
cudaError_t launch_score_steps(DType dtype, const SelectArgs& args, cudaStream_t stream);

}  // namespace lap::cuda
