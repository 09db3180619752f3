// SPDX-License-Identifier: MIT
// The norms of one layer as the score kernels need them: scaled (math/scale.h), rounded to the
// score's precision, in its type.
#pragma once

#include <vector>

#include "../math/dtype.h"
#include "../math/layout.h"
#include "../math/scale.h"

namespace lap::cpu {

template <typename Float>
struct ScaledNorms {
  std::vector<Float> row;  // [rows]
  std::vector<Float> col;  // [groups * cols], or [groups * cols * window] when expanded
  bool expanded = false;   // col repeats each entry over the window: a row of w has a row of it
  Scale scale = {0, 1};

  // Is the product of any two nonzero entries a normal number, also times 2^shift?
  bool normal() const { return scale.normal<Float>(); }
  bool normal(int shift) const { return scale.normal<Float>(shift); }

  // Puts the scale back into row, so that products are the true ones; normal(scale.exponent) must
  // hold.
  void unscale();
};

// rounded: to float's 24 bits (in Float = double: the wide form of math/score.h).
template <typename Float>
ScaledNorms<Float> scale_norms(const Norms& norms, const Layout& layout, bool rounded);

// The norms as they are, in double: rounded to float's 24 bits, or not.
ScaledNorms<double> unscaled_norms(const Norms& norms, const Layout& layout, bool rounded);

// Whether every product of two nonzero norms is a normal number of the scores' type, with nothing
// scaled: then |w| * (row_norm * col_norm) in this type is the score.
bool has_plain_scores(DType dtype, const Norms& norms, const Layout& layout);

extern template struct ScaledNorms<float>;
extern template struct ScaledNorms<double>;
extern template ScaledNorms<float> scale_norms(const Norms&, const Layout&, bool);
extern template ScaledNorms<double> scale_norms(const Norms&, const Layout&, bool);

}  // namespace lap::cpu
