// SPDX-License-Identifier: MIT
// How a block reads a tensor: tiles of kTile elements, kPerThread of them a thread, in vectors of
// 16 bytes. Vector v of thread t holds V = 16 / sizeof(T) neighbors, and a block's threads read
// neighboring vectors:
//
//   element j of thread t  =  tile + ((j / V) * kThreads + t) * V + j % V,   0 <= j < kPerThread
//
// A tensor that is not aligned, and a last tile that ends within a vector, is read element by
// element in the same order. Bit j of the 16-bit sets below stands for element j.
#pragma once

#include "device.cuh"

namespace lap::cuda {

constexpr int kPerThread = 16;
constexpr int64_t kTile = int64_t{kThreads} * kPerThread;
constexpr uint32_t kAllPresent = (1u << kPerThread) - 1;

template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

template <typename T>
struct alignas(16) Pack {
  T values[kVector<T>];
};

// Mask bytes of one vector, moved as one word.
template <int kBytes>
struct WordOf;
template <>
struct WordOf<2> {
  using Type = uint16_t;
};
template <>
struct WordOf<4> {
  using Type = uint32_t;
};
template <>
struct WordOf<8> {
  using Type = uint64_t;
};

// Offset of the thread's element j from the tile's begin.
template <typename T>
__device__ uint32_t offset_of(int j) {
  constexpr int V = kVector<T>;
  return (static_cast<uint32_t>(j / V) * kThreads + threadIdx.x) * V + j % V;
}

inline bool aligned_for_vectors(const void* data,
                                int64_t item,
                                const uint8_t* eligible,
                                const uint8_t* mask) {
  const uint64_t bytes = 16 / static_cast<uint64_t>(item);
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 &&
         reinterpret_cast<uintptr_t>(eligible) % bytes == 0 &&
         reinterpret_cast<uintptr_t>(mask) % bytes == 0;
}

// 16 bytes that are read once: they leave the caches first, what is read again (norms) stays.
__device__ inline uint4 load_once(const void* from) {
#if defined(LAP_EMULATED)
  return *static_cast<const uint4*>(from);
#else
  return __ldcs(static_cast<const uint4*>(from));
#endif
}

// Copies 16 bytes to shared memory while the thread goes on; commit_async ends a group of copies,
// and wait_async<n> waits until all but the last n groups are there.
__device__ inline void copy_async(void* shared, const void* from) {
#if defined(LAP_EMULATED)
  memcpy(shared, from, 16);
#else
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
#endif
}
__device__ inline void commit_async() {
#if !defined(LAP_EMULATED)
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int n>
__device__ inline void wait_async() {
#if !defined(LAP_EMULATED)
  asm volatile("cp.async.wait_group %0;" ::"n"(n) : "memory");
#endif
}

// How much of a tile exists, and whether all of it may be moved in vectors.
struct Reach {
  uint32_t count;  // elements, at most kTile
  bool vectors;
};

template <typename T>
__device__ Reach reach_of(int64_t begin, int64_t size, bool aligned) {
  const int64_t left = size - begin;
  const uint32_t count = static_cast<uint32_t>(left < kTile ? left : kTile);
  return {count, aligned && count % kVector<T> == 0};
}

// x[j] = tile[offset_of(j)], zero where nothing is; returns the set of those that exist. kVectors:
// reach.vectors is known to be true.
template <bool kVectors, typename T>
__device__ uint32_t load_values(const T* tile, const Reach& reach, T (&x)[kPerThread]) {
  constexpr int V = kVector<T>;
  uint32_t present = 0;
  if constexpr (!kVectors) {
    if (!reach.vectors) {
      LAP_UNROLL
      for (int e = 0; e < kPerThread; ++e) {
        const uint32_t offset = offset_of<T>(e);
        const bool exists = offset < reach.count;
        x[e] = exists ? tile[offset] : T{};
        present |= static_cast<uint32_t>(exists) << e;
      }
      return present;
    }
  }
  const T* mine = tile + threadIdx.x * V;
  uint4 words[kPerThread / V];
  if (reach.count == kTile) {  // nearly always
    present = kAllPresent;
    LAP_UNROLL
    for (int v = 0; v < kPerThread / V; ++v) words[v] = load_once(mine + v * kThreads * V);
  } else {
    LAP_UNROLL
    for (int v = 0; v < kPerThread / V; ++v) {
      const bool exists = offset_of<T>(v * V) < reach.count;
      words[v] = exists ? load_once(mine + v * kThreads * V) : uint4{};
      if (exists) present |= ((1u << V) - 1) << (v * V);
    }
  }
  LAP_UNROLL
  for (int v = 0; v < kPerThread / V; ++v) {
    const Pack<T> pack = bit_cast<Pack<T>>(words[v]);
    LAP_UNROLL
    for (int j = 0; j < V; ++j) x[v * V + j] = pack.values[j];
  }
  return present;
}

// to[0 .. n-1] = from, in words of 16 bytes; to is aligned.
template <typename Float, int n>
__device__ void store_vector(Float* to, const Float (&from)[n]) {
  constexpr int kWord = kVector<Float>;
  LAP_UNROLL
  for (int i = 0; i < n; i += kWord) {
    Pack<Float> pack;
    LAP_UNROLL
    for (int j = 0; j < kWord; ++j) pack.values[j] = from[i + j];
    *reinterpret_cast<uint4*>(to + i) = bit_cast<uint4>(pack);
  }
}

// to[0 .. n-1] = from, in words of 16 bytes; from is aligned.
template <typename Float, int n>
__device__ void load_vector(const Float* from, Float (&to)[n]) {
  constexpr int kWord = kVector<Float>;
  LAP_UNROLL
  for (int i = 0; i < n; i += kWord) {
    const Pack<Float> pack = bit_cast<Pack<Float>>(*reinterpret_cast<const uint4*>(from + i));
    LAP_UNROLL
    for (int j = 0; j < kWord; ++j) to[i + j] = pack.values[j];
  }
}

// The set of elements that exist and whose byte is not zero.
template <bool kVectors, typename T>
__device__ uint32_t load_bytes(const uint8_t* tile, const Reach& reach) {
  constexpr int V = kVector<T>;
  uint32_t set = 0;
  if constexpr (!kVectors) {
    if (!reach.vectors) {
      LAP_UNROLL
      for (int e = 0; e < kPerThread; ++e) {
        const uint32_t offset = offset_of<T>(e);
        if (offset < reach.count) set |= static_cast<uint32_t>(tile[offset] != 0) << e;
      }
      return set;
    }
  }
  LAP_UNROLL
  for (int v = 0; v < kPerThread / V; ++v) {
    using Word = typename WordOf<V>::Type;
    uint64_t word = 0;
    if (reach.count == kTile || offset_of<T>(v * V) < reach.count) {
      word = *reinterpret_cast<const Word*>(tile + threadIdx.x * V + v * kThreads * V);
    }
    LAP_UNROLL
    for (int j = 0; j < V; ++j) {
      set |= static_cast<uint32_t>(((word >> (8 * j)) & 0xff) != 0) << (v * V + j);
    }
  }
  return set;
}

// A set of the thread's elements as it is written: byte e % 4 of word e / 4 is 1 or 0.
struct ByteSet {
  static constexpr int kWords = kPerThread / 4;
  uint32_t words[kWords];

  __device__ bool holds(int e) const { return ((words[e / 4] >> (8 * (e % 4))) & 1) != 0; }
  // All bits in one word: bit 8 * (e % 4) + e / 4 stands for element e.
  __device__ uint32_t folded() const {
    uint32_t bits = 0;
    LAP_UNROLL
    for (int q = 0; q < kWords; ++q) bits |= words[q] << q;
    return bits;
  }
  __device__ static int element_of(int bit) { return 4 * (bit % 8) + bit / 8; }
};

// x[e], for any e: an array indexed at run time would lie in memory.
template <typename Value, int n>
__device__ Value pick(const Value (&x)[n], int e) {
  if constexpr (n == 1) {
    return x[0];
  } else {
    Value half[n / 2];
    LAP_UNROLL
    for (int i = 0; i < n / 2; ++i) half[i] = (e & (n / 2)) != 0 ? x[i + n / 2] : x[i];
    return pick(half, e);
  }
}

// The set of elements for which test(e).
template <typename Test>
__device__ ByteSet byte_set(const Test& test) {
  ByteSet set;
  LAP_UNROLL
  for (int q = 0; q < ByteSet::kWords; ++q) {
    const uint32_t low = (test(4 * q) ? 1u : 0u) | (test(4 * q + 1) ? 1u << 8 : 0u);
    const uint32_t high = (test(4 * q + 2) ? 1u << 16 : 0u) | (test(4 * q + 3) ? 1u << 24 : 0u);
    set.words[q] = low | high;
  }
  return set;
}

// The tile's bytes: 1 for the elements of the set, 0 for the others.
template <bool kVectors, typename T>
__device__ void store_bytes(uint8_t* tile, const Reach& reach, const ByteSet& set) {
  constexpr int V = kVector<T>;
  if constexpr (!kVectors) {
    if (!reach.vectors) {
      LAP_UNROLL
      for (int e = 0; e < kPerThread; ++e) {
        const uint32_t offset = offset_of<T>(e);
        if (offset < reach.count) tile[offset] = set.holds(e) ? 1 : 0;
      }
      return;
    }
  }
  uint8_t* mine = tile + threadIdx.x * V;
  LAP_UNROLL
  for (int v = 0; v < kPerThread / V; ++v) {
    using Word = typename WordOf<V>::Type;
    uint64_t word = set.words[v * V / 4] >> (8 * (v * V % 4));
    if constexpr (V == 8) word |= uint64_t{set.words[v * V / 4 + 1]} << 32;
    if (reach.count == kTile || offset_of<T>(v * V) < reach.count) {
      *reinterpret_cast<Word*>(mine + v * kThreads * V) = static_cast<Word>(word);
    }
  }
}

// The divisions that tell an element's row and column (math/layout.h).
struct LayoutDividers {
  Divider row_size;
  NarrowDivider narrow_row;  // if row_size allows it, which `straight` says
  bool small = false;        // indices of elements are below 2^31
  Divider window;
  Divider group_rows;
  int64_t cols = 1;
  int64_t groups = 1;

  LayoutDividers() = default;
  explicit LayoutDividers(const Layout& layout)
      : row_size(layout.row_size()),
        window(layout.window),
        group_rows(layout.group_rows()),
        cols(layout.cols),
        groups(layout.groups) {
    const int64_t size = layout.row_size();
    if (size <= NarrowDivider::kMost) narrow_row = NarrowDivider(size);
    small = layout.size() < int64_t{1} << 31;
  }
};

// Is every vector of 16 bytes part of one row, rows short enough for NarrowDivider, and the
// column's norm the same function of the offset in the row for all rows?
inline bool straight(const Weight& w) {
  const int64_t row_size = w.layout.row_size();
  const bool in_vectors = row_size % (16 / item_size(w.dtype)) == 0;
  return in_vectors && row_size <= NarrowDivider::kMost && w.layout.groups == 1;
}

// The rows of a tile of a straight weight. One division a tile, of 32 bits where they suffice, and
// one of 32 bits a vector.
class TileRows {
 public:
  __device__ TileRows(const LayoutDividers& layout, int64_t begin) : size_(layout.narrow_row) {
    row_ = layout.small ? size_.quotient(static_cast<uint32_t>(begin))
                        : layout.row_size.quotient(begin);
    rest_ = static_cast<uint32_t>(begin - row_ * static_cast<int64_t>(size_.divisor));
  }
  // The row of the tile's element `offset`, and *in_row: its offset there
  __device__ int64_t row_at(uint32_t offset, uint32_t* in_row) const {
    const uint32_t down = size_.quotient(rest_ + offset);
    *in_row = rest_ + offset - down * size_.divisor;
    return row_ + down;
  }

 private:
  const NarrowDivider& size_;
  int64_t row_;
  uint32_t rest_;
};

// Row and channel of neighboring elements of any weight: two or three divisions of 64 bits for the
// first, then steps.
class Coordinates {
 public:
  __device__ Coordinates(const LayoutDividers& layout, int64_t index) : layout_(layout) {
    row = layout.row_size.quotient(index);
    const int64_t rest = index - row * static_cast<int64_t>(layout.row_size.divisor);
    col_ = layout.window.quotient(rest);
    k_ = rest - col_ * static_cast<int64_t>(layout.window.divisor);
    start_group();
  }
  __device__ void step() {
    if (++k_ < static_cast<int64_t>(layout_.window.divisor)) return;
    k_ = 0;
    if (++col_ < layout_.cols) return;
    col_ = 0;
    ++row;
    start_group();
  }
  __device__ int64_t channel() const { return first_channel_ + col_; }

  int64_t row;

 private:
  __device__ void start_group() {
    first_channel_ = layout_.groups == 1 ? 0 : layout_.group_rows.quotient(row) * layout_.cols;
  }

  const LayoutDividers& layout_;
  int64_t col_;
  int64_t k_;
  int64_t first_channel_;
};

}  // namespace lap::cuda
