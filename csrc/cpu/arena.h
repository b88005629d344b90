// Scratch memory of one op: laid out twice by the same code, first to measure, then for real.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fusedrnn {

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
    // Huge pages: fewer faults, and the hardware's prefetchers are not stopped at every 4 KB of a panel.
    constexpr size_t huge_page = 2 << 20;
    const size_t alignment = used_ < 2 * huge_page ? 64 : huge_page;
    const size_t size = (used_ / alignment + 1) * alignment;
    base_ = static_cast<char*>(std::aligned_alloc(alignment, size));
    if (!base_) throw std::bad_alloc();
#ifdef __linux__
    if (alignment == huge_page) madvise(base_, size, MADV_HUGEPAGE);
#endif
    used_ = 0;
    layout(*this);
  }

 private:
  char* base_ = nullptr;
  size_t used_ = 0;
};

}  // namespace fusedrnn
