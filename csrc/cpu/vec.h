// SIMD vectors (GCC/Clang vector extension), loads and stores of n <= lanes elements, and storage types.
// Everything here and in the other kernel headers lives in a namespace of its instruction set, so that
// the linker never merges code compiled with different flags.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
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

// The first n elements of a V at p, the others 0. (A sanitizer sees only copies.)
template <class V>
FUSEDRNN_INLINE V load_first(const void* p, int64_t n) {
  constexpr int size = sizeof(V{}[0]), count = sizeof(V) / size;
  if (n == count) return *static_cast<const Unaligned<V>*>(p);
#if defined(__AVX512BW__) && !defined(__SANITIZE_ADDRESS__)
  const uint32_t mask = (uint32_t(1) << n) - 1;
  if constexpr (sizeof(V) == 64 && size == 8) return (V)_mm512_maskz_loadu_epi64(__mmask8(mask), p);
  if constexpr (sizeof(V) == 64 && size == 4) return (V)_mm512_maskz_loadu_epi32(__mmask16(mask), p);
  if constexpr (sizeof(V) == 64 && size == 2) return (V)_mm512_maskz_loadu_epi16(__mmask32(mask), p);
  if constexpr (sizeof(V) == 32 && size == 2) return (V)_mm256_maskz_loadu_epi16(__mmask16(mask), p);
#endif
  V v{};
  std::memcpy(&v, p, n * size);
  return v;
}

// Stores the first n elements of v.
template <class V>
FUSEDRNN_INLINE void store_first(void* p, V v, int64_t n) {
  constexpr int size = sizeof(v[0]), count = sizeof(V) / size;
  if (n == count) {
    *static_cast<Unaligned<V>*>(p) = v;
    return;
  }
#if defined(__AVX512BW__) && !defined(__SANITIZE_ADDRESS__)
  const uint32_t mask = (uint32_t(1) << n) - 1;
  if constexpr (sizeof(V) == 64 && size == 8) return _mm512_mask_storeu_epi64(p, __mmask8(mask), (__m512i)v);
  if constexpr (sizeof(V) == 64 && size == 4) return _mm512_mask_storeu_epi32(p, __mmask16(mask), (__m512i)v);
  if constexpr (sizeof(V) == 32 && size == 2) return _mm256_mask_storeu_epi16(p, __mmask16(mask), (__m256i)v);
#endif
  std::memcpy(p, &v, n * size);
}

// Loads n elements, the other lanes are 0.
template <class S>
FUSEDRNN_INLINE AccVec<S> load(const S* p, int64_t n = lanes<S>) {
  constexpr int w = lanes<S>;
  if constexpr (std::is_same_v<S, bf16>) {
    const Vec<uint32_t, w> bits = __builtin_convertvector(load_first<Vec<uint16_t, w>>(p, n), Vec<uint32_t, w>) << 16;
    AccVec<S> v;
    std::memcpy(&v, &bits, sizeof(v));
    return v;
  } else {
    return load_first<AccVec<S>>(p, n);
  }
}

// Stores n elements; to bfloat16 with round to nearest even, NaN kept. (The instruction takes subnormal numbers for
// zeros, as the one for products does.)
template <class S>
FUSEDRNN_INLINE void store(S* p, AccVec<S> v, int64_t n = lanes<S>) {
  if constexpr (std::is_same_v<S, bf16>) {
    constexpr int w = lanes<S>;
#ifdef __AVX512BF16__
    const auto half = (Vec<uint16_t, w>)_mm512_cvtneps_pbh((__m512)v);
#else
    Vec<uint32_t, w> bits;
    std::memcpy(&bits, &v, sizeof(bits));
    const Vec<uint32_t, w> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Vec<uint32_t, w> kept = v == v ? rounded : (bits >> 16) | 0x40;
    const auto half = __builtin_convertvector(kept, Vec<uint16_t, w>);
#endif
    store_first(p, half, n);
  } else {
    store_first(p, v, n);
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
  return load_first<Operand<S>>(p, n);
}

// n columns of k_step rows, a column in each lane; the other lanes are 0, and so is a row that is null.
template <class S>
FUSEDRNN_INLINE Operand<S> load_columns(const S* row, [[maybe_unused]] const S* next, int64_t n) {
  if constexpr (k_step<S> == 1) {
    return row ? load_operand(row, n) : Operand<S>{};
  } else {
    constexpr int w = lanes<S>;
    const auto half = [n](const S* p) __attribute__((always_inline)) {
      const auto v = p ? load_first<Vec<uint16_t, w>>(p, n) : Vec<uint16_t, w>{};
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

// acc + a b, rounded once where the processor can: left to choose, a compiler takes two instructions for some tiles,
// and then sums depend on the tile.
template <class V>
FUSEDRNN_INLINE V fused_multiply_add(V acc, V a, V b) {
#ifdef __AVX512F__
  if constexpr (std::is_same_v<V, AccVec<float>>) return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)acc);
  if constexpr (std::is_same_v<V, AccVec<double>>) return (V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)acc);
#elif defined(__FMA__)
  if constexpr (std::is_same_v<V, AccVec<float>>) return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)acc);
  if constexpr (std::is_same_v<V, AccVec<double>>) return (V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)acc);
#elif defined(__aarch64__)
  if constexpr (std::is_same_v<V, AccVec<float>>) return (V)vfmaq_f32((float32x4_t)acc, (float32x4_t)a, (float32x4_t)b);
  if constexpr (std::is_same_v<V, AccVec<double>>)
    return (V)vfmaq_f64((float64x2_t)acc, (float64x2_t)a, (float64x2_t)b);
#else
  return acc + a * b;
#endif
}

// acc + a0 b0 + a1 b1 for the bfloat16 pair of each lane.
FUSEDRNN_INLINE AccVec<bf16> dot_bf16(AccVec<bf16> acc, Operand<bf16> a, Operand<bf16> b) {
#ifdef __AVX512BF16__
  return (AccVec<bf16>)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)b);
#else
  using Pairs = Vec<uint32_t, lanes<bf16>>;
  using V = AccVec<bf16>;
  const Pairs pa = (Pairs)a, pb = (Pairs)b;
  acc = fused_multiply_add(acc, (V)(pa << 16), (V)(pb << 16));
  return fused_multiply_add(acc, (V)(pa & 0xffff0000u), (V)(pb & 0xffff0000u));
#endif
}

// acc + a b, lane by lane; for bfloat16 the sum of a lane's two products.
template <class S>
FUSEDRNN_INLINE AccVec<S> multiply_add(AccVec<S> acc, Operand<S> a, Operand<S> b) {
  if constexpr (k_step<S> == 1)
    return fused_multiply_add(acc, a, b);
  else
    return dot_bf16(acc, a, b);
}

// Lane r * (lanes / R) of the result is the sum of the lanes of rows[r]: halves on halves, for all R rows at once.
template <int R, int half, class V, int... j>
FUSEDRNN_INLINE V sums_apart(V* rows, std::integer_sequence<int, j...> all) {
  constexpr int w = sizeof...(j);
  for (int r = 0; r < (R + 1) / 2; ++r) {
    const V a = rows[r], b = rows[r + R / 2];
    rows[r] = shuffle<(j & half ? w + j - half : j)...>(a, b) + shuffle<(j & half ? w + j : j + half)...>(a, b);
  }
  if constexpr (half == 1)
    return rows[0];
  else
    return sums_apart<(R + 1) / 2, half / 2>(rows, all);
}

// Lane r < R of the result is the sum of the lanes of rows[r].
template <int R, class V, int... j>
FUSEDRNN_INLINE V sums(V* rows, std::integer_sequence<int, j...> all) {
  constexpr int w = sizeof...(j);
  const V apart = sums_apart<R, w / 2>(rows, all);
  return shuffle<(j * (w / R) % w)...>(apart, apart);
}

}  // namespace FUSEDRNN_ISA
}  // namespace fusedrnn
