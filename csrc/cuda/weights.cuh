// Recurrent weights that stay on the chip.
#pragma once

#include "cluster_shape.h"
#include "device.cuh"

namespace fusedrnn::cuda {

// What a lane has of 16 rows (two of them) of one block of k, in the order that its products take.
struct Fragment {
  Vector part[2];
};

// A warp's weights: `count` tiles of 16 rows, at most `tiles`, of some blocks of k. There are registers for `near`
// fragments, block by block, `tiles` to each; the others are in shared memory. Of `ahead` blocks, what they are
// multiplied with is under way together.
template <class Math, int tiles, int near, int ahead>
class WarpWeights {
 public:
  static constexpr int in_registers = near;

  // lane_part(tile, half, i) is the lane's part of a row of the i-th block, zeros beyond `count` and `blocks`; `far` is
  // the warp's shared memory.
  template <class Part>
  FUSEDRNN_DEVICE WarpWeights(Vector* far, int count, int blocks, Part lane_part)
      : far_(far + thread_index() % warp_size - near_fragments(near, tiles, count) * 2 * warp_size),
        count_(count),
        blocks_(blocks) {
    const auto fragment = [&](int m, int i) { return Math::fragment(lane_part(m, 0, i), lane_part(m, 1, i)); };
#pragma unroll
    for (int f = 0; f < near; ++f) near_[f] = fragment(f % tiles, f / tiles);
#pragma unroll 1
    for (int i = near / tiles; i < blocks; ++i) {
#pragma unroll 1
      for (int m = 0; m < count; ++m) {
        if (i * tiles + m < near) continue;
        const Fragment part = fragment(m, i);
        *far_part(m, i, 0) = part.part[0], *far_part(m, i, 1) = part.part[1];
      }
    }
  }

  // c += the product with b; b_part(i, b) gives the lane's part of the i-th block of b.
  template <int n_tiles, class Part>
  FUSEDRNN_DEVICE void multiply(float (&c)[tiles][n_tiles][4], Part b_part) const {
    constexpr int some_near = (near + tiles * ahead - 1) / (tiles * ahead) * ahead;
#pragma unroll
    for (int first = 0; first < some_near; first += ahead) multiply_blocks<true>(c, b_part, first);
#pragma unroll 1
    for (int first = some_near; first < blocks_; first += ahead) multiply_blocks<false>(c, b_part, first);
  }

 private:
  // Blocks first .. first + ahead - 1.
  template <bool some_near, int n_tiles, class Part>
  FUSEDRNN_DEVICE void multiply_blocks(float (&c)[tiles][n_tiles][4], Part b_part, int first) const {
    if (first >= blocks_) return;
    Vector b[ahead][n_tiles][1];
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      if (first + i < blocks_) b_part(first + i, b[i]);
    }
#pragma unroll
    for (int i = 0; i < ahead; ++i) {
      if (first + i >= blocks_) continue;
#pragma unroll
      for (int m = 0; m < tiles; ++m) {
        if (m >= count_) continue;
        const int f = (first + i) * tiles + m;
        const bool is_near = some_near && f < near;
        const Fragment a = is_near ? near_[f] : Fragment{*far_part(m, first + i, 0), *far_part(m, first + i, 1)};
#pragma unroll
        for (int n = 0; n < n_tiles; ++n) Math::multiply(c[m][n], a, b[i][n]);
      }
    }
  }

  FUSEDRNN_DEVICE Vector* far_part(int m, int i, int part) const {
    return far_ + ((i * count_ + m) * 2 + part) * warp_size;
  }

  Fragment near_[near];
  Vector* far_;
  int count_, blocks_;
};

}  // namespace fusedrnn::cuda
