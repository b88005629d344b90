#include "arena.h"

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fusedrnn {
namespace {

constexpr size_t huge_page = 2 << 20;

// What is kept for later ops: fresh memory has to be cleared by the system, which takes as long as some ops do.
class Kept {
 public:
  // The smallest that has `size` bytes and not many more; or null.
  Memory take(size_t size) {
    if (size < least) return {};
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
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock || memory.size < least || memory.size > most) return false;
    total_ += memory.size;
    memories_.push_back(memory);
    while (total_ > most) {
      total_ -= memories_.front().size;
      std::free(memories_.front().base);
      memories_.erase(memories_.begin());
    }
    return true;
  }

 private:
  static constexpr size_t least = 256 * 1024;  // less than that malloc keeps itself
  static constexpr size_t most = kept_scratch_bytes;
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

Memory take_scratch(size_t bytes) {
  const size_t alignment = bytes < 2 * huge_page ? 64 : huge_page;
  const size_t size = (bytes / alignment + 1) * alignment;
  Memory memory = kept().take(size);
  if (memory.base) return memory;
  memory = {static_cast<char*>(std::aligned_alloc(alignment, size)), size};
  if (!memory.base) throw std::bad_alloc();
  if (alignment == huge_page) advise_huge_pages(memory.base, size);
  return memory;
}

void give_scratch_back(Memory memory) {
  if (memory.base && !kept().keep(memory)) std::free(memory.base);
}

}  // namespace fusedrnn
