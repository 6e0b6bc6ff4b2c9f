// Large arrays that live for one call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fastcam {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

template <typename T>
using Workspace = std::unique_ptr<T[], Free>;

// n numbers, uninitialised and aligned to 64 bytes. Large ones ask for large pages: a fresh array of 40 MB is then
// ready after 20 page faults instead of 10,000, which take longer than filling it.
template <typename T>
Workspace<T> workspace(int64_t n) {
  constexpr size_t PAGE = size_t(1) << 21;
  const size_t bytes = n * sizeof(T), unit = bytes < 2 * PAGE ? 64 : PAGE;
  void* p = std::aligned_alloc(unit, (bytes + unit - 1) / unit * unit);
  if (p == nullptr && bytes > 0) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  if (unit == PAGE) madvise(p, bytes, MADV_HUGEPAGE);
#endif
  return Workspace<T>(static_cast<T*>(p));
}

}  // namespace fastcam
