// SPDX-License-Identifier: MIT
// The CPU core for NumPy arrays (pybind11, no torch): the module lap_ext._np. lap_ext/numpy.py
// checks the arguments in the user's words; here arrays become pointers and results.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "../cpu/isa.h"
#include "../cpu/memory.h"
#include "../cpu/norms.h"
#include "../cpu/score.h"
#include "../cpu/select.h"
#include "../cpu/zero.h"
#include "check.h"
#include "energy.h"

namespace py = pybind11;

namespace {

using lap::DType;
using lap::Layout;
using lap::Strided;
using lap::cpu::Pool;
using lap::cpu::Source;
namespace bind = lap::bind;
using Doubles = py::array_t<double, py::array::c_style | py::array::forcecast>;
using Mask = py::array_t<bool, py::array::c_style | py::array::forcecast>;

Pool pool() {
  const unsigned cores = std::thread::hardware_concurrency();
  return lap::cpu::std_thread_pool(cores == 0 ? 1 : static_cast<int>(cores));
}

DType dtype_of(const char* op, const py::array& x) {
  const std::string name = py::str(x.dtype().attr("name"));
  if (name == "float32") return DType::f32;
  if (name == "float64") return DType::f64;
  if (name == "float16") return DType::f16;
  if (name == "bfloat16") return DType::bf16;
  throw py::type_error(std::string(op) + ": expected float32, float64, float16 or bfloat16, got " +
                       name + ".");
}

// A view of the elements in C order; `holder` keeps a copy alive where strides are not whole
// elements or too many.
Strided strided(const char* op, const py::array& x, py::array* holder) {
  const DType dtype = dtype_of(op, x);
  const int64_t item = lap::item_size(dtype);
  std::vector<int64_t> sizes(x.shape(), x.shape() + x.ndim());
  std::vector<int64_t> strides(x.ndim());
  bool whole = true;
  for (py::ssize_t d = 0; d < x.ndim(); ++d) {
    whole = whole && x.strides(d) % item == 0;
    strides[d] = x.strides(d) / item;
  }
  Strided out;
  if (!whole || !lap::make_strided(x.data(), dtype, static_cast<int>(x.ndim()), sizes.data(),
                                   strides.data(), &out)) {
    *holder = py::module_::import("numpy").attr("ascontiguousarray")(x);
    return strided(op, *holder, holder);
  }
  return out;
}

std::vector<py::ssize_t> shape_of(const py::array& x) {
  return std::vector<py::ssize_t>(x.shape(), x.shape() + x.ndim());
}

struct Weight {
  py::array w;
  Doubles in_norm, out_norm;
  Strided x;
  Layout layout;
  lap::Norms norms;

  Weight(const char* op,
         const py::array& weight,
         const Doubles& in,
         const Doubles& out,
         int64_t groups,
         bool transposed,
         bool check_finite)
      : w(weight), in_norm(in), out_norm(out), x(strided(op, weight, &w)) {
    const Layout shape = bind::weight_shape(op, weight.shape(), weight.ndim(), in.size(),
                                            out.size(), groups, transposed);
    layout = shape;
    if (check_finite) {
      bind::check_norms(op, "in_norm", in.data(), in.size());
      bind::check_norms(op, "out_norm", out.data(), out.size());
    }
    norms = {transposed ? in_norm.data() : out_norm.data(),
             transposed ? out_norm.data() : in_norm.data()};
  }
};

py::array_t<bool> new_mask(const py::array& like) {
  py::array_t<bool> mask(shape_of(like));
  lap::cpu::prefer_large_pages(mask.mutable_data(), mask.size());
  return mask;
}

const uint8_t* eligible_of(const char* op, const Mask& mask, const py::array& like) {
  if (mask.size() != like.size()) bind::fail(op, "expected a mask of the weights' shape.");
  return reinterpret_cast<const uint8_t*>(mask.data());
}

Doubles row_energy(const py::array& weight, bool check_finite, const std::string& name) {
  if (weight.ndim() < 1) bind::fail("factors", "expected at least 1 dimension.");
  py::array holder = weight;
  const Strided x = strided("factors", weight, &holder);
  const int64_t rows = weight.shape(0);
  Doubles out(rows);
  bind::checked_energy(
      x, rows, check_finite, name, out.mutable_data(),
      [&](double scale, double* energy) { lap::cpu::row_energy(x, rows, scale, pool(), energy); });
  return out;
}

Doubles col_energy(const py::array& weight,
                   int64_t groups,
                   bool check_finite,
                   const std::string& name) {
  if (weight.ndim() < 2) bind::fail("factors", "expected at least 2 dimensions.");
  py::array holder = weight;
  const Strided x = strided("factors", weight, &holder);
  const Layout shape = bind::weight_shape("factors", weight.shape(), weight.ndim(),
                                          weight.shape(1) * groups, weight.shape(0), groups, false);
  const Layout layout = shape;
  Doubles out(groups * shape.cols);
  bind::checked_energy(x, out.size(), check_finite, name, out.mutable_data(),
                       [&](double scale, double* energy) {
                         lap::cpu::col_energy(x, layout, scale, pool(), energy);
                       });
  return out;
}

py::array score(const py::array& w,
                const Doubles& in_norm,
                const Doubles& out_norm,
                int64_t groups,
                bool transposed,
                bool check_finite) {
  const Weight weight("score", w, in_norm, out_norm, groups, transposed, check_finite);
  const bool wide = weight.x.dtype == DType::f64;
  py::array out(wide ? py::dtype::of<double>() : py::dtype::of<float>(), shape_of(w));
  lap::cpu::prefer_large_pages(out.mutable_data(), out.nbytes());
  if (!lap::cpu::score(weight.x, weight.layout, weight.norms, check_finite, pool(),
                       out.mutable_data())) {
    const lap::cpu::NotFinite found = lap::cpu::find_not_finite(weight.x, false);
    bind::fail_not_finite("score", "w", found.count, found.first);
  }
  return out;
}

py::array_t<bool> select_mask(const char* op,
                              const Weight& weight,
                              int64_t keep,
                              const std::optional<Mask>& eligible,
                              bool check_finite) {
  py::array_t<bool> mask = new_mask(weight.w);
  Source source = {weight.x, weight.layout, weight.norms};
  if (eligible) source.eligible = eligible_of(op, *eligible, weight.w);
  source.mask = reinterpret_cast<uint8_t*>(mask.mutable_data());
  const lap::cpu::Selection selection = lap::cpu::select({source}, keep, check_finite, pool());
  if (selection.outcome == lap::cpu::Outcome::not_finite) {
    const lap::cpu::NotFinite found = lap::cpu::find_not_finite(weight.x, false);
    bind::fail_not_finite(op, "w", found.count, found.first);
  }
  if (selection.outcome == lap::cpu::Outcome::range) bind::fail_range(op);
  return mask;
}

py::array_t<bool> mask(const py::array& w,
                       const Doubles& in_norm,
                       const Doubles& out_norm,
                       int64_t keep,
                       const std::optional<Mask>& mask,
                       int64_t groups,
                       bool transposed,
                       bool check_finite) {
  const Weight weight("mask", w, in_norm, out_norm, groups, transposed, check_finite);
  return select_mask("mask", weight, keep, mask, check_finite);
}

py::array_t<bool> prune_(py::array w,
                         const Doubles& in_norm,
                         const Doubles& out_norm,
                         int64_t keep,
                         const std::optional<Mask>& mask,
                         int64_t groups,
                         bool transposed,
                         bool check_finite) {
  const Weight weight("prune_", w, in_norm, out_norm, groups, transposed, check_finite);
  py::array_t<bool> kept = select_mask("prune_", weight, keep, mask, check_finite);
  Strided target = weight.x;
  if (target.data != w.data()) bind::fail("prune_", "expected w with strides of whole elements.");
  target.data = w.mutable_data();  // refuses a read-only array
  lap::cpu::zero(target, reinterpret_cast<const uint8_t*>(kept.data()), pool());
  return kept;
}

std::vector<Source> score_sources(const char* op,
                                  const std::vector<py::array>& scores,
                                  std::vector<py::array>* held) {
  std::vector<Source> sources;
  held->reserve(scores.size());
  for (const py::array& s : scores) {
    held->push_back(s);
    Source source;
    source.x = strided(op, s, &held->back());
    if (!sources.empty() && source.x.dtype != sources[0].x.dtype) {
      throw py::type_error(std::string(op) + ": expected scores of one dtype.");
    }
    sources.push_back(source);
  }
  return sources;
}

std::vector<py::array_t<bool>> topk_mask(const std::vector<py::array>& scores,
                                         int64_t keep,
                                         const std::vector<Mask>& masks,
                                         bool check_finite) {
  if (!masks.empty() && masks.size() != scores.size()) {
    bind::fail("topk_mask", "expected one mask per array of scores, or none.");
  }
  std::vector<py::array> held;
  std::vector<Source> sources = score_sources("topk_mask", scores, &held);
  std::vector<py::array_t<bool>> out;
  for (size_t t = 0; t < scores.size(); ++t) {
    out.push_back(new_mask(scores[t]));
    sources[t].mask = reinterpret_cast<uint8_t*>(out[t].mutable_data());
    if (!masks.empty()) sources[t].eligible = eligible_of("topk_mask", masks[t], scores[t]);
  }
  const lap::cpu::Selection selection = lap::cpu::select(sources, keep, check_finite, pool());
  if (selection.outcome != lap::cpu::Outcome::ok) bind::raise_nan("topk_mask", sources);
  return out;
}

double kth_largest(const std::vector<py::array>& scores, int64_t k, bool check_finite) {
  std::vector<py::array> held;
  const std::vector<Source> sources = score_sources("kth_largest", scores, &held);
  bind::check_rank(sources, k);
  const lap::cpu::Selection selection = lap::cpu::select(sources, k, check_finite, pool());
  if (selection.outcome != lap::cpu::Outcome::ok) bind::raise_nan("kth_largest", sources);
  return selection.threshold;
}

}  // namespace

PYBIND11_MODULE(_np, m) {
  lap::cpu::kernels();  // an unusable LAP_EXT_ISA fails the import
  m.doc() = "The CPU core of lap_ext for NumPy arrays; see lap_ext.numpy.";
  m.def("row_energy", &row_energy);
  m.def("col_energy", &col_energy);
  m.def("score", &score);
  m.def("mask", &mask);
  m.def("prune_", &prune_);
  m.def("topk_mask", &topk_mask);
  m.def("kth_largest", &kth_largest);
  m.def("isa", [] { return std::string(lap::cpu::kernels().name); });
}
