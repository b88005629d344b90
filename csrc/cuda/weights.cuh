// Recurrent weights that stay on the chip.
#pragma once

#include "device.cuh"

namespace fusedrnn::cuda {

// A warp's: `count` tiles of 16 rows, at most `tiles`, of some blocks of k. The first `near` blocks are in registers,
// the others in shared memory. Of `ahead` blocks, what they are multiplied with is under way together.
template <class Math, int tiles, int near, int ahead>
class WarpWeights {
 public:
  static constexpr int in_registers = near;

  // lane_part(tile, half, i) is the lane's part of a row of the i-th block, zeros beyond `count` and `blocks`; `far` is
  // the warp's shared memory, 2 count 32 vectors for a block.
  template <class Part>
  FUSEDRNN_DEVICE WarpWeights(Vector* far, int count, int blocks, Part lane_part)
      : far_(far + thread_index() % warp_size), count_(count), blocks_(blocks) {
#pragma unroll
    for (int i = 0; i < near; ++i) {
#pragma unroll
      for (int m = 0; m < tiles; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) near_[i][m][half] = lane_part(m, half, i);
      }
    }
#pragma unroll 1
    for (int i = near; i < blocks; ++i) {
      for (int m = 0; m < count; ++m) {
        for (int half = 0; half < 2; ++half) *far_part(i, m, half) = lane_part(m, half, i);
      }
    }
  }

  // c += the product with b; b_part(i, b) gives the lane's part of the i-th block of b.
  template <int n_tiles, class Part>
  FUSEDRNN_DEVICE void multiply(float (&c)[tiles][n_tiles][4], Part b_part) const {
#pragma unroll
    for (int first = 0; first < near; first += ahead) {
      if (first >= blocks_) continue;
      Vector b[ahead][n_tiles][1];
#pragma unroll
      for (int i = 0; i < ahead; ++i) {
        if (first + i < near && first + i < blocks_) b_part(first + i, b[i]);
      }
#pragma unroll
      for (int i = first; i < first + ahead && i < near; ++i) {
        if (i >= blocks_) continue;
#pragma unroll
        for (int m = 0; m < tiles; ++m) {
          if (m >= count_) continue;
#pragma unroll
          for (int n = 0; n < n_tiles; ++n) Math::multiply(c[m][n], near_[i][m], b[i - first][n]);
        }
      }
    }
#pragma unroll ahead
    for (int i = near; i < blocks_; ++i) {
      Vector b[n_tiles][1];
      b_part(i, b);
#pragma unroll
      for (int m = 0; m < tiles; ++m) {
        if (m >= count_) continue;
        const Vector a[2] = {*far_part(i, m, 0), *far_part(i, m, 1)};
#pragma unroll
        for (int n = 0; n < n_tiles; ++n) Math::multiply(c[m][n], a, b[n]);
      }
    }
  }

 private:
  FUSEDRNN_DEVICE Vector* far_part(int i, int m, int half) const {
    return far_ + (((i - near) * count_ + m) * 2 + half) * warp_size;
  }

  Vector near_[near][tiles][2];
  Vector* far_;
  int count_, blocks_;
};

}  // namespace fusedrnn::cuda
