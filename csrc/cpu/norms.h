// SPDX-License-Identifier: MIT
// Energies (squared norms) of a weight's channels, and the norms as the score kernels need them.
#pragma once

#include <vector>

#include "parallel.h"
#include "weight.h"

namespace lap::cpu {

// energy[r] = sum of squares of row r of x [rows, row_size], each element first times scale
void row_energy(const Strided& x, int64_t rows, double scale, const Pool& pool, double* energy);

// energy[g * cols + c] = sum over n and k of x[g * (rows / groups) + n, c, k]^2, likewise
void col_energy(
    const Strided& x, const Layout& layout, double scale, const Pool& pool, double* energy);

// Both, with the same bits (for scale 1), from one reading of x.
void energies(const Strided& x,
              const Layout& layout,
              const Pool& pool,
              double* row,   // [rows] out
              double* col);  // [groups * cols] out

// The norms of one layer, scaled by powers of two so that the larger vector entries lie in
// [0.5, 1): products cannot overflow and the scale drops out of every comparison.
template <typename Float>
struct Norms {
  std::vector<Float> row;  // [rows]
  std::vector<Float> col;  // [groups * cols], or [groups * cols * window] when expanded
  bool expanded = false;   // col repeats each entry over the window: a row is one straight run
  double least = 1;        // smallest product of two nonzero entries
  int exponent = 0;        // true product = stored product * 2^exponent

  // Is the product of any two nonzero entries, times 2^shift, a normal number?
  bool normal(int shift = 0) const;

  // Puts the scale back into row, so that products are the true ones; normal(exponent) must hold.
  void unscale();
};

// Whether every product of two nonzero norms is a normal number of the scores' type, with nothing
// scaled: then |w| * (row_norm * col_norm) in this type is the score.
bool has_plain_scores(DType dtype,
                      const double* row_norm,
                      const double* col_norm,
                      const Layout& layout);

// Rounds the norms to float's 24 bits when rounded is set (in Float = double: the wide form).
template <typename Float>
Norms<Float> scaled_norms(const double* row_norm,
                          const double* col_norm,
                          const Layout& layout,
                          bool rounded);

extern template Norms<float> scaled_norms(const double*, const double*, const Layout&, bool);
extern template Norms<double> scaled_norms(const double*, const double*, const Layout&, bool);

}  // namespace lap::cpu
