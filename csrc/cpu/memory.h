// Memory that one op gives back and a later one takes: fresh memory has to be cleared by the system, which takes as
// long as some ops do.
#pragma once

#include <cstddef>

namespace fusedrnn {

struct Memory {
  char* base = nullptr;
  size_t size = 0;
};

// How much the whole process keeps at most. Of large pieces the system may take the pages back when it is short of
// memory.
constexpr size_t kept_bytes = size_t(512) << 20;
// Pieces of less are malloc's to keep. Of more it keeps some, and gives the others back, as it happens.
constexpr size_t least_kept_bytes = 256 << 10;

// At least so many bytes, uninitialised, aligned to 64 bytes, or, if there are several of them, to huge pages. Throws
// std::runtime_error if there is no memory.
Memory take_memory(size_t bytes);
void give_back(Memory memory);

// Huge pages for memory that is about to be written for the first time: fewer faults, and the hardware's prefetchers
// are not stopped at every 4 KB.
void advise_huge_pages(void* p, size_t bytes);

}  // namespace fusedrnn

// Gives all that is kept back to the system; how many bytes it was.
extern "C" __attribute__((visibility("default"))) size_t fusedrnn_release_memory();
