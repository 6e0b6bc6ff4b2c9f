#include "parallel.h"

#include <dlfcn.h>
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

// The parts of one loop, shared by its threads.
class Parts {
 public:
  Parts(int64_t count, int threads, const std::function<void(int64_t)>& part) : ranges_(threads), part_(part) {
    for (int t = 0; t < threads; ++t) {
      ranges_[t].next = count * t / threads;
      ranges_[t].end = count * (t + 1) / threads;
    }
  }

  int threads() const { return static_cast<int>(ranges_.size()); }

  // First those of the thread's own range, which are the same in every loop over the same data; then what others have
  // left.
  void take(int id) {
    try {
      for (int t = 0; t < threads(); ++t) {
        Range& range = ranges_[(id + t) % threads()];
        for (int64_t i; (i = range.next.fetch_add(1)) < range.end;) part_(i);
      }
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
      for (Range& range : ranges_) range.next = range.end;
    }
  }

  void rethrow() const {
    if (error_) std::rethrow_exception(error_);
  }

 private:
  struct alignas(64) Range {
    std::atomic<int64_t> next{0};
    int64_t end = 0;
  };

  std::vector<Range> ranges_;
  const std::function<void(int64_t)>& part_;
  std::mutex mutex_;
  std::exception_ptr error_;
};

// Threads of our own that wait for a loop and share its parts.
class Pool {
 public:
  void run(Parts& parts) {
    while (static_cast<int>(workers_.size()) < parts.threads() - 1)
      workers_.emplace_back(&Pool::wait_for_work, this, static_cast<int>(workers_.size()) + 1, loop_.load());
    parts_ = &parts;
    running_ = static_cast<int>(workers_.size());
    {
      std::lock_guard<std::mutex> lock(mutex_);
      ++loop_;
    }
    wake_.notify_all();
    parts.take(0);
    for (int spin = 0; running_ > 0 && spin < SPINS; ++spin) pause();
    if (running_ > 0) {
      std::unique_lock<std::mutex> lock(mutex_);
      done_.wait(lock, [this] { return running_ == 0; });
    }
  }

  std::mutex owner;  // one loop at a time, whoever's threads it runs on

 private:
  // Takes part in every loop after number `seen`; all workers do, those that are not asked for by doing nothing.
  void wait_for_work(int id, uint64_t seen) {
    for (;;) {
      for (int spin = 0; loop_ == seen && spin < SPINS; ++spin) pause();
      if (loop_ == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return loop_ != seen; });
      }
      seen = loop_;
      if (id < parts_->threads()) parts_->take(id);
      if (--running_ == 0) {
        std::lock_guard<std::mutex> lock(mutex_);
        done_.notify_one();
      }
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  Parts* parts_ = nullptr;
  std::atomic<int> running_{0};  // workers that have not finished this loop
  std::atomic<uint64_t> loop_{0};
};

// Never destroyed: its threads may still wait while the process exits. A forked child has none of them and starts a new
// pool.
Pool* pool = new Pool;
bool forked = false;
const int at_fork = pthread_atfork(nullptr, nullptr, [] {
  pool = new Pool;
  forked = true;
});
thread_local bool inside = false;

// Torch's OpenMP runtime, which it loads for all to see. Its threads spin for a while after each of torch's loops: next
// to them, threads of our own would wait for a core. Not ours to link, since every wheel of torch brings its own.
struct OpenMP {
  void (*parallel)(void (*)(void*), void*, unsigned threads, unsigned flags) = nullptr;
  int (*thread_num)() = nullptr;

  OpenMP() {
#if !defined(FASTCAM_SANITIZE)  // the sanitizer of threads does not see its barriers
    parallel = reinterpret_cast<decltype(parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    thread_num = reinterpret_cast<decltype(thread_num)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
#endif
  }
};

void run(Parts& parts) {
  static const OpenMP openmp;
  if (forked || !openmp.parallel || !openmp.thread_num) return pool->run(parts);  // its threads do not outlive a fork
  struct Job {
    Parts& parts;
    int (*thread_num)();
  } job{parts, openmp.thread_num};
  openmp.parallel(
      [](void* data) {
        Job& job = *static_cast<Job*>(data);
        job.parts.take(job.thread_num());
      },
      &job, parts.threads(), 0);
}

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
  if (threads > 1 && !inside) {
    const std::unique_lock<std::mutex> owner(pool->owner, std::try_to_lock);
    if (owner) {
      Parts shared(parts, threads, part);
      run(shared);
      return shared.rethrow();
    }
  }
  for (int64_t i = 0; i < parts; ++i) part(i);
}

}  // namespace fastcam
