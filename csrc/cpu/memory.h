// Memory for large arrays: on pages of 2 MB where the system has them, since arrays that are walked in no order miss
// the processor's table of 4 kB pages, and filling that page by page costs as much as an iteration.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastcam {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <typename T>
using Memory = std::unique_ptr<T[], Free>;

// n numbers, not initialised. Throws std::bad_alloc.
template <typename T>
Memory<T> buffer(int64_t n) {
  constexpr size_t PAGE = size_t(1) << 21;
  const size_t bytes = std::max<int64_t>(n, 1) * sizeof(T);
  const size_t align = bytes < PAGE ? 64 : PAGE;
  const size_t room = (bytes + align - 1) / align * align;
  void* p = std::aligned_alloc(align, room);
  if (!p) throw std::bad_alloc();
#if defined(__linux__)
  if (align == PAGE) madvise(p, room, MADV_HUGEPAGE);
#endif
  return Memory<T>(static_cast<T*>(p));
}

// n times `value`.
template <typename T>
Memory<T> buffer(int64_t n, T value) {
  Memory<T> memory = buffer<T>(n);
  std::fill(memory.get(), memory.get() + n, value);
  return memory;
}

}  // namespace fastcam
