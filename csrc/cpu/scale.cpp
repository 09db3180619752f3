// SPDX-License-Identifier: MIT
#include "scale.h"

#include <algorithm>

#include "float_env.h"

namespace lap::cpu {
namespace {

constexpr int64_t kRowsPerEntry = 32;  // rows an entry must serve to be repeated: 3 % of w

NormRange range_of(const double* norm, int64_t n) {
  NormRange range = NormRange::none();
  for (int64_t i = 0; i < n; ++i) range = with(range, norm[i]);
  return range;
}

// The norms changed one by one, columns repeated over the window where that pays.
template <typename Float, typename Row, typename Col>
ScaledNorms<Float> laid_out(const Norms& norms,
                            const Layout& layout,
                            const Row& changed_row,
                            const Col& changed_col) {
  ScaledNorms<Float> out;
  out.expanded = layout.window > 1 && layout.group_rows() >= kRowsPerEntry;
  const int64_t repeat = out.expanded ? layout.window : 1;
  out.row.resize(layout.rows);
  out.col.resize(layout.channels() * repeat);
  for (int64_t r = 0; r < layout.rows; ++r) out.row[r] = changed_row(norms.row[r]);
  for (int64_t c = 0; c < layout.channels(); ++c) {
    std::fill_n(out.col.begin() + c * repeat, repeat, changed_col(norms.col[c]));
  }
  return out;
}

template <typename Float>
bool plain(const Norms& norms, const Layout& layout, bool rounded) {
  const ScaledNorms<Float> scaled = scale_norms<Float>(norms, layout, rounded);
  return scaled.normal() && scaled.normal(scaled.scale.exponent);
}

}  // namespace

template <typename Float>
ScaledNorms<Float> scale_norms(const Norms& norms, const Layout& layout, bool rounded) {
  const FloatEnv env;
  const NormRange row = range_of(norms.row, layout.rows);
  const NormRange col = range_of(norms.col, layout.channels());
  const ScaleBy scale_row(exponent_of(row));
  const ScaleBy scale_col(exponent_of(col));
  ScaledNorms<Float> out = laid_out<Float>(
      norms, layout, [&](double norm) { return static_cast<Float>(scale_row(norm, rounded)); },
      [&](double norm) { return static_cast<Float>(scale_col(norm, rounded)); });
  out.scale = scale_of(row, col);
  return out;
}

ScaledNorms<double> unscaled_norms(const Norms& norms, const Layout& layout, bool rounded) {
  const auto plain = [&](double norm) { return rounded ? round24(norm) : norm; };
  return laid_out<double>(norms, layout, plain, plain);
}

template <typename Float>
void ScaledNorms<Float>::unscale() {
  for (Float& norm : row) norm = std::ldexp(norm, scale.exponent);
  scale.exponent = 0;
}

bool has_plain_scores(DType dtype, const Norms& norms, const Layout& layout) {
  return dtype == DType::f64 ? plain<double>(norms, layout, false)
                             : plain<float>(norms, layout, true);
}

template struct ScaledNorms<float>;
template struct ScaledNorms<double>;
template ScaledNorms<float> scale_norms(const Norms&, const Layout&, bool);
template ScaledNorms<double> scale_norms(const Norms&, const Layout&, bool);

}  // namespace lap::cpu
