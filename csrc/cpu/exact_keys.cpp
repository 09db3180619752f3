// SPDX-License-Identifier: MIT
#include "exact_keys.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace lap::cpu {
namespace {

bool are_finite(const double* norm, int64_t n) {
  return std::all_of(norm, norm + n, [](double x) { return is_finite(x); });
}

ScaledNorms<double> wide_norms(const Source& source) {
  if (source.is_scores()) return {};
  const FloatEnv env;
  return unscaled_norms(source.norms, source.layout, source.x.dtype != DType::f64);
}

// x as a float's key, where x >= 0 may be any double
int32_t key_of(double x) {
  if (x > 0x1.fffffep127) return KeyTraits<int32_t>::kInfinity;
  return score_key(static_cast<float>(x));
}

// |w| such that its product with any product of norms is zero or a normal float, with a margin for
// the roundings: the products lie from scale.least to 1, times 2^scale.exponent.
WeightRange range_of(const Scale& scale) {
  const double least = std::ldexp(4 * kSmallestNormal<float> / scale.least, -scale.exponent);
  const double most = std::ldexp(1.0, kExponentEnd<float> - 1 - scale.exponent);
  return {std::max(key_of(least), 1), key_of(most)};
}

}  // namespace

ExactKeys::ExactKeys(const Source& source) : source_(source), wide_(source, wide_norms(source)) {
  const Layout& layout = source.layout;
  if (source.x.dtype == DType::f64) return;
  if (source.is_scores()) {
    narrow_ = true;
    return;
  }
  narrow_ = are_finite(source.norms.row, layout.rows) &&
            are_finite(source.norms.col, layout.channels()) &&
            has_plain_scores(source.x.dtype, source.norms, layout);
  if (!narrow_) return;
  norms_ = scale_norms<float>(source.norms, layout, true);
  range_ = range_of(norms_.scale);
  norms_.unscale();
}

bool ExactKeys::fill_narrow(int64_t begin, int64_t n, Scratch* scratch, int32_t* keys) const {
  const auto kernel = kernels().structures.keys_within[static_cast<int>(source_.x.dtype)];
  bool within = true;
  for_each_with_norms(
      source_.x, source_.layout, norms_, begin, n, scratch,
      [&](const void* x, const float* col, float row, int64_t first, int64_t count) {
        within = within && kernel(x, col, row, count, range_, keys + first);
      });
  return within;
}

bool ExactKeys::fill_narrow(const Lines& lines, KeyBuffers* buffers) const {
  const auto scores = kernels().narrow[static_cast<int>(source_.x.dtype)].scores;
  for (int64_t i = 0; i < lines.count; ++i) {
    for (int64_t done = 0; done < lines.n; done += kTile) {
      const int64_t begin = lines.begin + i * lines.step + done;
      const int64_t n = std::min(kTile, lines.n - done);
      int32_t* keys = buffers->narrow.data() + i * lines.n + done;
      if (source_.is_scores()) {
        const int32_t top =
            scores(elements(source_.x, begin, n, buffers->scratch.gathered), n, keys);
        if (top > KeyTraits<int32_t>::kInfinity) buffers->finite = false;
      } else if (!fill_narrow(begin, n, &buffers->scratch, keys)) {
        return false;
      }
      if (source_.eligible != nullptr) {
        kernels().decide32.restrict_to(source_.eligible + begin, n, keys);
      }
    }
  }
  return true;
}

void ExactKeys::fill_wide(const Lines& lines, KeyBuffers* buffers) const {
  for (int64_t i = 0; i < lines.count; ++i) {
    for (int64_t done = 0; done < lines.n; done += kTile) {
      const int64_t n = std::min(kTile, lines.n - done);
      int64_t* keys = buffers->wide.data() + i * lines.n + done;
      const int64_t top =
          wide_.fill(lines.begin + i * lines.step + done, n, &buffers->scratch, keys);
      if (top >= KeyTraits<int64_t>::kInfinity) buffers->finite = false;
      for (int64_t j = 0; j < n; ++j) {  // every NaN alike
        if (keys[j] > KeyTraits<int64_t>::kInfinity) keys[j] = KeyTraits<int64_t>::kMagnitude;
      }
    }
  }
}

bool ExactKeys::narrow_values(const Lines& lines,
                              bool squared,
                              Scratch* scratch,
                              double* out) const {
  const auto kernel = kernels().structures.values_within[static_cast<int>(source_.x.dtype)];
  bool within = true;
  for (int64_t i = 0; within && i < lines.count; ++i) {
    for (int64_t done = 0; within && done < lines.n; done += kTile) {
      for_each_with_norms(
          source_.x, source_.layout, norms_, lines.begin + i * lines.step + done,
          std::min(kTile, lines.n - done), scratch,
          [&](const void* x, const float* col, float row, int64_t first, int64_t count) {
            double* to = out + i * lines.n + done + first;
            within = within && kernel(x, col, row, count, range_, squared, to);
          });
    }
  }
  return within;
}

void ExactKeys::values(const Lines& lines, bool squared, KeyBuffers* buffers, double* out) const {
  if (plain() && narrow_values(lines, squared, &buffers->scratch, out)) return;
  with_keys(lines, buffers, [&](const auto* keys) {
    using Key = std::decay_t<decltype(*keys)>;
    structure_kernels<Key>().values(keys, lines.count * lines.n, squared, out);
  });
}

bool ExactKeys::two_of_four(int64_t begin, int64_t n, KeyBuffers* buffers, uint8_t* mask) const {
  if (!plain()) return false;
  const auto kernel = kernels().structures.two_of_four_weights[static_cast<int>(source_.x.dtype)];
  bool within = true;
  for_each_with_norms(
      source_.x, source_.layout, norms_, begin, n, &buffers->scratch,
      [&](const void* x, const float* col, float row, int64_t first, int64_t count) {
        within = within && kernel(x, col, row, count, range_, mask + first);
      });
  return within;
}

}  // namespace lap::cpu
