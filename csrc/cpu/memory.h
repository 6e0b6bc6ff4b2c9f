// Memory for large arrays: on pages of 2 MB where the system has them, since arrays that are walked in no order miss
// the processor's table of 4 kB pages, and kept for the next call when freed, since the system clears every page that
// it hands out, which takes as long as several iterations.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastcam {

// Freed arrays of a page and more, at most LIMIT bytes of them. Busy (or its owner left behind by a fork), it does
// nothing.
class FreeMemory {
 public:
  static FreeMemory& instance() {
    static FreeMemory* const memory = new FreeMemory;  // never destroyed: arrays may outlive static objects
    return *memory;
  }
  // The smallest array of at least `bytes`, and at most twice that; or null. `bytes` becomes its size.
  void* take(size_t& bytes) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return nullptr;
    size_t best = arrays_.size();
    for (size_t i = 0; i < arrays_.size(); ++i) {
      const size_t size = arrays_[i].second;
      if (size >= bytes && size <= 2 * bytes && (best == arrays_.size() || size < arrays_[best].second)) best = i;
    }
    if (best == arrays_.size()) return nullptr;
    void* const p = arrays_[best].first;
    bytes = arrays_[best].second;
    total_ -= bytes;
    arrays_.erase(arrays_.begin() + best);
    return p;
  }
  // Frees the oldest ones where there are too many.
  void give(void* p, size_t bytes) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return std::free(p);
    arrays_.emplace_back(p, bytes);
    total_ += bytes;
    while (total_ > LIMIT) {
      std::free(arrays_.front().first);
      total_ -= arrays_.front().second;
      arrays_.erase(arrays_.begin());
    }
  }

 private:
  static constexpr size_t LIMIT = size_t(1) << 27;

  std::mutex mutex_;
  std::vector<std::pair<void*, size_t>> arrays_;  // oldest first
  size_t total_ = 0;
};

constexpr size_t LARGE_PAGE = size_t(1) << 21;

struct Free {
  size_t bytes = 0;
  void operator()(void* p) const { bytes < LARGE_PAGE ? std::free(p) : FreeMemory::instance().give(p, bytes); }
};
template <typename T>
using Memory = std::unique_ptr<T[], Free>;

// n numbers, not initialised and aligned to 64 bytes. Throws std::bad_alloc.
template <typename T>
Memory<T> buffer(int64_t n) {
  size_t bytes = std::max<int64_t>(n, 1) * sizeof(T);
  const size_t align = bytes < LARGE_PAGE ? 64 : LARGE_PAGE;
  bytes = (bytes + align - 1) / align * align;
  void* p = bytes < LARGE_PAGE ? nullptr : FreeMemory::instance().take(bytes);
  if (!p) {
    p = std::aligned_alloc(align, bytes);
    if (!p) throw std::bad_alloc();
#if defined(__linux__)
    if (align == LARGE_PAGE) madvise(p, bytes, MADV_HUGEPAGE);
#endif
  }
  return Memory<T>(static_cast<T*>(p), Free{bytes});
}

// n times `value`.
template <typename T>
Memory<T> buffer(int64_t n, T value) {
  Memory<T> memory = buffer<T>(n);
  std::fill(memory.get(), memory.get() + n, value);
  return memory;
}

}  // namespace fastcam
