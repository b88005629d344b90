// A tile of a matrix product, by one block: out[m][n] = sum over k of a[m][k] b[n][k].
//
// The weights are a, so that a small batch (b's rows) wastes nothing. Rows of a and of b are read along k, 16 bytes a
// thread, straight into the registers that the tensor cores take: the order of k is free as long as a and b agree. The
// block's warps divide k (and b's rows, if there are many); each leaves its partial sums in shared memory.
#pragma once

#include "cluster_shape.h"
#include "quick.cuh"
#include "weights.cuh"

namespace fusedrnn::cuda {

constexpr int block_size = block_warps * warp_size;

// How a warp multiplies: what its lanes hold of 16 rows of a (two rows each) and of 8 rows of b, and the product. Lane
// l has rows l / 4 and l / 4 + 8 of the product at columns 2 (l % 4) and 2 (l % 4) + 1.

// bf16, fp16, and TF32 for float: tensor cores.
template <class S>
struct TensorCores {
  using Storage = S;
  using Number = Quick;                               // what a cell computes with
  static constexpr bool resident = true;              // a may stay on the chip
  static constexpr int vector = 16 / int(sizeof(S));  // elements a lane loads
  static constexpr int k = 4 * vector;                // of each row, for one product
  static constexpr int b_rows = 1;
  FUSEDRNN_DEVICE static int k_of(int lane) { return lane % 4 * vector; }
  FUSEDRNN_DEVICE static int b_row(int lane, int) { return lane / 4; }

  FUSEDRNN_DEVICE static Vector prepare(Vector v) {
    if constexpr (std::is_same_v<S, float>) {
      for (uint32_t& word : v.word) word = round_to_tf32(word);
    }
    return v;
  }
  FUSEDRNN_DEVICE static Fragment fragment(const Vector& row, const Vector& row_8) {
    return {{{row.word[0], row_8.word[0], row.word[1], row_8.word[1]},
             {row.word[2], row_8.word[2], row.word[3], row_8.word[3]}}};
  }
  FUSEDRNN_DEVICE static void multiply(float (&c)[4], const Fragment& a, const Vector (&b)[b_rows]) {
    mma(c, a.part[0].word, {b[0].word[0], b[0].word[1]}, S{});
    mma(c, a.part[1].word, {b[0].word[2], b[0].word[3]}, S{});
  }
};

// IEEE float and double: ordinary multiply-adds.
template <class S>
struct Fma {
  using Storage = S;
  using Number = S;
  static constexpr bool resident = false;
  static constexpr int vector = 16 / int(sizeof(S)), k = vector;
  static constexpr int b_rows = 2;
  FUSEDRNN_DEVICE static int k_of(int) { return 0; }
  FUSEDRNN_DEVICE static int b_row(int lane, int i) { return lane % 4 * 2 + i; }

  FUSEDRNN_DEVICE static Vector prepare(Vector v) { return v; }
  FUSEDRNN_DEVICE static Fragment fragment(const Vector& row, const Vector& row_8) { return {{row, row_8}}; }
  FUSEDRNN_DEVICE static void multiply(S (&c)[4], const Fragment& a, const Vector (&b)[b_rows]) {
    S as[2][vector], bs[b_rows][vector];
    std::memcpy(as, a.part, sizeof(as));
    std::memcpy(bs, b, sizeof(bs));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < vector; ++j) c[i] += as[i / 2][j] * bs[i % 2][j];
    }
  }
};

// m_tiles times 16 rows of a, n_tiles times 8 rows of b a warp, b's rows divided among n_warps groups of warps.
template <class Math, int m_tiles, int n_tiles, int n_warps>
struct Tile {
  using S = typename Math::Storage;
  using A = Accumulator<S>;
  static constexpr int rows = 16 * m_tiles, columns = 8 * n_tiles * n_warps;
  static constexpr int k_warps = block_warps / n_warps;
  static constexpr int pitch = sums_pitch(rows);
  static constexpr int64_t sums_bytes = int64_t(sizeof(A)) * k_warps * columns * pitch;

  // a where it stays on the chip. Warps that have the same k write the same to shared memory.
  using Weights = WarpWeights<Math, m_tiles, resident_fragments(n_tiles), n_tiles == 1 ? 8 : n_tiles == 2 ? 4 : 2>;
  template <class RowOfA>
  FUSEDRNN_DEVICE static Weights keep(Vector* far, RowOfA a_row, int64_t K) {
    const int each = far_fragments((K + Math::k - 1) / Math::k, k_warps, Weights::in_registers, m_tiles, m_tiles);
    return Weights(far + k_warp() * each * 2 * warp_size, m_tiles, blocks(K), [&](int m, int half, int i) {
      return Math::prepare(load_if(k_of(i) < K, a_row(16 * m + 8 * half + lane() / 4) + k_of(i)));
    });
  }

  // Leaves the product's partial sums in `sums`; the block has to meet before they are read. a is what keep() gave, or
  // a(m) is row m; b_row(n) is a row.
  template <class OperandA, class RowOfB>
  FUSEDRNN_DEVICE static void multiply(A* sums, const OperandA& a, RowOfB b_row, int64_t K) {
    const int n0 = thread_index() / warp_size / k_warps * 8 * n_tiles;
    const S* b_rows[n_tiles][Math::b_rows];
#pragma unroll
    for (int n = 0; n < n_tiles; ++n) {
#pragma unroll
      for (int i = 0; i < Math::b_rows; ++i) b_rows[n][i] = b_row(n0 + 8 * n + Math::b_row(lane(), i));
    }
    const auto b_part = [&](int i, Vector(&b)[n_tiles][Math::b_rows]) {
#pragma unroll
      for (int n = 0; n < n_tiles; ++n) {
#pragma unroll
        for (int j = 0; j < Math::b_rows; ++j) b[n][j] = load_row<true>(b_rows[n][j], k_of(i), K);
      }
    };

    A c[m_tiles][n_tiles][4] = {};
    if constexpr (std::is_same_v<OperandA, Weights>)
      a.multiply(c, b_part);
    else
      multiply_rows(c, a, b_part, K);

    A* mine = sums + (int64_t(k_warp()) * columns + n0) * pitch;
#pragma unroll
    for (int m = 0; m < m_tiles; ++m) {
#pragma unroll
      for (int n = 0; n < n_tiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          mine[(8 * n + 2 * (lane() % 4) + i % 2) * pitch + 16 * m + lane() / 4 + i / 2 * 8] = c[m][n][i];
        }
      }
    }
  }

  FUSEDRNN_DEVICE static A sum(const A* sums, int m, int n) {
    A total = 0;
#pragma unroll
    for (int w = 0; w < k_warps; ++w) total += sums[(w * columns + n) * pitch + m];
    return total;
  }
  // Of float, for rows m .. m + 3.
  FUSEDRNN_DEVICE static Vector sum_of_4(const float* sums, int m, int n) {
    float total[4] = {};
#pragma unroll
    for (int w = 0; w < k_warps; ++w) {
      const Vector part = load(sums + (w * columns + n) * pitch + m);
      float of[4];
      std::memcpy(of, &part, sizeof(of));
#pragma unroll
      for (int i = 0; i < 4; ++i) total[i] += of[i];
    }
    Vector v;
    std::memcpy(&v, total, sizeof(v));
    return v;
  }

 private:
  // A warp's blocks of k are those that leave the remainder k_warp() when divided by k_warps.
  FUSEDRNN_DEVICE static int lane() { return thread_index() % warp_size; }
  FUSEDRNN_DEVICE static int k_warp() { return thread_index() / warp_size % k_warps; }
  FUSEDRNN_DEVICE static int blocks(int64_t K) {
    return int((K + Math::k - 1) / Math::k - k_warp() + k_warps - 1) / k_warps;
  }
  // The lane's first element of the warp's i-th block.
  FUSEDRNN_DEVICE static int64_t k_of(int i) { return int64_t(k_warp() + i * k_warps) * Math::k + Math::k_of(lane()); }

  // The lane's 16 bytes of a row, 0 beyond K; K is a multiple of the vector.
  template <bool from_l2>
  FUSEDRNN_DEVICE static Vector load_row(const S* row, int64_t k, int64_t K) {
    if (k >= K) return {};
    return Math::prepare(from_l2 ? load_l2(row + k) : load(row + k));
  }

  template <class RowOfA, class Part>
  FUSEDRNN_DEVICE static void multiply_rows(A (&c)[m_tiles][n_tiles][4], RowOfA a_row, Part b_part, int64_t K) {
    const S* a_rows[m_tiles][2];
#pragma unroll
    for (int m = 0; m < m_tiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) a_rows[m][half] = a_row(16 * m + 8 * half + lane() / 4);
    }
    [[maybe_unused]] constexpr int ahead =
        Math::resident && n_tiles <= 2 ? 4 : 2;  // products whose operands are under way together
    const int count = blocks(K);
#pragma unroll ahead
    for (int i = 0; i < count; ++i) {
      Vector b[n_tiles][Math::b_rows];
      b_part(i, b);
#pragma unroll
      for (int m = 0; m < m_tiles; ++m) {
        const Fragment a =
            Math::fragment(load_row<false>(a_rows[m][0], k_of(i), K), load_row<false>(a_rows[m][1], k_of(i), K));
#pragma unroll
        for (int n = 0; n < n_tiles; ++n) Math::multiply(c[m][n], a, b[n]);
      }
    }
  }
};

}  // namespace fusedrnn::cuda
