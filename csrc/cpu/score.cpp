// SPDX-License-Identifier: MIT
// One reading of w, one writing of the scores: 8 bytes a float weight.
#include "score.h"

#include <cmath>
#include <utility>

#include "isa.h"
#include "source.h"

namespace lap::cpu {
namespace {

constexpr int64_t kChunk = int64_t{1} << 16;  // elements a worker takes at a time

// Calls visit(x, col_norm, row_norm, first, count) over all of w, in parallel; visit returns
// whether its weights are finite.
template <typename Float, typename Visit>
bool all_finite(const Strided& w,
                const Layout& layout,
                const ScaledNorms<Float>& norms,
                const Pool& pool,
                const Visit& visit) {
  std::atomic<bool> finite{true};
  for_each_chunk(pool, ceil_div(w.size, kChunk), [&](int, int64_t c) {
    Scratch scratch;
    const int64_t end = std::min(w.size, (c + 1) * kChunk);
    for (int64_t begin = c * kChunk; begin < end; begin += kTile) {
      for_each_with_norms(
          w, layout, norms, begin, std::min(kTile, end - begin), &scratch,
          [&](const void* x, const Float* col, Float row, int64_t first, int64_t count) {
            if (!visit(x, col, row, begin + first, count)) finite = false;
          });
    }
  });
  return finite;
}

// Products of the unscaled norms are normal floats: plain float arithmetic.
bool score_direct(const Strided& w,
                  const Layout& layout,
                  ScaledNorms<float> norms,
                  const Pool& pool,
                  float* out) {
  const auto kernel = kernels().score[static_cast<int>(w.dtype)];
  norms.unscale();
  return all_finite(w, layout, norms, pool,
                    [&](const void* x, const float* col, float row, int64_t first, int64_t count) {
                      return kernel(x, col, row, count, out + first) <
                             KeyTraits<int32_t>::kInfinity;
                    });
}

// Scaled norms in double; the scale 2^exponent is multiplied back in two halves at the end, unless
// the norms can carry it.
bool score_wide(const Strided& w,
                const Layout& layout,
                ScaledNorms<double> norms,
                const Pool& pool,
                char* out) {
  const auto kernel = kernels().wide_score[static_cast<int>(w.dtype)];
  const int64_t item = w.dtype == DType::f64 ? 8 : 4;
  const int exponent = norms.scale.exponent;
  const int carried = norms.normal(exponent) ? exponent : exponent % 2;
  for (double& norm : norms.row) norm = std::ldexp(norm, carried);
  const double scale = std::ldexp(1.0, (exponent - carried) / 2);
  return all_finite(
      w, layout, norms, pool,
      [&](const void* x, const double* col, double row, int64_t first, int64_t count) {
        return kernel(x, col, row, scale, count, out + first * item) <
               KeyTraits<int64_t>::kInfinity;
      });
}

}  // namespace

bool score(const Strided& w,
           const Layout& layout,
           const Norms& norms,
           bool check_finite,
           const Pool& pool,
           void* out) {
  bool finite = true;
  bool done = false;
  if (w.dtype != DType::f64) {
    ScaledNorms<float> scaled = scale_norms<float>(norms, layout, true);
    if (scaled.normal() && scaled.normal(scaled.scale.exponent)) {
      finite = score_direct(w, layout, std::move(scaled), pool, static_cast<float*>(out));
      done = true;
    }
  }
  if (!done) {
    ScaledNorms<double> scaled = scale_norms<double>(norms, layout, w.dtype != DType::f64);
    finite = score_wide(w, layout, std::move(scaled), pool, static_cast<char*>(out));
  }
  return finite || !check_finite;
}

}  // namespace lap::cpu
