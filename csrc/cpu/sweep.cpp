// SPDX-License-Identifier: MIT
#include "sweep.h"

#include <functional>

namespace lap::cpu {
namespace {

constexpr int64_t kMaxChunk = int64_t{1} << 16;   // so that offsets in a chunk fit 16 bits
constexpr int64_t kMinChunk = int64_t{1} << 14;   // below, drawing a chunk costs more than it does
constexpr int64_t kChunksPerThread = 8;           // so that a slow core leaves work to the others
constexpr int64_t kRoomPerMille = 45;             // candidates' bytes, of the weights' bytes
constexpr int64_t kLeastRoom = int64_t{1} << 20;  // bytes

uint64_t hash(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// One position in each of m equal stretches of 0 .. size-1, stretches cut in fixed point.
class SamplePositions {
 public:
  SamplePositions(int64_t m, int64_t size) : length_((size << kFraction) / m) {}
  int64_t operator()(int64_t i) const {
    const int64_t begin = (i * length_) >> kFraction;
    const int64_t end = ((i + 1) * length_) >> kFraction;
    const uint64_t random = hash(i) >> 32;
    return begin + static_cast<int64_t>((random * static_cast<uint64_t>(end - begin)) >> 32);
  }

 private:
  static constexpr int kFraction = 16;  // size < 2^45 and m * length < 2^61
  int64_t length_;
};

const DecideKernels<int32_t>& decide(int32_t) {
  return kernels().decide32;
}
const DecideKernels<int64_t>& decide(int64_t) {
  return kernels().decide64;
}

}  // namespace

template <typename Key>
Sweeper<Key>::Sweeper(std::vector<Keys<Key>> keys, const Pool& pool)
    : keys_(std::move(keys)), pool_(pool) {
  for (const Keys<Key>& k : keys_) {
    first_.push_back(size_);
    size_ += k.source().x.size;
    bytes_ += k.source().x.size * item_size(k.source().x.dtype);
  }
  const int64_t even = ceil_div(size_, kChunksPerThread * pool.threads);
  const int64_t chunk = ceil_div(std::min(kMaxChunk, std::max(kMinChunk, even)), kBlock) * kBlock;
  for (size_t s = 0; s < keys_.size(); ++s) {
    const int64_t n = keys_[s].source().x.size;
    for (int64_t begin = 0; begin < n; begin += chunk) {
      chunks_.push_back({static_cast<int>(s), begin, std::min(n, begin + chunk)});
    }
  }
}

template <typename Key>
uint8_t* Sweeper<Key>::mask_of(const Chunk& chunk) const {
  uint8_t* mask = keys_[chunk.source].source().mask;
  return mask == nullptr ? nullptr : mask + chunk.begin;
}

template <typename Key>
int64_t Sweeper<Key>::capacity() const {
  const int64_t item = static_cast<int64_t>(sizeof(Key) + sizeof(uint16_t));
  const int64_t room = std::max(kLeastRoom, bytes_ / 1000 * kRoomPerMille);
  return std::max<int64_t>(room / (item * kSlab), 4 * pool_.threads) * kSlab;
}

template <typename Key>
std::vector<Key> Sweeper<Key>::sample(int64_t m) const {
  std::vector<Key> sampled(m);
  const SamplePositions position_of(m, size_);
  for_each_chunk(pool_, ceil_div(m, kBlock), [&](int, int64_t block) {
    Scratch scratch;
    int64_t position[kBlock];
    const int64_t end = std::min(m, (block + 1) * kBlock);
    for (int64_t begin = block * kBlock; begin < end;) {  // once per source, mostly once
      const auto after = std::upper_bound(first_.begin(), first_.end(), position_of(begin));
      const int64_t source = after - first_.begin() - 1;  // of equal begins the last: not empty
      const int64_t stop = after == first_.end() ? size_ : *after;
      int64_t n = 0;
      for (; begin + n < end && position_of(begin + n) < stop; ++n) {
        position[n] = position_of(begin + n) - first_[source];
      }
      keys_[source].pick(position, n, &scratch, &sampled[begin]);
      begin += n;
    }
  });
  return sampled;
}

template <typename Key>
template <typename Block>
Key Sweeper<Key>::for_each_block(const std::atomic<bool>& stop, const Block& block) {
  std::vector<Key> tops(pool_.threads, 0);
  for_each_chunk(pool_, static_cast<int64_t>(chunks_.size()), [&](int worker, int64_t c) {
    Scratch scratch;
    Key top = tops[worker];
    const int64_t size = chunks_[c].end - chunks_[c].begin;
    for (int64_t first = 0; first < size && !stop; first += kBlock) {
      top = std::max(top, block(worker, c, first, std::min(kBlock, size - first), &scratch));
    }
    tops[worker] = top;
  });
  return *std::max_element(tops.begin(), tops.end());
}

template <typename Key>
template <typename Block>
Key Sweeper<Key>::for_each_keys(const Block& block) {
  const std::atomic<bool> never{false};
  return for_each_block(
      never, [&](int worker, int64_t c, int64_t first, int64_t n, Scratch* scratch) {
        alignas(64) Key keys[kBlock];
        const Chunk& chunk = chunks_[c];
        const Key top = keys_[chunk.source].fill(chunk.begin + first, n, scratch, keys);
        block(worker, c, first, n, keys);
        return top;
      });
}

template <typename Key>
Swept<Key> Sweeper<Key>::sweep(const Decision<Key>& to) {
  struct alignas(64) Worker {
    int64_t above = 0;
    Candidates<Key> slab = {nullptr, nullptr, kSlab};
    int64_t run_begin = kSlab;  // first candidate of the run that is open
    int64_t chunk = -1;
    std::vector<Run<Key>> runs;

    void close_run() {
      const int64_t count = slab.count - run_begin;
      if (count > 0)
        runs.push_back({chunk, slab.keys + run_begin, slab.offsets + run_begin, count});
      run_begin = slab.count;
    }
  };
  room_.reset();
  CandidateRoom<Key> room(capacity() / kSlab);
  std::vector<Worker> workers(pool_.threads);
  std::atomic<bool> overflow{false};
  Swept<Key> swept;
  swept.top = for_each_block(
      overflow, [&](int worker, int64_t c, int64_t first, int64_t n, Scratch* scratch) {
        Worker& w = workers[worker];
        const Chunk& chunk = chunks_[c];
        const bool full = w.slab.count + n > kSlab;
        if (full || w.chunk != c) w.close_run();
        w.chunk = c;
        if (full && !room.next(&w.slab)) {
          overflow = true;
          return Key{0};
        }
        if (full) w.run_begin = 0;
        uint8_t unwanted[kBlock];
        uint8_t* mask = mask_of(chunk);
        return keys_[chunk.source].classify(chunk.begin + first, n, to, first, scratch,
                                            mask == nullptr ? unwanted : mask + first, &w.slab,
                                            &w.above);
      });
  for (Worker& w : workers) {
    w.close_run();
    swept.above += w.above;
    for (const Run<Key>& run : w.runs) swept.candidates += run.count;
    swept.runs.insert(swept.runs.end(), w.runs.begin(), w.runs.end());
  }
  swept.overflow = overflow;
  room_ = room.release();
  return swept;
}

template <typename Key>
Marked<Key> Sweeper<Key>::mark_ties(Key threshold) {
  const auto mark = decide(Key{}).mark_ties;
  Marked<Key> marked;
  marked.chunk_ties.resize(chunks_.size());
  std::vector<int64_t> above(chunks_.size());
  marked.top = for_each_keys([&](int, int64_t c, int64_t first, int64_t n, const Key* keys) {
    uint8_t unwanted[kBlock];
    uint8_t* mask = mask_of(chunks_[c]);
    above[c] +=
        mark(keys, n, threshold, mask == nullptr ? unwanted : mask + first, &marked.chunk_ties[c]);
  });
  for (const int64_t n : above) marked.above += n;
  for (const int64_t n : marked.chunk_ties) marked.ties += n;
  return marked;
}

template <typename Key>
void Sweeper<Key>::settle_ties(const std::vector<int64_t>& chunk_ties, int64_t ties) {
  std::vector<int64_t> wanted(chunk_ties.size());
  for (size_t c = 0; c < wanted.size(); ++c) {
    wanted[c] = std::min(chunk_ties[c], ties);
    ties -= wanted[c];
  }
  for_each_chunk(pool_, static_cast<int64_t>(chunks_.size()), [&](int, int64_t c) {
    uint8_t* mask = mask_of(chunks_[c]);
    if (mask == nullptr || chunk_ties[c] == 0) return;
    const int64_t n = chunks_[c].end - chunks_[c].begin;
    int64_t j = 0;
    for (int64_t left = wanted[c]; left > 0; ++j) {
      left -= mask[j] >> 1;
      mask[j] = mask[j] != 0;
    }
    for (; j < n; ++j) mask[j] &= 1;
  });
}

template <typename Key>
std::vector<int64_t> Sweeper<Key>::histogram(typename std::make_unsigned<Key>::type low,
                                             int shift) {
  std::vector<std::vector<int64_t>> counts(pool_.threads, std::vector<int64_t>(kBins));
  for_each_keys([&](int worker, int64_t, int64_t, int64_t n, const Key* keys) {
    int64_t* mine = counts[worker].data();
    for (int64_t j = 0; j < n; ++j) {
      const auto bits = biased(keys[j]);
      const auto bin = (bits - low) >> shift;
      if (bits >= low && bin < kBins) ++mine[bin];
    }
  });
  for (size_t w = 1; w < counts.size(); ++w) {
    for (int64_t b = 0; b < kBins; ++b) counts[0][b] += counts[w][b];
  }
  return counts[0];
}

template <typename Key>
Key Sweeper<Key>::top() {
  return for_each_keys([](int, int64_t, int64_t, int64_t, const Key*) {});
}

template <typename Key>
bool Sweeper<Key>::underflows() {
  std::atomic<bool> found{false};
  for_each_chunk(pool_, static_cast<int64_t>(chunks_.size()), [&](int, int64_t c) {
    Scratch scratch;
    const Chunk& chunk = chunks_[c];
    for (int64_t begin = chunk.begin; begin < chunk.end && !found; begin += kBlock) {
      const int64_t n = std::min(kBlock, chunk.end - begin);
      if (keys_[chunk.source].underflows(begin, n, &scratch)) found = true;
    }
  });
  return found;
}

template class Sweeper<int32_t>;
template class Sweeper<int64_t>;

}  // namespace lap::cpu
