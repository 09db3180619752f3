// SPDX-License-Identifier: MIT
// The kernels of select.cuh that know the element type. Ranks is ScoreRanks<T> or WeightRanks<T,
// Key>; T the element type.
#pragma once

#include "sample.cuh"

namespace lap::cuda {

// --- 3. scan ----------------------------------------------------------------------------------

// Candidates that a warp collects in shared memory before it writes them together: one global
// atomic for some hundred of them, neighbors in memory, and no warp waits for another.
#if defined(LAP_EMULATED)
constexpr int kListed = 48;
#else
constexpr int kListed = 128;
#endif

template <typename Rank>
struct WarpLists {
  struct List {
    Rank rank[kListed];
    uint32_t place[kListed];  // position - Collector::origin_
  } of[kThreads / kWarp];
};

template <typename Rank>
class Collector {
 public:
  using List = typename WarpLists<Rank>::List;
  __device__ Collector(const SelectArgs& args, List* list) : args_(args), list_(list) {}

  // Adds the elements of the set; all lanes of the warp call it.
  template <typename T>
  __device__ void add(const Tile& tile, const ByteSet& open, const Rank (&rank)[kPerThread]) {
    uint32_t left = open.folded();
    const int mine = __popc(left);
    const int inclusive = warp_inclusive_sum(mine);
    const int total = __shfl_sync(kAllLanes, inclusive, kWarp - 1);
    if (total == 0) return;
    const bool far = static_cast<uint64_t>(tile.position - origin_) >= (uint64_t{1} << 31);
    if (count_ + total > kListed || far) flush();
    if (total > kListed) return write<T>(tile, open, rank, inclusive - mine, total);
    if (count_ == 0) origin_ = tile.position;
    const uint32_t first = static_cast<uint32_t>(tile.position - origin_);
    int to = count_ + inclusive - mine;
    for (; left != 0; left &= left - 1) {  // few, most often none
      const int e = ByteSet::element_of(__ffs(static_cast<int>(left)) - 1);
      list_->rank[to] = pick(rank, e);
      list_->place[to] = first + offset_of<T>(e);
      ++to;
    }
    count_ += total;
  }

  __device__ void flush() {
    if (count_ == 0) return;
    warp_sync();
    const int64_t base = reserve(count_);
    for (int i = lane_id(); i < count_; i += kWarp) {
      put(base + i, list_->rank[i], origin_ + list_->place[i]);
    }
    warp_sync();
    count_ = 0;
  }

 private:
  // Room for so many candidates in the buffer, or what would follow it.
  __device__ int64_t reserve(int count) {
    Count base = 0;
    if (lane_id() == 0) base = atomicAdd(&args_.state->candidates, static_cast<Count>(count));
    return static_cast<int64_t>(__shfl_sync(kAllLanes, base, 0));
  }
  __device__ void put(int64_t to, Rank rank, int64_t position) {
    if (to >= args_.room) return;
    static_cast<Rank*>(args_.ranks)[to] = rank;
    args_.positions[to] = position;
  }
  // More than the list holds: `before` elements of earlier lanes come first.
  template <typename T>
  __device__ void write(const Tile& tile,
                        const ByteSet& open,
                        const Rank (&rank)[kPerThread],
                        int before,
                        int total) {
    int64_t to = reserve(total) + before;
    LAP_UNROLL
    for (int e = 0; e < kPerThread; ++e) {
      if (open.holds(e)) put(to++, rank[e], tile.position + offset_of<T>(e));
    }
  }

  const SelectArgs& args_;
  List* list_;
  int count_ = 0;       // the same in all lanes, as the next
  int64_t origin_ = 0;  // position of the first tile in the list
};

template <typename T>
__device__ void note_bad_in(const SelectArgs& args, const Tile& tile, uint32_t bad) {
  Source& source = args.sources[tile.source];
  note_bad(&source.bad_count, &source.bad_first_inverted, __popc(bad),
           tile.begin + offset_of<T>(__ffs(static_cast<int>(bad)) - 1));
  atomicMax(&args.state->status.source_inverted, ~static_cast<uint32_t>(tile.source));
}

// Thread: kPerThread elements of a tile. Bytes per element: sizeof(T) read (+ 1 eligible), 1 mask
// byte written, sizeof(rank) + 8 for a candidate.
template <typename T, typename Ranks>
__global__ void __launch_bounds__(kThreads, Ranks::kResident) scan_kernel(SelectArgs args) {
  using Rank = typename Ranks::Rank;
  LAP_SHARED(WarpLists<Rank>, lists);
  Collector<Rank> candidates(args, &lists.of[threadIdx.x / kWarp]);
  const Ranks ranks(args.scaled, args.places);
  const Rank first = static_cast<Rank>(args.state->first);
  const Rank beyond = static_cast<Rank>(args.state->last + 1);  // last is not the worst
  Count sure_count = 0;
  bool underflow = false;
  TileFinder tiles(args.sources, args.count);
  for (int64_t number = blockIdx.x; number < args.tiles; number += gridDim.x) {
    const Tile tile = tiles.find<T>(number);
    Rank rank[kPerThread];
    const uint32_t bad = load_ranks<T>(ranks, tile, rank, &underflow);
    if (args.check && bad != 0) note_bad_in<T>(args, tile, bad);
    const ByteSet sure = byte_set([&](int e) { return rank[e] < first; });
    ByteSet open = byte_set([&](int e) { return rank[e] < beyond; });
    LAP_UNROLL
    for (int q = 0; q < ByteSet::kWords; ++q) open.words[q] &= ~sure.words[q];
    sure_count += static_cast<Count>(__popc(sure.folded()));
    if (tile.mask != nullptr) {
      store_bytes<Ranks::kVectors, T>(tile.mask + tile.begin, tile.reach, sure);
    }
    candidates.template add<T>(tile, open, rank);
  }
  candidates.flush();
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
    constexpr int kBatch = sizeof(Rank) == 8 ? 2 : 4;  // what the registers hold
    const int64_t stride = int64_t{gridDim.x} * blockDim.x;
    const int64_t start = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    for (int64_t first = start; first < count; first += kBatch * stride) {
      Rank rank[kBatch];
      int64_t position[kBatch];
      LAP_UNROLL
      for (int b = 0; b < kBatch; ++b) {
        const int64_t i = first + b * stride;
        rank[b] = i < count ? ranks[i] : Rank{0};
        position[b] = i < count ? positions[i] : 0;
      }
      LAP_UNROLL
      for (int b = 0; b < kBatch; ++b) {
        if (first + b * stride < count) visit(rank[b], static_cast<uint64_t>(position[b]));
      }
    }
  }
};

template <typename T, typename Ranks>
struct Everything {
  using Rank = typename Ranks::Rank;
  static constexpr bool kVectors = Ranks::kVectors;
  const SelectArgs& args;
  const Ranks& ranks;
  uint32_t* underflow;

  // visit_tile(tile, rank): once per tile that may hold elements of the prefix
  template <typename VisitTile>
  __device__ void for_each_tile(const Prefix<Rank>& prefix, const VisitTile& visit_tile) const {
    bool underflows = false;
    TileFinder tiles(args.sources, args.count);
    for (int64_t number = blockIdx.x; number < args.tiles; number += gridDim.x) {
      const Tile tile = tiles.find<T>(number);
      const uint64_t first = static_cast<uint64_t>(tile.position);
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
      LAP_UNROLL
      for (int j = 0; j < kPerThread; ++j) {
        if (rank[j] == RankTraits<typename Ranks::Key>::kWorst) continue;
        visit(rank[j], static_cast<uint64_t>(tile.position + offset_of<T>(j)));
      }
    });
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
  int bits = 0;
  const Prefix<Rank> shared =
      common_prefix(static_cast<Rank>(state.first), static_cast<Rank>(state.last), &bits);
  const Selected<Rank> selected = well ? selector.select(candidates, among, shared, bits)
                                       : selector.select(everything, request);
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
  using Ranks = WeightRanks<T, int64_t, false>;
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
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 1 : kResident)
    finish_kernel(SelectArgs args) {
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
  error = grid_for(scan_kernel<T, Ranks>, args.tiles, &blocks);
  if (error != cudaSuccess) return error;
  error = launch(scan_kernel<T, Ranks>, blocks, kThreads, stream, args);
  if (error != cudaSuccess) return error;
  return launch_together(finish_kernel<T, Ranks>, args.tiles, stream, args);
}

// One .cu file instantiates each (compile time).
cudaError_t launch_row_steps(DType dtype, const SelectArgs& args, cudaStream_t stream);
cudaError_t launch_weight_steps(DType dtype, const SelectArgs& args, cudaStream_t stream);
cudaError_t launch_score_steps(DType dtype, const SelectArgs& args, cudaStream_t stream);

}  // namespace lap::cuda
