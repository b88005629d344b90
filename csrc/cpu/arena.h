// Scratch memory of one op: laid out twice by the same code, first to measure, then for real.
#pragma once

#include <cstdint>

#include "memory.h"

namespace fusedrnn {

class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { give_back(memory_); }

  // An array of count elements, 64-byte aligned, uninitialised; null while measuring.
  template <class T>
  T* take(int64_t count) {
    const size_t at = used_;
    used_ += (size_t(count) * sizeof(T) + 63) / 64 * 64;
    return memory_.base ? reinterpret_cast<T*>(memory_.base + at) : nullptr;
  }

  // Lays out by layout(arena), with memory behind it.
  template <class Layout>
  void allocate(Layout layout) {
    layout(*this);
    memory_ = take_memory(used_);
    used_ = 0;
    layout(*this);
  }

 private:
  Memory memory_;
  size_t used_ = 0;
};

}  // namespace fusedrnn
