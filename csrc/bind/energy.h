// SPDX-License-Identifier: MIT
// What the two CPU bindings share beyond check.h: results of the core turned into errors.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "../cpu/norms.h"
#include "../cpu/select.h"
#include "../math/sums.h"
#include "check.h"

namespace lap::bind {

// Runs energy_of(scale, energy) and checks its result: finite, and not vanished. Squares of doubles
// below 2^-537 vanish: a channel of nonzero weights with (nearly) no energy would pass for a dead
// one, so such channels are computed again enlarged.
template <typename Energy>
void checked_energy(const Strided& x,
                    int64_t channels,
                    bool check_finite,
                    const std::string& name,
                    double* energy,
                    const Energy& energy_of) {
  constexpr const char* kOp = "factors";
  energy_of(1.0, energy);
  if (!check_finite) return;
  const auto is_finite = [](double e) { return e - e == 0; };
  const auto is_small = [](double e) { return e < kVanishing; };
  if (!std::all_of(energy, energy + channels, is_finite)) {
    const cpu::NotFinite found = cpu::find_not_finite(x, false);
    if (found.count > 0) fail_not_finite(kOp, name, found.count, found.first);
    fail_energy(kOp, name);
  }
  if (x.dtype != DType::f64 || std::none_of(energy, energy + channels, is_small)) return;
  std::vector<double> enlarged(channels);
  energy_of(kEnlarge, enlarged.data());
  for (int64_t c = 0; c < channels; ++c) {
    if (is_small(energy[c]) && enlarged[c] > 0) fail_energy(kOp, name);
  }
}

// Both energies from one reading of x, checked like each alone. Only what must be computed again
// enlarged is read again.
inline void checked_energies(const Strided& x,
                             const Layout& layout,
                             bool check_finite,
                             const std::string& name,
                             const cpu::Pool& pool,
                             double* row,    // [rows] out
                             double* col) {  // [groups * cols] out
  cpu::energies(x, layout, pool, row, col);
  const auto by_row = [&](double scale, double* energy) {
    if (scale != 1.0) cpu::row_energy(x, layout.rows, scale, pool, energy);
  };
  const auto by_col = [&](double scale, double* energy) {
    if (scale != 1.0) cpu::col_energy(x, layout, scale, pool, energy);
  };
  checked_energy(x, layout.rows, check_finite, name, row, by_row);
  checked_energy(x, layout.groups * layout.cols, check_finite, name, col, by_col);
}

// Raises for the first tensor of scores that holds a NaN.
inline void raise_nan(const char* op, const std::vector<cpu::Source>& sources) {
  for (size_t t = 0; t < sources.size(); ++t) {
    const cpu::NotFinite found = cpu::find_not_finite(sources[t].x, true);
    const std::string name = sources.size() == 1 ? "scores" : "scores[" + std::to_string(t) + "]";
    if (found.count > 0) fail_nan(op, name, found.count, found.first);
  }
}

inline void check_rank(const std::vector<cpu::Source>& sources, int64_t k) {
  int64_t n = 0;
  for (const cpu::Source& source : sources) n += source.x.size;
  if (k < 1 || k > n) {
    fail("kth_largest", "expected 1 <= k <= " + std::to_string(n) +
                            " (the number of scores), got " + std::to_string(k) + ".");
  }
}

}  // namespace lap::bind
