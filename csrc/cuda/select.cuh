// SPDX-License-Identifier: MIT
// Exact selection of the best `keep` of all elements of one or several tensors; no score is stored.
//
//   1. prepare_kernel  describes the tensors in the workspace, scales the norms
//   2. sample_kernel   ranks at hashed positions set an interval [first, last] of ranks that should
//                      hold the bound, 3.5 standard deviations wide on each side
//   3. scan_kernel     the one reading of all elements: better than the interval -> mask 1, worse
//                      -> mask 0; the few inside are guessed by its middle, and appended to a
//                      buffer as (rank, position)
//   4. finish_kernel   all blocks together (radix.cuh): the bound among the buffered, by the digits
//                      that the interval leaves open, until it lies among few, which the last block
//                      ranks alone; and the bytes guessed wrong (some 12 % of the buffered ones':
//                      each moves a sector of 32 bytes). If the sample misled or the buffer
//                      overflowed: the bound among all elements, and all masks again. If underflow
//                      could have decided: the same with WIDE ranks (math/score.h).
//
// Which branch is taken is read from the State on the device. The buffer's order depends on timing;
// nothing else does, and digits are counted without regard to order: the result is deterministic.
//
//   bytes per element, steps 2-4:  sizeof(T) read, 1 written (+ 1 read with an eligible mask)
//                                  + about 0.4 for the buffer; if misled 3 to 5 readings more
#pragma once

#include "../math/sample.h"
#include "radix.cuh"

namespace lap::cuda {

#if defined(LAP_SMALL)
constexpr int64_t kLeastCapacity = 512;
constexpr int kLeastSampleBits = 7;
constexpr int kMostSampleBits = 9;
constexpr int64_t kCapacityShare = 3;
constexpr int64_t kFew = 40;
#else
constexpr int64_t kLeastCapacity = 1 << 16;  // candidates
constexpr int kLeastSampleBits = 12;
constexpr int kMostSampleBits = 16;
constexpr int64_t kCapacityShare = 64;  // of n / 64 candidates: 3/16 byte per element
constexpr int64_t kFew = 4096;          // elements that one block ranks alone
#endif
constexpr double kDeviations = 3.5;    // misleads once in 2000 times, holds 1.4 % of n at most
constexpr int kSourcesPerLaunch = 32;  // 72 bytes each, of the 4 KB that parameters may have

struct alignas(16) State {
  Status status;
  Scale scale;
  uint64_t first;   // the interval of ranks
  uint64_t middle;  // of its elements, those with lower ranks get mask bytes of 1 at first
  uint64_t last;
  Count above;       // elements better than the interval
  Count candidates;  // elements in it
  uint32_t underflow;
  uint32_t wide_underflow;
  uint32_t arrived;  // blocks of finish_kernel that have sorted out the few
  uint32_t few;      // how many those are
  Histograms histograms;
};

struct SourceBatch {
  ListedSource sources[kSourcesPerLaunch];
  int begin;  // number of sources[0] in the list
  int count;
};

// How the interval is found.
enum class Plan {
  none,        // keep 0: no element is above, none a candidate
  all,         // keep >= size: every eligible element is above
  candidates,  // few elements: every eligible one is a candidate
  sample,      // from 2^sample_bits ranks
};

struct SelectArgs {
  State* state;
  ListedSource* sources;  // [count]
  ListedSource sole;      // sources[0], where it is the only one
  int count;
  int64_t tiles;  // of all
  Norms norms;    // weights only, as the next two
  ScaledNorms scaled;
  LayoutDividers layout;
  bool rounded;    // float scores: 24 bits
  bool wide_keys;  // 64-bit keys from the start: double
  Plan plan;
  int sample_bits;
  SamplePositions sampled;
  int64_t first_sampled;   // places in the sample, best first, that set the interval;
  int64_t last_sampled;    // below 0 and from 2^sample_bits on: open on that side
  void* sample;            // [2^sample_bits] ranks
  void* ranks;             // [capacity] candidates
  int64_t* positions;      // [capacity]
  void* few_ranks;         // [kFew]
  int64_t* few_positions;  // [kFew]
  int64_t capacity;
  Count keep;
  int position_bits;
  bool check;
  void* value;  // [1] kth_largest only: where the threshold goes
};

}  // namespace lap::cuda
