// SPDX-License-Identifier: MIT
#include "scan.h"

#include "../math/host_device.h"

namespace lap::cpu {
namespace {

constexpr int64_t kMaxChunk = int64_t{1} << 16;  // so that offsets in a chunk fit 16 bits
constexpr int64_t kMinChunk = int64_t{1} << 14;  // below, drawing a chunk costs more than it does
constexpr int64_t kChunksPerThread = 8;          // so that a slow core leaves work to the others
constexpr int64_t kCapacityPerMille = 45;        // candidates' bytes, of the weights' bytes
constexpr int64_t kLeastCapacity = int64_t{1} << 20;  // bytes

const DecideKernels<int32_t>& decide(int32_t) {
  return kernels().decide32;
}
const DecideKernels<int64_t>& decide(int64_t) {
  return kernels().decide64;
}

}  // namespace

std::vector<int64_t> sum_of(std::vector<std::vector<int64_t>> counts) {
  for (size_t w = 1; w < counts.size(); ++w) {
    for (int64_t b = 0; b < kBins; ++b) counts[0][b] += counts[w][b];
  }
  return std::move(counts[0]);
}

template <typename Key>
Scanner<Key>::Scanner(std::vector<Keys<Key>> keys, const Pool& pool)
    : keys_(std::move(keys)), pool_(pool) {
  int64_t size = 0;
  for (const Keys<Key>& k : keys_) {
    size += k.source().x.size;
    bytes_ += k.source().x.size * item_size(k.source().x.dtype);
  }
  const int64_t even = ceil_div(size, kChunksPerThread * pool.threads);
  const int64_t chunk = ceil_div(std::min(kMaxChunk, std::max(kMinChunk, even)), kTile) * kTile;
  for (size_t s = 0; s < keys_.size(); ++s) {
    const int64_t n = keys_[s].source().x.size;
    for (int64_t begin = 0; begin < n; begin += chunk) {
      chunks_.push_back({static_cast<int>(s), begin, std::min(n, begin + chunk)});
    }
  }
}

template <typename Key>
uint8_t* Scanner<Key>::mask_of(const Chunk& chunk) const {
  uint8_t* mask = keys_[chunk.source].source().mask;
  return mask == nullptr ? nullptr : mask + chunk.begin;
}

template <typename Key>
int64_t Scanner<Key>::capacity() const {
  const int64_t item = static_cast<int64_t>(sizeof(Key) + sizeof(uint16_t));
  const int64_t bytes = std::max(kLeastCapacity, bytes_ / 1000 * kCapacityPerMille);
  return std::max<int64_t>(bytes / (item * kPart), 4 * pool_.threads) * kPart;
}

template <typename Key>
template <typename Visit>
Key Scanner<Key>::for_each_tile(const std::atomic<bool>& stop, const Visit& visit) {
  std::vector<Key> tops(pool_.threads, 0);
  for_each_chunk(pool_, static_cast<int64_t>(chunks_.size()), [&](int worker, int64_t c) {
    Scratch scratch;
    Key top = tops[worker];
    const int64_t size = chunks_[c].end - chunks_[c].begin;
    for (int64_t first = 0; first < size && !stop; first += kTile) {
      top = std::max(top, visit(worker, c, first, std::min(kTile, size - first), &scratch));
    }
    tops[worker] = top;
  });
  return *std::max_element(tops.begin(), tops.end());
}

template <typename Key>
template <typename Visit>
Key Scanner<Key>::for_each_keys(const Visit& visit) {
  const std::atomic<bool> never{false};
  return for_each_tile(
      never, [&](int worker, int64_t c, int64_t first, int64_t n, Scratch* scratch) {
        alignas(64) Key keys[kTile];
        const Chunk& chunk = chunks_[c];
        const Key top = keys_[chunk.source].fill(chunk.begin + first, n, scratch, keys);
        visit(worker, c, first, n, keys);
        return top;
      });
}

template <typename Key>
Scanned<Key> Scanner<Key>::scan(const Interval<Key>& interval) {
  struct alignas(64) Worker {
    int64_t above = 0;
    Candidates<Key> part = {nullptr, nullptr, kPart};
    int64_t list_begin = kPart;  // first candidate of the list that is open
    int64_t chunk = -1;
    std::vector<CandidateList<Key>> lists;

    void close_list() {
      const int64_t count = part.count - list_begin;
      if (count > 0) {
        lists.push_back({chunk, part.keys + list_begin, part.offsets + list_begin, count});
      }
      list_begin = part.count;
    }
  };
  candidates_.reset();
  CandidateBuffer<Key> buffer(capacity() / kPart);
  std::vector<Worker> workers(pool_.threads);
  std::atomic<bool> overflow{false};
  Scanned<Key> scanned;
  scanned.top = for_each_tile(
      overflow, [&](int worker, int64_t c, int64_t first, int64_t n, Scratch* scratch) {
        Worker& w = workers[worker];
        const Chunk& chunk = chunks_[c];
        const bool full = w.part.count + n > kPart;
        if (full || w.chunk != c) w.close_list();
        w.chunk = c;
        if (full && !buffer.next(&w.part)) {
          overflow = true;
          return Key{0};
        }
        if (full) w.list_begin = 0;
        uint8_t unwanted[kTile];
        uint8_t* mask = mask_of(chunk);
        return keys_[chunk.source].classify(chunk.begin + first, n, interval, first, scratch,
                                            mask == nullptr ? unwanted : mask + first, &w.part,
                                            &w.above);
      });
  for (Worker& w : workers) {
    w.close_list();
    scanned.above += w.above;
    for (const CandidateList<Key>& list : w.lists) scanned.candidates += list.count;
    scanned.lists.insert(scanned.lists.end(), w.lists.begin(), w.lists.end());
  }
  scanned.overflow = overflow;
  candidates_ = buffer.release();
  return scanned;
}

template <typename Key>
Marked<Key> Scanner<Key>::mark_ties(Key threshold) {
  const auto mark = decide(Key{}).mark_ties;
  Marked<Key> marked;
  marked.chunk_ties.resize(chunks_.size());
  std::vector<int64_t> above(chunks_.size());
  marked.top = for_each_keys([&](int, int64_t c, int64_t first, int64_t n, const Key* keys) {
    uint8_t unwanted[kTile];
    uint8_t* mask = mask_of(chunks_[c]);
    above[c] +=
        mark(keys, n, threshold, mask == nullptr ? unwanted : mask + first, &marked.chunk_ties[c]);
  });
  for (const int64_t n : above) marked.above += n;
  for (const int64_t n : marked.chunk_ties) marked.ties += n;
  return marked;
}

template <typename Key>
void Scanner<Key>::finalize_ties(const std::vector<int64_t>& chunk_ties, int64_t ties) {
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
std::vector<int64_t> Scanner<Key>::histogram(typename std::make_unsigned<Key>::type low,
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
  return sum_of(std::move(counts));
}

template <typename Key>
Key Scanner<Key>::top() {
  return for_each_keys([](int, int64_t, int64_t, int64_t, const Key*) {});
}

template <typename Key>
bool Scanner<Key>::underflows() {
  std::atomic<bool> found{false};
  for_each_chunk(pool_, static_cast<int64_t>(chunks_.size()), [&](int, int64_t c) {
    Scratch scratch;
    const Chunk& chunk = chunks_[c];
    for (int64_t begin = chunk.begin; begin < chunk.end && !found; begin += kTile) {
      const int64_t n = std::min(kTile, chunk.end - begin);
      if (keys_[chunk.source].underflows(begin, n, &scratch)) found = true;
    }
  });
  return found;
}

template class Scanner<int32_t>;
template class Scanner<int64_t>;

}  // namespace lap::cpu
