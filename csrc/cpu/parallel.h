// SPDX-License-Identifier: MIT
// How the core shares work among threads. Work is divided into chunks whose results do not depend
// on who takes them; workers draw the next chunk from a counter, so a busy core delays nobody.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>

#include "float_env.h"

namespace lap::cpu {

constexpr int64_t kGrain = int64_t{1} << 15;  // elements that are worth a thread

struct Pool {
  int threads = 1;
  // runs body(0) here, and body(1) ... body(workers - 1), each at most once, on threads that come
  // before body(0) returns; returns when all that have begun are done
  std::function<void(int workers, const std::function<void(int)>& body)> run;
};

// Threads that sleep until there is work. Nobody waits for one that has not begun, or by spinning:
// another program may have its core. One call at a time has them; others run on their own thread.
Pool thread_pool(int threads);

// As many threads of a pool as so many elements are worth, where grain of them are worth one.
inline Pool pool_for(int64_t elements, Pool pool, int64_t grain = kGrain) {
  const int64_t worth = std::max<int64_t>(1, elements / grain);
  pool.threads = static_cast<int>(std::min<int64_t>(pool.threads, worth));
  return pool;
}

// Calls body(worker, chunk) for each chunk in 0 .. chunks-1. Chunks rise within a worker.
template <typename Body>
void for_each_chunk(const Pool& pool, int64_t chunks, const Body& body) {
  const int workers = static_cast<int>(std::min<int64_t>(pool.threads, chunks));
  std::atomic<int64_t> next{0};
  const auto work = [&](int worker) {
    const FloatEnv env;
    for (int64_t c; (c = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) body(worker, c);
  };
  if (workers <= 1) {
    if (chunks > 0) work(0);
  } else {
    pool.run(workers, work);
  }
}

}  // namespace lap::cpu
