// SPDX-License-Identifier: MIT
// Step 2 of select.cuh: ranks at hashed positions, and the interval that they set. See
// select_kernels.cuh for T and Keys.
#pragma once

#include "select.cuh"

namespace lap::cuda {

#if defined(LAP_EMULATED)
constexpr int kSampleThreads = 128;
#else
constexpr int kSampleThreads = 1024;  // the last block works alone; 61 registers a thread
#endif

// Bits of a rank that the interval's ends are known to: the rest is rounded outwards.
template <typename Rank>
constexpr int kSampledBits = sizeof(Rank) == 4 ? 22 : 33;

// visit(rank) for this thread's share of the sample, in vectors of 16 bytes.
template <typename Rank, typename Visit>
__device__ void for_each_sampled(const Rank* sample, int size, const Visit& visit) {
  constexpr int V = kVector<Rank>;
  const int stride = static_cast<int>(blockDim.x) * V;
  for (int first = static_cast<int>(threadIdx.x) * V; first < size; first += kInFlight * stride) {
    Rank rank[kInFlight][V];
    LAP_UNROLL
    for (int b = 0; b < kInFlight; ++b) {
      if (first + b * stride < size) load_vector(sample + first + b * stride, rank[b]);
    }
    LAP_UNROLL
    for (int b = 0; b < kInFlight; ++b) {
      if (first + b * stride >= size) break;
      LAP_UNROLL
      for (int j = 0; j < V; ++j) visit(rank[b][j]);
    }
  }
}

struct LocalHistograms {
  LocalHistogram of[2];
};

// The leading bits of the sample's ranks at two indices (0: the best), by one block. `digits`: the
// counts of all ranks' first digit.
template <typename Rank>
__device__ void prefixes_at(const Rank* sample,
                            int size,
                            const Count* digits,
                            const int64_t (&index)[2],
                            LocalHistograms* local,
                            Prefix<Rank> (&prefix)[2]) {
  constexpr int kBits = static_cast<int>(sizeof(Rank)) * 8;
  Count wanted[2];
  for (int side = 0; side < 2; ++side) {
    wanted[side] = static_cast<Count>(index[side]) + 1;
    const Bin bin = find_bin<kSampleThreads>(wanted[side], [&](int b) { return digits[b]; });
    prefix[side].extend(bin.digit, kBits - kRadixBits);
    wanted[side] -= bin.before;
  }
  for (int shift = kBits - 2 * kRadixBits; shift > kBits - kSampledBits<Rank> - kRadixBits;
       shift -= kRadixBits) {
    const Digit digit = {shift, kRadixBits, true};
    __syncthreads();
    for (int b = threadIdx.x; b < kBins; b += blockDim.x) {
      for (int side = 0; side < 2; ++side) local->of[side].counts[b] = 0;
    }
    __syncthreads();
    for_each_sampled(sample, size, [&](Rank rank) {
      for (int side = 0; side < 2; ++side) {
        if (!prefix[side].matches(rank)) continue;
        atomicAdd(&local->of[side].counts[digit.of(rank, 0)], 1u);
      }
    });
    __syncthreads();
    for (int side = 0; side < 2; ++side) {
      const LocalHistogram& counted = local->of[side];
      const Bin bin =
          find_bin<kSampleThreads>(wanted[side], [&](int b) { return Count{counted.counts[b]}; });
      prefix[side].extend(bin.digit, shift);
      wanted[side] -= bin.before;
    }
  }
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

// Sets state.first, middle, last. Thread: one sampled element. Reads 2^sample_bits sectors of 32
// bytes; every block counts the first digit of its ranks, and the last block reads all ranks once
// (twice, 64-bit keys) from the L2 cache.
template <typename T, typename Keys>
__global__ void __launch_bounds__(kSampleThreads) sample_kernel(SelectArgs args) {
  using Rank = typename Keys::Rank;
  constexpr Rank kWorst = RankTraits<typename Keys::Key>::kWorst;
  constexpr int kTop = static_cast<int>(sizeof(Rank)) * 8 - kRadixBits;
  LAP_SHARED(LocalHistograms, local);
  Rank* sample = static_cast<Rank*>(args.sample);
  const int size = 1 << args.sample_bits;
  uint32_t* counts = local.of[0].counts;
  for (int b = threadIdx.x; b < kBins; b += blockDim.x) counts[b] = 0;
  __syncthreads();
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i < size) {
    const Keys keys(args.scaled, args.layout);
    const int64_t position = args.sampled(i);
    const ListedSource& source = source_at(args.sources, args.count, position);
    const int64_t index = position - source.first;
    const bool live = source.eligible == nullptr || source.eligible[index] != 0;
    const Rank rank =
        live ? keys.rank_at(index, static_cast<const T*>(source.data)[index]) : kWorst;
    sample[i] = rank;
    atomicAdd(counts + (rank >> kTop), 1u);
  }
  __syncthreads();
  Count* digits = args.state->histograms.counts[kTurns - 1];  // finish_kernel clears it in time
  for (int b = threadIdx.x; b < kBins; b += blockDim.x) {
    if (counts[b] != 0) atomicAdd(digits + b, Count{counts[b]});
  }
  if (!last_block(&args.state->sampled)) return;
  const int64_t most = size - 1;
  const int64_t index[2] = {args.first_sampled > 0 ? args.first_sampled : 0,
                            args.last_sampled < most ? args.last_sampled : most};
  Prefix<Rank> prefix[2];
  prefixes_at(sample, size, digits, index, &local, prefix);
  if (threadIdx.x != 0) return;
  const Rank edge = prefix[1].rank | prefix[1].rank_rest;
  const bool open[2] = {args.first_sampled<0, args.last_sampled> most || edge == kWorst};
  const Rank first = open[0] ? Rank{0} : prefix[0].rank;
  const Rank last = open[1] ? static_cast<Rank>(kWorst - 1) : edge;
  args.state->first = first;
  args.state->middle = open[0] || open[1] ? first : first + (last - first) / 2;
  args.state->last = last;
}

}  // namespace lap::cuda
