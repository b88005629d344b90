// The operations on AMX tiles that the kernels use, by name, so that another implementation of them
// (tests/amx_host/amx_host.h) runs the same kernels on processors that have no tiles. A thread has 8 tile registers of
// up to 16 rows x 64 bytes; which shape each has is a part of its state.
//
// In assembly and not <immintrin.h>'s intrinsics: GCC's take the register's number as a literal only, and do not tell
// the compiler that a tile load reads memory.
#pragma once

#include "vec.h"

namespace fusedrnn::FUSEDRNN_ISA {

// The shapes of the registers, as LDTILECFG reads them.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileShapes) == 64);

#ifdef FUSEDRNN_AMX_HOST
}  // namespace fusedrnn::FUSEDRNN_ISA
#include "amx_host.h"
#else

// Gives this thread's registers these shapes and zeros, unless they have these shapes already: to load a configuration
// takes some 200 cycles, to ask for it 20.
inline void configure_tiles(const TileShapes& shapes) {
  alignas(64) char now[sizeof(shapes)];
  asm volatile("sttilecfg %0" : "=m"(now));
  if (std::memcmp(now, &shapes, sizeof(now)) != 0) asm volatile("ldtilecfg %0" : : "m"(shapes));
}

// Back to the state in which a thread has no tiles, and the kernel none to save.
inline void release_tiles() { asm volatile("tilerelease"); }

// A row of the tile for every `stride` bytes.
template <int t>
void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(t) : "memory");
}
template <int t>
void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1)" : : "r"(to), "r"(stride), "i"(t) : "memory");
}

// c [M, n] += a [M, k pairs] b [k, n pairs], the pairs bfloat16. For every element of c, the products of the pairs'
// first and those of their second numbers are summed over k, each by multiply-adds that start from 0; the two sums are
// added, and then that to c. Every operation rounds to nearest even, takes subnormal numbers for 0 and gives 0 for
// them.
template <int c, int a, int b>
void multiply_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(c), "i"(a), "i"(b));
}

}  // namespace fusedrnn::FUSEDRNN_ISA
#endif
