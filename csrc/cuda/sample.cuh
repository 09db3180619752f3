// SPDX-License-Identifier: MIT
// Step 2 of select.cuh: ranks at hashed positions, and the interval that they set. See
// select_kernels.cuh for T and Keys.
#pragma once

#include "select.cuh"

namespace lap::cuda {

#if defined(LAP_SMALL)
constexpr int kSampleThreads = 128;
#else
constexpr int kSampleThreads = 512;
#endif

// Sets state.first, middle, last, by all blocks together (launch_together). The ends are known to
// the leading 2 * kRadixBits bits, the rest is rounded outwards. Thread: one sampled element, or
// more where the device is small. Reads 2^sample_bits sectors of 32 bytes.
//
// histograms.counts[2] gets the first digit of all ranks; counts[0] and counts[1] the second one of
// those that share the first with an end, and are cleared again for finish_kernel.
template <typename T, typename Keys>
__global__ void __launch_bounds__(kSampleThreads, 1) sample_kernel(SelectArgs args) {
  using Rank = typename Keys::Rank;
  constexpr Rank kWorst = RankTraits<typename Keys::Key>::kWorst;
  constexpr int kTop = static_cast<int>(sizeof(Rank)) * 8 - kRadixBits;
  constexpr int kNext = kTop - kRadixBits;
  static_assert(kTurns == 3, "one histogram for each of the digits counted here");
  LAP_SHARED(LocalHistogram, local);
  auto& counts = args.state->histograms.counts;
  Rank* sample = static_cast<Rank*>(args.sample);
  const int size = 1 << args.sample_bits;
  const int start = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  const int stride = static_cast<int>(gridDim.x * blockDim.x);
  for (int b = threadIdx.x; b < kBins; b += blockDim.x) local.counts[b] = 0;
  __syncthreads();
  const Keys keys(args.scaled, args.layout);
  for (int i = start; i < size; i += stride) {
    const int64_t position = args.sampled(i);
    const ListedSource& source = source_at(args.sources, args.count, position);
    const int64_t index = position - source.first;
    const bool live = source.eligible == nullptr || source.eligible[index] != 0;
    const T* values = static_cast<const T*>(source.data);
    const Rank rank = live ? rank_of(keys.key_at(index, values[index])) : kWorst;
    sample[i] = rank;
    atomicAdd(local.counts + (rank >> kTop), 1u);
  }
  __syncthreads();
  for (int b = threadIdx.x; b < kBins; b += blockDim.x) {
    if (local.counts[b] != 0) atomicAdd(counts[2] + b, Count{local.counts[b]});
  }
  grid_sync();
  const int64_t most = size - 1;
  Count wanted[2] = {
      static_cast<Count>(args.first_sampled > 0 ? args.first_sampled : 0) + 1,
      static_cast<Count>(args.last_sampled < most ? args.last_sampled : most) + 1,
  };
  Bin bins[2];
  find_bins<kSampleThreads>(wanted, [&](int b) { return counts[2][b]; }, bins);
  Prefix<Rank> prefix[2];
  LAP_UNROLL
  for (int side = 0; side < 2; ++side) {
    prefix[side].extend(bins[side].digit, kTop);
    wanted[side] -= bins[side].before;
  }
  const Digit next = {kNext, kRadixBits, true};
  for (int i = start; i < size; i += stride) {
    const Rank rank = sample[i];
    LAP_UNROLL
    for (int side = 0; side < 2; ++side) {
      if (prefix[side].matches(rank)) atomicAdd(counts[side] + next.of(rank, 0), Count{1});
    }
  }
  grid_sync();
  if (blockIdx.x != 0) return;
  LAP_UNROLL
  for (int side = 0; side < 2; ++side) {
    const Bin bin = find_bin<kSampleThreads>(wanted[side], [&](int b) { return counts[side][b]; });
    prefix[side].extend(bin.digit, kNext);
    for (int b = threadIdx.x; b < kBins; b += blockDim.x) counts[side][b] = 0;
  }
  if (threadIdx.x != 0) return;
  const Rank edge = prefix[1].rank | prefix[1].rank_rest;
  const bool open[2] = {(args.first_sampled < 0), (args.last_sampled > most) || edge == kWorst};
  const Rank first = open[0] ? Rank{0} : prefix[0].rank;
  const Rank last = open[1] ? static_cast<Rank>(kWorst - 1) : edge;
  args.state->first = first;
  args.state->middle = open[0] || open[1] ? first : first + (last - first) / 2;
  args.state->last = last;
}

}  // namespace lap::cuda
