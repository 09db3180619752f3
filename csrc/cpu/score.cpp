// SPDX-License-Identifier: MIT
// One reading of w, one writing of the scores: 8 bytes a float weight.
#include "score.h"

#include <cmath>

namespace lap::cpu {
namespace {

constexpr int64_t kChunk = int64_t{1} << 16;  // elements a worker takes at a time

// Calls piece(x, col_norm, row_norm, first, count) over all of w, in parallel; piece returns
// whether its weights are finite.
template <typename Float, typename Piece>
bool for_all_pieces(const Strided& w,
                    const Layout& layout,
                    const Norms<Float>& norms,
                    const Pool& pool,
                    const Piece& piece) {
  std::atomic<bool> finite{true};
  for_each_chunk(pool, ceil_div(w.size, kChunk), [&](int, int64_t c) {
    Scratch scratch;
    const int64_t end = std::min(w.size, (c + 1) * kChunk);
    for (int64_t begin = c * kChunk; begin < end; begin += kBlock) {
      for_each_piece(w, layout, norms, begin, std::min(kBlock, end - begin), &scratch,
                     [&](const void* x, const Float* col, Float row, int64_t first, int64_t count) {
                       if (!piece(x, col, row, begin + first, count)) finite = false;
                     });
    }
  });
  return finite;
}

// Products of the unscaled norms are normal floats: plain float arithmetic.
bool score_direct(
    const Strided& w, const Layout& layout, Norms<float> norms, const Pool& pool, float* out) {
  const auto run = kernels().score[static_cast<int>(w.dtype)];
  norms.unscale();
  return for_all_pieces(
      w, layout, norms, pool,
      [&](const void* x, const float* col, float row, int64_t first, int64_t count) {
        return run(x, col, row, count, out + first) < KeyTraits<int32_t>::kInfinity;
      });
}

// Scaled norms in double; the scale 2^exponent is multiplied back in two halves at the end, unless
// the norms can carry it.
bool score_wide(
    const Strided& w, const Layout& layout, Norms<double> norms, const Pool& pool, char* out) {
  const auto run = kernels().wide_score[static_cast<int>(w.dtype)];
  const int64_t item = w.dtype == DType::f64 ? 8 : 4;
  const int carried = norms.normal(norms.exponent) ? norms.exponent : norms.exponent % 2;
  for (double& norm : norms.row) norm = std::ldexp(norm, carried);
  const double scale = std::ldexp(1.0, (norms.exponent - carried) / 2);
  return for_all_pieces(
      w, layout, norms, pool,
      [&](const void* x, const double* col, double row, int64_t first, int64_t count) {
        return run(x, col, row, scale, count, out + first * item) < KeyTraits<int64_t>::kInfinity;
      });
}

}  // namespace

bool score(const Strided& w,
           const Layout& layout,
           const double* row_norm,
           const double* col_norm,
           bool check_finite,
           const Pool& pool,
           void* out) {
  bool finite = true;
  bool done = false;
  if (w.dtype != DType::f64) {
    Norms<float> norms = scaled_norms<float>(row_norm, col_norm, layout, true);
    if (norms.normal() && norms.normal(norms.exponent)) {
      finite = score_direct(w, layout, std::move(norms), pool, static_cast<float*>(out));
      done = true;
    }
  }
  if (!done) {
    Norms<double> norms = scaled_norms<double>(row_norm, col_norm, layout, w.dtype != DType::f64);
    finite = score_wide(w, layout, std::move(norms), pool, static_cast<char*>(out));
  }
  return finite || !check_finite;
}

}  // namespace lap::cpu
