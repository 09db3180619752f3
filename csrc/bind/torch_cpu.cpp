// SPDX-License-Identifier: MIT
// The CPU core as operators of torch (LibTorch stable ABI: one build for torch 2.11 and later).
// Their schemas stand in lap_ext/ops/schema.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "../cpu/isa.h"
#include "../cpu/scale.h"
#include "../cpu/select.h"
#include "check.h"
#include "chunk_operators.h"
#include "cpu_core.h"
#include "operators.h"
#include "structure_operators.h"
#include "torch_arrays.h"

namespace {

namespace bind = lap::bind;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Adds what CpuCore needs: the threads, and what to say where prune_ cannot write.
struct TorchCpuArrays : bind::TorchArrays {
  static constexpr const char* kNotInPlace = "w of at most 8 strides";

  static lap::cpu::Pool pool() {
    return lap::cpu::thread_pool(static_cast<int>(torch::stable::get_num_threads()));
  }
};

using Core = bind::CpuCore<TorchCpuArrays>;
using Operators = bind::Operators<Core>;
using ChunkOperators = bind::ChunkOperators<Core>;
using StructureOperators = bind::StructureOperators<Core>;

// One of the weights that are ranked together. Its scores are stored only where its norms multiply
// to more or less than their type can hold; an empty row_norm says that w is scores.
struct Ranked {
  Tensor held;  // keeps alive what source points to
  std::optional<bind::Weight<Core>> weight;
  Core::Source source;

  Ranked(const Core& core,
         const char* op,
         const std::string& name,
         const Tensor& w,
         const Tensor& row_norm,
         const Tensor& col_norm,
         int64_t groups,
         bool check_finite)
      : held(w) {
    if (row_norm.numel() == 0) {
      source = core.source(op, w, &held);
      return;
    }
    weight.emplace(core, op, w, col_norm, row_norm, groups, false, check_finite);
    source = Core::source_of(*weight);
    source.absolute = lap::cpu::has_plain_scores(source.x.dtype, source.norms, source.layout);
    if (source.absolute) return;
    held = Operators::scores_of(core, *weight, name, check_finite);
    source = core.source(op, held, &held);
  }
};

std::vector<Tensor> global_mask(const std::vector<Tensor>& w,
                                const std::vector<Tensor>& row_norm,
                                const std::vector<Tensor>& col_norm,
                                const std::vector<int64_t>& groups,
                                int64_t keep,
                                const std::vector<Tensor>& masks,
                                bool check_finite) {
  constexpr const char* op = "global_mask";
  bind::check_keep(op, keep);
  if (row_norm.size() != w.size() || col_norm.size() != w.size() || groups.size() != w.size() ||
      (!masks.empty() && masks.size() != w.size())) {
    bind::fail(op, {"one row_norm, col_norm, groups and mask per weight"});
  }
  if (w.empty()) return {};
  const Core core(w[0]);
  const auto name = [](int64_t t) { return "w[" + std::to_string(t) + "]"; };
  std::vector<Ranked> ranked;
  std::vector<Tensor> out;
  std::vector<Core::Source> sources;
  ranked.reserve(w.size());
  for (size_t t = 0; t < w.size(); ++t) {
    if ((w[t].scalar_type() == ScalarType::Double) != (w[0].scalar_type() == ScalarType::Double)) {
      bind::fail(op, {"weights that are all float64, or none"});
    }
    ranked.emplace_back(core, op, name(t), w[t], row_norm[t], col_norm[t], groups[t], check_finite);
    sources.push_back(ranked[t].source);
    out.push_back(core.empty<bool>(w[t], TorchCpuArrays::sizes(w[t])));
    sources[t].mask = static_cast<uint8_t*>(out[t].mutable_data_ptr());
    if (!masks.empty()) sources[t].eligible = TorchCpuArrays::eligible(op, masks[t], w[t]);
  }
  const bind::Problems problems = core.select(sources, keep, check_finite);
  Operators::raise_weight(op, name(problems.source), problems);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lap_ext, CPU, m) {
  bind::implement<Operators>(m);
  m.impl("global_mask", TORCH_BOX(&global_mask));
  m.impl("count_keys", TORCH_BOX(&ChunkOperators::count_keys));
  m.impl("key_histogram", TORCH_BOX(&ChunkOperators::key_histogram));
  m.impl("squares_above", TORCH_BOX(&ChunkOperators::squares_above));
  m.impl("threshold_mask", TORCH_BOX(&ChunkOperators::threshold_mask));
  m.impl("random_scores_", TORCH_BOX(&ChunkOperators::random_scores_));
  m.impl("masked_zero_", TORCH_BOX(&ChunkOperators::masked_zero_));
  m.impl("nonzero_mask", TORCH_BOX(&ChunkOperators::nonzero_mask));
  bind::implement_structures<StructureOperators>(m);
}

// The parts of this thread's last failure, 0 to 4 (check.h).
extern "C" __attribute__((visibility("default"))) const char* lap_ext_mistake(int part) {
  return bind::part_of_last_mistake(part);
}

// The SIMD level in use; nothing when LAP_EXT_ISA asks for one that this CPU lacks.
extern "C" __attribute__((visibility("default"))) const char* lap_ext_isa() {
  return lap::cpu::level_is_usable() ? lap::cpu::kernels().name : nullptr;
}
