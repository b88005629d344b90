// A weight matrix as the kernels multiply by it: out[rows, columns] = a[rows, K] W, from panels packed for the
// micro-kernel, or, for few rows, from the tensor as it is.
//
// The columns are `gates` x `units`. The gates of one vector of units lie side by side in a panel, so that a tile
// holds all that a cell needs of its units; a matrix with one gate has several vectors of units in a panel.
#pragma once

#include <algorithm>

#ifdef __AMX_BF16__
#include "amx_tile.h"
#else
#include "tile.h"
#endif

namespace fusedrnn::FUSEDRNN_ISA {

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

template <class S>
struct Matrix {
  static constexpr int w = lanes<S>;

  int64_t K = 0, units = 0;
  int gates = 1;
  const S* rows = nullptr;     // [gates * units, K]: column c of the product is row c here; unless `columns`
  const S* columns = nullptr;  // [K, units], one gate; row k of W is at columns + row_of(k) * units
  int64_t shift = 0;           // row_of(k) = (k + shift) modulo K: the backward pass orders gates by slots
  const S* bias = nullptr;     // [gates * units] or null
  int64_t most_rows = 1;       // of a in any product, on whatever thread
  bool packed = false;
  S* panels = nullptr;      // [panels][padded_K / k_step][vectors * w][k_step] if packed
  bool in_turn = false;     // each panel is packed just before its only use, in the place of the one before
  Acc<S>* start = nullptr;  // [panels * width]: the bias by panels, or zeros

  int units_per_panel() const { return std::max(1, max_vectors / gates) * w; }
  int width() const { return units_per_panel() * gates; }  // columns of a full panel
  int64_t panel_count() const { return divide_up(units, units_per_panel()); }
  int64_t padded_K() const { return round_up(K, MatrixUnit<S>::k_block); }
  int64_t first_unit(int64_t panel) const { return panel * units_per_panel(); }
  // Vectors of units in this panel: the last one can be narrower.
  int unit_vectors(int64_t panel) const {
    return int(divide_up(std::min<int64_t>(units - first_unit(panel), units_per_panel()), w));
  }
  int64_t panel_size() const { return width() * padded_K(); }
  int64_t panels_size() const { return panel_count() * panel_size(); }
  S* panel_data(int64_t panel) const { return panels + (in_turn ? 0 : panel * panel_size()); }

  void pack(int64_t panel) {
    const int n = unit_vectors(panel);
    Acc<S>* s = start + panel * width();
    for (int u = 0; u < n; ++u)
      for (int g = 0; g < gates; ++g, s += w) {
        const int64_t unit = first_unit(panel) + u * w;
        store(s, bias ? load(bias + g * units + unit, std::min<int64_t>(w, units - unit)) : AccVec<S>{});
      }
    if (!packed) return;
    S* p = panel_data(panel);
    for (int u = 0; u < n; ++u)
      for (int g = 0; g < gates; ++g) {
        const int64_t unit = first_unit(panel) + u * w;
        const int64_t valid = std::min<int64_t>(w, units - unit);
        S* vector = p + (u * gates + g) * w * k_step<S>;
        if (columns)
          pack_columns(vector, n * gates * w, columns + unit, valid);
        else
          pack_rows(vector, n * gates * w, rows + (g * units + unit) * K, valid);
      }
  }

  // out[count, width] = start + a[count, K] W(panel), in blocks of K that stay in the first-level cache.
  void multiply(int64_t panel, int64_t count, const S* a, int64_t lda, Acc<S>* out, int64_t ldo) const {
    const int n = unit_vectors(panel) * gates;
    const Acc<S>* s = start + panel * width();
    if (!packed) {
      for_tiles(count, max_dot_rows,
                [&](int64_t first, int m) { dot_panel(panel, m, a + first * lda, lda, s, out + first * ldo, ldo); });
      return;
    }
    const Tiling<S>& tiling = MatrixUnit<S>::tiling(most_rows);
    const S* p = panel_data(panel);
    const int64_t blocks = std::max<int64_t>(1, divide_up(K * n * w * sizeof(S), k_block_bytes));  // of K = 0 as well
    for (int64_t i = 0, k = 0; i < blocks; ++i) {
      const int64_t next = i + 1 == blocks ? K : round_up(K * (i + 1) / blocks, MatrixUnit<S>::k_block);
      for_tiles(count, tiling.most_rows[n - 1], [&](int64_t first, int m) {
        Acc<S>* o = out + first * ldo;
        tiling.of[n - 1][m - 1](next - k, a + first * lda + k, lda, p + k * n * w, i ? o : s, i ? ldo : 0, o, ldo);
      });
      k = next;
    }
  }

 private:
  static constexpr int64_t k_block_bytes = 32 * 1024;

  // dst[k / k_step][stride][k_step] <- W's rows r < valid as columns: a transposition, block by block in registers.
  void pack_rows(S* dst, int64_t stride, const S* src, int64_t valid) const {
    constexpr int step = k_step<S>, length = w * step;
    const auto pack_block = [&](int64_t k, auto rows, auto count) __attribute__((always_inline)) {
      Operand<S> block[w];
#pragma GCC unroll 16
      for (int r = 0; r < w; ++r) {
        block[r] = r < rows ? load_operand(src + r * K + k, count) : Operand<S>{};
        if (r < rows) __builtin_prefetch(src + r * K + k + 4 * length);
      }
      transpose<S>(block);
      const int64_t padded = count == length ? length : padded_K() - k;
#pragma GCC unroll 16
      for (int j = 0; j * step < padded; ++j)
        std::memcpy(dst + (k / step + j) * stride * step, &block[j], sizeof(block[j]));
    };
    int64_t k = 0;
    for (; valid == w && k + length <= K; k += length)
      pack_block(k, std::integral_constant<int, w>{}, std::integral_constant<int, length>{});
    for (; k < K; k += length) pack_block(k, valid, std::min<int64_t>(length, K - k));
  }

  void pack_columns(S* dst, int64_t stride, const S* src, int64_t valid) const {
    const auto row = [&](int64_t k) {
      return k < K ? src + (k + shift < K ? k + shift : k + shift - K) * units : nullptr;
    };
    for (int64_t k = 0; k < padded_K(); k += k_step<S>) {
      const Operand<S> operand = load_columns(row(k), row(k + 1), valid);
      std::memcpy(dst + k * stride, &operand, sizeof(operand));
    }
  }

  void dot_panel(int64_t panel, int m, const S* a, int64_t lda, const Acc<S>* s, Acc<S>* out, int64_t ldo) const {
    static constexpr void (*dots[max_dot_rows])(int64_t, int64_t, const S*, int64_t, const S*, int64_t, const Acc<S>*,
                                                Acc<S>*, int64_t) = {dot_rows<S, 1>, dot_rows<S, 2>, dot_rows<S, 3>,
                                                                     dot_rows<S, 4>};
    for (int v = 0; v < unit_vectors(panel) * gates; ++v) {
      const int64_t unit = first_unit(panel) + v / gates * w, count = std::min<int64_t>(w, units - unit);
      for (int i = 0; i < m && count < w; ++i) store(out + i * ldo + v * w, load(s + v * w));  // for the other lanes
      dots[m - 1](count, K, a, lda, rows + (v % gates * units + unit) * K, K, s + v * w, out + v * w, ldo);
    }
  }
};

}  // namespace fusedrnn::FUSEDRNN_ISA
