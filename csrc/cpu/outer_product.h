// Weight gradients: dW[M, N] = sum over the rows r of a[r, :M]^T b[r, :N], and the bias gradients sum_r a[r, :M].
#pragma once

#include "recurrence.h"

namespace fusedrnn::FUSEDRNN_ISA {

template <class S>
class OuterProduct {
  using A = Acc<S>;
  static constexpr int w = lanes<S>, width = max_vectors * w, step = k_step<S>;
  static constexpr int tile_m = max_rows(max_vectors), block_m = 8 * tile_m;

 public:
  // Scratch for one thread, for products of up to M x N.
  void layout(Arena& arena, int64_t rows, int64_t M, int64_t N) {
    block_k_ = std::min<int64_t>(round_up(rows, step), std::clamp<int64_t>(b_budget / round_up(N, width), 64, 512));
    b_ = arena.take<S>(block_k_ * round_up(N, width));
    a_ = arena.take<S>(block_k_ * block_m);
    c_ = arena.take<A>(M * round_up(N, width));
    sums_ = arena.take<A>(round_up(M, w) + w);
    rows_ = arena.take<const S*>(block_k_);
    zeros_ = arena.take<A>(width);
  }

  // Rows `m` of dW and elements `m` of the bias gradient. row_pointers(r, count, pointers) tells where rows of b are.
  // Row i of dW is for column (i - shift) mod M of a. dw and db can be null.
  template <class RowPointers>
  void run(int64_t rows, const S* a, int64_t lda, int64_t M, Range m, int64_t shift, int64_t N,
           const RowPointers& row_pointers, S* dw, S* db) {
    if (m.size() == 0) return;
    const int64_t panels = dw ? divide_up(N, width) : 0, ldc = panels * width;
    std::fill(sums_, sums_ + round_up(m.size(), w), A{});
    std::fill(c_, c_ + m.size() * ldc, A{});
    for (int64_t k0 = 0; k0 < rows; k0 += block_k_) {
      const int64_t k = std::min(block_k_, rows - k0), padded_k = round_up(k, step);
      if (dw) {
        row_pointers(k0, k, rows_);
        for (int64_t panel = 0; panel < panels; ++panel) pack_b(panel, k, N);
      }
      for (int64_t m0 = m.begin; m0 < m.end; m0 += block_m) {
        const int64_t count = std::min<int64_t>(block_m, m.end - m0);
        const S* block = a + k0 * lda + m0;
        if (db) add_sums(block, lda, k, count, sums_ + (m0 - m.begin));
        if (!dw) continue;
        for_tiles(count, tile_m, [&](int64_t first, int rows_m) { pack_a(block + first, lda, k, first, rows_m); });
        for (int64_t panel = 0; panel < panels; ++panel)
          for_tiles(count, tile_m, [&](int64_t first, int rows_m) {
            A* c = c_ + (m0 - m.begin + first) * ldc + panel * width;
            tiles<S, true>[max_vectors - 1][rows_m - 1](padded_k, a_ + first * block_k_, 0,
                                                        b_ + panel * width * block_k_, c, ldc, c, ldc);
          });
      }
    }
    for (int64_t i = m.begin; i < m.end; ++i) {
      const int64_t row = i + shift < M ? i + shift : i + shift - M;
      if (dw) copy_or_zero(dw + row * N, const_cast<const A*>(c_ + (i - m.begin) * ldc), N);
      if (db) copy_or_zero(db + row, const_cast<const A*>(sums_ + (i - m.begin)), 1);
    }
  }

 private:
  static constexpr int64_t b_budget = 384 * 1024 / sizeof(S);

  // b_ [panels][block_k / step][width][step]
  void pack_b(int64_t panel, int64_t k, int64_t N) {
    S* to = b_ + panel * width * block_k_;
    const int64_t first = panel * width, valid = std::min<int64_t>(width, N - first);
    for (int64_t i = 0; i < round_up(k, step); ++i) {
      const S* from = i < k ? rows_[i] : nullptr;
      S* d = to + i / step * width * step + i % step;
      if (from)
        for (int64_t j = 0; j < valid; ++j) d[j * step] = from[first + j];
      else
        for (int64_t j = 0; j < valid; ++j) d[j * step] = S{};
      for (int64_t j = valid; j < width; ++j) d[j * step] = S{};
    }
  }

  // a_ [tiles][block_k / step][rows_m][step]
  void pack_a(const S* from, int64_t lda, int64_t k, int64_t first, int rows_m) {
    if (rows_m == tile_m)
      pack_a_rows(from, lda, k, a_ + first * block_k_, std::integral_constant<int, tile_m>{});
    else
      pack_a_rows(from, lda, k, a_ + first * block_k_, rows_m);
  }

  template <class Rows>
  static void pack_a_rows(const S* from, int64_t lda, int64_t k, S* to, Rows rows_m) {
    for (int64_t i = 0; i < k; i += step, to += rows_m * step)
      for (int j = 0; j < rows_m; ++j) {
        to[j * step] = from[i * lda + j];
        if constexpr (step == 2) to[j * step + 1] = i + 1 < k ? from[(i + 1) * lda + j] : S{};
      }
  }

  static void add_sums(const S* from, int64_t lda, int64_t k, int64_t count, A* sums) {
    for (int64_t j = 0; j < count; j += w) {
      const int64_t valid = std::min<int64_t>(w, count - j);
      AccVec<S> total = load(sums + j, valid);
      for (int64_t i = 0; i < k; ++i) total += load(from + i * lda + j, valid);
      store(sums + j, total, valid);
    }
  }

  int64_t block_k_;
  S* b_;
  S* a_;
  A* c_;
  A* sums_;
  const S** rows_;
  A* zeros_;
};

}  // namespace fusedrnn::FUSEDRNN_ISA
