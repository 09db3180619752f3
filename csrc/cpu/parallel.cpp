// SPDX-License-Identifier: MIT
#include "parallel.h"

#include <pthread.h>
#include <signal.h>

#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>

namespace lap::cpu {
namespace {

class Helpers {
 public:
  // A body must not call this again.
  void run(int workers, const std::function<void(int)>& body) {
    const std::unique_lock<std::mutex> alone(caller_, std::try_to_lock);
    if (!alone.owns_lock()) return body(0);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      invite(workers, body);
    }
    std::exception_ptr error;
    try {
      body(0);
    } catch (...) {
      error = std::current_exception();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    invited_ = 0;
    done_.wait(lock, [this] { return active_ == 0; });
    if (!error) error = error_;
    error_ = nullptr;
    lock.unlock();
    if (error) std::rethrow_exception(error);
  }

 private:
  void invite(int workers, const std::function<void(int)>& body) {
    try {
      for (; threads_ < workers - 1; ++threads_) start();
    } catch (const std::system_error&) {  // no more threads: fewer do it
    }
    body_ = &body;
    next_ = 1;
    invited_ = std::min(workers - 1, threads_);
    for (int i = 0; i < invited_; ++i) wake_.notify_one();
  }

  // Signals are for the host's own threads, but for those that a thread's own fault raises.
  void start() {
    sigset_t all, before;
    sigfillset(&all);
    for (int own : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) sigdelset(&all, own);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    try {
      std::thread([this] { work(); }).detach();
    } catch (...) {
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
      throw;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
  }

  [[noreturn]] void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      wake_.wait(lock, [this] { return invited_ > 0; });
      --invited_;
      ++active_;
      const int worker = next_++;
      const std::function<void(int)>& body = *body_;
      lock.unlock();
      std::exception_ptr error;
      try {
        body(worker);
      } catch (...) {
        error = std::current_exception();
      }
      lock.lock();
      if (error && !error_) error_ = error;
      if (--active_ == 0) done_.notify_one();
    }
  }

  std::mutex caller_;  // held by the one call that has the threads
  std::mutex mutex_;   // of all below
  std::condition_variable wake_;
  std::condition_variable done_;
  const std::function<void(int)>* body_ = nullptr;
  int threads_ = 0;
  int invited_ = 0;  // threads that may still begin
  int active_ = 0;   // threads that have begun
  int next_ = 1;     // the next one's number
  std::exception_ptr error_;
};

// Never destroyed: its threads sleep in it until the process ends.
std::atomic<Helpers*> helpers{nullptr};

// A forked child has none of the threads, and perhaps locked mutexes.
void forget_helpers() {
  helpers = nullptr;
}

Helpers& the_helpers() {
  static const int registered = pthread_atfork(nullptr, nullptr, forget_helpers);
  static_cast<void>(registered);
  Helpers* found = helpers;
  if (found == nullptr) {
    Helpers* made = new Helpers;
    if (helpers.compare_exchange_strong(found, made)) return *made;
    delete made;
  }
  return *found;
}

}  // namespace

Pool thread_pool(int threads) {
  return {threads, [](int workers, const std::function<void(int)>& body) {
            the_helpers().run(workers, body);
          }};
}

}  // namespace lap::cpu
