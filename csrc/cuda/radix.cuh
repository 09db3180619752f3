// SPDX-License-Identifier: MIT
// Exact selection by digits (radix select), by all blocks of a grid together.
//
// Wanted: the bound that has exactly `keep` elements before it in the order (rank, position).
// Read rank, then position, as digits of kRadixBits bits, the most significant first:
//
//   1. every block counts, in shared memory, the next digit of the elements whose earlier digits
//      equal the prefix found so far; the counts are added to a histogram in global memory
//   2. grid_sync()
//   3. every block scans the histogram: the digit in which the keep-th element lies joins the
//      prefix, and keep drops by the number of elements with lower digits
//   4. if all elements with this prefix are wanted, the bound is known; else back to 1, or, where
//      few are left, the rest by one block alone (BlockTally)
//
// The digits of the position come after those of the rank: this decides ties, lowest index first,
// and needs one reading of the tiles (later digits touch only the tiles the prefix leaves).
// Counts are integers, so neither the order of atomics nor of candidates can change the result.
// Three histograms take turns: while one is filled, block 0 clears the next; a histogram is cleared
// after the grid_sync() that ended its last reading.
#pragma once

#include "key.cuh"

namespace lap::cuda {

#if defined(LAP_SMALL)
constexpr int kRadixBits = 8;
#else
constexpr int kRadixBits = 11;  // 3 readings for 32-bit keys; 8 KB of counters a block
#endif
constexpr int kBins = 1 << kRadixBits;
constexpr int kTurns = 3;

struct LocalHistogram {
  uint32_t counts[kBins];
};
struct Histograms {
  Count counts[kTurns][kBins];
};

// The elements kept: rank < bound.rank, or rank == bound.rank and position < bound.position.
template <typename Rank>
struct Bound {
  Rank rank;
  uint64_t position;

  __device__ bool keeps(Rank r, uint64_t p) const {
    return r < rank || (r == rank && p < position);
  }
};

// The digits known so far; *_rest are the bits not known yet.
template <typename Rank>
struct Prefix {
  Rank rank = 0;
  Rank rank_rest = static_cast<Rank>(~Rank{0});
  uint64_t position = 0;
  uint64_t position_rest = ~uint64_t{0};

  __device__ bool matches(Rank r) const { return (r & ~rank_rest) == rank; }
  __device__ bool matches(Rank r, uint64_t p) const {
    return matches(r) && (p & ~position_rest) == position;
  }
  __device__ void extend(uint32_t digit, int shift) {
    rank |= static_cast<Rank>(static_cast<Rank>(digit) << shift);
    rank_rest = static_cast<Rank>((Rank{1} << shift) - 1);
  }
  __device__ bool may_lie_in(uint64_t first, uint64_t last) const {
    return first <= (position | position_rest) && position <= last;
  }
};

// Where a digit lies.
struct Digit {
  int shift;
  int width;
  bool of_rank;

  template <typename Rank>
  __device__ uint32_t of(Rank r, uint64_t p) const {
    const uint64_t word = of_rank ? static_cast<uint64_t>(r) : p;
    return static_cast<uint32_t>(word >> shift) & ((1u << width) - 1);
  }
};

struct Bin {
  uint32_t digit;
  Count before;  // elements with lower digits
  Count inside;
  Count total;
};

template <int numbers>
struct FoundBins {
  Bin bins[numbers];
};

// Counts digits; equal digits in a row cost one atomic, so that all-equal data is no worst case.
class DigitCounter {
 public:
  __device__ explicit DigitCounter(LocalHistogram* histogram) : histogram_(histogram) {}
  __device__ void add(uint32_t digit) {
    if (digit != digit_) flush();
    digit_ = digit;
    ++run_;
  }
  __device__ void flush() {
    if (run_ != 0) atomicAdd(&histogram_->counts[digit_], run_);
    run_ = 0;
  }

 private:
  LocalHistogram* histogram_;
  uint32_t digit_ = 0;
  uint32_t run_ = 0;
};

// Of each of the numbers keep: the bin that holds the keep-th element, 1 <= keep <= total, in every
// thread of a block of `threads`. count(b): the histogram, read once, each thread's share at a
// time.
template <int threads, int numbers, typename CountOf>
__device__ void find_bins(const Count (&keep)[numbers],
                          const CountOf& count,
                          Bin (&bins)[numbers]) {
  LAP_SHARED(FoundBins<numbers>, found);
  constexpr int kPerShare = kBins / threads;
  static_assert(kPerShare * threads == kBins, "every bin has one thread");
  const int begin = static_cast<int>(threadIdx.x) * kPerShare;
  Count counts[kPerShare];
  Count mine = 0;
  LAP_UNROLL
  for (int b = 0; b < kPerShare; ++b) counts[b] = count(begin + b);
  LAP_UNROLL
  for (int b = 0; b < kPerShare; ++b) mine += counts[b];
  Count total = 0;
  const Count start = block_exclusive_sum(mine, &total);
  LAP_UNROLL
  for (int i = 0; i < numbers; ++i) {
    Count before = start;
    if (before < keep[i] && keep[i] <= before + mine) {
      LAP_UNROLL
      for (int b = 0; b < kPerShare; ++b) {
        if (before < keep[i] && keep[i] <= before + counts[b]) {
          found.bins[i] = {static_cast<uint32_t>(begin + b), before, counts[b], total};
        }
        before += counts[b];
      }
    } else if (threadIdx.x == 0 && keep[i] > total) {
      found.bins[i] = {kBins - 1, 0, 0, total};
    }
  }
  __syncthreads();
  LAP_UNROLL
  for (int i = 0; i < numbers; ++i) bins[i] = found.bins[i];
}

template <int threads, typename CountOf>
__device__ Bin find_bin(Count keep, const CountOf& count) {
  Bin bins[1];
  find_bins<threads>({keep}, count, bins);
  return bins[0];
}

// Step 1 above: the digits of the elements that match the prefix, counted in shared memory.
template <typename Elements, typename Rank>
__device__ void count_digits(const Elements& elements,
                             const Prefix<Rank>& prefix,
                             const Digit& digit,
                             LocalHistogram* local) {
  __syncthreads();  // the last digit's readers are done
  for (int b = threadIdx.x; b < kBins; b += blockDim.x) local->counts[b] = 0;
  __syncthreads();
  DigitCounter counter(local);
  if (digit.of_rank) {
    elements.for_each_rank(prefix, [&](Rank rank, uint64_t) {
      if (prefix.matches(rank)) counter.add(digit.of(rank, 0));
    });
  } else {
    elements.for_each(prefix, [&](Rank rank, uint64_t position) {
      if (prefix.matches(rank, position)) counter.add(digit.of(rank, position));
    });
  }
  counter.flush();
  __syncthreads();
}

template <typename Rank>
struct Selected {
  Bound<Rank> bound;
  bool ranked;          // false: nothing or everything is kept, whatever the order
  bool pending;         // the bound lies among few elements, those that match the prefix:
  Prefix<Rank> prefix;  //
  Count keep;           // so many of them come before it
};

struct Request {
  Count keep;
  int position_bits;  // positions are below 2^position_bits
  bool exact;         // the bound's rank must be that of the last element kept (1 <= keep <= all)
};

// The prefix that two ranks and all between them share; *bits: how many bits of a rank it leaves,
// at least one.
template <typename Rank>
__device__ Prefix<Rank> common_prefix(Rank first, Rank last, int* bits) {
  constexpr int kBits = static_cast<int>(sizeof(Rank)) * 8;
  *bits = 1;
  while (*bits < kBits && ((first ^ last) >> *bits) != 0) ++*bits;
  Prefix<Rank> prefix;
  if (*bits == kBits) return prefix;
  prefix.rank_rest = static_cast<Rank>((Rank{1} << *bits) - 1);
  prefix.rank = static_cast<Rank>(first & ~prefix.rank_rest);
  return prefix;
}

// Steps 1 to 3 above: Tally::count gives the bin of a digit in which the keep-th of the elements
// that match the prefix lies. This one is of all blocks of a grid together; all threads call it
// alike.
class GridTally {
 public:
  // turn: how many digits this grid has counted so far
  __device__ GridTally(Histograms* histograms, LocalHistogram* local, int* turn)
      : histograms_(histograms), local_(local), turn_(*turn) {}

  template <typename Elements, typename Rank>
  __device__ Bin
  count(const Elements& elements, const Prefix<Rank>& prefix, const Digit& digit, Count keep) {
    count_digits(elements, prefix, digit, local_);
    Count* filled = histograms_->counts[turn_ % kTurns];
    Count* next = histograms_->counts[(turn_ + 1) % kTurns];
    for (int b = threadIdx.x; b < kBins; b += blockDim.x) {
      if (local_->counts[b] != 0) atomicAdd(filled + b, Count{local_->counts[b]});
      if (blockIdx.x == 0) next[b] = 0;
    }
    ++turn_;
    grid_sync();
    return find_bin<kThreads>(keep, [&](int b) { return filled[b]; });
  }

 private:
  Histograms* histograms_;
  LocalHistogram* local_;
  int& turn_;
};

// The same of one block alone.
class BlockTally {
 public:
  __device__ explicit BlockTally(LocalHistogram* local) : local_(local) {}

  template <typename Elements, typename Rank>
  __device__ Bin
  count(const Elements& elements, const Prefix<Rank>& prefix, const Digit& digit, Count keep) {
    count_digits(elements, prefix, digit, local_);
    return find_bin<kThreads>(keep, [&](int b) { return Count{local_->counts[b]}; });
  }

 private:
  LocalHistogram* local_;
};

// Elements: for_each(prefix, visit) calls visit(rank, position) for this thread's share of the
// elements that may match the prefix; none has rank kWorst. for_each_rank(prefix, visit) does the
// same where positions do not matter, and gives any.
template <typename Key, typename Tally>
class Selector {
 public:
  using Rank = typename RankTraits<Key>::Rank;

  __device__ explicit Selector(const Tally& tally) : tally_(tally) {}

  // prefix: that of all elements; bits: how many it leaves. `few` elements or less may be left
  // pending, if their ranks are below `limit`.
  template <typename Elements>
  __device__ Selected<Rank> select(const Elements& elements,
                                   const Request& request,
                                   Prefix<Rank> prefix = {},
                                   int bits = KeyTraits<Key>::kBits,
                                   Count few = 0,
                                   Rank limit = 0) {
    constexpr Rank kWorst = RankTraits<Key>::kWorst;
    if (request.keep == 0) return kept({0, 0}, false);
    Count keep = request.keep;
    for (int shift = bits; shift > 0;) {
      const int width = shift < kRadixBits ? shift : kRadixBits;
      const bool start = shift == bits;
      shift -= width;
      const Bin bin = tally_.count(elements, prefix, {shift, width, true}, keep);
      if (start && !request.exact && keep >= bin.total) return kept({kWorst, 0}, false);
      keep -= bin.before;
      prefix.extend(bin.digit, shift);
      const Rank last = prefix.rank | prefix.rank_rest;
      // A bound looser than the last kept rank must not look doubtful where that rank is not.
      const bool clear = shift == 0 || last < RankTraits<Key>::kDoubtful;
      if (!request.exact && keep == bin.inside && clear) {
        return kept({last == kWorst ? last - 1 : last, ~uint64_t{0}}, true);
      }
      if (bin.inside <= few && last < limit) return {{}, true, true, prefix, keep};
    }
    if (request.exact) return kept({prefix.rank, ~uint64_t{0}}, true);
    const uint64_t last = last_position(elements, prefix, keep, request.position_bits);
    return kept({prefix.rank, last + 1}, true);
  }

 private:
  __device__ static Selected<Rank> kept(const Bound<Rank>& bound, bool ranked) {
    return {bound, ranked, false, {}, 0};
  }

  // Position of the keep-th of the elements that match the prefix.
  template <typename Elements>
  __device__ uint64_t
  last_position(const Elements& elements, Prefix<Rank> prefix, Count keep, int position_bits) {
    for (int shift = position_bits; shift > 0;) {
      const int width = shift < kRadixBits ? shift : kRadixBits;
      shift -= width;
      const Bin bin = tally_.count(elements, prefix, {shift, width, false}, keep);
      keep -= bin.before;
      prefix.position |= static_cast<uint64_t>(bin.digit) << shift;
      prefix.position_rest = (uint64_t{1} << shift) - 1;
      if (keep == bin.inside) break;
    }
    return position_bits == 0 ? 0 : prefix.position | prefix.position_rest;
  }

  Tally tally_;
};

}  // namespace lap::cuda
