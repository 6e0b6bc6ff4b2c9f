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

// Threads that wait for a loop and share its parts. One loop at a time.
class Pool {
 public:
  // False if another loop has the threads.
  bool run(int64_t parts, int threads, const std::function<void(int64_t)>& part) {
    std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner) return false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < threads - 1) {
        workers_.emplace_back([this, id = static_cast<int>(workers_.size())] { wait_for_work(id); });
      }
      part_ = &part;
      parts_ = parts;
      next_ = 0;
      helpers_ = threads - 1;
      running_ = helpers_;
      error_ = nullptr;
      ++loop_;
    }
    wake_.notify_all();
    take_parts();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
    if (error_) std::rethrow_exception(error_);
    return true;
  }

 private:
  void wait_for_work(int id) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return loop_ != seen; });
      seen = loop_;
      if (id >= helpers_) continue;
      lock.unlock();
      take_parts();
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  void take_parts() {
    try {
      for (int64_t i; (i = next_.fetch_add(1)) < parts_;) (*part_)(i);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!error_) error_ = std::current_exception();
      next_ = parts_;
    }
  }

  std::mutex owner_, mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  const std::function<void(int64_t)>* part_ = nullptr;
  std::atomic<int64_t> next_{0};
  int64_t parts_ = 0;
  int helpers_ = 0, running_ = 0;
  uint64_t loop_ = 0;
  std::exception_ptr error_;
};

// Never destroyed: its threads may still wait while the process exits. A forked child has none of them and starts a new
// pool.
Pool* pool = new Pool;
const int at_fork = pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
thread_local bool inside = false;

}  // namespace

void parallel_for(int64_t n, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& f) {
  if (n <= 0) return;
  grain = std::max<int64_t>(grain, 1);
  const int64_t parts = (n + grain - 1) / grain;
  threads = static_cast<int>(std::min<int64_t>(std::max(threads, 1), parts));
  const std::function<void(int64_t)> part = [&](int64_t i) {
    struct Inside {
      bool before = inside;
      Inside() { inside = true; }
      ~Inside() { inside = before; }
    } guard;
    f(i * grain, std::min(n, (i + 1) * grain));
  };
  if (threads > 1 && !inside && pool->run(parts, threads, part)) return;
  for (int64_t i = 0; i < parts; ++i) part(i);
}

}  // namespace fastcam
