// csrc/cpu/amx.h for a processor without AMX, from the instructions' documentation: registers in memory, and the bits
// that TDPBF16PS gives. What the processor refuses ends the process, and so does a thread that ends with tiles
// configured.
#pragma once

#include <immintrin.h>

#include <cstdio>
#include <cstdlib>

namespace fusedrnn::FUSEDRNN_ISA {

class HostTiles {
 public:
  ~HostTiles() { require(shapes_.palette == 0, "a thread ends and has not released its tiles"); }

  void configure(const TileShapes& shapes) {
    if (std::memcmp(&shapes_, &shapes, sizeof(shapes)) == 0) return;
    require(shapes.palette == 1 && shapes.start_row == 0, "palette 1, and no interrupted load to go on with");
    for (int t = 0; t < 8; ++t) {
      require(shapes.rows[t] <= 16 && shapes.row_bytes[t] <= 64, "a tile has at most 16 rows of 64 bytes");
      require((shapes.rows[t] == 0) == (shapes.row_bytes[t] == 0), "a tile is empty in both directions or in none");
    }
    shapes_ = shapes;
    std::memset(tiles_, 0, sizeof(tiles_));
  }

  void release() {
    shapes_ = {.palette = 0};
    std::memset(tiles_, 0, sizeof(tiles_));
  }

  void load(int t, const void* from, int64_t stride) {
    const int bytes = row_bytes(t);
    std::memset(tiles_[t], 0, sizeof(tiles_[t]));
    for (int m = 0; m < shapes_.rows[t]; ++m)
      std::memcpy(tiles_[t][m], static_cast<const char*>(from) + m * stride, bytes);
  }

  void store(int t, void* to, int64_t stride) const {
    const int bytes = row_bytes(t);
    for (int m = 0; m < shapes_.rows[t]; ++m) std::memcpy(static_cast<char*>(to) + m * stride, tiles_[t][m], bytes);
  }

  void multiply(int c, int a, int b) {
    require(c != a && c != b && a != b, "three different tiles");
    require(row_bytes(c) == row_bytes(b) && shapes_.rows[c] == shapes_.rows[a], "c is as high as a and as wide as b");
    require(row_bytes(a) == 4 * shapes_.rows[b], "as many pairs in a row of a as rows in b");
    constexpr unsigned all_masked = 0x1f80, subnormals_are_zero = 0x8040;  // and round to nearest even
    const unsigned before = _mm_getcsr();
    _mm_setcsr(all_masked | subnormals_are_zero);
    for (int m = 0; m < shapes_.rows[c]; ++m) add_row(tiles_[c][m], tiles_[a][m], tiles_[b], shapes_.rows[b]);
    _mm_setcsr(before);
  }

 private:
  static void require(bool condition, const char* what) {
    if (condition) return;
    std::fprintf(stderr, "AMX on the host: %s\n", what);
    std::abort();
  }

  // Of a tile that an instruction may name.
  int row_bytes(int t) const {
    require(shapes_.palette == 1 && shapes_.rows[t] > 0, "the tile is configured");
    require(shapes_.row_bytes[t] % 4 == 0, "rows of whole pairs");
    return shapes_.row_bytes[t];
  }

  // A call of its own, so that the compiler does the arithmetic between the two changes of MXCSR. Columns that the
  // tiles don't have are zeros and stay so.
  __attribute__((noinline)) static void add_row(unsigned char* c, const unsigned char* a, const unsigned char (*b)[64],
                                                int pairs) {
    using Pairs = Vec<uint32_t, 16>;
    const auto first = [](Pairs pair) { return (__m512)(pair << 16); };
    const auto second = [](Pairs pair) { return (__m512)(pair & 0xffff0000u); };
    __m512 sum_of_first{}, sum_of_second{};
    for (int k = 0; k < pairs; ++k) {
      uint32_t pair;
      std::memcpy(&pair, a + 4 * k, sizeof(pair));
      const Pairs ak = Pairs{} + pair, bk = (Pairs)_mm512_loadu_si512(b[k]);
      sum_of_first = _mm512_fmadd_ps(first(ak), first(bk), sum_of_first);
      sum_of_second = _mm512_fmadd_ps(second(ak), second(bk), sum_of_second);
    }
    _mm512_storeu_ps(c, _mm512_loadu_ps(c) + (sum_of_first + sum_of_second));
  }

  TileShapes shapes_{.palette = 0};
  unsigned char tiles_[8][16][64] = {};
};

inline thread_local HostTiles host_tiles;

inline void configure_tiles(const TileShapes& shapes) { host_tiles.configure(shapes); }
inline void release_tiles() { host_tiles.release(); }
template <int t>
void load_tile(const void* from, int64_t stride) {
  host_tiles.load(t, from, stride);
}
template <int t>
void store_tile(void* to, int64_t stride) {
  host_tiles.store(t, to, stride);
}
template <int c, int a, int b>
void multiply_tiles() {
  host_tiles.multiply(c, a, b);
}

}  // namespace fusedrnn::FUSEDRNN_ISA
