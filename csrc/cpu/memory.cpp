#include "memory.h"

#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fusedrnn {
namespace {

constexpr size_t huge_page = 2 << 20;

#ifdef __SANITIZE_ADDRESS__
constexpr bool keeps = false;  // use after free would go unseen
#else
constexpr bool keeps = true;
#endif

class Kept {
 public:
  Kept() { memories_.reserve(kept_bytes / least_kept_bytes + 1); }  // so that keep() never throws: destructors call it

  // The smallest that has `size` bytes and not many more; or null.
  Memory take(size_t size) {
    if (size < least_kept_bytes) return {};
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return {};
    size_t best = memories_.size();
    for (size_t i = 0; i < memories_.size(); ++i) {
      const size_t has = memories_[i].size;
      if (has >= size && has / 2 <= size && (best == memories_.size() || has < memories_[best].size)) best = i;
    }
    if (best == memories_.size()) return {};
    const Memory memory = memories_[best];
    memories_.erase(memories_.begin() + std::ptrdiff_t(best));
    total_ -= memory.size;
    return memory;
  }

  // False if it is not kept. The oldest make room.
  bool keep(Memory memory) {
    if (!keeps || memory.size < least_kept_bytes || memory.size > kept_bytes) return false;
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return false;
    total_ += memory.size;
    memories_.push_back(memory);
    while (total_ > kept_bytes) {
      total_ -= memories_.front().size;
      std::free(memories_.front().base);
      memories_.erase(memories_.begin());
    }
    return true;
  }

  size_t release() {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return 0;
    for (const Memory& memory : memories_) std::free(memory.base);
    memories_.clear();
    return std::exchange(total_, 0);
  }

 private:
  std::mutex mutex_;  // only tried: a child forked while it was held must not wait for it
  std::vector<Memory> memories_;
  size_t total_ = 0;
};

Kept& kept() {
  static Kept& kept = *new Kept;  // never destroyed: a thread may still compute at exit
  return kept;
}

}  // namespace

void advise_huge_pages([[maybe_unused]] void* p, [[maybe_unused]] size_t bytes) {
#ifdef __linux__
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + huge_page - 1) / huge_page * huge_page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) / huge_page * huge_page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

Memory take_memory(size_t bytes) {
  const size_t alignment = bytes < 2 * huge_page ? 64 : huge_page;
  const size_t size = (bytes / alignment + 1) * alignment;
  Memory memory = kept().take(size);
  if (memory.base) return memory;
  memory = {static_cast<char*>(std::aligned_alloc(alignment, size)), size};
  if (!memory.base && kept().release()) memory.base = static_cast<char*>(std::aligned_alloc(alignment, size));
  if (!memory.base) throw std::runtime_error("fusedrnn: can't allocate " + std::to_string(size) + " bytes of memory");
  if (alignment == huge_page) advise_huge_pages(memory.base, size);
  return memory;
}

void give_back(Memory memory) {
  if (!memory.base) return;
#if defined(__linux__) && defined(MADV_FREE)
  // Before anyone can take it: its contents are nobody's from here on.
  if (keeps && memory.size >= 8 * huge_page) madvise(memory.base, memory.size, MADV_FREE);
#endif
  if (!kept().keep(memory)) std::free(memory.base);
}

}  // namespace fusedrnn

size_t fusedrnn_release_memory() { return fusedrnn::kept().release(); }
