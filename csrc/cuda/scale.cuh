// SPDX-License-Identifier: MIT
// The norms as the score kernels need them: rounded to the score's precision and scaled by powers
// of two so that each vector's largest lies in [0.5, 1). Products cannot overflow then, and the
// scale drops out of every comparison.
#pragma once

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

struct Scale {
  int exponent;  // true product = stored product * 2^exponent
  int narrow;    // every product of nonzero norms is normal in the score's own type
  int wide;      // ... in double
};

inline ScaledNorms take_scaled_norms(Carver* carver, const Weight& w) {
  const int64_t channels = w.groups * w.cols;
  ScaledNorms norms = {};
  norms.row = carver->take<double>(w.rows);
  norms.col = carver->take<double>(channels);
  norms.row_narrow = carver->take<float>(w.rows);
  norms.col_narrow = carver->take<float>(channels);
  norms.is_double = w.dtype == DType::f64;
  norms.rows = w.rows;
  norms.channels = channels;
  norms.window = w.window;
  if (!straight(w)) return norms;
  if (w.window == 1) {
    norms.along = norms.is_double ? static_cast<void*>(norms.col) : norms.col_narrow;
  } else if (channels * w.window <= kMostAlong) {
    const int64_t item = norms.is_double ? 8 : 4;
    norms.along = carver->take<char>(channels * w.window * item);
  }
  return norms;
}

// Largest and smallest entry that is positive and finite; zero when there is none.
struct NormRange {
  double largest;
  double smallest;
};

__device__ inline NormRange widest(NormRange a, NormRange b) {
  if (b.largest == 0) return a;
  if (a.largest == 0) return b;
  return {a.largest > b.largest ? a.largest : b.largest,
          a.smallest < b.smallest ? a.smallest : b.smallest};
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
    if (x > 0 && is_finite(x)) range = widest(range, {x, x});  // inf and NaN stay what they are
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

__device__ inline int exponent_of(double x) {
  int exponent = 0;
  if (x != 0) frexp(x, &exponent);
  return exponent;  // x = m * 2^exponent, m in [0.5, 1)
}

__device__ inline void block_scale(
    const double* norm, int64_t n, int exponent, bool rounded, double* wide, float* narrow) {
  block_for_each(norm, n, [&](int64_t i, double given) {
    double x = ldexp(given, -exponent);
    const bool normal = is_finite(x) && score_key(x) >= KeyTraits<int64_t>::kSmallestNormal;
    if (rounded && normal) x = round24(x);
    wide[i] = x;
    narrow[i] = static_cast<float>(x);
  });
}

// along[c * window + k] = col[c], col [channels] of the same type
template <typename Float>
__device__ void block_stretch(const Float* col, int64_t channels, int64_t window, Float* along) {
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
  const int row_exponent = exponent_of(row.largest);
  const int col_exponent = exponent_of(col.largest);
  block_scale(norms.row, out.rows, row_exponent, rounded, out.row, out.row_narrow);
  block_scale(norms.col, out.channels, col_exponent, rounded, out.col, out.col_narrow);
  if (out.along != nullptr && out.window != 1) {  // a thread reads what it has written itself
    if (out.is_double) {
      block_stretch(out.col, out.channels, out.window, static_cast<double*>(out.along));
    } else {
      block_stretch(out.col_narrow, out.channels, out.window, static_cast<float*>(out.along));
    }
  }
  double least = 1;  // smallest product of two nonzero entries
  if (row.largest > 0 && col.largest > 0) {
    least = product(ldexp(row.smallest, -row_exponent), ldexp(col.smallest, -col_exponent));
  }
  // Rounding can lower the smallest product by two ulp: a margin of 4.
  const bool wide = least >= 4 * 0x1p-1022;
  const bool narrow = rounded ? least >= 4 * 0x1p-126 : wide;
  return {row_exponent + col_exponent, narrow, wide};
}

}  // namespace lap::cuda
