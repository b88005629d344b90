// SIMD vectors (GCC/Clang vector extension), loads and stores of n <= lanes elements, and storage types.
// Everything here and in the other kernel headers lives in a namespace of its instruction set, so that
// the linker never merges code compiled with different flags.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#include "../math.h"
#include "params.h"

#ifndef FUSEDRNN_ISA
#error "define FUSEDRNN_ISA (a namespace name) and FUSEDRNN_VECTOR_BYTES before including the CPU kernels"
#endif

namespace fusedrnn {

namespace FUSEDRNN_ISA {

template <class T, int n>
struct VecOf {
  typedef T type __attribute__((vector_size(n * sizeof(T))));
};
template <class T, int n>
using Vec = typename VecOf<T, n>::type;

// Lanes of a vector of accumulators.
template <class S>
inline constexpr int lanes = FUSEDRNN_VECTOR_BYTES / int(sizeof(Acc<S>));
template <class S>
using AccVec = Vec<Acc<S>, lanes<S>>;

// Elements of a bfloat16 pair are multiplied and added in one instruction, so K goes in steps of 2.
template <class S>
inline constexpr int k_step = sizeof(Acc<S>) / sizeof(S);

// A vector of V's type at any address of its elements.
template <class V>
struct UnalignedOf {
  typedef V type __attribute__((aligned(1), may_alias));
};
template <class V>
using Unaligned = typename UnalignedOf<V>::type;

// Loads n elements, the other lanes are 0.
template <class S>
FUSEDRNN_INLINE AccVec<S> load(const S* p, int64_t n = lanes<S>) {
  constexpr int w = lanes<S>;
  if constexpr (std::is_same_v<S, bf16>) {
    Vec<uint16_t, w> half{};
    std::memcpy(&half, p, n == w ? sizeof(half) : n * sizeof(S));
    const Vec<uint32_t, w> bits = __builtin_convertvector(half, Vec<uint32_t, w>) << 16;
    AccVec<S> v;
    std::memcpy(&v, &bits, sizeof(v));
    return v;
  } else {
    if (n == w) return *reinterpret_cast<const Unaligned<AccVec<S>>*>(p);
    AccVec<S> v{};
    std::memcpy(&v, p, n * sizeof(S));
    return v;
  }
}

// Stores n elements; to bfloat16 with round to nearest even, NaN kept. (The instruction takes subnormal numbers for
// zeros, as the one for products does.)
template <class S>
FUSEDRNN_INLINE void store(S* p, AccVec<S> v, int64_t n = lanes<S>) {
  constexpr int w = lanes<S>;
  if constexpr (std::is_same_v<S, bf16>) {
#ifdef __AVX512BF16__
    const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
#else
    Vec<uint32_t, w> bits;
    std::memcpy(&bits, &v, sizeof(bits));
    const Vec<uint32_t, w> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Vec<uint32_t, w> kept = v == v ? rounded : (bits >> 16) | 0x40;
    const Vec<uint16_t, w> half = __builtin_convertvector(kept, Vec<uint16_t, w>);
#endif
    std::memcpy(p, &half, n == w ? sizeof(half) : n * sizeof(S));
  } else if (n == w) {
    *reinterpret_cast<Unaligned<AccVec<S>>*>(p) = v;
  } else {
    std::memcpy(p, &v, n * sizeof(S));
  }
}

// Operands of the matrix products: k_step elements of K in each lane.
template <class S>
struct OperandOf {
  using type = AccVec<S>;
};
template <>
struct OperandOf<bf16> {
  using type = Vec<uint16_t, 2 * lanes<bf16>>;
};
template <class S>
using Operand = typename OperandOf<S>::type;

// n of the lanes * k_step elements, the others 0.
template <class S>
FUSEDRNN_INLINE Operand<S> load_operand(const S* p, int64_t n = lanes<S> * k_step<S>) {
  if (n == lanes<S> * k_step<S>) return *reinterpret_cast<const Unaligned<Operand<S>>*>(p);
  Operand<S> v{};
  std::memcpy(&v, p, n * sizeof(S));
  return v;
}

// n columns of k_step rows, a column in each lane; the other lanes are 0, and so is a row that is null.
template <class S>
FUSEDRNN_INLINE Operand<S> load_columns(const S* row, [[maybe_unused]] const S* next, int64_t n) {
  if constexpr (k_step<S> == 1) {
    return row ? load_operand(row, n) : Operand<S>{};
  } else {
    constexpr int w = lanes<S>;
    const auto half = [n](const S* p) __attribute__((always_inline)) {
      Vec<uint16_t, w> v{};
      if (p && n == w)
        std::memcpy(&v, p, sizeof(v));
      else if (p)
        std::memcpy(&v, p, n * sizeof(S));
      return __builtin_convertvector(v, Vec<uint32_t, w>);
    };
    return (Operand<S>)(half(row) | half(next) << 16);
  }
}

// The k_step elements at p, in every lane. As integers: 0 + x is not x for a float, and the compiler would add.
template <class S>
FUSEDRNN_INLINE Operand<S> broadcast(const S* p) {
  using Bits = std::conditional_t<sizeof(S) * k_step<S> == 4, uint32_t, uint64_t>;
  Bits element;
  std::memcpy(&element, p, sizeof(element));
  const Vec<Bits, lanes<S>> all = Vec<Bits, lanes<S>>{} + element;
  Operand<S> v;
  std::memcpy(&v, &all, sizeof(v));
  return v;
}

// The elements of a and b at the indices, which count through a and then b.
template <int... indices, class V>
FUSEDRNN_INLINE V shuffle(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, indices...);
#else
  return __builtin_shuffle(a, b, V{indices...});
#endif
}

// One stage of a transposition: swaps the off-diagonal blocks of size `size` in the 2 size x 2 size squares.
template <int size, class V, int... j>
FUSEDRNN_INLINE void swap_blocks(V* rows, std::integer_sequence<int, j...>) {
  constexpr int w = sizeof...(j);
  for (int i = 0; i < w; ++i) {
    if (i & size) continue;
    const V a = rows[i], b = rows[i + size];
    rows[i] = shuffle<(j & size ? w + j - size : j)...>(a, b);
    rows[i + size] = shuffle<(j & size ? w + j : j + size)...>(a, b);
  }
}

// Transposes lanes x lanes elements (pairs of them, for bfloat16) in place.
template <class S, int size = 1>
FUSEDRNN_INLINE void transpose(Operand<S>* rows) {
  using Element = Vec<std::conditional_t<sizeof(Acc<S>) == 4, uint32_t, uint64_t>, lanes<S>>;
  if constexpr (size < lanes<S>) {
    Element elements[lanes<S>];
    std::memcpy(elements, rows, sizeof(elements));
    swap_blocks<size>(elements, std::make_integer_sequence<int, lanes<S>>{});
    std::memcpy(rows, elements, sizeof(elements));
    transpose<S, 2 * size>(rows);
  }
}

// acc + a0 b0 + a1 b1 for the bfloat16 pair of each lane.
FUSEDRNN_INLINE AccVec<bf16> dot_bf16(AccVec<bf16> acc, Operand<bf16> a, Operand<bf16> b) {
#ifdef __AVX512BF16__
  return (AccVec<bf16>)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
  using Pairs = Vec<uint32_t, lanes<bf16>>;
  const Pairs pa = (Pairs)a, pb = (Pairs)b;
  acc += (AccVec<bf16>)(pa << 16) * (AccVec<bf16>)(pb << 16);
  acc += (AccVec<bf16>)(pa & 0xffff0000u) * (AccVec<bf16>)(pb & 0xffff0000u);
  return acc;
#endif
}

// acc + a b, lane by lane; for bfloat16 the sum of a lane's two products.
template <class S>
FUSEDRNN_INLINE AccVec<S> multiply_add(AccVec<S> acc, Operand<S> a, Operand<S> b) {
  if constexpr (k_step<S> == 1) {
    return acc + a * b;
  } else {
    return dot_bf16(acc, a, b);
  }
}

// The sum of a vector's lanes, pairwise.
template <class V>
FUSEDRNN_INLINE scalar_t<V> sum(V v) {
  constexpr int n = sizeof(V) / sizeof(scalar_t<V>);
  if constexpr (n == 1) {
    return v[0];
  } else {
    Vec<scalar_t<V>, n / 2> half[2];
    std::memcpy(half, &v, sizeof(v));
    return sum(half[0] + half[1]);
  }
}

}  // namespace FUSEDRNN_ISA
}  // namespace fusedrnn
