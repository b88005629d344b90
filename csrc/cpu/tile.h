// The matrix micro-kernels: out[M][n * lanes] = start + a[M, K] b[K, n * lanes], the accumulators in registers.
// b is a panel: [K / k_step][n * lanes][k_step], streamed once; a is broadcast element by element.
// They know nothing of cells. Every element of the result is one sum over k in order, so that it does not depend
// on how rows and columns were divided into tiles and threads.
#pragma once

#include <algorithm>
#include <array>
#include <utility>

#include "vec.h"

namespace fusedrnn::FUSEDRNN_ISA {

constexpr int max_vectors = 4;  // panel width in vectors
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int registers = 32;
#else
constexpr int registers = 16;
#endif

// Rows of a tile of n vectors: as many accumulators as the register file holds.
constexpr int max_rows(int n) {
  constexpr int of_32[] = {14, 14, 8, 6}, of_16[] = {6, 6, 4, 3};
  return (registers == 32 ? of_32 : of_16)[n - 1];
}

// v, which M multiply-adds use, loaded once. If M is 2 or 3, the compiler would rather load it for each of them, and a
// core's loads are what such tiles have too few of.
template <int M, class V>
FUSEDRNN_INLINE V loaded_once(V v) {
#ifdef __AVX__
  if constexpr (M == 2 || M == 3) asm("" : "+v"(v));
#endif
  return v;
}

// a: row m at a + m * lda; or transposed, the k_step elements of row m for step k at a + k * lda + m * k_step.
// start: row m is start + m * ld_start (a bias: ld_start = 0). It is added to the whole sum, so that sums over many
// rows, block by block, lose no more than pairwise ones.
template <class S, int M, int n, bool transposed>
void tile(int64_t K, const S* a, int64_t lda, const S* b, const Acc<S>* start, int64_t ld_start, Acc<S>* out,
          int64_t ldo) {
  constexpr int w = lanes<S>, step = k_step<S>;
  constexpr bool fits = (M + 1) * n < registers;  // the sums and b beside an element of a
  AccVec<S> acc[M][n];
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < n; ++v) acc[m][v] = AccVec<S>{};
  if constexpr (transposed) {  // sums over many rows: out is not in the cache
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
      for (int v = 0; v < n; ++v) __builtin_prefetch(start + m * ld_start + v * w);
  }
  const int64_t whole = K / step * step;
  for (int64_t k = 0; k < whole; k += step) {
    Operand<S> bk[n];
#pragma GCC unroll 16
    for (int v = 0; v < n; ++v) bk[v] = loaded_once<fits ? M : 1>(load_operand(b + v * w * step));
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const Operand<S> ak = broadcast(transposed ? a + k * lda + m * step : a + m * lda + k);
#pragma GCC unroll 16
      for (int v = 0; v < n; ++v) acc[m][v] = multiply_add<S>(acc[m][v], ak, bk[v]);
    }
    b += n * w * step;
  }
  if (step > 1 && whole < K) {  // an odd K: the pair's second element is 0
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      S last[step]{};
      last[0] = transposed ? a[whole * lda + m * step] : a[m * lda + whole];
#pragma GCC unroll 16
      for (int v = 0; v < n; ++v)
        acc[m][v] = multiply_add<S>(acc[m][v], broadcast(last), load_operand(b + v * w * step));
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 16
    for (int v = 0; v < n; ++v) store(out + m * ldo + v * w, acc[m][v] + load(start + m * ld_start + v * w));
}

template <class S>
using TileFn = void (*)(int64_t, const S*, int64_t, const S*, const Acc<S>*, int64_t, Acc<S>*, int64_t);

// The micro-kernels for n vectors: row[M - 1] is the one for M rows.
template <class S>
using TileRow = std::array<TileFn<S>, 16>;

template <class S, int n, bool transposed, int... M>
constexpr TileRow<S> tile_row(std::integer_sequence<int, M...>) {
  TileRow<S> row{};
  ((row[M] = tile<S, M + 1, n, transposed>), ...);
  return row;
}

// tiles[n - 1][M - 1]
template <class S, bool transposed = false>
inline constexpr std::array<TileRow<S>, max_vectors> tiles = {
    tile_row<S, 1, transposed>(std::make_integer_sequence<int, max_rows(1)>{}),
    tile_row<S, 2, transposed>(std::make_integer_sequence<int, max_rows(2)>{}),
    tile_row<S, 3, transposed>(std::make_integer_sequence<int, max_rows(3)>{}),
    tile_row<S, 4, transposed>(std::make_integer_sequence<int, max_rows(4)>{}),
};

// What products run on: micro-kernels, and the most rows that they take.
template <class S>
struct Tiling {
  std::array<TileRow<S>, max_vectors> of;  // of[n - 1][M - 1]
  std::array<int, max_vectors> most_rows;  // [n - 1]
};
template <class S>
inline constexpr Tiling<S> vector_tiling = {tiles<S>, {max_rows(1), max_rows(2), max_rows(3), max_rows(4)}};

// The processor's unit for products of whole matrices of S; where there is one (amx_tile.h), it is a specialisation. An
// object of it lives as long as a thread multiplies.
template <class S>
struct MatrixUnit {
  static constexpr bool exists = false;
  static constexpr int k_block = k_step<S>;  // K of a panel is a multiple of it, padded with zeros
  // For products of up to `rows` rows. It must not follow from how rows are divided among threads: another tiling's
  // sums have another order.
  static constexpr const Tiling<S>& tiling(int64_t /*rows*/) { return vector_tiling<S>; }
};

// Calls f(first, count) for runs of at most `most` rows out of `rows`, as even as possible.
template <class F>
FUSEDRNN_INLINE void for_tiles(int64_t rows, int most, F f) {
  const int64_t count = (rows + most - 1) / most;
  for (int64_t i = 0, first = 0; i < count; ++i) {
    const int64_t next = rows * (i + 1) / count;
    f(first, int(next - first));
    first = next;
  }
}

// out[m][r] = start[r] + dot(a[m, :K], w[r, :K]) for M rows of a and R rows of w, both contiguous along K: for few rows
// of a, where packing w would cost more than the product.
template <class S, int M, int R>
void dot_tile(int64_t K, const S* a, int64_t lda, const S* w, int64_t ldw, const Acc<S>* start, Acc<S>* out,
              int64_t ldo) {
  constexpr int block = lanes<S> * k_step<S>;
  AccVec<S> acc[M][R]{};
  const auto add = [&](int64_t k, int64_t n) __attribute__((always_inline)) {
    Operand<S> ak[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) ak[m] = load_operand(a + m * lda + k, n);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Operand<S> wk = loaded_once<M>(load_operand(w + r * ldw + k, n));
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) acc[m][r] = multiply_add<S>(acc[m][r], ak[m], wk);
    }
  };
  int64_t k = 0;
  for (; k + block <= K; k += block) add(k, block);
  if (k < K) add(k, K - k);
  for (int m = 0; m < M; ++m)
    store(out + m * ldo, sums<R>(acc[m], std::make_integer_sequence<int, lanes<S>>{}) + load(start, R), R);
}

constexpr int max_dot_rows = 4;

// dot_tile for any number of rows of w, R of them at a time and then fewer.
template <class S, int M, int R = std::max(1, std::min(lanes<S>, 16 / (M == 3 ? 4 : M)))>
void dot_rows(int64_t rows, int64_t K, const S* a, int64_t lda, const S* w, int64_t ldw, const Acc<S>* start,
              Acc<S>* out, int64_t ldo) {
  int64_t r = 0;
  for (; r + R <= rows; r += R) dot_tile<S, M, R>(K, a, lda, w + r * ldw, ldw, start + r, out + r, ldo);
  if constexpr (R > 1)
    if (r < rows) dot_rows<S, M, R / 2>(rows - r, K, a, lda, w + r * ldw, ldw, start + r, out + r, ldo);
}

}  // namespace fusedrnn::FUSEDRNN_ISA
