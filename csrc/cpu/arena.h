// Scratch memory of one op: laid out twice by the same code, first to measure, then for real.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fusedrnn {

// Huge pages for memory that is about to be written for the first time: fewer faults, and the hardware's prefetchers
// are not stopped at every 4 KB.
void advise_huge_pages(void* p, size_t bytes);

struct Memory {
  char* base = nullptr;
  size_t size = 0;
};

// Memory aligned to 64 bytes, uninitialised. What is given back is kept for the next op, up to kept_scratch_bytes in
// the whole process.
constexpr size_t kept_scratch_bytes = size_t(128) << 20;
Memory take_scratch(size_t bytes);
void give_scratch_back(Memory memory);

class Arena {
 public:
  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena() { give_scratch_back(memory_); }

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
    memory_ = take_scratch(used_);
    used_ = 0;
    layout(*this);
  }

 private:
  Memory memory_;
  size_t used_ = 0;
};

}  // namespace fusedrnn
