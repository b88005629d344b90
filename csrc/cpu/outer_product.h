// Weight gradients: dW[M, N] = sum over the rows r of a[r, :M]^T b[r, :N], and the bias gradients sum_r a[r, :M].
#pragma once

#include <functional>
#include <initializer_list>

#include "recurrence.h"

namespace fusedrnn::FUSEDRNN_ISA {

template <class S>
class OuterProduct {
  using A = Acc<S>;
  static constexpr int w = lanes<S>, width = max_vectors * w, step = k_step<S>;
  static constexpr int tile_m = max_rows(max_vectors), block_m = 8 * tile_m;

 public:
  // A product with the same a: where its gradients go (or null), and where its b is.
  struct Target {
    S* dw;  // [M, N]
    S* db;  // [M]
    int64_t N;
    std::function<void(int64_t r, int64_t count, const S** to)> rows;  // to[i] <- row r + i of b

    int64_t panels() const { return dw ? divide_up(N, width) : 0; }
  };

  // Scratch for one thread: for a run's products, M x N altogether.
  void layout(Arena& arena, int64_t rows, int64_t M, int64_t N) {
    const int64_t columns = width * std::min<int64_t>(group, N / width + 2);  // two targets: two narrower panels
    block_k_ = std::min<int64_t>(round_up(rows, step), std::clamp<int64_t>(b_budget / columns, 64, 256));
    b_ = arena.take<S>(block_k_ * columns);
    a_ = arena.take<S>(block_k_ * block_m);
    c_ = arena.take<A>(M * columns);
    sums_ = arena.take<A>(round_up(M, w) + w);
    rows_ = arena.take<const S*>(block_k_);
  }

  // The part `m` of the gradients' first dimension; element i of it is for column (i - shift) mod M of a.
  void run(int64_t rows, const S* a, int64_t lda, int64_t M, Range m, int64_t shift,
           std::initializer_list<Target> targets) {
    if (m.size() == 0) return;
    bool sums = false;
    int64_t panels = 0;
    for (const Target& target : targets) panels += target.panels(), sums |= target.db != nullptr;
    std::fill(sums_, sums_ + m.size(), A{});
    for (int64_t k0 = 0; sums && panels == 0 && k0 < rows; k0 += block_k_)
      add_sums(a + k0 * lda + m.begin, lda, std::min(block_k_, rows - k0), m.size(), sums_);
    const auto row_of = [&](int64_t i) { return i + shift < M ? i + shift : i + shift - M; };
    const int64_t groups = divide_up(panels, group);
    for (int64_t i = 0; i < groups; ++i) {
      const Range some = part_of(panels, i, groups);
      multiply(rows, a, lda, m, targets, some, panels, sums && i == 0);
      for_panels(targets, some, [&](const Target& target, int64_t panel, int64_t column) {
        for (int64_t i = m.begin; i < m.end; ++i)
          copy_or_zero(target.dw + row_of(i) * target.N + column,
                       static_cast<const A*>(c_ + ((i - m.begin) * some.size() + panel) * width),
                       std::min<int64_t>(width, target.N - column));
      });
    }
    for (int64_t i = m.begin; i < m.end; ++i)
      for (const Target& target : targets)
        if (target.db) copy_or_zero(target.db + row_of(i), static_cast<const A*>(sums_ + (i - m.begin)), 1);
  }

 private:
  static constexpr int64_t b_budget = 512 * 1024 / sizeof(S);
  static constexpr int group = 8;  // panels whose b stays in the second-level cache

  // Calls f(target, i, column) for the i-th panel of a run of the targets' panels, and its first column.
  template <class F>
  static void for_panels(std::initializer_list<Target> targets, Range some, F f) {
    int64_t panel = 0;
    for (const Target& target : targets)
      for (int64_t i = 0; i < target.panels(); ++i, ++panel)
        if (panel >= some.begin && panel < some.end) f(target, panel - some.begin, i * width);
  }

  // c_ [m, some panels, width] = a^T b; and sums_ += a's columns m
  void multiply(int64_t rows, const S* a, int64_t lda, Range m, std::initializer_list<Target> targets, Range some,
                int64_t panels, bool sums) {
    const bool pack = step > 1 || panels > 4;  // with few columns, packing a would cost more than it saves
    const int64_t ldc = some.size() * width;
    std::fill(c_, c_ + m.size() * ldc, A{});
    for (int64_t k0 = 0; k0 < rows; k0 += block_k_) {
      const int64_t k = std::min(block_k_, rows - k0), padded_k = round_up(k, step);
      const Target* last = nullptr;
      for_panels(targets, some, [&](const Target& target, int64_t panel, int64_t column) {
        if (&target != last) target.rows(k0, k, rows_), last = &target;
        pack_b(panel, column, k, target.N);
      });
      for (int64_t m0 = m.begin; m0 < m.end; m0 += block_m) {
        const int64_t count = std::min<int64_t>(block_m, m.end - m0);
        const S* block = a + k0 * lda + m0;
        if (sums) add_sums(block, lda, k, count, sums_ + (m0 - m.begin));
        if (pack) for_tiles(count, tile_m, [&](int64_t i, int tile) { pack_a(block + i, lda, k, i, tile); });
        for (int64_t panel = 0; panel < some.size(); ++panel)
          for_tiles(count, tile_m, [&](int64_t i, int tile) {
            A* c = c_ + (m0 - m.begin + i) * ldc + panel * width;
            tiles<S, true>[max_vectors - 1][tile - 1](padded_k, pack ? a_ + i* block_k_ : block + i, pack ? tile : lda,
                                                      b_ + panel* width* block_k_, c, ldc, c, ldc);
          });
      }
    }
  }

  // b_ [panels][block_k / step][width][step] <- columns from `first` of the rows in rows_, of N columns.
  void pack_b(int64_t panel, int64_t first, int64_t k, int64_t N) {
    S* to = b_ + panel * width * block_k_;
    const int64_t valid = std::min<int64_t>(width, N - first);
    for (int64_t i = 0; i < round_up(k, step); ++i) {
      S* d = to + i / step * width * step + i % step;
      if (i < k && valid == width)
        for (int j = 0; j < width; ++j) d[j * step] = rows_[i][first + j];
      else
        for (int j = 0; j < width; ++j) d[j * step] = i < k && j < valid ? rows_[i][first + j] : S{};
    }
  }

  // a_ [tiles][block_k / step][tile][step]
  void pack_a(const S* from, int64_t lda, int64_t k, int64_t first, int tile) {
    if (tile == tile_m)
      pack_a_rows(from, lda, k, a_ + first * block_k_, std::integral_constant<int, tile_m>{});
    else
      pack_a_rows(from, lda, k, a_ + first * block_k_, tile);
  }

  template <class Tile>
  static void pack_a_rows(const S* from, int64_t lda, int64_t k, S* to, Tile tile) {
    for (int64_t i = 0; i < k; i += step, to += tile * step)
      for (int j = 0; j < tile; ++j) {
        to[j * step] = from[i * lda + j];
        if constexpr (step == 2) to[j * step + 1] = i + 1 < k ? from[(i + 1) * lda + j] : S{};
      }
  }

  static void add_sums(const S* from, int64_t lda, int64_t k, int64_t count, A* sums) {
    for (int64_t j = 0; j < count; j += w) {
      const int64_t valid = std::min<int64_t>(w, count - j);
      AccVec<S> total{};
      for (int64_t i = 0; i < k; ++i) total += load(from + i * lda + j, valid);
      store(sums + j, load(sums + j, valid) + total, valid);
    }
  }

  int64_t block_k_;
  S* b_;
  S* a_;
  A* c_;
  A* sums_;
  const S** rows_;
};

}  // namespace fusedrnn::FUSEDRNN_ISA
