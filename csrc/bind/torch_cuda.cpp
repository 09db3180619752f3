// SPDX-License-Identifier: MIT
// The CUDA kernels as operators of torch (LibTorch stable ABI: one build for torch 2.11 and later).
// Schemas stand in lap_ext/ops.py. Here: tensors to pointers on the current stream, results and
// workspaces allocated, errors raised.
//
// With check_finite the Status is copied to the host: the only wait for the device. Without it
// every operator can be captured in a CUDA graph. Strided weights are copied; prune_ writes their
// strides.
#include <cstdint>

// CPU-only torch lacks this symbol: weak, so that the library links and loads beside it too.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t, void**);

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../cuda/launch.h"
#include "../math/sums.h"
#include "check.h"
#include "tensors.h"

namespace {

namespace bind = lap::bind;
namespace cuda = lap::cuda;
using cuda::Status;
using lap::DType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void require(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "lap_ext: CUDA error: ", cudaGetErrorString(error));
}

// The device of a tensor made current, and the stream that torch works on there.
class Device {
 public:
  explicit Device(const Tensor& x) : guard_(x.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "lap_ext: expected a torch with CUDA, got one without.");
    void* stream = nullptr;
    const int32_t failed = aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream);
    STD_TORCH_CHECK(failed == 0, "lap_ext: torch tells no current CUDA stream.");
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

  // Copies to the host and waits for it.
  template <typename T>
  void read(const void* from, int64_t count, T* to) const {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    require(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_));
    require(cudaStreamSynchronize(stream_));
  }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// Scratch of torch's allocator, freed while kernels run: its next owner's come later on the stream.
class Workspace {
 public:
  Workspace(const Tensor& beside, size_t bytes)
      : memory_(torch::stable::new_empty(beside, {static_cast<int64_t>(bytes)}, ScalarType::Byte)) {
  }
  void* data() const { return memory_.mutable_data_ptr(); }
  Status status(const Device& device) const {
    Status status;
    device.read(data(), 1, &status);
    return status;
  }

 private:
  Tensor memory_;
};

uint8_t* bytes_of(const Tensor& mask) {
  return static_cast<uint8_t*>(mask.mutable_data_ptr());
}

// --- norms ------------------------------------------------------------------------------------

// Squares of doubles above 2^512 overflow, those below 2^-537 vanish: a channel of nonzero weights
// with (nearly) no energy would pass for a dead one, so such channels are computed again enlarged.
template <typename Launch>
void check_energy(const Device& device,
                  const Tensor& energy,
                  const std::string& name,
                  const Launch& launch) {
  std::vector<double> found(energy.numel());
  device.read(energy.const_data_ptr(), energy.numel(), found.data());
  if (!std::all_of(found.begin(), found.end(), [](double e) { return e - e == 0; })) {
    bind::fail_energy("factors", name);
  }
  if (std::none_of(found.begin(), found.end(), [](double e) { return e < lap::kVanishing; }))
    return;
  const Tensor enlarged = torch::stable::empty_like(energy);
  launch(lap::kEnlarge, enlarged.mutable_data_ptr<double>());
  std::vector<double> large(energy.numel());
  device.read(enlarged.const_data_ptr(), energy.numel(), large.data());
  for (size_t c = 0; c < found.size(); ++c) {
    if (found[c] < lap::kVanishing && large[c] > 0) bind::fail_energy("factors", name);
  }
}

// launch(scale, energy, workspace): one of the two energies of weight
template <typename Launch>
Tensor energy_tensor(const Device& device,
                     const Tensor& weight,
                     int64_t channels,
                     size_t workspace_bytes,
                     bool check_finite,
                     const std::string& name,
                     const Launch& launch) {
  const Tensor energy = torch::stable::new_empty(weight, {channels}, ScalarType::Double);
  const Workspace workspace(weight, workspace_bytes);
  const auto run = [&](double scale, double* to) { require(launch(scale, to, workspace.data())); };
  run(1.0, energy.mutable_data_ptr<double>());
  if (!check_finite) return energy;
  const Status status = workspace.status(device);
  if (status.bad_count != 0) {
    bind::fail_not_finite("factors", name, static_cast<int64_t>(status.bad_count), status.first());
  }
  if (weight.scalar_type() == ScalarType::Double) check_energy(device, energy, name, run);
  return energy;
}

Tensor row_energy(const Tensor& weight, bool check_finite, const std::string& name) {
  if (weight.dim() < 1) bind::fail("factors", "expected at least 1 dimension.");
  const DType dtype = bind::dtype_of("factors", weight);
  const Device device(weight);
  const Tensor x = torch::stable::contiguous(weight);
  const int64_t rows = weight.sizes()[0];
  const int64_t row_size = rows == 0 ? 0 : weight.numel() / rows;
  const cuda::Weight shape = {x.const_data_ptr(), dtype, {rows, row_size, 1, 1}};
  return energy_tensor(device, x, rows, cuda::row_energy_workspace(shape), check_finite, name,
                       [&](double scale, double* energy, void* workspace) {
                         return cuda::launch_row_energy(shape, scale, check_finite, energy,
                                                        workspace, device.stream());
                       });
}

Tensor col_energy(const Tensor& weight,
                  int64_t groups,
                  bool check_finite,
                  const std::string& name) {
  if (weight.dim() < 2) bind::fail("factors", "expected at least 2 dimensions.");
  const DType dtype = bind::dtype_of("factors", weight);
  const Device device(weight);
  const Tensor x = torch::stable::contiguous(weight);
  const auto sizes = weight.sizes();
  const lap::Layout s = bind::weight_shape("factors", sizes, weight.dim(), sizes[1] * groups,
                                           sizes[0], groups, false);
  const cuda::Weight shape = {x.const_data_ptr(), dtype, s};
  return energy_tensor(device, x, groups * s.cols, cuda::col_energy_workspace(shape), check_finite,
                       name, [&](double scale, double* energy, void* workspace) {
                         return cuda::launch_col_energy(shape, scale, check_finite, energy,
                                                        workspace, device.stream());
                       });
}

// Two passes: one launcher after the other.
std::tuple<Tensor, Tensor> energies(const Tensor& weight,
                                    int64_t groups,
                                    bool check_finite,
                                    const std::string& name) {
  const Tensor x = torch::stable::contiguous(weight);  // copied once if at all
  return {row_energy(x, check_finite, name), col_energy(x, groups, check_finite, name)};
}

// --- weights ----------------------------------------------------------------------------------

// One contiguous weight with its norms: pointers into tensors it holds.
struct Weight {
  const char* op;
  bool transposed;
  Tensor w, in_norm, out_norm;
  cuda::Weight x;
  lap::Norms norms;

  Weight(const char* name,
         const Tensor& weight,
         const Tensor& in,
         const Tensor& out,
         int64_t groups,
         bool is_transposed)
      : op(name),
        transposed(is_transposed),
        w(torch::stable::contiguous(weight)),
        in_norm(torch::stable::contiguous(in)),
        out_norm(torch::stable::contiguous(out)) {
    if (in.scalar_type() != ScalarType::Double || out.scalar_type() != ScalarType::Double) {
      bind::fail(op, "expected in_norm and out_norm of float64.");
    }
    const lap::Layout s = bind::weight_shape(op, weight.sizes(), weight.dim(), in.numel(),
                                             out.numel(), groups, transposed);
    x = {w.const_data_ptr(), bind::dtype_of(op, w), s};
    const double* in_data = in_norm.const_data_ptr<double>();
    const double* out_data = out_norm.const_data_ptr<double>();
    norms = {transposed ? in_data : out_data, transposed ? out_data : in_data};
  }

  // Raises what the run found.
  void check(const Device& device, const Status& status) const {
    for (const int which : {transposed ? 0 : 1, transposed ? 1 : 0}) {  // in_norm first
      if (!status.bad_norm(which)) continue;
      const int64_t i = status.first_norm(which);
      const bool is_in = (which == 0) == transposed;
      double value = 0;
      device.read((which == 0 ? norms.row : norms.col) + i, 1, &value);
      bind::fail(op, std::string("expected finite norms >= 0 in ") +
                         (is_in ? "in_norm" : "out_norm") + ", got " + std::to_string(value) +
                         " at index " + std::to_string(i) + ".");
    }
    if (status.bad_count != 0) {
      bind::fail_not_finite(op, "w", static_cast<int64_t>(status.bad_count), status.first());
    }
    if (status.out_of_range != 0) bind::fail_range(op);
  }
};

Tensor score(const Tensor& w,
             const Tensor& in_norm,
             const Tensor& out_norm,
             int64_t groups,
             bool transposed,
             bool check_finite) {
  const Device device(w);
  const Weight weight("score", w, in_norm, out_norm, groups, transposed);
  Tensor out = torch::stable::new_empty(
      w, w.sizes(), weight.x.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float);
  const Workspace workspace(w, cuda::score_workspace(weight.x));
  require(cuda::launch_score(weight.x, weight.norms, check_finite, out.mutable_data_ptr(),
                             workspace.data(), device.stream()));
  if (check_finite) weight.check(device, workspace.status(device));
  return out;
}

// mask and, with target, prune_: its second kernel reads the Status on the device.
Tensor select_mask(const Device& device,
                   const Weight& weight,
                   int64_t keep,
                   const std::optional<Tensor>& eligible,
                   bool check_finite,
                   const lap::Strided* target) {
  if (keep < 0) bind::fail(weight.op, "expected keep >= 0, got " + std::to_string(keep) + ".");
  const uint8_t* may = eligible ? bind::eligible_of(weight.op, *eligible, weight.w) : nullptr;
  Tensor mask = torch::stable::new_empty(weight.w, weight.w.sizes(), ScalarType::Bool);
  const Workspace workspace(weight.w, cuda::mask_workspace(weight.x));
  require(cuda::launch_mask(weight.x, weight.norms, may, keep, check_finite, bytes_of(mask),
                            workspace.data(), device.stream()));
  if (target != nullptr) {
    require(cuda::launch_zero(*target, bytes_of(mask), check_finite, workspace.data(),
                              device.stream()));
  }
  if (check_finite) weight.check(device, workspace.status(device));
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
  const Device device(w);
  const Weight weight("mask", w, in_norm, out_norm, groups, transposed);
  return select_mask(device, weight, keep, mask, check_finite, nullptr);
}

Tensor prune_(const Tensor& w,
              const Tensor& in_norm,
              const Tensor& out_norm,
              int64_t keep,
              const std::optional<Tensor>& mask,
              int64_t groups,
              bool transposed,
              bool check_finite) {
  const Device device(w);
  const Weight weight("prune_", w, in_norm, out_norm, groups, transposed);
  const int dims = static_cast<int>(w.dim());
  lap::Strided target;
  if (dims > lap::kMaxDims || !lap::make_strided(w.mutable_data_ptr(), weight.x.dtype, dims,
                                                 w.sizes().data(), w.strides().data(), &target)) {
    bind::fail("prune_", "expected w of at most 8 dimensions.");
  }
  return select_mask(device, weight, keep, mask, check_finite, &target);
}

// --- lists of scores --------------------------------------------------------------------------

// A list of score tensors as the core takes it; holds contiguous copies where it had to make them.
struct Scores {
  const char* op;
  DType dtype;
  std::vector<Tensor> held;
  std::vector<cuda::Source> sources;
  int64_t size = 0;

  Scores(const char* name, const std::vector<Tensor>& scores) : op(name) {
    dtype = bind::dtype_of(op, scores[0]);
    for (const Tensor& s : scores) {
      if (s.scalar_type() != scores[0].scalar_type()) {
        bind::fail(op, "expected scores of one dtype.");
      }
      if (s.get_device_index() != scores[0].get_device_index()) {
        bind::fail(op, "expected scores on one device.");
      }
      held.push_back(torch::stable::contiguous(s));
      sources.push_back({held.back().const_data_ptr(), s.numel(), nullptr, nullptr});
      size += s.numel();
    }
  }
  int count() const { return static_cast<int>(sources.size()); }
  size_t workspace() const { return cuda::topk_mask_workspace(sources.data(), count(), dtype); }

  void check(const Status& status) const {
    if (status.bad_count == 0) return;
    const std::string name =
        count() == 1 ? "scores" : "scores[" + std::to_string(status.source()) + "]";
    bind::fail_nan(op, name, static_cast<int64_t>(status.bad_count), status.first());
  }
};

std::vector<Tensor> topk_mask(const std::vector<Tensor>& scores,
                              int64_t keep,
                              const std::vector<Tensor>& masks,
                              bool check_finite) {
  if (keep < 0) bind::fail("topk_mask", "expected keep >= 0, got " + std::to_string(keep) + ".");
  if (!masks.empty() && masks.size() != scores.size()) {
    bind::fail("topk_mask", "expected one mask per tensor of scores, or none.");
  }
  if (scores.empty()) return {};
  const Device device(scores[0]);
  Scores list("topk_mask", scores);
  std::vector<Tensor> out;
  for (size_t t = 0; t < scores.size(); ++t) {
    out.push_back(torch::stable::new_empty(scores[t], scores[t].sizes(), ScalarType::Bool));
    list.sources[t].mask = bytes_of(out[t]);
    if (!masks.empty())
      list.sources[t].eligible = bind::eligible_of("topk_mask", masks[t], scores[t]);
  }
  const Workspace workspace(scores[0], list.workspace());
  require(cuda::launch_topk_mask(list.sources.data(), list.count(), list.dtype, keep, check_finite,
                                 workspace.data(), device.stream()));
  if (check_finite) list.check(workspace.status(device));
  return out;
}

Tensor kth_largest(const std::vector<Tensor>& scores, int64_t k, bool check_finite) {
  if (scores.empty()) bind::fail("kth_largest", "expected at least one tensor of scores.");
  const Device device(scores[0]);
  const Scores list("kth_largest", scores);
  if (k < 1 || k > list.size) {
    bind::fail("kth_largest", "expected 1 <= k <= " + std::to_string(list.size) +
                                  " (the number of scores), got " + std::to_string(k) + ".");
  }
  Tensor out = torch::stable::new_empty(
      scores[0], {}, list.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float);
  const Workspace workspace(scores[0], list.workspace());
  require(cuda::launch_kth_largest(list.sources.data(), list.count(), list.dtype, k, check_finite,
                                   out.mutable_data_ptr(), workspace.data(), device.stream()));
  if (check_finite) list.check(workspace.status(device));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lap_ext, CUDA, m) {
  m.impl("row_energy", TORCH_BOX(&row_energy));
  m.impl("col_energy", TORCH_BOX(&col_energy));
  m.impl("energies", TORCH_BOX(&energies));
  m.impl("score", TORCH_BOX(&score));
  m.impl("mask", TORCH_BOX(&mask));
  m.impl("prune_", TORCH_BOX(&prune_));
  m.impl("topk_mask", TORCH_BOX(&topk_mask));
  m.impl("kth_largest", TORCH_BOX(&kth_largest));
}
