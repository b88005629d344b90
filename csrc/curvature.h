// What the curvature ops are given: steps of one direction of a layer, each by itself, in any order. All arrays are
// dense.
#pragma once

#include <cstdint>

namespace fusedrnn {

template <class S>
struct Curvature {
  int64_t rows, H;
  const S *wx, *rh;    // [rows, G * H]
  const S *h, *c;      // [rows, H], before the step; null where the cell doesn't read it
  const S *dwx, *drh;  // how they change, or null
  const S *dh, *dc;
  const S *upstream_h, *upstream_c;  // [rows, H]: a loss's gradients after the step (h before a projection)
  const S* dupstream_h;              // how the first changes, or null
  // How the loss's gradients in wx, rh [rows, G * H], h and c [rows, H] change; h without what flows through rh. Null:
  // rh's where it is wx's, those of h and c where they are nothing.
  S *by_wx, *by_rh, *by_h, *by_c;
  S* dh_after;  // [rows, H]: how h after the step changes
};

}  // namespace fusedrnn
