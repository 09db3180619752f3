// SPDX-License-Identifier: MIT
// The CUDA core as operators of torch (LibTorch stable ABI: one build for torch 2.11 and later).
// Their schemas stand in lap_ext/ops/schema.py.
//
// With check_finite the Status is copied to the host: the only wait for the device. Without it
// every operator can be captured in a CUDA graph. Strided weights are copied; prune_ writes their
// strides.
#include <cstdint>

// CPU-only torch lacks this symbol: weak, so that the library links and loads beside it too.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t, void**);

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "../cuda/launch.h"
#include "../math/sums.h"
#include "check.h"
#include "operators.h"
#include "structure_operators.h"
#include "torch_arrays.h"

namespace {

namespace bind = lap::bind;
namespace cuda = lap::cuda;
using bind::Axis;
using bind::Problems;
using lap::DType;
using lap::Strided;
using torch::stable::Tensor;

void require(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "lap_ext: CUDA error: ", cudaGetErrorString(error));
}

// csrc/cuda as the operators see it. The device of a tensor is current while the core lives, and
// all work goes to the stream that torch works on there.
class CudaCore {
 public:
  using Arrays = bind::TorchArrays;
  using Source = cuda::Source;
  using Weight = bind::Weight<CudaCore>;
  using Scores = bind::Scores<CudaCore>;
  using Structured = bind::Structured<CudaCore>;

  explicit CudaCore(const Tensor& x) : device_(x.get_device_index()), guard_(device_) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "lap_ext: expected a torch with CUDA, got one without.");
    void* stream = nullptr;
    const int32_t failed = aoti_torch_get_current_cuda_stream(device_, &stream);
    STD_TORCH_CHECK(failed == 0, "lap_ext: torch tells no current CUDA stream.");
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <typename T>
  Tensor empty(const Tensor& like, const bind::Sizes& sizes) const {
    return Arrays::empty<T>(like, sizes);
  }

  // The elements of x in C order: in place, or copied to *held where x is not contiguous.
  Strided view(const char* op, const Tensor& x, Tensor* held) const {
    const DType dtype = Arrays::dtype(op, x);
    *held = Arrays::contiguous(x);
    Strided out;
    out.data = held->const_data_ptr();
    out.dtype = dtype;
    out.size = x.numel();
    return out;
  }

  Source source(const char* op, const Tensor& scores, Tensor* held) const {
    if (scores.get_device_index() != device_) bind::fail(op, {"scores on one device"});
    return {view(op, scores, held).data, scores.numel(), nullptr, nullptr};
  }

  // The kernels check norms as they read them: see problems().
  void check_norms(const char*, const char*, const double*, int64_t) const {}

  // The squared norm of each row (column) of scale * w.
  Problems squared_norm(
      Axis axis, const Weight& weight, double scale, bool check, const Tensor& out) const {
    const cuda::Weight w = native(weight);
    const bool rows = axis == Axis::rows;
    const auto launch = rows ? cuda::launch_row_squared_norms : cuda::launch_col_squared_norms;
    const Tensor workspace = scratch(
        out, rows ? cuda::row_squared_norm_workspace(w) : cuda::col_squared_norm_workspace(w));
    require(launch(w, scale, check, out.mutable_data_ptr<double>(), workspace.mutable_data_ptr(),
                   stream_));
    return check ? problems(status(workspace)) : Problems{};
  }

  // Both from two readings of w, the first of which finds what is not finite.
  Problems squared_norms(const Weight& weight,
                         bool check,
                         const Tensor& row,
                         const Tensor& col) const {
    const Problems problems = squared_norm(Axis::rows, weight, 1.0, check, row);
    squared_norm(Axis::cols, weight, 1.0, false, col);
    return problems;
  }

  // Copies to the host and waits for it.
  std::vector<double> read(const Tensor& x) const {
    std::vector<double> out(x.numel());
    read(x.const_data_ptr(), x.numel(), out.data());
    return out;
  }

  Problems score(const Weight& weight, bool check_finite, const Tensor& out) const {
    const cuda::Weight w = native(weight);
    const Tensor workspace = scratch(out, cuda::score_workspace(w));
    require(cuda::launch_score(w, weight.norms, check_finite, out.mutable_data_ptr(),
                               workspace.mutable_data_ptr(), stream_));
    return check_finite ? problems(weight, status(workspace)) : Problems{};
  }

  // mask and, with pruned, prune_: its second kernel reads the Status on the device.
  Problems mask(const Weight& weight,
                const uint8_t* eligible,
                int64_t keep,
                bool check_finite,
                const Tensor& mask,
                const Tensor* pruned) const {
    Strided target;
    if (pruned != nullptr && (pruned->dim() > lap::kMaxDims ||
                              !bind::strided<Arrays>(*pruned, weight.x.dtype, &target))) {
      bind::fail(weight.op, {"w of at most 8 dimensions"});
    }
    const cuda::Weight w = native(weight);
    const Tensor workspace = scratch(mask, cuda::mask_workspace(w));
    uint8_t* kept = static_cast<uint8_t*>(mask.mutable_data_ptr());
    require(cuda::launch_mask(w, weight.norms, eligible, keep, check_finite, kept,
                              workspace.mutable_data_ptr(), stream_));
    if (pruned != nullptr) {
      target.data = pruned->mutable_data_ptr();
      require(cuda::launch_zero(target, kept, check_finite, workspace.const_data_ptr(), stream_));
    }
    return check_finite ? problems(weight, status(workspace)) : Problems{};
  }

  // Marks the k largest in the masks of a list, or writes the k-th to value.
  Problems rank(const Scores& list, int64_t k, bool check_finite, const Tensor* value) const {
    const cuda::Source* sources = list.sources.data();
    const int count = static_cast<int>(list.sources.size());
    const Tensor workspace =
        scratch(list.held[0], cuda::topk_mask_workspace(sources, count, list.dtype));
    void* work = workspace.mutable_data_ptr();
    require(value == nullptr
                ? cuda::launch_topk_mask(sources, count, list.dtype, k, check_finite, work, stream_)
                : cuda::launch_kth_largest(sources, count, list.dtype, k, check_finite,
                                           value->mutable_data_ptr(), work, stream_));
    return check_finite ? problems(status(workspace)) : Problems{};
  }

  // --- structures -----------------------------------------------------------------------------

  Problems nm_mask(const Structured& weight,
                   int64_t keep,
                   int64_t of,
                   bool rows,
                   bool check,
                   const Tensor& mask) const {
    const cuda::Weight w = native(weight);
    const Tensor workspace = scratch(mask, cuda::nm_mask_workspace(w));
    require(cuda::launch_nm_mask(w, weight.norms, {keep, of, rows}, weight.eligible, check,
                                 bytes(mask), workspace.mutable_data_ptr(), stream_));
    return check ? problems(weight, status(workspace)) : Problems{};
  }

  Problems transposable_mask(const Structured& weight,
                             bool squared,
                             bool check,
                             const Tensor& mask) const {
    const cuda::Weight w = native(weight);
    const Tensor workspace = scratch(mask, cuda::transposable_mask_workspace(w));
    require(cuda::launch_transposable_mask(w, weight.norms, squared, weight.eligible, check,
                                           bytes(mask), workspace.mutable_data_ptr(), stream_));
    return check ? problems(weight, status(workspace)) : Problems{};
  }

  Problems block_sums(const Structured& weight,
                      const lap::Blocks& blocks,
                      bool squared,
                      bool check,
                      const Tensor& sums) const {
    const cuda::Weight w = native(weight);
    const Tensor workspace = scratch(sums, cuda::block_sums_workspace(w, blocks));
    require(cuda::launch_block_sums(w, weight.norms, blocks, squared, weight.eligible, check,
                                    sums.mutable_data_ptr<double>(), workspace.mutable_data_ptr(),
                                    stream_));
    return check ? problems(weight, status(workspace)) : Problems{};
  }

  void block_mask(const Tensor& kept,
                  const lap::Layout& layout,
                  const lap::Blocks& blocks,
                  const uint8_t* eligible,
                  const Tensor& mask) const {
    const uint8_t* from = static_cast<const uint8_t*>(kept.const_data_ptr());
    require(cuda::launch_block_mask(from, layout, blocks, eligible, bytes(mask), stream_));
  }

 private:
  // Of torch's allocator, freed while kernels run: its next owner's come later on the stream.
  static Tensor scratch(const Tensor& beside, size_t bytes) {
    return Arrays::empty<uint8_t>(beside, {static_cast<int64_t>(bytes)});
  }
  // Of a Weight, or of a Structured.
  template <typename Given>
  static cuda::Weight native(const Given& weight) {
    return {weight.x.data, weight.x.dtype, weight.layout};
  }
  static uint8_t* bytes(const Tensor& mask) {
    return static_cast<uint8_t*>(mask.mutable_data_ptr());
  }

  // Copies to the host and waits for it.
  template <typename T>
  void read(const void* from, int64_t count, T* to) const {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    require(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream_));
    require(cudaStreamSynchronize(stream_));
  }
  cuda::Status status(const Tensor& workspace) const {
    cuda::Status status;
    read(workspace.const_data_ptr(), 1, &status);
    return status;
  }

  static Problems problems(const cuda::Status& status) {
    return {static_cast<int64_t>(status.bad_count), status.first(), status.source(),
            status.out_of_range != 0};
  }
  Problems problems(const Weight& weight, const cuda::Status& status) const {
    for (const bool in : {true, false}) {
      const int which = in == weight.transposed ? 0 : 1;  // in_norm is the rows' when transposed
      if (!status.bad_norm(which)) continue;
      const int64_t i = status.first_norm(which);
      double value = 0;
      read((which == 0 ? weight.norms.row : weight.norms.col) + i, 1, &value);
      bind::fail_norm(weight.op, in ? "in_norm" : "out_norm", value, i);
    }
    return problems(status);
  }
  Problems problems(const Structured& weight, const cuda::Status& status) const {
    return weight.weight ? problems(*weight.weight, status) : problems(status);
  }

  int32_t device_;
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

using Operators = bind::Operators<CudaCore>;
using StructureOperators = bind::StructureOperators<CudaCore>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(lap_ext, CUDA, m) {
  bind::implement<Operators>(m);
  bind::implement_structures<StructureOperators>(m);
}

// The parts of this thread's last failure, 0 to 4 (check.h).
extern "C" __attribute__((visibility("default"))) const char* lap_ext_mistake(int part) {
  return bind::part_of_last_mistake(part);
}
