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
    const StepRows rows = p.steps.rows(s);
    for (int64_t n = block_index().y; n < rows.batch; n += grid_size().y) {
      for (int64_t unit = thread_index(); unit < p.P; unit += row_threads) {
        S h{};
        if (n < rows.batch_before)
          h = p.y.at(rows.first_before + n)[unit];
        else if (p.h0)
          h = p.h0[n * p.P + unit];
        p.h_prev[(rows.first + n) * p.P + unit] = h;
      }
    }
  }
}

}  // namespace fusedrnn::cuda
