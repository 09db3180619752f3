// SPDX-License-Identifier: MIT
// The CPU kernels as operators of torch (LibTorch stable ABI: one build for torch 2.11 and later).
// Schemas stand in lap_ext/ops.py. Here: tensors to pointers, results allocated, errors raised.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/isa.h"
#include "../cpu/memory.h"
#include "../cpu/norms.h"
#include "../cpu/score.h"
#include "../cpu/select.h"
#include "../cpu/zero.h"
#include "check.h"
#include "energy.h"
#include "tensors.h"

namespace {

using lap::DType;
using lap::Layout;
using lap::Strided;
using lap::cpu::Pool;
using lap::cpu::Source;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
namespace bind = lap::bind;

Pool torch_pool() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int workers, const std::function<void(int)>& body) {
            torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
              for (int64_t i = begin; i < end; ++i) body(static_cast<int>(i));
            });
          }};
}

// A view of the elements in C order; `holder` keeps a copy alive where there are too many strides.
Strided strided(const char* op, const Tensor& x, Tensor* holder) {
  const DType dtype = bind::dtype_of(op, x);
  const auto sizes = x.sizes();
  const auto strides = x.strides();
  Strided out;
  if (!lap::make_strided(x.const_data_ptr(), dtype, static_cast<int>(x.dim()), sizes.data(),
                         strides.data(), &out)) {
    *holder = torch::stable::contiguous(x);
    return strided(op, *holder, holder);
  }
  return out;
}

// One weight with its norms: pointers into tensors that outlive it.
struct Weight {
  Tensor w, in_norm, out_norm;
  Strided x;
  Layout layout;
  lap::Norms norms;

  Weight(const char* op,
         const Tensor& weight,
         const Tensor& in,
         const Tensor& out,
         int64_t groups,
         bool transposed,
         bool check_finite)
      : w(weight),
        in_norm(torch::stable::contiguous(in)),
        out_norm(torch::stable::contiguous(out)) {
    if (in.scalar_type() != ScalarType::Double || out.scalar_type() != ScalarType::Double) {
      bind::fail(op, "expected in_norm and out_norm of float64.");
    }
    x = strided(op, weight, &w);
    const Layout shape = bind::weight_shape(op, weight.sizes(), weight.dim(), in.numel(),
                                            out.numel(), groups, transposed);
    layout = shape;
    const double* in_data = in_norm.const_data_ptr<double>();
    const double* out_data = out_norm.const_data_ptr<double>();
    if (check_finite) {
      bind::check_norms(op, "in_norm", in_data, in.numel());
      bind::check_norms(op, "out_norm", out_data, out.numel());
    }
    norms = {transposed ? in_data : out_data, transposed ? out_data : in_data};
  }
};

Tensor new_mask(const Tensor& like) {
  Tensor mask = torch::stable::new_empty(like, like.sizes(), ScalarType::Bool);
  lap::cpu::prefer_large_pages(mask.mutable_data_ptr(), mask.numel());
  return mask;
}

// channels energies as a float64 tensor beside weight
template <typename Energy>
Tensor energy_tensor(const Tensor& weight,
                     const Strided& x,
                     int64_t channels,
                     bool check_finite,
                     const std::string& name,
                     const Energy& energy_of) {
  Tensor out = torch::stable::new_empty(weight, {channels}, ScalarType::Double);
  bind::checked_energy(x, channels, check_finite, name, out.mutable_data_ptr<double>(), energy_of);
  return out;
}

Tensor row_energy(const Tensor& weight, bool check_finite, const std::string& name) {
  if (weight.dim() < 1) bind::fail("factors", "expected at least 1 dimension.");
  Tensor holder = weight;
  const Strided x = strided("factors", weight, &holder);
  const int64_t rows = weight.sizes()[0];
  const Pool pool = torch_pool();
  return energy_tensor(weight, x, rows, check_finite, name, [&](double scale, double* energy) {
    lap::cpu::row_energy(x, rows, scale, pool, energy);
  });
}

Layout energy_layout(const Tensor& weight, int64_t groups) {
  if (weight.dim() < 2) bind::fail("factors", "expected at least 2 dimensions.");
  const auto sizes = weight.sizes();
  const Layout shape = bind::weight_shape("factors", sizes, weight.dim(), sizes[1] * groups,
                                          sizes[0], groups, false);
  return shape;
}

Tensor col_energy(const Tensor& weight,
                  int64_t groups,
                  bool check_finite,
                  const std::string& name) {
  const Layout layout = energy_layout(weight, groups);
  Tensor holder = weight;
  const Strided x = strided("factors", weight, &holder);
  const Pool pool = torch_pool();
  return energy_tensor(
      weight, x, groups * layout.cols, check_finite, name,
      [&](double scale, double* energy) { lap::cpu::col_energy(x, layout, scale, pool, energy); });
}

std::tuple<Tensor, Tensor> energies(const Tensor& weight,
                                    int64_t groups,
                                    bool check_finite,
                                    const std::string& name) {
  const Layout layout = energy_layout(weight, groups);
  Tensor holder = weight;
  const Strided x = strided("factors", weight, &holder);
  Tensor row = torch::stable::new_empty(weight, {layout.rows}, ScalarType::Double);
  Tensor col = torch::stable::new_empty(weight, {groups * layout.cols}, ScalarType::Double);
  bind::checked_energies(x, layout, check_finite, name, torch_pool(),
                         row.mutable_data_ptr<double>(), col.mutable_data_ptr<double>());
  return {row, col};
}

[[noreturn]] void fail_not_finite(const char* op, const std::string& name, const Weight& weight) {
  const lap::cpu::NotFinite found = lap::cpu::find_not_finite(weight.x, false);
  bind::fail_not_finite(op, name, found.count, found.first);
}

Tensor scores_of(const char* op, const std::string& name, const Weight& weight, bool check_finite) {
  const bool wide = weight.x.dtype == DType::f64;
  const ScalarType dtype = wide ? ScalarType::Double : ScalarType::Float;
  Tensor out = torch::stable::new_empty(weight.w, weight.w.sizes(), dtype);
  lap::cpu::prefer_large_pages(out.mutable_data_ptr(), out.numel() * (wide ? 8 : 4));
  if (!lap::cpu::score(weight.x, weight.layout, weight.norms, check_finite, torch_pool(),
                       out.mutable_data_ptr())) {
    fail_not_finite(op, name, weight);
  }
  return out;
}

Tensor score(const Tensor& w,
             const Tensor& in_norm,
             const Tensor& out_norm,
             int64_t groups,
             bool transposed,
             bool check_finite) {
  const Weight weight("score", w, in_norm, out_norm, groups, transposed, check_finite);
  return scores_of("score", "w", weight, check_finite);
}

Tensor select_mask(const char* op,
                   const Weight& weight,
                   int64_t keep,
                   const std::optional<Tensor>& eligible,
                   bool check_finite) {
  if (keep < 0) bind::fail(op, "expected keep >= 0, got " + std::to_string(keep) + ".");
  Tensor mask = new_mask(weight.w);
  Source source = {weight.x, weight.layout, weight.norms};
  if (eligible) source.eligible = bind::eligible_of(op, *eligible, weight.w);
  source.mask = static_cast<uint8_t*>(mask.mutable_data_ptr());
  const lap::cpu::Selection selection =
      lap::cpu::select({source}, keep, check_finite, torch_pool());
  if (selection.outcome == lap::cpu::Outcome::not_finite) fail_not_finite(op, "w", weight);
  if (selection.outcome == lap::cpu::Outcome::range) bind::fail_range(op);
  return mask;
}

Tensor mask(const Tensor& w,
            const Tensor& in_norm,
            const Tensor& out_norm,
            int64_t keep,
            const std::optional<Tensor>& mask,
            int64_t groups,
            bool transposed,
            bool check_finite) {
  const Weight weight("mask", w, in_norm, out_norm, groups, transposed, check_finite);
  return select_mask("mask", weight, keep, mask, check_finite);
}

// The threshold is known only after all of w is read, so w is written in a pass of its own.
Tensor prune_(const Tensor& w,
              const Tensor& in_norm,
              const Tensor& out_norm,
              int64_t keep,
              const std::optional<Tensor>& mask,
              int64_t groups,
              bool transposed,
              bool check_finite) {
  const Weight weight("prune_", w, in_norm, out_norm, groups, transposed, check_finite);
  Tensor kept = select_mask("prune_", weight, keep, mask, check_finite);
  Strided target = weight.x;
  if (w.const_data_ptr() != target.data) bind::fail("prune_", "expected w of at most 8 strides.");
  target.data = w.mutable_data_ptr();
  lap::cpu::zero(target, static_cast<const uint8_t*>(kept.const_data_ptr()), torch_pool());
  return kept;
}

// The sources of a list of scores; `held` keeps copies alive.
std::vector<Source> score_sources(const char* op,
                                  const std::vector<Tensor>& scores,
                                  std::vector<Tensor>* held) {
  std::vector<Source> sources;
  held->reserve(scores.size());
  for (const Tensor& s : scores) {
    if (s.scalar_type() != scores[0].scalar_type()) bind::fail(op, "expected scores of one dtype.");
    held->push_back(s);
    Source source;
    source.x = strided(op, s, &held->back());
    sources.push_back(source);
  }
  return sources;
}

std::vector<Tensor> topk_mask(const std::vector<Tensor>& scores,
                              int64_t keep,
                              const std::vector<Tensor>& masks,
                              bool check_finite) {
  if (keep < 0) bind::fail("topk_mask", "expected keep >= 0, got " + std::to_string(keep) + ".");
  if (!masks.empty() && masks.size() != scores.size()) {
    bind::fail("topk_mask", "expected one mask per tensor of scores, or none.");
  }
  std::vector<Tensor> held;
  std::vector<Source> sources = score_sources("topk_mask", scores, &held);
  std::vector<Tensor> out;
  for (size_t t = 0; t < scores.size(); ++t) {
    out.push_back(new_mask(scores[t]));
    sources[t].mask = static_cast<uint8_t*>(out[t].mutable_data_ptr());
    if (!masks.empty()) sources[t].eligible = bind::eligible_of("topk_mask", masks[t], scores[t]);
  }
  const lap::cpu::Selection selection = lap::cpu::select(sources, keep, check_finite, torch_pool());
  if (selection.outcome != lap::cpu::Outcome::ok) bind::raise_nan("topk_mask", sources);
  return out;
}

// One of the weights that are ranked together. Its scores are stored only where its norms multiply
// to more or less than their type can hold; an empty row_norm says that w is scores.
struct Ranked {
  Tensor held;  // keeps alive what source points to
  std::optional<Weight> weight;
  Source source;

  Ranked(const char* op,
         const std::string& name,
         const Tensor& w,
         const Tensor& row_norm,
         const Tensor& col_norm,
         int64_t groups,
         bool check_finite)
      : held(w) {
    if (row_norm.numel() == 0) {
      source.x = strided(op, w, &held);
      return;
    }
    weight.emplace(op, w, col_norm, row_norm, groups, false, check_finite);
    if (lap::cpu::has_plain_scores(weight->x.dtype, weight->norms, weight->layout)) {
      source = {weight->x, weight->layout, weight->norms};
      source.absolute = true;
    } else {
      held = scores_of(op, name, *weight, check_finite);
      source.x = strided(op, held, &held);
    }
  }
};

std::vector<Tensor> global_mask(const std::vector<Tensor>& w,
                                const std::vector<Tensor>& row_norm,
                                const std::vector<Tensor>& col_norm,
                                const std::vector<int64_t>& groups,
                                int64_t keep,
                                const std::vector<Tensor>& masks,
                                bool check_finite) {
  const char* op = "global_mask";
  if (keep < 0) bind::fail(op, "expected keep >= 0, got " + std::to_string(keep) + ".");
  if (row_norm.size() != w.size() || col_norm.size() != w.size() || groups.size() != w.size() ||
      (!masks.empty() && masks.size() != w.size())) {
    bind::fail(op, "expected one row_norm, col_norm, groups and mask per weight.");
  }
  const auto name = [](size_t t) { return "w[" + std::to_string(t) + "]"; };
  std::vector<Ranked> ranked;
  std::vector<Tensor> out;
  std::vector<Source> sources;
  ranked.reserve(w.size());
  for (size_t t = 0; t < w.size(); ++t) {
    if ((w[t].scalar_type() == ScalarType::Double) != (w[0].scalar_type() == ScalarType::Double)) {
      bind::fail(op, "expected weights that are all float64, or none.");
    }
    ranked.emplace_back(op, name(t), w[t], row_norm[t], col_norm[t], groups[t], check_finite);
    sources.push_back(ranked[t].source);
    out.push_back(new_mask(w[t]));
    sources[t].mask = static_cast<uint8_t*>(out[t].mutable_data_ptr());
    if (!masks.empty()) sources[t].eligible = bind::eligible_of(op, masks[t], w[t]);
  }
  const lap::cpu::Selection selection = lap::cpu::select(sources, keep, check_finite, torch_pool());
  if (selection.outcome == lap::cpu::Outcome::ok) return out;
  for (size_t t = 0; t < w.size(); ++t) {
    const Source& source = sources[t];
    const lap::cpu::NotFinite found = lap::cpu::find_not_finite(source.x, source.is_scores());
    if (found.count > 0) bind::fail_not_finite(op, name(t), found.count, found.first);
  }
  bind::fail_range(op);
}

Tensor kth_largest(const std::vector<Tensor>& scores, int64_t k, bool check_finite) {
  std::vector<Tensor> held;
  const std::vector<Source> sources = score_sources("kth_largest", scores, &held);
  bind::check_rank(sources, k);
  const lap::cpu::Selection selection = lap::cpu::select(sources, k, check_finite, torch_pool());
  if (selection.outcome != lap::cpu::Outcome::ok) bind::raise_nan("kth_largest", sources);
  const bool wide = sources[0].x.dtype == DType::f64;
  Tensor out =
      torch::stable::new_empty(scores[0], {}, wide ? ScalarType::Double : ScalarType::Float);
  if (wide) {
    *out.mutable_data_ptr<double>() = selection.threshold;
  } else {
    *out.mutable_data_ptr<float>() = static_cast<float>(selection.threshold);
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lap_ext, CPU, m) {
  m.impl("row_energy", TORCH_BOX(&row_energy));
  m.impl("col_energy", TORCH_BOX(&col_energy));
  m.impl("energies", TORCH_BOX(&energies));
  m.impl("score", TORCH_BOX(&score));
  m.impl("mask", TORCH_BOX(&mask));
  m.impl("prune_", TORCH_BOX(&prune_));
  m.impl("topk_mask", TORCH_BOX(&topk_mask));
  m.impl("global_mask", TORCH_BOX(&global_mask));
  m.impl("kth_largest", TORCH_BOX(&kth_largest));
}

// The SIMD level in use; nothing when LAP_EXT_ISA asks for one that this CPU lacks.
extern "C" __attribute__((visibility("default"))) const char* lap_ext_isa() {
  return lap::cpu::level_is_usable() ? lap::cpu::kernels().name : nullptr;
}
