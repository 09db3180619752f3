// SPDX-License-Identifier: MIT
// Scores of all weights, the formula of math/score.h:  s = |w| * (row_norm * col_norm).
//
//   1. one block scales the norms by powers of two (scale.cuh)
//   2. one pass: the product of the scaled numbers, times 2^exponent, is the score wherever the
//      product is a normal number; the few others are computed from mantissas and exponents, so
//      that the only rounding beyond the formula's own is the conversion to the score's type.
#include "scale.cuh"
#include "tile.cuh"

namespace lap::cuda {
namespace {

struct ScoreArgs {
  const void* w;
  int64_t size;
  bool aligned;
  Norms norms;
  ScaledNorms scaled;
  Places places;
  const Scale* scale;
  void* out;
  Status* status;  // null: no check
};

struct ScaleArgs {
  Norms norms;
  ScaledNorms scaled;
  bool rounded;
  Scale* scale;
  Status* status;
};

__global__ void __launch_bounds__(kLoneThreads) scale_kernel(ScaleArgs args) {
  const Scale scale = block_scale_norms(args.norms, args.rounded, args.scaled, args.status);
  if (threadIdx.x == 0) *args.scale = scale;
}

__device__ inline float rounded_to(float, double x) {
  return static_cast<float>(round24(x));
}
__device__ inline double rounded_to(double, double x) {
  return x;
}

// Any factors at all: mantissas lie in [0.5, 1], so their products stay normal, and ldexp rounds
// once. For floats ldexp is exact or far below float's range. Rare: not worth registers inline.
template <typename Float>
__device__ __noinline__ Float exact_score(double w, double row_norm, double col_norm) {
  int row_exponent = 0;
  int col_exponent = 0;
  int exponent = 0;
  const double row = rounded_to(Float{}, frexp(row_norm, &row_exponent));
  const double col = rounded_to(Float{}, frexp(col_norm, &col_exponent));
  const double mantissa = frexp(magnitude(w), &exponent);
  const double factor = rounded_to(Float{}, product(row, col));
  const double s = rounded_to(Float{}, product(mantissa, factor));
  if (s == 0 || !is_finite(s)) return static_cast<Float>(s);
  return static_cast<Float>(ldexp(s, row_exponent + col_exponent + exponent));
}

template <typename Float>
struct FastScale {
  Float factor;  // 2^exponent
  bool usable;   // factor is a normal number, and so are all products of nonzero norms

  __device__ explicit FastScale(const Scale& scale) {
    constexpr int kMost = sizeof(Float) == 4 ? 127 : 1023;
    usable = scale.narrow && scale.exponent > -kMost && scale.exponent <= kMost;
    factor = usable ? static_cast<Float>(ldexp(1.0, scale.exponent)) : Float{1};
  }
};

template <typename Float>
struct NormsIn;
template <>
struct NormsIn<float> {
  const float* row;
  const float* col;
  __device__ explicit NormsIn(const ScaledNorms& n) : row(n.row_narrow), col(n.col_narrow) {}
};
template <>
struct NormsIn<double> {
  const double* row;
  const double* col;
  __device__ explicit NormsIn(const ScaledNorms& n) : row(n.row), col(n.col) {}
};

template <typename Float>
__device__ Float score_at(Float w,
                          const Place& place,
                          const NormsIn<Float>& scaled,
                          const FastScale<Float>& scale,
                          const Norms& norms) {
  constexpr Float kSmallestNormal = sizeof(Float) == 4 ? 0x1p-126 : 0x1p-1022;
  const Float factor = product(scaled.row[place.row], scaled.col[place.channel()]);
  const Float s = product(magnitude(w), factor);
  const Float value = product(s, scale.factor);
  const bool normal = s > kSmallestNormal && is_finite(value);
  const bool zero = s == 0 && (w == 0 || factor == 0);  // exactly zero, given a usable scale
  if (scale.usable && (normal || zero)) return value;
  return exact_score<Float>(w, norms.row[place.row], norms.col[place.channel()]);
}

// out = score of w. Thread: kPerThread elements of a tile, in vectors of 16 bytes; bytes per
// element: sizeof(T) read, sizeof(Float) written. Elements are independent: deterministic.
template <typename T>
__global__ void __launch_bounds__(kThreads, kResident) score_kernel(ScoreArgs args) {
  using Float = decltype(widen(T{}));
  constexpr int V = kVector<T>;
  const NormsIn<Float> scaled(args.scaled);
  const FastScale<Float> scale(*args.scale);
  Float* out = static_cast<Float*>(args.out);
  const int64_t tiles = ceil_div(args.size, kTile);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t begin = tile * kTile;
    const bool whole = args.aligned && begin + kTile <= args.size;
    T x[kPerThread];
    const uint32_t present = load_values(static_cast<const T*>(args.w), begin, args.size, whole, x);
    LAP_UNROLL
    for (int v = 0; v < kPerThread / V; ++v) {
      if (!((present >> (v * V)) & 1)) continue;
      const int64_t first = begin + offset_of<T>(v * V);
      Place place(args.places, first);
      Float scores[V];
      LAP_UNROLL
      for (int j = 0; j < V; ++j) {
        if (!((present >> (v * V + j)) & 1)) continue;
        const Float w = widen(x[v * V + j]);
        scores[j] = score_at(w, place, scaled, scale, args.norms);
        if (args.status != nullptr && !is_finite(w)) {
          note_bad(&args.status->bad_count, &args.status->first_inverted, 1, first + j);
        }
        place.step();
        if (!whole) out[first + j] = scores[j];
      }
      if (whole) store_vector(out + first, scores);
    }
  }
}

}  // namespace

size_t score_workspace(const Weight& w) {
  Carver carver(nullptr);
  carver.take<Status>(1);
  carver.take<Scale>(1);
  take_scaled_norms(&carver, w);
  return carver.used();
}

cudaError_t launch_score(const Weight& w,
                         const Norms& norms,
                         bool check_finite,
                         void* out,
                         void* workspace,
                         cudaStream_t stream) {
  Carver carver(workspace);
  Status* status = carver.take<Status>(1);
  Scale* scale = carver.take<Scale>(1);
  const ScaledNorms scaled = take_scaled_norms(&carver, w);
  cudaError_t error = cudaMemsetAsync(status, 0, sizeof(Status), stream);
  if (error != cudaSuccess || w.size() == 0) return error;
  Status* checked = check_finite ? status : nullptr;
  const ScaleArgs scale_args = {norms, scaled, w.dtype != DType::f64, scale, checked};
  error = launch(scale_kernel, 1, kLoneThreads, stream, scale_args);
  if (error != cudaSuccess) return error;
  const bool aligned = aligned_for_vectors(w.data, item_size(w.dtype), nullptr, nullptr) &&
                       reinterpret_cast<uintptr_t>(out) % 16 == 0;
  const ScoreArgs args = {w.data, w.size(), aligned, norms, scaled, Places(w), scale, out, checked};
  unsigned blocks = 0;
  error = grid_for(ceil_div(w.size(), kTile), &blocks);
  if (error != cudaSuccess) return error;
  return with_type(w.dtype, [&](auto type) {
    return launch(score_kernel<decltype(type)>, blocks, kThreads, stream, args);
  });
}

}  // namespace lap::cuda
