// SPDX-License-Identifier: MIT
// The kernels of select.cuh that know the element type. Ranks is ScoreRanks<T> or WeightRanks<T,
// Key>; T the element type.
#pragma once

#include "select.cuh"

namespace lap::cuda {

// --- 2. sample --------------------------------------------------------------------------------

// Bits of a rank that the interval's ends are known to: the rest is rounded outwards.
template <typename Rank>
constexpr int kSampledBits = sizeof(Rank) == 4 ? 22 : 33;

// i-th of 2^bits positions in [0, size): one hashed place in each of 2^bits equal stretches.
__device__ inline int64_t sample_position(uint32_t i, int bits, int64_t size) {
  uint64_t hash = (i + 1) * 0x9e3779b97f4a7c15u;  // splitmix64
  hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9u;
  hash = (hash ^ (hash >> 27)) * 0x94d049bb133111ebu;
  hash ^= hash >> 31;
  const uint64_t fraction = static_cast<uint64_t>(i) << (64 - bits) | hash >> bits;
  return static_cast<int64_t>(__umul64hi(fraction, static_cast<uint64_t>(size)));
}

// The leading bits of the sample's rank at a place (0: the best). One block.
template <typename Rank>
__device__ Prefix<Rank> prefix_at(const Rank* sample,
                                  int size,
                                  int64_t place,
                                  LocalHistogram* local) {
  constexpr int kBits = static_cast<int>(sizeof(Rank)) * 8;
  Prefix<Rank> prefix;
  Count wanted = static_cast<Count>(place) + 1;
  for (int shift = kBits - kRadixBits; shift > kBits - kSampledBits<Rank> - kRadixBits;
       shift -= kRadixBits) {
    const Digit digit = {shift, kRadixBits, true};
    for (int b = threadIdx.x; b < kBins; b += blockDim.x) local->counts[b] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
      if (prefix.matches(sample[i], 0)) atomicAdd(&local->counts[digit.of(sample[i], 0)], 1u);
    }
    __syncthreads();
    const Bin bin = find_bin(wanted, [&](int b) { return Count{local->counts[b]}; });
    __syncthreads();  // all have read the counts
    wanted -= bin.before;
    prefix.rank |= static_cast<Rank>(static_cast<Rank>(bin.digit) << shift);
    prefix.rank_rest = static_cast<Rank>((Rank{1} << shift) - 1);
  }
  return prefix;
}

// True in all threads of the block that is the last to call this.
__device__ inline bool last_block(uint32_t* arrived) {
  LAP_SHARED(bool, last);
  __threadfence();  // what this block has written is seen before its arrival
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(arrived, 1u) == gridDim.x - 1;
  __syncthreads();
  __threadfence();
  return last;
}

// Sets state.first, state.last. Thread: one sampled element. Reads 2^sample_bits sectors of 32
// bytes; the last block reads the sample 4 times (6 for 64-bit keys), from the L2 cache.
template <typename T, typename Ranks>
__global__ void __launch_bounds__(kLoneThreads) sample_kernel(SelectArgs args) {
  using Rank = typename Ranks::Rank;
  constexpr Rank kWorst = RankTraits<typename Ranks::Key>::kWorst;
  LAP_SHARED(LocalHistogram, local);
  const Ranks ranks(args.scaled, args.places);
  Rank* sample = static_cast<Rank*>(args.sample);
  const int size = 1 << args.sample_bits;
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < size) {
    const int64_t position = sample_position(i, args.sample_bits, args.size);
    const Source& source = source_at(args.sources, args.count, position);
    const int64_t index = position - source.first;
    const bool live = source.eligible == nullptr || source.eligible[index] != 0;
    const typename Ranks::Cursor cursor(ranks, index);
    bool underflow = false;
    sample[i] = live ? cursor.rank(static_cast<const T*>(source.data)[index], &underflow) : kWorst;
  }
  if (!last_block(&args.state->sampled)) return;
  Rank first = 0;
  Rank last = kWorst - 1;
  if (args.first_place >= 0) first = prefix_at(sample, size, args.first_place, &local).rank;
  if (args.last_place < size) {
    const Prefix<Rank> prefix = prefix_at(sample, size, args.last_place, &local);
    const Rank edge = prefix.rank | prefix.rank_rest;
    last = edge < last ? edge : last;
  }
  if (threadIdx.x == 0) {
    args.state->first = first;
    args.state->last = last;
  }
}

// --- 3. scan ----------------------------------------------------------------------------------

// Appends the thread's open elements to the candidates: one global atomic a block and tile. All
// threads of the block call it; *cursor is two shared counters that take turns.
struct AppendCursor {
  uint32_t counts[2];
  Count base;
};

template <typename T, typename Rank>
__device__ void append(const SelectArgs& args,
                       const Tile& tile,
                       uint32_t open,
                       const Rank (&rank)[kPerThread],
                       AppendCursor* cursor,
                       int turn) {
  const uint32_t mine = static_cast<uint32_t>(__popc(open));
  uint32_t inclusive = mine;
  for (int step = 1; step < kWarp; step *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, inclusive, step);
    if (lane_id() >= step) inclusive += other;
  }
  uint32_t warp_base = 0;
  if (lane_id() == kWarp - 1) warp_base = atomicAdd(&cursor->counts[turn], inclusive);
  warp_base = __shfl_sync(kAllLanes, warp_base, kWarp - 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    const uint32_t count = cursor->counts[turn];
    cursor->base = count == 0 ? 0 : atomicAdd(&args.state->candidates, Count{count});
    cursor->counts[turn ^ 1] = 0;
  }
  __syncthreads();
  int64_t to = static_cast<int64_t>(cursor->base + warp_base + inclusive - mine);
  LAP_UNROLL
  for (int j = 0; j < kPerThread; ++j) {
    if (!((open >> j) & 1)) continue;
    if (to < args.room) {
      static_cast<Rank*>(args.ranks)[to] = rank[j];
      args.positions[to] = tile.source->first + tile.begin + offset_of<T>(j);
    }
    ++to;
  }
}

template <typename T>
__device__ void note_bad_in(const SelectArgs& args, const Tile& tile, uint32_t bad) {
  const int number = static_cast<int>(tile.source - args.sources);
  Source& source = args.sources[number];
  note_bad(&source.bad_count, &source.bad_first_inverted, __popc(bad),
           tile.begin + offset_of<T>(__ffs(static_cast<int>(bad)) - 1));
  atomicMax(&args.state->status.source_inverted, ~static_cast<uint32_t>(number));
}

// Thread: kPerThread elements of a tile. Bytes per element: sizeof(T) read (+ 1 eligible), 1 mask
// byte written, sizeof(rank) + 8 for a candidate.
template <typename T, typename Ranks>
__global__ void __launch_bounds__(kThreads, kResident) scan_kernel(SelectArgs args) {
  using Rank = typename Ranks::Rank;
  LAP_SHARED(AppendCursor, cursor);
  const Ranks ranks(args.scaled, args.places);
  const Rank first = static_cast<Rank>(args.state->first);
  const Rank last = static_cast<Rank>(args.state->last);
  Count sure_count = 0;
  bool underflow = false;
  int turn = 0;
  if (threadIdx.x == 0) cursor.counts[0] = 0;
  __syncthreads();
  for (int64_t number = blockIdx.x; number < args.tiles; number += gridDim.x) {
    const Tile tile = tile_at(args.sources, args.count, number);
    Rank rank[kPerThread];
    const uint32_t bad = load_ranks<T>(ranks, tile, rank, &underflow);
    if (args.check && bad != 0) note_bad_in<T>(args, tile, bad);
    uint32_t sure = 0;
    uint32_t open = 0;
    LAP_UNROLL
    for (int j = 0; j < kPerThread; ++j) {
      sure |= static_cast<uint32_t>(rank[j] < first) << j;
      open |= static_cast<uint32_t>(rank[j] >= first && rank[j] <= last) << j;
    }
    sure_count += static_cast<Count>(__popc(sure));
    const Source& source = *tile.source;
    if (source.mask != nullptr) {
      store_bytes<T>(source.mask, tile.begin, source.size, tile.whole, sure);
    }
    append<T>(args, tile, open, rank, &cursor, turn);
    turn ^= 1;
  }
  Count total = 0;
  block_exclusive_sum(sure_count, &total);
  if (threadIdx.x == 0 && total != 0) atomicAdd(&args.state->sure, total);
  if (underflow) args.state->underflow = 1;
}

// --- 4. finish --------------------------------------------------------------------------------

template <typename Rank>
struct Candidates {
  const Rank* ranks;
  const int64_t* positions;
  int64_t count;

  template <typename Visit>
  __device__ void for_each(const Prefix<Rank>&, const Visit& visit) const {
    const int64_t stride = int64_t{gridDim.x} * blockDim.x;
    for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += stride) {
      visit(ranks[i], static_cast<uint64_t>(positions[i]));
    }
  }
};

template <typename T, typename Ranks>
struct Everything {
  using Rank = typename Ranks::Rank;
  const SelectArgs& args;
  const Ranks& ranks;
  uint32_t* underflow;

  // visit_tile(tile, rank): once per tile that may hold elements of the prefix
  template <typename VisitTile>
  __device__ void for_each_tile(const Prefix<Rank>& prefix, const VisitTile& visit_tile) const {
    bool underflows = false;
    for (int64_t number = blockIdx.x; number < args.tiles; number += gridDim.x) {
      const Tile tile = tile_at(args.sources, args.count, number);
      const uint64_t first = static_cast<uint64_t>(tile.source->first + tile.begin);
      if (!prefix.may_lie_in(first, first + kTile - 1)) continue;
      Rank rank[kPerThread];
      load_ranks<T>(ranks, tile, rank, &underflows);
      visit_tile(tile, rank);
    }
    if (underflows) *underflow = 1;
  }

  template <typename Visit>
  __device__ void for_each(const Prefix<Rank>& prefix, const Visit& visit) const {
    for_each_tile(prefix, [&](const Tile& tile, const Rank(&rank)[kPerThread]) {
      const int64_t first = tile.source->first + tile.begin;
      LAP_UNROLL
      for (int j = 0; j < kPerThread; ++j) {
        if (rank[j] == RankTraits<typename Ranks::Key>::kWorst) continue;
        visit(rank[j], static_cast<uint64_t>(first + offset_of<T>(j)));
      }
    });
  }
};

// All masks anew: 1 for what the bound keeps.
template <typename T, typename Elements, typename Rank>
__device__ void write_masks(const Elements& everything, const Bound<Rank>& bound) {
  everything.for_each_tile(Prefix<Rank>{}, [&](const Tile& tile, const Rank(&rank)[kPerThread]) {
    const Source& source = *tile.source;
    if (source.mask == nullptr) return;
    const int64_t first = source.first + tile.begin;
    uint32_t kept = 0;
    LAP_UNROLL
    for (int j = 0; j < kPerThread; ++j) {
      const uint64_t position = static_cast<uint64_t>(first + offset_of<T>(j));
      const bool live = rank[j] != static_cast<Rank>(~Rank{0});
      kept |= static_cast<uint32_t>(live && bound.keeps(rank[j], position)) << j;
    }
    store_bytes<T>(source.mask, tile.begin, source.size, tile.whole, kept);
  });
}

// Mask bytes of the candidates that the bound keeps.
template <typename Rank>
__device__ void mark(const SelectArgs& args,
                     const Candidates<Rank>& candidates,
                     const Bound<Rank>& bound) {
  candidates.for_each(Prefix<Rank>{}, [&](Rank rank, uint64_t position) {
    if (!bound.keeps(rank, position)) return;
    const int64_t at = static_cast<int64_t>(position);
    const Source& source = source_at(args.sources, args.count, at);
    if (source.mask != nullptr) source.mask[at - source.first] = 1;
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
  if (state.candidates > static_cast<Count>(args.room) || state.sure >= args.keep) return false;
  const bool open = static_cast<Rank>(state.last) == static_cast<Rank>(~Rank{0}) - 1;
  return open || args.keep < state.sure + state.candidates;
}

template <typename Key>
__device__ void write_value(const SelectArgs& args, typename RankTraits<Key>::Rank rank) {
  using Float = typename KeyTraits<Key>::Float;
  if (args.value == nullptr || blockIdx.x != 0 || threadIdx.x != 0) return;
  const Key key = static_cast<Key>(rank) ^ KeyTraits<Key>::kMagnitude;
  *static_cast<Float*>(args.value) = bit_cast<Float>(flip_negative(key));
}

// The narrow half of step 4; false: wide ranks must decide (nothing final is written then).
template <typename T, typename Ranks, bool kHasWide>
__device__ bool finish(const SelectArgs& args,
                       const Request& request,
                       LocalHistogram* local,
                       int* turn) {
  using Key = typename Ranks::Key;
  using Rank = typename Ranks::Rank;
  State& state = *args.state;
  GridSelector<Key> selector(&state.histograms, local, turn);
  const Ranks ranks(args.scaled, args.places);
  const Everything<T, Ranks> everything = {args, ranks, &state.underflow};
  const bool well = sampled_well<Rank>(args);
  const int64_t in_buffer = static_cast<int64_t>(
      state.candidates < static_cast<Count>(args.room) ? state.candidates : args.room);
  const Candidates<Rank> candidates = {static_cast<const Rank*>(args.ranks), args.positions,
                                       in_buffer};
  Request among = request;
  if (well) among.keep = request.keep - state.sure;
  const Selected<Rank> selected =
      well ? selector.select(candidates, among) : selector.select(everything, request);
  if (Ranks::kWeights && doubtful<Key>(selected, state.underflow)) {
    if (kHasWide) return false;
    if (blockIdx.x == 0 && threadIdx.x == 0) state.status.out_of_range = 1;
  }
  write_value<Key>(args, selected.bound.rank);
  if (well) {
    mark(args, candidates, selected.bound);
  } else {
    write_masks<T>(everything, selected.bound);
  }
  return true;
}

template <typename T>
__device__ void finish_wide(const SelectArgs& args,
                            const Request& request,
                            LocalHistogram* local,
                            int* turn) {
  using Ranks = WeightRanks<T, int64_t>;
  State& state = *args.state;
  GridSelector<int64_t> selector(&state.histograms, local, turn);
  const Ranks ranks(args.scaled, args.places);
  const Everything<T, Ranks> everything = {args, ranks, &state.wide_underflow};
  const auto selected = selector.select(everything, request);
  if (doubtful<int64_t>(selected, state.wide_underflow) && blockIdx.x == 0 && threadIdx.x == 0) {
    state.status.out_of_range = 1;
  }
  write_masks<T>(everything, selected.bound);
}

// Launched with all blocks on the device. Bytes: those of the candidates, about 4 times; in the
// fallback each digit reads all elements once, and the masks are written once more.
template <typename T, typename Ranks>
__global__ void __launch_bounds__(kThreads, kResident) finish_kernel(SelectArgs args) {
  constexpr bool kHasWide = Ranks::kWeights && sizeof(T) < 8;
  LAP_SHARED(LocalHistogram, local);
  State& state = *args.state;
  if (blockIdx.x == 0 && threadIdx.x == 0 && state.status.source_inverted != 0) {
    const Source& source = args.sources[~state.status.source_inverted];
    state.status.bad_count = source.bad_count;
    state.status.first_inverted = source.bad_first_inverted;
  }
  int turn = 0;
  const Request request = {args.keep, args.position_bits, args.value != nullptr};
  bool done = false;
  if (!kHasWide || state.scale.narrow) {
    done = finish<T, Ranks, kHasWide>(args, request, &local, &turn);
  }
  if constexpr (kHasWide) {
    if (!done) finish_wide<T>(args, request, &local, &turn);
  }
}

// Steps 2 to 4 for one element type.
template <typename T, typename Ranks>
cudaError_t launch_steps(const SelectArgs& args, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  if (args.plan == Plan::sample) {
    const int64_t blocks = ceil_div(int64_t{1} << args.sample_bits, kLoneThreads);
    error =
        launch(sample_kernel<T, Ranks>, static_cast<unsigned>(blocks), kLoneThreads, stream, args);
    if (error != cudaSuccess) return error;
  }
  unsigned blocks = 0;
  error = grid_for(args.tiles, &blocks);
  if (error != cudaSuccess) return error;
  error = launch(scan_kernel<T, Ranks>, blocks, kThreads, stream, args);
  if (error != cudaSuccess) return error;
  return launch_together(finish_kernel<T, Ranks>, args.tiles, stream, args);
}

// One .cu file instantiates each (compile time).
cudaError_t launch_weight_steps(DType dtype, const SelectArgs& args, cudaStream_t stream);
cudaError_t launch_score_steps(DType dtype, const SelectArgs& args, cudaStream_t stream);

}  // namespace lap::cuda
