// SPDX-License-Identifier: MIT
// Scores of all weights, the formula of math/score.h:  s = |w| * (row_norm * col_norm).
//
//   1. some blocks scale the norms by powers of two (scale.cuh)
//   2. one pass: the product of the scaled numbers, times 2^exponent, is the score wherever both
//      are normal numbers; the few others are computed from mantissas and exponents, so that the
//      exact product of |w| and the rounded norms is rounded once.
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
  LayoutDividers layout;
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
  bool check;
};

// Step 1, by all blocks together; the first one clears the status. Reads 8 bytes per row and
// column, twice.
__global__ void __launch_bounds__(kNormThreads, 1) scale_kernel(ScaleArgs args) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *args.status = Status{};
  Status* status = args.check ? args.status : nullptr;
  const Scale scale = grid_scale_norms(args.norms, args.rounded, args.scaled, status);
  if (blockIdx.x == 0 && threadIdx.x == 0) *args.scale = scale;
}

__device__ inline float rounded_to(float, double x) {
  return static_cast<float>(round24(x));
}
__device__ inline double rounded_to(double, double x) {
  return x;
}

// Any factors at all: mantissas lie in [0.5, 1], so their products stay normal (float: exact), and
// the score is rounded once, to what its exponent leaves of it. Rare: not worth registers inline.
template <typename Float>
__device__ __noinline__ Float exact_score(double w, double row_norm, double col_norm) {
  int row_exponent = 0;
  int col_exponent = 0;
  int exponent = 0;
  const double row = rounded_to(Float{}, frexp(row_norm, &row_exponent));
  const double col = rounded_to(Float{}, frexp(col_norm, &col_exponent));
  const double mantissa = frexp(magnitude(w), &exponent);
  const double factor = rounded_to(Float{}, product(row, col));
  const double s = product(mantissa, factor);
  if (s == 0 || !is_finite(s)) return static_cast<Float>(s);
  exponent += row_exponent + col_exponent;
  constexpr int kFar = 1200;  // from here on zero or infinity
  exponent = exponent < -kFar ? -kFar : exponent > kFar ? kFar : exponent;
  const int half = exponent / 2;
  return static_cast<Float>(product(ldexp(mantissa, half), ldexp(factor, exponent - half)));
}

// The scaled norms in the score's type, and when their products may be used.
template <typename Float>
struct Scaled {
  const Float* row;
  const Float* col;
  const Float* along;
  Float factor;  // 2^exponent
  Float bound;   // products above it are normal numbers, also times factor
  bool usable;   // factor is a normal number, and so are all products of nonzero norms

  __device__ Scaled(const ScaledNorms& norms, const Scale& scale) {
    constexpr bool kFloat = sizeof(Float) == 4;
    constexpr int kMost = kExponentEnd<Float> - 2;  // 2^kMost and 2^-kMost are normal numbers
    if constexpr (kFloat) {
      row = norms.row_narrow;
      col = norms.col_narrow;
    } else {
      row = norms.row;
      col = norms.col;
    }
    along = static_cast<const Float*>(norms.along);
    usable = scale.normal<Float>() && scale.exponent >= -kMost && scale.exponent <= kMost;
    factor = usable ? static_cast<Float>(ldexp(1.0, scale.exponent)) : Float{1};
    const int up = usable && scale.exponent < 0 ? -scale.exponent : 0;
    bound = product(static_cast<Float>(kSmallestNormal<Float>), static_cast<Float>(ldexp(1.0, up)));
  }
};

// One weight's score, whatever it is; notes it if it is bad.
template <typename T>
__device__ void score_one(const ScoreArgs& args, int64_t index) {
  using Float = decltype(widen(T{}));
  const Float w = widen(static_cast<const T*>(args.w)[index]);
  const Coordinates at(args.layout, index);
  static_cast<Float*>(args.out)[index] =
      exact_score<Float>(w, args.norms.row[at.row], args.norms.col[at.channel()]);
  if (args.status != nullptr && !is_finite(w)) {
    note_bad(&args.status->bad_count, &args.status->first_inverted, 1, index);
  }
}

// Are the scores of x [V], products [V] by factors [V], what value = product * 2^exponent says?
template <typename T, typename Float, int V>
__device__ bool scores_hold(const T* x,
                            const Float (&factors)[V],
                            const Float (&products)[V],
                            const Float (&values)[V],
                            Float bound) {
  Float trapped = 0;
  Float least = products[0];
  LAP_UNROLL
  for (int j = 0; j < V; ++j) {
    trapped = trap(values[j], trapped);
    least = products[j] < least ? products[j] : least;
  }
  if (trapped != 0) return false;  // not finite; NaN is unequal to zero
  if (least > bound) return true;
  bool hold = true;  // a zero of zero factors is exact
  LAP_UNROLL
  for (int j = 0; j < V; ++j) {
    hold = hold && (products[j] > bound || widen(x[j]) == 0 || factors[j] == 0);
  }
  return hold;
}

// out = score of w. Thread: kPerThread elements of a tile, in vectors of 16 bytes; bytes per
// element: sizeof(T) read, sizeof(Float) written. Elements are independent: deterministic. kRows:
// see WeightKeys.
template <typename T, bool kRows>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? kResident : 3)
    score_kernel(ScoreArgs args) {
  using Float = decltype(widen(T{}));
  constexpr int V = kVector<T>;
  const Scaled<Float> scaled(args.scaled, *args.scale);
  const int64_t tiles = ceil_div(args.size, kTile);
  for (int64_t tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const int64_t begin = tile * kTile;
    const Reach reach = reach_of<T>(begin, args.size, args.aligned);
    Float* out = static_cast<Float*>(args.out) + begin;
    T x[kPerThread];
    load_values<kRows>(static_cast<const T*>(args.w) + begin, reach, x);
    const TileRows rows(args.layout, begin);
    uint32_t others = 0;  // vectors that need score_one
    LAP_UNROLL
    for (int v = 0; v < kPerThread / V; ++v) {
      const uint32_t offset = offset_of<T>(v * V);
      if (offset >= reach.count) continue;
      const bool in_vectors = kRows || reach.vectors;
      Float factors[V];
      if constexpr (kRows) {
        uint32_t in_row = 0;
        const Float row_norm = scaled.row[rows.row_at(offset, &in_row)];
        load_vector(scaled.along + in_row, factors);
        LAP_UNROLL
        for (int j = 0; j < V; ++j) factors[j] = product(row_norm, factors[j]);
      } else {
        Coordinates at(args.layout, begin + offset);
        LAP_UNROLL
        for (int j = 0; j < V; ++j) {
          const bool exists = in_vectors || offset + j < reach.count;
          factors[j] = exists ? product(scaled.row[at.row], scaled.col[at.channel()]) : 0;
          at.step();
        }
      }
      Float products[V];
      Float values[V];
      LAP_UNROLL
      for (int j = 0; j < V; ++j) {
        products[j] = product(magnitude(widen(x[v * V + j])), factors[j]);
        values[j] = product(products[j], scaled.factor);
      }
      const bool hold =
          scaled.usable && scores_hold(x + v * V, factors, products, values, scaled.bound);
      if (!hold) {
        others |= 1u << v;
      } else if (in_vectors) {
        store_vector(out + offset, values);
      } else {
        LAP_UNROLL
        for (int j = 0; j < V; ++j) {
          if (offset + j < reach.count) out[offset + j] = values[j];
        }
      }
    }
    for (; others != 0; others &= others - 1) {
      const int v = __ffs(static_cast<int>(others)) - 1;
      const uint32_t offset = (static_cast<uint32_t>(v) * kThreads + threadIdx.x) * V;
      for (uint32_t j = offset; j < offset + V && j < reach.count; ++j)
        score_one<T>(args, begin + j);
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
  const int64_t size = w.layout.size();
  if (size == 0) return cudaMemsetAsync(status, 0, sizeof(Status), stream);
  const ScaleArgs scale_args = {norms, scaled, w.dtype != DType::f64, scale, status, check_finite};
  const cudaError_t error =
      launch_together(scale_kernel, norm_blocks(scaled), stream, scale_args, kNormThreads);
  if (error != cudaSuccess) return error;
  const bool aligned = aligned_for_vectors(w.data, item_size(w.dtype), nullptr, nullptr) &&
                       reinterpret_cast<uintptr_t>(out) % 16 == 0;
  const ScoreArgs args = {w.data, size,   aligned,
                          norms,  scaled, LayoutDividers(w.layout),
                          scale,  out,    check_finite ? status : nullptr};
  return with_type(w.dtype, [&](auto type) {
    using T = decltype(type);
    const bool rows = aligned && scaled.along != nullptr;
    const auto kernel = rows ? score_kernel<T, true> : score_kernel<T, false>;
    unsigned blocks = 0;
    const cudaError_t found = grid_for(kernel, ceil_div(size, kTile), &blocks);
    return found != cudaSuccess ? found : launch(kernel, blocks, kThreads, stream, args);
  });
}

}  // namespace lap::cuda
