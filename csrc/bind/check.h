// SPDX-License-Identifier: MIT
// What every binding checks, and the words it says it with: torch-free and NumPy-free. A user's
// mistake is a std::invalid_argument, which reaches Python as ValueError. The Python layer has
// checked shapes before, in more words; these checks keep a direct call of an operator from
// reading where it must not.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "../math/layout.h"

namespace lap::bind {

[[noreturn]] inline void fail(const std::string& op, const std::string& text) {
  throw std::invalid_argument(op + ": " + text);
}

// w [O, I / groups, *K], or [I, O / groups, *K] when transposed, with in_norm [I], out_norm [O].
inline Layout layout_of(const char* op,
                        const std::vector<int64_t>& sizes,
                        int64_t in_count,
                        int64_t out_count,
                        int64_t groups,
                        bool transposed) {
  if (sizes.size() < 2) {
    fail(op, "expected w with at least 2 dimensions [O, I, *K], got " +
                 std::to_string(sizes.size()) + ".");
  }
  Layout layout = {sizes[0], sizes[1], 1, groups};
  for (size_t d = 2; d < sizes.size(); ++d) layout.window *= sizes[d];
  if (groups < 1 || layout.rows % groups != 0) {
    fail(op, "expected groups that divide w.shape[0], got groups " + std::to_string(groups) +
                 " and w.shape[0] " + std::to_string(layout.rows) + ".");
  }
  const int64_t rows = transposed ? in_count : out_count;
  const int64_t cols = transposed ? out_count : in_count;
  if (rows != layout.rows || cols != layout.cols * groups) {
    fail(op, "expected one norm per channel of w, got in_norm [" + std::to_string(in_count) +
                 "], out_norm [" + std::to_string(out_count) + "] and w [" +
                 std::to_string(layout.rows) + ", " + std::to_string(layout.cols) +
                 ", ...] with groups " + std::to_string(groups) + ".");
  }
  return layout;
}

[[noreturn]] inline void fail_not_finite(const std::string& op,
                                         const std::string& name,
                                         int64_t count,
                                         int64_t first) {
  fail(op, "expected finite weights in " + name + ", got " + std::to_string(count) +
               " non-finite values, the first at flat index " + std::to_string(first) +
               ". Repair them, or pass check_finite=False to rank them as they come.");
}

[[noreturn]] inline void fail_nan(const std::string& op,
                                  const std::string& name,
                                  int64_t count,
                                  int64_t first) {
  fail(op, "expected scores without NaN in " + name + ", got " + std::to_string(count) +
               " NaN values, the first at flat index " + std::to_string(first) +
               ". Repair them, or pass check_finite=False to rank them as they come.");
}

[[noreturn]] inline void fail_range(const std::string& op) {
  fail(op,
       "expected products within float64's range, got scores around the threshold that underflow. "
       "Multiply w, w_prev or w_next by a power of two; a common factor changes no mask.");
}

[[noreturn]] inline void fail_energy(const std::string& op, const std::string& name) {
  fail(op, "expected squared norms within float64's range in " + name +
               ", got one that leaves it. Multiply " + name +
               " by a power of two; a common factor changes no mask.");
}

// Norms given by the user: finite and not negative.
[[noreturn]] inline void fail_norm(const char* op, const char* name, double norm, int64_t i) {
  fail(op, std::string("expected finite norms >= 0 in ") + name + ", got " + std::to_string(norm) +
               " at index " + std::to_string(i) + ".");
}

inline void check_keep(const char* op, int64_t keep) {
  if (keep < 0) fail(op, "expected keep >= 0, got " + std::to_string(keep) + ".");
}

inline void check_rank(const char* op, int64_t k, int64_t count) {
  if (k < 1 || k > count) {
    fail(op, "expected 1 <= k <= " + std::to_string(count) + " (the number of scores), got " +
                 std::to_string(k) + ".");
  }
}

}  // namespace lap::bind
