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

// visit(i, norm[i]) for this thread's part of the share, kInFlight loads at a time.
template <typename Visit>
__device__ void block_for_each(const double* norm, const Share& share, const Visit& visit) {
  const int64_t stride = blockDim.x;
  const int64_t end = share.end;
  int64_t i = share.begin + threadIdx.x;
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

// The range of the share, in every thread of the block.
__device__ inline NormRange block_range(const double* norm, const Share& share) {
  LAP_SHARED(WarpValues<NormRange>, warps);
  NormRange range = NormRange::none();
  block_for_each(norm, share, [&](int64_t, double x) { range = with(range, x); });
  range = warp_range(range);
  __syncthreads();  // the previous call's readers are done
  if (lane_id() == 0) warps.values[threadIdx.x / kWarp] = range;
  __syncthreads();
  const bool lives = lane_id() < static_cast<int>(blockDim.x) / kWarp;
  return warp_range(lives ? warps.values[lane_id()] : NormRange::none());
}

// Scales the share and checks it: bad_inverted (null: no check) receives the first index of a norm
// that is not finite or below zero.
__device__ inline void block_scale(const double* norm,
                                   const Share& share,
                                   int exponent,
                                   bool rounded,
                                   double* wide,
                                   float* narrow,
                                   Count* bad_inverted) {
  const ScaleBy scaled(exponent);
  block_for_each(norm, share, [&](int64_t i, double given) {
    const double x = scaled(given, rounded);
    wide[i] = x;
    narrow[i] = static_cast<float>(x);
    const bool bad = bit_cast<uint64_t>(given) >= KeyTraits<int64_t>::kInfinity && given != 0;
    if (bad && bad_inverted != nullptr) atomicMax(bad_inverted, ~static_cast<Count>(i));
  });
}

// along[c * window + k] = col[c] for the block's share of col. A thread reads what it has written
// itself: the order of entries is block_for_each's.
template <typename Float>
__device__ void block_repeat(const Float* col, const Share& share, int64_t window, Float* along) {
  for (int64_t c = share.begin + threadIdx.x; c < share.end; c += blockDim.x) {
    const Float norm = col[c];
    for (int64_t k = 0; k < window; ++k) along[c * window + k] = norm;
  }
}

// norm_blocks(out) blocks together write `out`; each returns the scale, the same in every thread.
// rounded: 24 bits (float scores), else 53. status: null for no check of the norms; it may be
// cleared by a block before it calls this. Contains one grid_sync().
__device__ inline Scale grid_scale_norms(const Norms& norms,
                                         bool rounded,
                                         const ScaledNorms& out,
                                         Status* status) {
  const Share rows(out.rows);
  const Share cols(out.channels);
  const NormRange row = block_range(norms.row, rows);
  const NormRange col = block_range(norms.col, cols);
  if (threadIdx.x == 0) {
    out.ranges[2 * blockIdx.x] = row;
    out.ranges[2 * blockIdx.x + 1] = col;
  }
  grid_sync();
  NormRange range[2];
  for (int side = 0; side < 2; ++side) {
    const bool lives = lane_id() < static_cast<int>(gridDim.x);
    range[side] = warp_range(lives ? out.ranges[2 * lane_id() + side] : NormRange::none());
  }
  Count* bad[2] = {};
  for (int side = 0; side < 2 && status != nullptr; ++side)
    bad[side] = status->norm_inverted + side;
  block_scale(norms.row, rows, exponent_of(range[0]), rounded, out.row, out.row_narrow, bad[0]);
  block_scale(norms.col, cols, exponent_of(range[1]), rounded, out.col, out.col_narrow, bad[1]);
  if (out.along != nullptr && out.window != 1) {
    if (out.is_double) {
      block_repeat(out.col, cols, out.window, static_cast<double*>(out.along));
    } else {
      block_repeat(out.col_narrow, cols, out.window, static_cast<float*>(out.along));
    }
  }
  return scale_of(range[0], range[1]);
}

}  // namespace lap::cuda
