// What the forward and the backward pass share: the part of the work that one thread does, and its barriers.
#pragma once

#include <new>

#include "../cells/cell.h"
#include "arena.h"
#include "matrix.h"
#include "plan.h"
#include "team.h"

namespace fusedrnn::FUSEDRNN_ISA {

// A run of indices.
struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// The i-th of `count` nearly equal parts of [0, n).
constexpr Range part_of(int64_t n, int64_t i, int64_t count) { return {n * i / count, n * (i + 1) / count}; }

// The i-th of `count` parts of the batch entries, such that each has about the same number of rows in the sequence.
inline Range batch_part(const Shape& shape, int64_t i, int64_t count) {
  const int64_t N = shape.batch(0);
  if (shape.batch(shape.T - 1) == N) return part_of(N, i, count);
  const auto bound = [&](int64_t j) {
    const int64_t wanted = shape.rows() * j / count;
    int64_t low = 0, high = N;  // the least n whose entries before it have `wanted` rows
    while (low < high) {
      const int64_t n = (low + high) / 2;
      int64_t rows = 0;
      for (int64_t t = 0; t < shape.T; ++t) rows += std::min(n, shape.batch(t));
      if (rows < wanted)
        low = n + 1;
      else
        high = n;
    }
    return low;
  };
  return {bound(i), i + 1 == count ? N : bound(i + 1)};
}

// Rows are multiplied and handed to the cell in blocks of this many: few enough that the product is in the cache still,
// and enough of them that large weights are not fetched into it too often.
constexpr int64_t row_block = 128;
template <class S>
inline constexpr int64_t product_size = row_block * max_vectors * lanes<S>;

// Calls f(first, count) for the blocks of a range of rows.
template <class F>
FUSEDRNN_INLINE void for_blocks(Range rows, F f) {
  for (int64_t r = rows.begin; r < rows.end; r += row_block) f(r, std::min(row_block, rows.end - r));
}

// What a thread does: these rows (batch entries, in the time loop) with the other members of its group, who have other
// columns. In each row group one thread has the same columns, and so multiplies by the same panels.
struct Part {
  Range n;
  Member group;
  int row_group, row_groups;
};

// The barriers of the row groups.
class Groups {
 public:
  void layout(Arena& arena, int threads) {
    barriers_ = arena.take<Barrier>(threads);
    if (barriers_)
      for (int i = 0; i < threads; ++i) new (barriers_ + i) Barrier();
  }
  Part part(const Shape& shape, const Split& split, int id) const {
    const int row_group = id / split.unit_groups;
    return {batch_part(shape, row_group, split.row_groups),
            {id % split.unit_groups, split.unit_groups, barriers_ + row_group},
            row_group,
            split.row_groups};
  }

 private:
  Barrier* barriers_ = nullptr;
};

// Memory for a matrix's panels (if it is worth packing) and start vectors.
template <class S>
void layout_matrix(Arena& arena, Matrix<S>& matrix, bool packed) {
  matrix.start = arena.take<Acc<S>>(matrix.panel_count() * matrix.width());
  matrix.panels = packed ? arena.take<S>(matrix.panels_size()) : nullptr;
  matrix.packed = packed;
}

// The panels that a thread multiplies by.
template <class S>
Range panels_of(const Matrix<S>& matrix, const Part& part) {
  return part_of(matrix.panel_count(), part.group.id, part.group.size);
}

// Packs panels that this thread will multiply by, so that they are in its cache: all of them, or its share if threads
// of other row groups need them too.
template <class S>
void pack_share(Matrix<S>& matrix, const Part& part) {
  const Range panels = panels_of(matrix, part);
  for (int64_t panel = panels.begin + part.row_group; panel < panels.end; panel += part.row_groups) matrix.pack(panel);
}

// A thread's view of a matrix. Panels that it alone needs, and once, wait for their turn: until they are used, they
// would only leave its cache.
template <class S>
Matrix<S> packed_for(Matrix<S> matrix, const Part& part, bool used_once) {
  matrix.in_turn = used_once && matrix.packed && part.row_groups == 1;
  if (matrix.in_turn)
    matrix.panels += panels_of(matrix, part).begin * matrix.panel_size();
  else
    pack_share(matrix, part);
  return matrix;
}

// Calls body with the number of valid lanes of a vector of units; as a compile-time constant if all are.
template <int w, class Body>
FUSEDRNN_INLINE void with_lanes(int64_t valid, Body body) {
  if (valid >= w)
    body(std::integral_constant<int64_t, w>{});
  else
    body(valid);
}

// Fills dst[n] from src[n], or with zeros where src is null, converting the type.
template <class D, class S>
void copy_or_zero(D* dst, const S* src, int64_t n) {
  constexpr int w = lanes<S>;
  for (int64_t i = 0; i < n; i += w) {
    const int64_t valid = std::min<int64_t>(w, n - i);
    store(dst + i, src ? load(src + i, valid) : AccVec<S>{}, valid);
  }
}

}  // namespace fusedrnn::FUSEDRNN_ISA
