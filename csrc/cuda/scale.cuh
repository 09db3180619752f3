// SPDX-License-Identifier: MIT
// The norms of one layer as the score kernels need them: scaled (math/scale.h), rounded to the
// score's precision, in its type.
#pragma once

#include "../math/scale.h"
#include "tile.cuh"

namespace lap::cuda {

// Where one layer's scaled norms lie in a workspace.
struct ScaledNorms {
  double* row;        // [rows]
  double* col;        // [groups * cols]
  float* row_narrow;  // the same numbers as floats: exact while they are normal
  float* col_narrow;
  // [cols * window]: the column norm of each element of a row, in the score's type, to be read in
  // vectors beside the weights. Null: the weight is not straight, or this would be too long.
  void* along;
  NormRange* ranges;  // [2 * kMostNormBlocks]: of each block's share of the rows, of the columns
  bool is_double;     // the type of `along`
  int64_t rows;
  int64_t channels;  // groups * cols
  int64_t window;
};

constexpr int64_t kMostAlong = 1 << 16;  // entries that are repeated; windows of 1 need none
// Blocks that scale one layer's norms together, each a share of them.
#if defined(LAP_SMALL)
constexpr int64_t kNormsPerBlock = 24;
#else
constexpr int64_t kNormsPerBlock = 1024;
#endif
constexpr int64_t kMostNormBlocks = kWarp;  // a lane reads the range of each

inline int64_t norm_blocks(const ScaledNorms& norms) {
  const int64_t blocks = ceil_div(norms.rows + norms.channels, kNormsPerBlock);
  return blocks < 1 ? 1 : blocks < kMostNormBlocks ? blocks : kMostNormBlocks;
}

inline ScaledNorms take_scaled_norms(Carver* carver, const Weight& w) {
  const int64_t rows = w.layout.rows;
  const int64_t channels = w.layout.channels();
  const int64_t window = w.layout.window;
  ScaledNorms norms = {};
  norms.row = carver->take<double>(rows);
  norms.col = carver->take<double>(channels);
  norms.row_narrow = carver->take<float>(rows);
  norms.col_narrow = carver->take<float>(channels);
  norms.ranges = carver->take<NormRange>(2 * kMostNormBlocks);
  norms.is_double = w.dtype == DType::f64;
  norms.rows = rows;
  norms.channels = channels;
  norms.window = window;
  if (!straight(w)) return norms;
  if (window == 1) {
    norms.along = norms.is_double ? static_cast<void*>(norms.col) : norms.col_narrow;
  } else if (channels * window <= kMostAlong) {
    const int64_t item = norms.is_double ? 8 : 4;
    norms.along = carver->take<char>(channels * window * item);
  }
  return norms;
}

// The entries of [0, n) that fall to this block.
struct Share {
  int64_t begin;
  int64_t end;

  __device__ explicit Share(int64_t n) {
    const int64_t each = ceil_div(n, gridDim.x);
    begin = each * blockIdx.x < n ? each * blockIdx.x : n;
    end = begin + each < n ? begin + each : n;
  }
};

// One half of a block takes the rows' norms, the other the columns', so that neither waits for the
// other's memory.
struct BlockHalf {
  bool cols;
  int thread;   // of `threads`
  int threads;  // whole warps

  __device__ BlockHalf()
      : cols(threadIdx.x >= blockDim.x / 2), threads(static_cast<int>(blockDim.x) / 2) {
    thread = static_cast<int>(threadIdx.x) - (cols ? threads : 0);
  }
};

// visit(i, norm[i]) for this thread's part of the share, kInFlight loads at a time.
template <typename Visit>
__device__ void half_for_each(const BlockHalf& half,
                              const double* norm,
                              const Share& share,
                              const Visit& visit) {
  const int64_t stride = half.threads;
  const int64_t end = share.end;
  int64_t i = share.begin + half.thread;
  for (; i + (kInFlight - 1) * stride < end; i += kInFlight * stride) {
    double x[kInFlight];
    LAP_UNROLL
    for (int b = 0; b < kInFlight; ++b) x[b] = norm[i + b * stride];
    LAP_UNROLL
    for (int b = 0; b < kInFlight; ++b) visit(i + b * stride, x[b]);
  }
  double x[kInFlight];
  LAP_UNROLL
  for (int b = 0; b < kInFlight; ++b) x[b] = i + b * stride < end ? norm[i + b * stride] : 0;
  LAP_UNROLL
  for (int b = 0; b < kInFlight; ++b) {
    if (i + b * stride < end) visit(i + b * stride, x[b]);
  }
}

// The widest of the lanes' ranges, in all lanes.
__device__ inline NormRange warp_range(NormRange range) {
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const uint64_t largest = __shfl_down_sync(kAllLanes, range.largest, step);
    const uint64_t smallest = __shfl_down_sync(kAllLanes, range.smallest, step);
    range = widest(range, {largest, smallest});
  }
  return {__shfl_sync(kAllLanes, range.largest, 0), __shfl_sync(kAllLanes, range.smallest, 0)};
}

// The range of the half's share, in every thread of the half. Once in a kernel.
__device__ inline NormRange half_range(const BlockHalf& half,
                                       const double* norm,
                                       const Share& share) {
  LAP_SHARED(WarpValues<NormRange>, warps);
  NormRange range = NormRange::none();
  half_for_each(half, norm, share, [&](int64_t, double x) { range = with(range, x); });
  range = warp_range(range);
  if (lane_id() == 0) warps.values[threadIdx.x / kWarp] = range;
  __syncthreads();
  const int count = half.threads / kWarp;
  const NormRange* first = warps.values + (half.cols ? count : 0);
  return warp_range(lane_id() < count ? first[lane_id()] : NormRange::none());
}

// along[c * window + k] = col[c] for the half's share of col. A thread reads what it has written
// itself: the order of entries is half_for_each's.
template <typename Float>
__device__ void half_repeat(
    const BlockHalf& half, const Float* col, const Share& share, int64_t window, Float* along) {
  for (int64_t c = share.begin + half.thread; c < share.end; c += half.threads) {
    const Float norm = col[c];
    for (int64_t k = 0; k < window; ++k) along[c * window + k] = norm;
  }
}

// At most norm_blocks(out) blocks together write `out`; returns the scale in the first warp of
// each, for the others nothing. rounded: 24 bits (float scores), else 53. status: null for no check
// of the norms, else it receives the first index of one that is not finite or below zero; it may be
// cleared by a block before it calls this. Contains one grid_sync().
__device__ inline Scale grid_scale_norms(const Norms& norms,
                                         bool rounded,
                                         const ScaledNorms& out,
                                         Status* status) {
  const BlockHalf half;
  const double* norm = half.cols ? norms.col : norms.row;
  const Share share(half.cols ? out.channels : out.rows);
  const NormRange mine = half_range(half, norm, share);
  if (half.thread == 0) out.ranges[2 * blockIdx.x + (half.cols ? 1 : 0)] = mine;
  grid_sync();
  const auto range_of = [&](int side) {
    const bool lives = lane_id() < static_cast<int>(gridDim.x);
    return warp_range(lives ? out.ranges[2 * lane_id() + side] : NormRange::none());
  };
  const NormRange range = range_of(half.cols ? 1 : 0);
  const ScaleBy scaled(exponent_of(range));
  double* wide = half.cols ? out.col : out.row;
  float* narrow = half.cols ? out.col_narrow : out.row_narrow;
  Count* bad_inverted = status == nullptr ? nullptr : status->norm_inverted + (half.cols ? 1 : 0);
  half_for_each(half, norm, share, [&](int64_t i, double given) {
    const double x = scaled(given, rounded);
    wide[i] = x;
    narrow[i] = static_cast<float>(x);
    const bool bad = bit_cast<uint64_t>(given) >= KeyTraits<int64_t>::kInfinity && given != 0;
    if (bad && bad_inverted != nullptr) atomicMax(bad_inverted, ~static_cast<Count>(i));
  });
  if (half.cols && out.along != nullptr && out.window != 1) {
    if (out.is_double) {
      half_repeat(half, out.col, share, out.window, static_cast<double*>(out.along));
    } else {
      half_repeat(half, out.col_narrow, share, out.window, static_cast<float*>(out.along));
    }
  }
  if (threadIdx.x >= kWarp) return {0, 1};
  return scale_of(range, range_of(1));
}

}  // namespace lap::cuda
