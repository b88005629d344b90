// Batches of sequences that end early or begin anew, as the packed rows that the layer ops run (fusedrnn/rows.py).
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <numeric>

#include "../tensors.h"

namespace fusedrnn {
namespace {

// Consecutive steps of one sequence in which the state is never reset.
struct Segment {
  int64_t sequence, start, length;
};

// Where the state is reset: [N, steps], or nowhere.
struct Resets {
  const bool* data = nullptr;
  int64_t sequence_stride = 0, step_stride = 0;

  explicit Resets(const MaybeTensor& t) {
    if (!t) return;
    data = static_cast<const bool*>(t->const_data_ptr());
    sequence_stride = t->stride(0), step_stride = t->stride(1);
  }
  bool at(int64_t n, int64_t t) const { return data && data[n * sequence_stride + t * step_stride]; }
};

void check(const char* name, const Tensor& t, std::initializer_list<int64_t> shape, ScalarType dtype) {
  const auto sizes = t.sizes();
  STD_TORCH_CHECK(std::equal(shape.begin(), shape.end(), sizes.begin(), sizes.end()), "fusedrnn: ", name,
                  ": its shape does not fit the lengths and the number of steps");
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == dtype, "fusedrnn: ", name, ": expected dtype ", toString(dtype),
                  " on the CPU");
  check_storage(name, t);
}

std::vector<int64_t> values(const Tensor& t) {
  std::vector<int64_t> copy(t.size(0));
  const auto* data = static_cast<const int64_t*>(t.const_data_ptr());
  for (size_t n = 0; n < copy.size(); ++n) copy[n] = data[int64_t(n) * t.stride(0)];
  return copy;
}

void check_lengths(const std::vector<int64_t>& lengths, int64_t steps) {
  int64_t rows = 0;
  for (const int64_t length : lengths) {
    if (length >= 0 && length <= steps && !__builtin_add_overflow(rows, length, &rows)) continue;
    std::string got;
    for (const int64_t each : lengths) got += (got.empty() ? "" : ", ") + std::to_string(each);
    STD_TORCH_CHECK(false, "Expected lengths from 0 to ", steps, ", got [", got, "]");
  }
}

// By sequence and, in it, by time.
std::vector<Segment> segments_of(const std::vector<int64_t>& lengths, const Resets& resets) {
  std::vector<Segment> segments;
  segments.reserve(lengths.size());
  for (int64_t n = 0; n < int64_t(lengths.size()); ++n) {
    int64_t start = 0;
    for (int64_t t = 1; resets.data && t < lengths[n]; ++t) {
      if (!resets.at(n, t)) continue;
      segments.push_back({n, start, t - start});
      start = t;
    }
    if (lengths[n] > 0) segments.push_back({n, start, lengths[n] - start});
  }
  return segments;
}

// How many segments are longer than each number of steps, up to the longest one's: the batch sizes, and a zero.
std::vector<int64_t> count_longer(const std::vector<Segment>& segments) {
  int64_t longest = 0;
  for (const Segment& s : segments) longest = std::max(longest, s.length);
  std::vector<int64_t> longer(longest + 1, 0);
  for (const Segment& s : segments) ++longer[s.length - 1];
  std::partial_sum(longer.rbegin(), longer.rend(), longer.rbegin());
  return longer;
}

// batch_sizes [longest], source [rows], initial [D, S], final [D, N] of a Segments in rows.py. Step t of sequence n is
// row first_row[n] + step_row[t] of the input.
std::tuple<Tensor, Tensor, Tensor, Tensor> segments_op(const Tensor& lengths_, const MaybeTensor& reset,
                                                       const Tensor& first_row_, const Tensor& step_row_,
                                                       int64_t directions) {
  STD_TORCH_CHECK(directions == 1 || directions == 2, "fusedrnn: directions: expected 1 or 2, got ", directions);
  STD_TORCH_CHECK(lengths_.dim() == 1 && step_row_.dim() == 1,
                  "fusedrnn: lengths, step_row: expected one dimension, got ", lengths_.dim(), " and ",
                  step_row_.dim());
  const int64_t N = lengths_.size(0), steps = step_row_.size(0);
  check("lengths", lengths_, {N}, ScalarType::Long);
  check("first_row", first_row_, {N}, ScalarType::Long);
  check("step_row", step_row_, {steps}, ScalarType::Long);
  if (reset) check("reset", *reset, {N, steps}, ScalarType::Bool);
  const std::vector<int64_t> lengths = values(lengths_), first_row = values(first_row_), step_row = values(step_row_);
  check_lengths(lengths, steps);

  const Resets resets(reset);
  const std::vector<Segment> segments = segments_of(lengths, resets);
  std::vector<int64_t> rank = count_longer(segments);  // of the next segment that has so many steps
  const int64_t longest = int64_t(rank.size()) - 1, S = int64_t(segments.size());
  std::vector<int64_t> offset(longest + 1, 0);
  std::partial_sum(rank.begin(), rank.end() - 1, offset.begin() + 1);

  const auto integers = [&](const std::vector<int64_t>& shape) { return empty(shape, ScalarType::Long, lengths_); };
  const Tensor batch_sizes = integers({longest}), source = integers({offset[longest]});
  const Tensor initial = integers({directions, S}), final = integers({directions, N});
  std::copy_n(rank.begin(), longest, data<int64_t>(batch_sizes));
  for (int64_t d = 0; d < directions; ++d)
    std::iota(data<int64_t>(final) + d * N, data<int64_t>(final) + (d + 1) * N, S);
  for (const Segment& s : segments) {
    const int64_t r = rank[s.length]++, n = s.sequence;
    // Backwards in time a sequence begins with its last segment and ends with its first.
    const bool first = s.start == 0, last = s.start + s.length == lengths[n];
    data<int64_t>(initial)[r] = first && !resets.at(n, 0) ? n : N;
    if (last) data<int64_t>(final)[n] = r;
    if (directions == 2) {
      data<int64_t>(initial)[S + r] = last ? n : N;
      if (first) data<int64_t>(final)[N + n] = r;
    }
    for (int64_t t = 0; t < s.length; ++t)  // unsigned, so that no sum overflows: index_select checks them
      data<int64_t>(source)[offset[t] + r] = int64_t(uint64_t(first_row[n]) + uint64_t(step_row[s.start + t]));
  }
  return {batch_sizes, source, initial, final};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fusedrnn, CPU, m) { m.impl("segments", TORCH_BOX(&segments_op)); }

}  // namespace fusedrnn
