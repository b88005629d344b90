// The matrix micro-kernels of tile.h on AMX tiles: rows of bfloat16 in a, and the same panels, where the 16 pairs of k
// of 16 columns are a tile as they lie.
#pragma once

#include "amx.h"
#include "tile.h"

namespace fusedrnn::FUSEDRNN_ISA {

constexpr int amx_rows = 16, amx_k = 32;  // rows of a tile; bfloat16 numbers in each
static_assert(lanes<bf16> == 16);

// Registers: 0 to 3 sums, 4 a, 5 to 7 b.
constexpr TileShapes amx_shapes(int M) {
  TileShapes shapes;
  for (int t = 0; t < 8; ++t) {
    shapes.row_bytes[t] = 64;
    shapes.rows[t] = t < 5 ? M : amx_k / 2;
  }
  return shapes;
}

// The sums begin with `start`. A row's order of summation depends on k alone, not on M: see multiply_tiles.
template <int M, int n>
void amx_tile(int64_t K, const bf16* a, int64_t lda, const bf16* b, const float* start, int64_t ld_start, float* out,
              int64_t ldo) {
  static constexpr TileShapes shapes = amx_shapes(M);
  configure_tiles(shapes);
  const auto with_vectors = [&]<int... v>(std::integer_sequence<int, v...>) __attribute__((always_inline)) {
    constexpr int w = lanes<bf16>;
    const auto add = [&](const void* rows, int64_t ld) __attribute__((always_inline)) {
      load_tile<4>(rows, ld * sizeof(bf16));
      ((load_tile<5 + v % 3>(b + v * 2 * w, n * 64), multiply_tiles<v, 4, 5 + v % 3>()), ...);
      b += n * w * amx_k;
    };
    (load_tile<v>(start + v * w, ld_start * sizeof(float)), ...);
    int64_t k = 0;
    for (; k + amx_k <= K; k += amx_k) add(a + k, lda);
    if (k < K) {  // what lies behind a row is not 0, and perhaps not ours
      __m512i rest[M];
      for (int m = 0; m < M; ++m) rest[m] = _mm512_maskz_loadu_epi16((1u << (K - k)) - 1, a + m * lda + k);
      add(rest, amx_k);
    }
    (store_tile<v>(out + v * w, ldo * sizeof(float)), ...);
  };
  with_vectors(std::make_integer_sequence<int, n>{});
}

template <int n, int... M>
constexpr TileRow<bf16> amx_tile_row(std::integer_sequence<int, M...>) {
  return {amx_tile<M + 1, n>...};
}
template <int... n>
constexpr Tiling<bf16> amx_tiling_of(std::integer_sequence<int, n...>) {
  return {{amx_tile_row<n + 1>(std::make_integer_sequence<int, amx_rows>{})...}, {(void(n), amx_rows)...}};
}
inline constexpr Tiling<bf16> amx_tiling = amx_tiling_of(std::make_integer_sequence<int, max_vectors>{});

template <>
struct MatrixUnit<bf16> {
  static constexpr bool exists = true;
  static constexpr int k_block = amx_k;

  MatrixUnit() = default;
  MatrixUnit(const MatrixUnit&) = delete;
  MatrixUnit& operator=(const MatrixUnit&) = delete;
  ~MatrixUnit() { release_tiles(); }

  // A tile of b, 1 KB of weights, takes TDPBF16PS 16 cycles for up to 16 rows of a, and about 16 more at a product's
  // ends if K is a few hundred; VDPBF16PS takes 8 to 16 a row.
  static constexpr const Tiling<bf16>& tiling(int64_t rows) { return rows < 3 ? vector_tiling<bf16> : amx_tiling; }

  // to [columns, ldt] <- the transpose of `from` [k, columns <= 16], with zeros up to a multiple of k_block.
  static void transpose_columns(const bf16* from, int64_t ld, int64_t k, int columns, bf16* to, int64_t ldt) {
    using Row = Vec<uint16_t, 16>;
    using Pairs = Vec<uint32_t, 16>;
    const __mmask16 there = (1u << columns) - 1;
    const auto row = [&](int64_t i) {
      if (i >= k) return Pairs{};
      return __builtin_convertvector((Row)_mm256_maskz_loadu_epi16(there, from + i * ld), Pairs);
    };
    for (int64_t i = 0; i < k; i += k_block) {
      Operand<bf16> block[k_block / 2];
      for (int p = 0; p < k_block / 2; ++p) block[p] = (Operand<bf16>)(row(i + 2 * p) | row(i + 2 * p + 1) << 16);
      transpose<bf16>(block);
      for (int c = 0; c < columns; ++c) std::memcpy(to + c * ldt + i, &block[c], sizeof(block[c]));
    }
  }
};

}  // namespace fusedrnn::FUSEDRNN_ISA
