// SPDX-License-Identifier: MIT
// Runs CUDA kernels on the CPU, for machines without a GPU: csrc/cuda/*.cu compiled by the host
// compiler with -DLAP_EMULATED. Every CUDA thread is a fiber (ucontext); blocks run one after the
// other, or all at once where they meet in grid_sync(). Device memory is plain heap memory, so
// AddressSanitizer sees every access out of bounds.
//
// Emulated: threadIdx, blockIdx, blockDim, gridDim, __syncthreads, grid_sync, shuffles (all lanes),
// atomics, shared memory (filled with garbage), memset. Threads run in a shuffled order that
// changes with every round, so that a missing barrier shows. Not emulated: timing, memory order,
// the cost of anything. A barrier that not all threads reach aborts with a message.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __launch_bounds__(...)

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
struct uint4 {
  uint32_t x, y, z, w;
};

namespace emulator {

struct Dim {
  unsigned x = 0;
};

struct Barrier {
  int expected = 0;
  int arrived = 0;
  int round = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t slots[2][32] = {};
};

struct Block {
  Dim index;
  Barrier barrier;
  std::vector<Warp> warps;
  std::map<const void*, std::unique_ptr<char[]>> shared;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Dim thread;
  Block* block = nullptr;
  int turn = 0;  // of the warp's slots
  const Barrier* waits_for = nullptr;
  int round = 0;
  bool done = false;
};

struct Grid {
  Dim blocks;
  Dim threads;
  Barrier barrier;
  const std::function<void()>* body = nullptr;
  ucontext_t scheduler;
  Fiber* current = nullptr;
  bool together = false;
};

inline Grid grid;           // NOLINT: one kernel runs at a time
inline unsigned order = 1;  // seed of the threads' order
inline int launches = 0;
inline int processor_count = 3;

inline Fiber& fiber() {
  return *grid.current;
}

inline void wait(Barrier* barrier) {
  Fiber& self = fiber();
  if (++barrier->arrived == barrier->expected) {
    barrier->arrived = 0;
    ++barrier->round;
    return;
  }
  self.waits_for = barrier;
  self.round = barrier->round;
  swapcontext(&self.context, &grid.scheduler);
}

inline void grid_sync() {
  if (!grid.together) {
    std::fprintf(stderr, "emulator: grid_sync() in a kernel launched without it\n");
    std::abort();
  }
  wait(&grid.barrier);
}

template <typename T>
T& shared(const void* tag) {
  std::unique_ptr<char[]>& room = fiber().block->shared[tag];
  if (!room) {
    room.reset(new char[sizeof(T)]);
    std::memset(room.get(), 0xcd, sizeof(T));
  }
  return *reinterpret_cast<T*>(room.get());
}

// The value that lane `from` passes to the same call; all 32 lanes call it.
template <typename T>
T exchange(T value, int from) {
  Fiber& self = fiber();
  Warp& warp = self.block->warps[self.thread.x / 32];
  uint64_t* slots = warp.slots[self.turn];
  self.turn ^= 1;
  std::memcpy(slots + self.thread.x % 32, &value, sizeof(T));
  wait(&warp.barrier);
  T other;
  std::memcpy(&other, slots + from, sizeof(T));
  return other;
}

inline void run_fiber() {
  (*grid.body)();
  fiber().done = true;
}

inline void prepare(Fiber* f, Block* block, unsigned thread) {
  constexpr size_t kStack = 64 << 10;
  if (!f->stack) f->stack.reset(new char[kStack]);
  f->thread.x = thread;
  f->block = block;
  f->turn = 0;
  f->waits_for = nullptr;
  f->done = false;
  getcontext(&f->context);
  f->context.uc_stack.ss_sp = f->stack.get();
  f->context.uc_stack.ss_size = kStack;
  f->context.uc_link = &grid.scheduler;
  makecontext(&f->context, run_fiber, 0);
}

// Runs blocks begin .. end-1 at the same time.
inline void run_blocks(unsigned begin, unsigned end) {
  static std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Block> blocks(end - begin);
  const unsigned threads = grid.threads.x;
  const size_t count = size_t{threads} * blocks.size();
  while (fibers.size() < count) fibers.push_back(std::make_unique<Fiber>());
  grid.barrier = {static_cast<int>(count), 0, 0};
  for (unsigned b = 0; b < blocks.size(); ++b) {
    blocks[b].index.x = begin + b;
    blocks[b].barrier.expected = static_cast<int>(threads);
    blocks[b].warps.resize(threads / 32);
    for (Warp& warp : blocks[b].warps) warp.barrier.expected = 32;
    for (unsigned t = 0; t < threads; ++t) {
      prepare(fibers[size_t{b} * threads + t].get(), &blocks[b], t);
    }
  }
  for (size_t live = count; live > 0;) {
    bool moved = false;
    order = order * 1664525u + 1013904223u;
    const size_t start = order >> 8;
    const size_t wanted = 2 * ((order >> 4) % 64) + 1;
    const size_t stride = std::gcd(wanted, count) == 1 ? wanted : 1;
    for (size_t i = 0; i < count; ++i) {
      Fiber& f = *fibers[(start + i * stride) % count];
      if (f.done || (f.waits_for != nullptr && f.waits_for->round == f.round)) continue;
      f.waits_for = nullptr;
      grid.current = &f;
      swapcontext(&grid.scheduler, &f.context);
      moved = true;
      live -= f.done;
    }
    if (!moved) {
      std::fprintf(stderr, "emulator: a barrier that not all threads reach\n");
      std::abort();
    }
  }
}

inline void start(unsigned blocks, int threads, const std::function<void()>& body, bool together) {
  if (blocks == 0 || threads <= 0 || threads > 1024) {
    std::fprintf(stderr, "emulator: invalid launch\n");
    std::abort();
  }
  ++launches;
  grid.blocks.x = blocks;
  grid.threads.x = static_cast<unsigned>((threads + 31) / 32 * 32);
  grid.body = &body;
  grid.together = together;
  if (together) return run_blocks(0, blocks);
  for (unsigned b = 0; b < blocks; ++b) run_blocks(b, b + 1);
}

template <typename Body>
void launch(unsigned blocks, int threads, cudaStream_t, const Body& body) {
  start(blocks, threads, body, false);
}
template <typename Body>
void launch_together(unsigned blocks, int threads, cudaStream_t, const Body& body) {
  start(blocks, threads, body, true);
}

}  // namespace emulator

#define threadIdx (::emulator::fiber().thread)
#define blockIdx (::emulator::fiber().block->index)
#define blockDim (::emulator::grid.threads)
#define gridDim (::emulator::grid.blocks)

// One variable per block and place in the source (each template instance has its own).
#define LAP_EMULATED_SHARED(type, name) \
  static char name##_tag;               \
  type& name = ::emulator::shared<type>(&name##_tag)

inline void __syncthreads() {
  ::emulator::wait(&::emulator::fiber().block->barrier);
}
inline void __threadfence() {}
template <typename T>
T __shfl_sync(uint32_t, T value, int lane) {
  return ::emulator::exchange(value, lane);
}
template <typename T>
T __shfl_down_sync(uint32_t, T value, int step) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return ::emulator::exchange(value, lane + step < 32 ? lane + step : lane);
}
template <typename T>
T __shfl_up_sync(uint32_t, T value, int step) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return ::emulator::exchange(value, lane >= step ? lane - step : lane);
}
template <typename T>
T atomicAdd(T* to, T value) {
  return std::exchange(*to, *to + value);
}
template <typename T>
T atomicMax(T* to, T value) {
  return std::exchange(*to, *to > value ? *to : value);
}
inline int __popc(uint32_t x) {
  return __builtin_popcount(x);
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = emulator::processor_count;
  return cudaSuccess;
}
