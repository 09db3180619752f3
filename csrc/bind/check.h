// SPDX-License-Identifier: MIT
// What every binding checks, and the words it says it with: torch-free and NumPy-free. A user's
// mistake is a Failure, a std::invalid_argument, which reaches Python as ValueError; the parts of
// its text reach the Python layer beside it (lap_ext/errors.py), which adds who called. That layer
// has checked shapes before, in more words; these checks keep a direct call of an operator from
// reading where it must not.
#pragma once

#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "../math/layout.h"

namespace lap::bind {

// The parts of an error, as lap_ext/errors.py has them: option is the cure where the function has
// an option for such values. "{argument}" in a part stands for argument.
class Mistake {
 public:
  std::string expected, got, cure, option, argument;

  std::string text(const std::string& op) const {
    const std::string& way_out = option.empty() ? cure : option;
    std::string out = op + ": expected " + filled(expected);
    if (!got.empty()) out += ", got " + filled(got);
    out += ".";
    if (!way_out.empty()) out += " " + filled(way_out);
    return out;
  }

 private:
  std::string filled(std::string part) const {
    const std::string mark = "{argument}";
    for (size_t at = part.find(mark); at != std::string::npos;
         at = part.find(mark, at + argument.size())) {
      part.replace(at, mark.size(), argument);
    }
    return part;
  }
};

struct Failure : std::invalid_argument {
  Failure(const std::string& op, const Mistake& parts)
      : std::invalid_argument(parts.text(op)), mistake(parts) {}
  Mistake mistake;
};

// The parts of this thread's last failure: torch's stable ABI carries no more than a text.
inline thread_local Mistake last_mistake;

[[noreturn]] inline void fail(const std::string& op, const Mistake& mistake) {
  last_mistake = mistake;
  throw Failure(op, mistake);
}

// Part 0 to 4 of the last failure: expected, got, cure, option, argument.
inline const char* part_of_last_mistake(int part) {
  const std::string* parts[] = {&last_mistake.expected, &last_mistake.got, &last_mistake.cure,
                                &last_mistake.option, &last_mistake.argument};
  return part >= 0 && part < 5 ? parts[part]->c_str() : nullptr;
}

inline constexpr const char* kRankAsTheyCome =
    "Repair them, or pass check_finite=False to rank them as they come.";

// w [O, I / groups, *K], or [I, O / groups, *K] when transposed, with in_norm [I], out_norm [O].
inline Layout layout_of(const char* op,
                        const std::vector<int64_t>& sizes,
                        int64_t in_count,
                        int64_t out_count,
                        int64_t groups,
                        bool transposed) {
  if (sizes.size() < 2) {
    fail(op, {"w with at least 2 dimensions [O, I, *K]", std::to_string(sizes.size())});
  }
  Layout layout = {sizes[0], sizes[1], 1, groups};
  for (size_t d = 2; d < sizes.size(); ++d) layout.window *= sizes[d];
  if (groups < 1 || layout.rows % groups != 0) {
    fail(op,
         {"groups that divide w.shape[0]",
          "groups " + std::to_string(groups) + " and w.shape[0] " + std::to_string(layout.rows)});
  }
  const int64_t rows = transposed ? in_count : out_count;
  const int64_t cols = transposed ? out_count : in_count;
  if (rows != layout.rows || cols != layout.cols * groups) {
    fail(op, {"one norm per channel of w",
              "in_norm [" + std::to_string(in_count) + "], out_norm [" + std::to_string(out_count) +
                  "] and w [" + std::to_string(layout.rows) + ", " + std::to_string(layout.cols) +
                  ", ...] with groups " + std::to_string(groups)});
  }
  return layout;
}

[[noreturn]] inline void fail_not_finite(const std::string& op,
                                         const std::string& name,
                                         int64_t count,
                                         int64_t first) {
  fail(op, {"finite weights in {argument}",
            std::to_string(count) + " non-finite values, the first at flat index " +
                std::to_string(first),
            "Repair them.", kRankAsTheyCome, name});
}

[[noreturn]] inline void fail_nan(const std::string& op,
                                  const std::string& name,
                                  int64_t count,
                                  int64_t first) {
  fail(op, {"scores without NaN in {argument}",
            std::to_string(count) + " NaN values, the first at flat index " + std::to_string(first),
            "Repair them.", kRankAsTheyCome, name});
}

[[noreturn]] inline void fail_range(const std::string& op) {
  fail(op, {"products within float64's range", "scores around the threshold that underflow",
            "Multiply w, w_prev or w_next by a power of two; a common factor changes no mask."});
}

[[noreturn]] inline void fail_squared_norm(const std::string& op, const std::string& name) {
  fail(op, {"squared norms within float64's range in {argument}", "one that leaves it",
            "Multiply {argument} by a power of two; a common factor changes no mask.", "", name});
}

inline std::string number(double x) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", x);
  return text;
}

// Norms given by the user: finite and not negative.
[[noreturn]] inline void fail_norm(const char* op, const char* name, double norm, int64_t i) {
  fail(op, {"finite norms >= 0 in {argument}", number(norm) + " at index " + std::to_string(i), "",
            "", name});
}

inline void check_keep(const char* op, int64_t keep) {
  if (keep < 0) fail(op, {"keep >= 0", std::to_string(keep)});
}

inline void check_rank(const char* op, int64_t k, int64_t count) {
  if (k < 1 || k > count) {
    fail(op, {"1 <= k <= " + std::to_string(count) + " (the number of scores)", std::to_string(k)});
  }
}

}  // namespace lap::bind
