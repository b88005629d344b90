// Scratch memory of one op: laid out twice by the same code, first to measure, then for real.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <new>

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
    base_ = static_cast<char*>(std::aligned_alloc(64, used_ + 64 - used_ % 64));
    if (!base_) throw std::bad_alloc();
    used_ = 0;
    layout(*this);
  }

 private:
  char* base_ = nullptr;
  size_t used_ = 0;
};

}  // namespace fusedrnn
