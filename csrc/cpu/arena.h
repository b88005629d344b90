// Scratch memory of one op: laid out twice by the same code, first to measure, then for real.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fusedrnn {

// Huge pages for memory that is about to be written for the first time: fewer faults, and the hardware's prefetchers
// are not stopped at every 4 KB.
constexpr size_t huge_page = 2 << 20;
inline void advise_huge_pages([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
#ifdef __linux__
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + huge_page - 1) / huge_page * huge_page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) / huge_page * huge_page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { std::free(base_); }

  // An array of count elements, 64-byte aligned, uninitialised; null while measuring.
  template <class T>
  T* take(int64_t count) {
    const size_t at = used_;
    used_ += (size_t(count) * sizeof(T) + 63) / 64 * 64;
    return base_ ? reinterpret_cast<T*>(base_ + at) : nullptr;
  }

  // Lays out by layout(arena), with memory behind it.
  template <class Layout>
  void allocate(Layout layout) {
    layout(*this);
    const size_t alignment = used_ < 2 * huge_page ? 64 : huge_page;
    const size_t size = (used_ / alignment + 1) * alignment;
    base_ = static_cast<char*>(std::aligned_alloc(alignment, size));
    if (!base_) throw std::bad_alloc();
    if (alignment == huge_page) advise_huge_pages(base_, size);
    used_ = 0;
    layout(*this);
  }

 private:
  char* base_ = nullptr;
  size_t used_ = 0;
};

}  // namespace fusedrnn
