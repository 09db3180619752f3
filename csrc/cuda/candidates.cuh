// SPDX-License-Identifier: MIT
// Where a scan puts the elements it cannot decide: a buffer of (rank, position) in the workspace.
#pragma once

#include "select.cuh"

namespace lap::cuda {

// visit(rank, position) of the elements first, first + stride, ... below count, some loads at a
// time.
template <typename Rank, typename Visit>
__device__ void for_each_from(const Rank* ranks,
                              const int64_t* positions,
                              int64_t count,
                              int64_t first,
                              int64_t stride,
                              const Visit& visit) {
  constexpr int kBatch = sizeof(Rank) == 8 ? 2 : 4;  // what the registers hold
  for (; first < count; first += kBatch * stride) {
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

template <typename Rank>
struct Candidates {
  const Rank* ranks;
  const int64_t* positions;
  int64_t count;

  template <typename Visit>
  __device__ void for_each(const Prefix<Rank>&, const Visit& visit) const {
    const int64_t start = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
    for_each_from(ranks, positions, count, start, int64_t{gridDim.x} * blockDim.x, visit);
  }

  // In vectors, by no more blocks than have two batches to do: each adds a histogram of its own.
  template <typename Visit>
  __device__ void for_each_rank(const Prefix<Rank>&, const Visit& visit) const {
    constexpr int V = kVector<Rank>;
    constexpr int kBatch = 4;
    const int64_t batch = int64_t{blockDim.x} * V * kBatch;
    const int64_t busy = ceil_div(count, 2 * batch);
    const int64_t blocks = busy < gridDim.x ? busy : gridDim.x;
    if (blockIdx.x >= blocks) return;
    const int64_t stride = blocks * blockDim.x * V;
    const int64_t start = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * V;
    for (int64_t first = start; first < count; first += kBatch * stride) {
      Rank rank[kBatch][V] = {};
      LAP_UNROLL
      for (int b = 0; b < kBatch; ++b) {
        const int64_t begin = first + b * stride;
        if (begin + V <= count) {
          load_vector(ranks + begin, rank[b]);
        } else {  // what lies beyond was never written
          LAP_UNROLL
          for (int j = 0; j < V; ++j) {
            if (begin + j < count) rank[b][j] = ranks[begin + j];
          }
        }
      }
      LAP_UNROLL
      for (int b = 0; b < kBatch; ++b) {
        LAP_UNROLL
        for (int j = 0; j < V; ++j) {
          if (first + b * stride + j < count) visit(rank[b][j], 0);
        }
      }
    }
  }
};

// A few candidates, for one block: the bound is among them.
template <typename Rank>
struct Few {
  const Rank* ranks;
  const int64_t* positions;
  int count;

  template <typename Visit>
  __device__ void for_each(const Prefix<Rank>&, const Visit& visit) const {
    for_each_from(ranks, positions, count, threadIdx.x, blockDim.x, visit);
  }
  template <typename Visit>
  __device__ void for_each_rank(const Prefix<Rank>& prefix, const Visit& visit) const {
    for_each(prefix, visit);
  }
};

// Candidates that a warp collects in shared memory before it writes them together: one global
// atomic for some hundred of them, neighbors in memory, and no warp waits for another. Their order
// does not matter (radix.cuh).
#if defined(LAP_SMALL)
constexpr int kListed = 48;
#else
constexpr int kListed = 120;  // so that four blocks' shared memory fits every processor of sm_80
#endif

template <typename Rank>
struct WarpLists {
  struct List {
    Rank rank[kListed];
    uint32_t offset[kListed];  // position - Collector::origin_
    int next;                  // where the next candidate goes
  } of[kThreads / kWarp];
};

template <typename Key>
class Collector {
 public:
  using Rank = typename RankTraits<Key>::Rank;
  using List = typename WarpLists<Rank>::List;
  __device__ Collector(const SelectArgs& args, List* list) : args_(args), list_(list) {
    if (lane_id() == 0) list_->next = 0;
    warp_sync();
  }

  // Adds the elements of the set; all lanes of the warp call it.
  template <typename T>
  __device__ void add(const Tile& tile, const ByteSet& open, const Key (&key)[kPerThread]) {
    uint32_t left = open.folded();
    const int mine = __popc(left);
    const int total = warp_total(mine);
    if (total == 0) return;
    const bool far = static_cast<uint64_t>(tile.position - origin_) >= (uint64_t{1} << 31);
    if (count_ + total > kListed || far) flush();
    if (total > kListed) return write<T>(tile, open, key, mine, total);
    if (count_ == 0) origin_ = tile.position;
    count_ += total;
    if (mine == 0) return;
    const uint32_t first = static_cast<uint32_t>(tile.position - origin_);
    int to = atomicAdd(&list_->next, mine);
    for (; left != 0; left &= left - 1) {
      const int e = ByteSet::element_of(__ffs(static_cast<int>(left)) - 1);
      list_->rank[to] = rank_of(pick(key, e));
      list_->offset[to] = first + offset_of<T>(e);
      ++to;
    }
  }

  __device__ void flush() {
    if (count_ == 0) return;
    warp_sync();
    const int64_t base = reserve(count_);
    for (int i = lane_id(); i < count_; i += kWarp) {
      put(base + i, list_->rank[i], origin_ + list_->offset[i]);
    }
    warp_sync();
    if (lane_id() == 0) list_->next = 0;
    warp_sync();
    count_ = 0;
  }

 private:
  // Where so many candidates go in the buffer, or beyond its end.
  __device__ int64_t reserve(int count) {
    Count base = 0;
    if (lane_id() == 0) base = atomicAdd(&args_.state->candidates, static_cast<Count>(count));
    return static_cast<int64_t>(__shfl_sync(kAllLanes, base, 0));
  }
  __device__ void put(int64_t to, Rank rank, int64_t position) {
    if (to >= args_.capacity) return;
    static_cast<Rank*>(args_.ranks)[to] = rank;
    args_.positions[to] = position;
  }
  // More than the list holds, `mine` of them this lane's.
  template <typename T>
  __device__ void write(
      const Tile& tile, const ByteSet& open, const Key (&key)[kPerThread], int mine, int total) {
    int64_t to = reserve(total) + warp_inclusive_sum(mine) - mine;
    LAP_UNROLL
    for (int e = 0; e < kPerThread; ++e) {
      if (open.holds(e)) put(to++, rank_of(key[e]), tile.position + offset_of<T>(e));
    }
  }

  const SelectArgs& args_;
  List* list_;
  int count_ = 0;       // of the list; the same in all lanes, as the next
  int64_t origin_ = 0;  // position of the first tile in the list
};

}  // namespace lap::cuda
