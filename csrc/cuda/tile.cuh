// A tile of a matrix product, by one block: out[m][n] = sum over k of a[m][k] b[n][k].
//
// The weights are a, so that a small batch (b's rows) wastes nothing. Rows of a and of b are read along k, 16 bytes a
// thread, straight into the registers that the tensor cores take: the order of k is free as long as a and b agree. The
// block's warps divide k (and b's rows, if there are many); each leaves its partial sums in shared memory.
#pragma once

#include "device.cuh"

namespace fusedrnn::cuda {

constexpr int block_warps = 8, block_size = block_warps * warp_size;

// How a warp multiplies: what its lanes hold of 16 rows of a (two rows each) and of 8 rows of b, and the product. Lane
// l has rows l / 4 and l / 4 + 8 of the product at columns 2 (l % 4) and 2 (l % 4) + 1.

// bf16, fp16, and TF32 for float: tensor cores.
template <class S>
struct TensorCores {
  using Storage = S;
  static constexpr bool resident = true;              // a may stay in shared memory
  static constexpr int vector = 16 / int(sizeof(S));  // elements a lane loads
  static constexpr int k = 4 * vector;                // of each row, for one product
  static constexpr int b_rows = 1, a_lanes = warp_size;
  FUSEDRNN_DEVICE static int k_of(int lane) { return lane % 4 * vector; }
  FUSEDRNN_DEVICE static int b_row(int lane, int) { return lane / 4; }
  FUSEDRNN_DEVICE static int a_slot(int lane) { return lane; }  // lanes that load the same of a share a slot

  FUSEDRNN_DEVICE static Vector prepare(Vector v) {
    if constexpr (std::is_same_v<S, float>) {
      for (uint32_t& word : v.word) word = round_to_tf32(word);
    }
    return v;
  }
  FUSEDRNN_DEVICE static void multiply(float (&c)[4], const Vector (&a)[2], const Vector (&b)[b_rows]) {
    mma(c, {a[0].word[0], a[1].word[0], a[0].word[1], a[1].word[1]}, {b[0].word[0], b[0].word[1]}, S{});
    mma(c, {a[0].word[2], a[1].word[2], a[0].word[3], a[1].word[3]}, {b[0].word[2], b[0].word[3]}, S{});
  }
};

// IEEE float and double: ordinary multiply-adds.
template <class S>
struct Fma {
  using Storage = S;
  static constexpr bool resident = false;
  static constexpr int vector = 16 / int(sizeof(S)), k = vector;
  static constexpr int b_rows = 2, a_lanes = warp_size / 4;
  FUSEDRNN_DEVICE static int k_of(int) { return 0; }
  FUSEDRNN_DEVICE static int b_row(int lane, int i) { return lane % 4 * 2 + i; }
  FUSEDRNN_DEVICE static int a_slot(int lane) { return lane / 4; }

  FUSEDRNN_DEVICE static Vector prepare(Vector v) { return v; }
  FUSEDRNN_DEVICE static void multiply(S (&c)[4], const Vector (&a)[2], const Vector (&b)[b_rows]) {
    S as[2][vector], bs[b_rows][vector];
    std::memcpy(as, a, sizeof(as));
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
  static constexpr int pitch = rows + 4;  // no bank conflicts when lanes store their sums
  static constexpr int64_t sums_bytes = int64_t(sizeof(A)) * k_warps * columns * pitch;
  static constexpr int64_t weights_bytes(int64_t K) {
    return (K + Math::k - 1) / Math::k * m_tiles * 2 * Math::a_lanes * int64_t(sizeof(Vector));
  }

  // The lane's 16 bytes of a row, 0 beyond K; K is a multiple of the vector.
  template <bool from_l2>
  FUSEDRNN_DEVICE static Vector load_row(const S* row, int64_t k, int64_t K) {
    if (k >= K) return {};
    return Math::prepare(from_l2 ? load_l2(row + k) : load(row + k));
  }

  // Copies a into shared memory, in the order that multiply() reads it. a_row(m) is row m of a.
  template <class RowOfA>
  FUSEDRNN_DEVICE static void keep(Vector* weights, RowOfA a_row, int64_t K) {
    const int64_t count = weights_bytes(K) / int64_t(sizeof(Vector));
    for (int64_t i = thread_index(); i < count; i += block_size) {
      const int slot = int(i % Math::a_lanes), half = int(i / Math::a_lanes % 2);
      const int m = int(i / (2 * Math::a_lanes) % m_tiles);
      const int64_t k = i / (2 * Math::a_lanes * m_tiles) * Math::k;
      const int lane = slot * (warp_size / Math::a_lanes);
      weights[i] = load_row<false>(a_row(16 * m + 8 * half + lane / 4), k + Math::k_of(lane), K);
    }
  }

  // Leaves the product's partial sums in `sums`; the block has to meet before they are read. a_row(m) and b_row(n) are
  // rows; weights is what keep() left, or null.
  template <class RowOfA, class RowOfB>
  FUSEDRNN_DEVICE static void multiply(A* sums, const Vector* weights, RowOfA a_row, RowOfB b_row, int64_t K) {
    const int warp = thread_index() / warp_size, lane = thread_index() % warp_size;
    const int n0 = warp / k_warps * 8 * n_tiles;
    const S* a_rows[m_tiles][2];
    const S* b_rows[n_tiles][Math::b_rows];
#pragma unroll
    for (int m = 0; m < m_tiles; ++m) {
#pragma unroll
      for (int i = 0; i < 2; ++i) a_rows[m][i] = a_row(16 * m + 8 * i + lane / 4);
    }
#pragma unroll
    for (int n = 0; n < n_tiles; ++n) {
#pragma unroll
      for (int i = 0; i < Math::b_rows; ++i) b_rows[n][i] = b_row(n0 + 8 * n + Math::b_row(lane, i));
    }

    A c[m_tiles][n_tiles][4] = {};
    const int64_t blocks = (K + Math::k - 1) / Math::k;
    [[maybe_unused]] constexpr int ahead =
        Math::resident && n_tiles <= 2 ? 4 : 2;  // products whose operands are under way together
#pragma unroll ahead
    for (int64_t block = warp % k_warps; block < blocks; block += k_warps) {
      const int64_t k = block * Math::k + Math::k_of(lane);
      Vector b[n_tiles][Math::b_rows];
#pragma unroll
      for (int n = 0; n < n_tiles; ++n) {
#pragma unroll
        for (int i = 0; i < Math::b_rows; ++i) b[n][i] = load_row<true>(b_rows[n][i], k, K);
      }
#pragma unroll
      for (int m = 0; m < m_tiles; ++m) {
        Vector a[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          a[i] = weights ? weights[((block * m_tiles + m) * 2 + i) * Math::a_lanes + Math::a_slot(lane)]
                         : load_row<false>(a_rows[m][i], k, K);
        }
#pragma unroll
        for (int n = 0; n < n_tiles; ++n) Math::multiply(c[m][n], a, b[n]);
      }
    }

    A* mine = sums + (int64_t(warp % k_warps) * columns + n0) * pitch;
#pragma unroll
    for (int m = 0; m < m_tiles; ++m) {
#pragma unroll
      for (int n = 0; n < n_tiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          mine[(8 * n + 2 * (lane % 4) + i % 2) * pitch + 16 * m + lane / 4 + i / 2 * 8] = c[m][n][i];
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
};

}  // namespace fusedrnn::cuda
