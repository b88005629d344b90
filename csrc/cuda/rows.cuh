// Small kernels around the time loop that move rows.
#pragma once

#include "params.h"

namespace fusedrnn::cuda {

constexpr int row_threads = 256;

// Some int64 of an array, passed by value: no copy from the host's memory that a captured graph would read later.
struct Numbers {
  static constexpr int most = 256;
  int64_t value[most];
  int count;
  int64_t* to;
};

FUSEDRNN_KERNEL(row_threads) write_numbers(const Numbers p) {
  const int i = thread_index();
  if (i < p.count) p.to[i] = p.value[i];
}

// h before each row's step, for dW_hh.
template <class S>
struct PreviousRows {
  Steps steps;
  int64_t P;
  Rows<const S> y;  // [rows, P]
  const S* h0;      // [N, P] or null (zeros)
  S* h_prev;        // [rows, P]
};

template <class S>
FUSEDRNN_KERNEL(row_threads)
previous_rows(const PreviousRows<S> p) {
  for (int64_t s = block_index().x; s < p.steps.T; s += grid_size().x) {
    int64_t bound[3];
    p.steps.bounds(s - 1, bound);
    const int known = Steps::batch(bound), batch = Steps::batch(bound + 1);
    const int64_t row_before = Steps::first_row(bound), row = Steps::first_row(bound + 1);
    for (int64_t n = block_index().y; n < batch; n += grid_size().y) {
      for (int64_t unit = thread_index(); unit < p.P; unit += row_threads) {
        S h{};
        if (n < known)
          h = p.y.at(row_before + n)[unit];
        else if (p.h0)
          h = p.h0[n * p.P + unit];
        p.h_prev[(row + n) * p.P + unit] = h;
      }
    }
  }
}

}  // namespace fusedrnn::cuda
