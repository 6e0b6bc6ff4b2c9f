#include "parallel.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace fastcam {
namespace {

constexpr int SPINS =
    1000;  // some tens of microseconds: loops follow each other closely, and waking a thread takes as long

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Threads that wait for a loop and share its parts. One loop at a time.
class Pool {
 public:
  // False if another loop has the threads.
  bool run(int64_t parts, int threads, const std::function<void(int64_t)>& part) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner) return false;
    while (static_cast<int>(workers_.size()) < threads - 1)
      workers_.emplace_back(&Pool::wait_for_work, this, static_cast<int>(workers_.size()) + 1, loop_.load());
    part_ = &part;
    threads_ = threads;
    if (static_cast<int>(ranges_.size()) < threads) ranges_ = std::vector<Range>(threads);
    for (int t = 0; t < threads; ++t) {
      ranges_[t].next = parts * t / threads;
      ranges_[t].end = parts * (t + 1) / threads;
    }
    error_ = nullptr;
    running_ = static_cast<int>(workers_.size());
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ++loop_;
    }
    wake_.notify_all();
    take_parts(0);
    for (int spin = 0; running_ > 0 && spin < SPINS; ++spin) pause();
    if (running_ > 0) {
      std::unique_lock<std::mutex> lock(mutex_);
      done_.wait(lock, [this] { return running_ == 0; });
    }
    if (error_) std::rethrow_exception(error_);
    return true;
  }

 private:
  struct alignas(64) Range {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  // Takes part in every loop after number `seen`; all workers do, those that are not asked for by doing nothing.
  void wait_for_work(int id, uint64_t seen) {
    for (;;) {
      for (int spin = 0; loop_ == seen && spin < SPINS; ++spin) pause();
      if (loop_ == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return loop_ != seen; });
      }
      seen = loop_;
      if (id < threads_) take_parts(id);
      if (--running_ == 0) {
        std::lock_guard<std::mutex> lock(mutex_);
        done_.notify_one();
      }
    }
  }

  // First those of the thread's own range, which are the same in every loop over the same data; then what others have
  // left.
  void take_parts(int id) {
    try {
      for (int t = 0; t < threads_; ++t) {
        Range& range = ranges_[(id + t) % threads_];
        for (int64_t i; (i = range.next.fetch_add(1)) < range.end;) (*part_)(i);
      }
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
      for (int t = 0; t < threads_; ++t) ranges_[t].next = ranges_[t].end;
    }
  }

  std::mutex owner_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  std::vector<Range> ranges_;
  const std::function<void(int64_t)>* part_ = nullptr;
  int threads_ = 0;
  std::atomic<int> running_{0};  // workers that have not finished this loop
  std::atomic<uint64_t> loop_{0};
  std::exception_ptr error_;
};

// Never destroyed: its threads may still wait while the process exits. A forked child has none of them and starts a new
// pool.
Pool* pool = new Pool;
const int at_fork = pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
thread_local bool inside = false;

// While a part runs: it starts no further threads, and numbers below the normal range count as 0, since a CPU takes
// a hundred times as long for them.
class Inside {
 public:
  Inside() { inside = true; }
  ~Inside() { inside = before_; }

 private:
  const bool before_ = inside;
#if defined(__x86_64__)
  struct FlushSubnormals {
    const unsigned before = __builtin_ia32_stmxcsr();
    FlushSubnormals() { __builtin_ia32_ldmxcsr(before | 0x8040); }
    ~FlushSubnormals() { __builtin_ia32_ldmxcsr(before); }
  } flush_;
#endif
};

}  // namespace

void parallel_for(int64_t n, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& f) {
  if (n <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t parts = (n + grain - 1) / grain;
  threads = static_cast<int>(std::min<int64_t>(std::max(threads, 1), parts));
  const std::function<void(int64_t)> part = [&](int64_t i) {
    const Inside guard;
    f(i * grain, std::min(n, (i + 1) * grain));
  };
  if (threads > 1 && !inside && pool->run(parts, threads, part)) return;
  for (int64_t i = 0; i < parts; ++i) part(i);
}

}  // namespace fastcam
