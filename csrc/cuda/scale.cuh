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
  bool is_double;  // the type of `along`
  int64_t rows;
  int64_t channels;  // groups * cols
  int64_t window;
};

constexpr int64_t kMostAlong = 1 << 16;  // written by one block; windows of 1 need no writing

inline ScaledNorms take_scaled_norms(Carver* carver, const Weight& w) {
  const int64_t rows = w.layout.rows;
  const int64_t channels = w.layout.channels();
  const int64_t window = w.layout.window;
  ScaledNorms norms = {};
  norms.row = carver->take<double>(rows);
  norms.col = carver->take<double>(channels);
  norms.row_narrow = carver->take<float>(rows);
  norms.col_narrow = carver->take<float>(channels);
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

// visit(i, norm[i]) for this thread's share of norm [n], kInFlight loads at a time.
template <typename Visit>
__device__ void block_for_each(const double* norm, int64_t n, const Visit& visit) {
  const int64_t stride = blockDim.x;
  for (int64_t first = threadIdx.x; first < n; first += kInFlight * stride) {
    double x[kInFlight];
    LAP_UNROLL
    for (int b = 0; b < kInFlight; ++b) {
      const int64_t i = first + b * stride;
      x[b] = i < n ? norm[i] : 0;
    }
    LAP_UNROLL
    for (int b = 0; b < kInFlight; ++b) {
      const int64_t i = first + b * stride;
      if (i < n) visit(i, x[b]);
    }
  }
}

// The range of norm [n], in every thread of the block. bad_inverted (null: no check) receives the
// first index of a norm that is not finite or below zero.
__device__ inline NormRange block_range(const double* norm, int64_t n, Count* bad_inverted) {
  LAP_SHARED(WarpValues<NormRange>, warps);
  NormRange range = {0, 0};
  block_for_each(norm, n, [&](int64_t i, double x) {
    range = with(range, x);
    if (bad_inverted != nullptr && !(x >= 0 && is_finite(x))) {
      atomicMax(bad_inverted, ~static_cast<Count>(i));
    }
  });
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const double largest = __shfl_down_sync(kAllLanes, range.largest, step);
    const double smallest = __shfl_down_sync(kAllLanes, range.smallest, step);
    range = widest(range, {largest, smallest});
  }
  __syncthreads();  // the previous call's readers are done
  if (lane_id() == 0) warps.values[threadIdx.x / kWarp] = range;
  __syncthreads();
  range = warps.values[0];
  for (int i = 1; i < static_cast<int>(blockDim.x) / kWarp; ++i) {
    range = widest(range, warps.values[i]);
  }
  return range;
}

__device__ inline void block_scale(
    const double* norm, int64_t n, int exponent, bool rounded, double* wide, float* narrow) {
  block_for_each(norm, n, [&](int64_t i, double given) {
    const double x = scaled(given, exponent, rounded);
    wide[i] = x;
    narrow[i] = static_cast<float>(x);
  });
}

// along[c * window + k] = col[c], col [channels] of the same type
template <typename Float>
__device__ void block_repeat(const Float* col, int64_t channels, int64_t window, Float* along) {
  for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
    const Float norm = col[c];
    for (int64_t k = 0; k < window; ++k) along[c * window + k] = norm;
  }
}

// One block writes `out` and returns the scale, the same in every thread. rounded: 24 bits (float
// scores), else 53. status: null for no check of the norms.
__device__ inline Scale block_scale_norms(const Norms& norms,
                                          bool rounded,
                                          const ScaledNorms& out,
                                          Status* status) {
  Count* bad = status == nullptr ? nullptr : status->norm_inverted;
  const NormRange row = block_range(norms.row, out.rows, bad);
  const NormRange col = block_range(norms.col, out.channels, bad == nullptr ? bad : bad + 1);
  block_scale(norms.row, out.rows, exponent_of(row.largest), rounded, out.row, out.row_narrow);
  block_scale(norms.col, out.channels, exponent_of(col.largest), rounded, out.col, out.col_narrow);
  if (out.along != nullptr && out.window != 1) {  // a thread reads what it has written itself
    if (out.is_double) {
      block_repeat(out.col, out.channels, out.window, static_cast<double*>(out.along));
    } else {
      block_repeat(out.col_narrow, out.channels, out.window, static_cast<float*>(out.along));
    }
  }
  return scale_of(row, col);
}

}  // namespace lap::cuda
