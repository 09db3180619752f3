// SPDX-License-Identifier: MIT
// The selection's launchers and its first kernel: see select.cuh. Tensors are described to the
// device in kernel parameters, kSourcesPerLaunch at a time: a copy from pageable host memory could
// not be captured in a CUDA graph.
#include <algorithm>
#include <cmath>

#include "select.cuh"
#include "select_kernels.cuh"

namespace lap::cuda {
namespace {

__device__ void describe(ListedSource* sources, const SourceBatch& batch) {
  for (int i = threadIdx.x; i < batch.count; i += blockDim.x) {
    sources[batch.begin + i] = batch.sources[i];
  }
}

// Further sources than prepare_kernel takes. Thread: one source.
__global__ void describe_kernel(ListedSource* sources, SourceBatch batch) {
  describe(sources, batch);
}

struct PrepareArgs {
  SelectArgs select;
  SourceBatch batch;
};

// Step 1, by all blocks together: clears the state, scales the norms (scale.cuh). The first block
// describes the first sources and sets the interval where no sample is taken.
__global__ void __launch_bounds__(kNormThreads, 1) prepare_kernel(PrepareArgs given) {
  const SelectArgs& args = given.select;
  State& state = *args.state;
  uint4* words = reinterpret_cast<uint4*>(args.state);
  constexpr int kWords = static_cast<int>(sizeof(State) / sizeof(uint4));
  const int stride = static_cast<int>(gridDim.x * blockDim.x);
  for (int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); i < kWords; i += stride) {
    words[i] = uint4{0, 0, 0, 0};
  }
  const bool first = blockIdx.x == 0;
  if (first) describe(args.sources, given.batch);
  Scale scale = {0, 1};
  if (args.norms.row != nullptr) {
    Status* status = args.check ? &state.status : nullptr;
    scale = grid_scale_norms(args.norms, args.rounded, args.scaled, status);
  }
  __syncthreads();
  if (!first || threadIdx.x != 0) return;
  const uint64_t worst = args.wide_keys ? ~uint64_t{0} : uint64_t{0xffffffff};
  state.scale = scale;
  if (args.plan == Plan::all) state.first = state.middle = worst;
  if (args.plan == Plan::all || args.plan == Plan::candidates) state.last = worst - 1;
}

struct Buffers {
  int64_t size = 0;  // elements of all sources
  int64_t capacity = 0;
  int sample_bits = 0;
};

Buffers plan_buffers(const Source* sources, int count) {
  Buffers plan;
  for (int i = 0; i < count; ++i) plan.size += sources[i].size;
  plan.capacity = std::max(kLeastCapacity, plan.size / kCapacityShare);
  plan.sample_bits = kLeastSampleBits;
  while (plan.sample_bits < kMostSampleBits && (int64_t{32} << plan.sample_bits) <= plan.size) {
    ++plan.sample_bits;
  }
  return plan;
}

// Divides the workspace; weight is null for raw scores. Returns the bytes used.
size_t carve(void* workspace,
             const Buffers& plan,
             int count,
             DType dtype,
             const Weight* weight,
             SelectArgs* args) {
  Carver carver(workspace);
  args->state = carver.take<State>(1);
  args->sources = carver.take<ListedSource>(count);
  if (weight != nullptr) args->scaled = take_scaled_norms(&carver, *weight);
  const int64_t rank_size = dtype == DType::f64 ? 8 : 4;
  args->sample = carver.take<char>(rank_size << plan.sample_bits);
  args->ranks = carver.take<char>(rank_size * plan.capacity);
  args->positions = carver.take<int64_t>(plan.capacity);
  args->few_ranks = carver.take<char>(rank_size * kFew);
  args->few_positions = carver.take<int64_t>(kFew);
  return carver.used();
}

void plan_interval(int64_t keep, const Buffers& buffers, SelectArgs* args) {
  const bool threshold_wanted = args->value != nullptr;
  args->sample_bits = buffers.sample_bits;
  if (keep <= 0) {
    args->plan = Plan::none;
  } else if (keep >= buffers.size && !threshold_wanted) {
    args->plan = Plan::all;
  } else if (buffers.size <= buffers.capacity) {
    args->plan = Plan::candidates;
  } else {
    args->plan = Plan::sample;
    const double kept = static_cast<double>(keep) / static_cast<double>(buffers.size);
    const int64_t sampled = int64_t{1} << buffers.sample_bits;
    args->sampled = SamplePositions(sampled, buffers.size);
    const double center = kept * static_cast<double>(sampled);
    const double margin = kDeviations * std::sqrt(center * (1 - kept)) + 2;
    args->first_sampled = static_cast<int64_t>(std::floor(center - margin));
    args->last_sampled = static_cast<int64_t>(std::ceil(center + margin));
  }
}

// Launches prepare_kernel, and describe_kernel for what it does not take.
cudaError_t launch_prepare(
    const Source* sources, int count, DType dtype, SelectArgs* args, cudaStream_t stream) {
  SourceBatch batch = {};
  bool prepared = false;
  int64_t first = 0;
  for (int i = 0; i <= count; ++i) {
    if (batch.count == kSourcesPerLaunch || (i == count && (batch.count != 0 || !prepared))) {
      const cudaError_t error =
          prepared ? launch(describe_kernel, 1, kSourcesPerLaunch, stream, args->sources, batch)
                   : launch_together(prepare_kernel, norm_blocks(args->scaled), stream,
                                     PrepareArgs{*args, batch}, kNormThreads);
      if (error != cudaSuccess) return error;
      prepared = true;
      batch.begin = i;
      batch.count = 0;
    }
    if (i == count) break;
    const Source& s = sources[i];
    const bool aligned = aligned_for_vectors(s.data, item_size(dtype), s.eligible, s.mask);
    const ListedSource listed = {s, first, args->tiles, 0, 0, aligned};
    if (i == 0) args->sole = listed;
    batch.sources[batch.count++] = listed;
    first += s.size;
    args->tiles += ceil_div(s.size, kTile);
  }
  return cudaSuccess;
}

int bits_of(int64_t x) {
  int bits = 0;
  while (x >> bits) ++bits;
  return bits;
}

cudaError_t launch_select(const Source* sources,
                          int count,
                          DType dtype,
                          const Weight* weight,
                          const Norms& norms,
                          int64_t keep,
                          bool check_finite,
                          void* value,
                          void* workspace,
                          cudaStream_t stream) {
  SelectArgs args = {};
  const Buffers buffers = plan_buffers(sources, count);
  carve(workspace, buffers, count, dtype, weight, &args);
  if (buffers.size == 0) return cudaMemsetAsync(args.state, 0, sizeof(Status), stream);
  args.count = count;
  args.norms = norms;
  if (weight != nullptr) args.layout = LayoutDividers(weight->layout);
  args.rounded = dtype != DType::f64;
  args.wide_keys = dtype == DType::f64;
  args.capacity = buffers.capacity;
  args.keep = keep < 0 ? 0 : static_cast<Count>(keep);
  args.position_bits = bits_of(buffers.size - 1);
  args.check = check_finite;
  args.value = value;
  plan_interval(keep, buffers, &args);
  const cudaError_t error = launch_prepare(sources, count, dtype, &args, stream);
  if (error != cudaSuccess) return error;
  if (weight == nullptr) return launch_score_steps(dtype, args, stream);
  const Source& w = sources[0];
  const bool rows = args.scaled.along != nullptr &&
                    aligned_for_vectors(w.data, item_size(dtype), w.eligible, w.mask);
  return rows ? launch_row_steps(dtype, args, stream) : launch_weight_steps(dtype, args, stream);
}

}  // namespace

size_t mask_workspace(const Weight& w) {
  SelectArgs args = {};
  const Source source = {w.data, w.layout.size(), nullptr, nullptr};
  return carve(nullptr, plan_buffers(&source, 1), 1, w.dtype, &w, &args);
}

cudaError_t launch_mask(const Weight& w,
                        const Norms& norms,
                        const uint8_t* eligible,
                        int64_t keep,
                        bool check_finite,
                        uint8_t* mask,
                        void* workspace,
                        cudaStream_t stream) {
  const Source source = {w.data, w.layout.size(), eligible, mask};
  return launch_select(&source, 1, w.dtype, &w, norms, keep, check_finite, nullptr, workspace,
                       stream);
}

size_t topk_mask_workspace(const Source* scores, int count, DType dtype) {
  SelectArgs args = {};
  return carve(nullptr, plan_buffers(scores, count), count, dtype, nullptr, &args);
}

cudaError_t launch_topk_mask(const Source* scores,
                             int count,
                             DType dtype,
                             int64_t keep,
                             bool check_finite,
                             void* workspace,
                             cudaStream_t stream) {
  return launch_select(scores, count, dtype, nullptr, {}, keep, check_finite, nullptr, workspace,
                       stream);
}

cudaError_t launch_kth_largest(const Source* scores,
                               int count,
                               DType dtype,
                               int64_t k,
                               bool check_finite,
                               void* value,
                               void* workspace,
                               cudaStream_t stream) {
  return launch_select(scores, count, dtype, nullptr, {}, k, check_finite, value, workspace,
                       stream);
}

}  // namespace lap::cuda
