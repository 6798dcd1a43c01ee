// Elementwise formulas on vectors, by the names of ../elementwise.py, which explains them.
//
// Vectors are those of GCC and Clang, so that one source serves every processor. They are as long as its
// registers: GCC compiles comparisons of longer ones to one scalar instruction per lane. float has polynomials,
// double calls the C++ library.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

// Vectors stay in registers only if everything that takes or returns them is inlined.
#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

namespace fused_distill {

typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef double Doubles __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t Int32s __attribute__((vector_size(VECTOR_BYTES)));
typedef int64_t Int64s __attribute__((vector_size(VECTOR_BYTES)));

template <class T> struct Vectors;
template <> struct Vectors<float> { using Values = Floats; using Mask = Int32s; };
template <> struct Vectors<double> { using Values = Doubles; using Mask = Int64s; };
template <class T> using Values = typename Vectors<T>::Values;
template <class T> using Mask = typename Vectors<T>::Mask;
template <class V> using Element = std::remove_reference_t<decltype(V{}[0])>;

template <class T> constexpr int kLanes = VECTOR_BYTES / sizeof(T);
template <class T> constexpr T kInfinity = std::numeric_limits<T>::infinity();

template <class T> INLINE Values<T> all(T x) { return x - Values<T>{}; }

// The first `count` lanes from memory, `rest` in the others.
template <class T> INLINE Values<T> load_part(const T* from, int count, T rest) {
  Values<T> v;
  if (count == kLanes<T>) {
    std::memcpy(&v, from, sizeof v);
    return v;
  }
  v = all<T>(rest);
  for (int i = 0; i < count; ++i) v[i] = from[i];
  return v;
}

template <class T> INLINE void store(T* to, Values<T> v, int count) {
  if (count == kLanes<T>) {
    std::memcpy(to, &v, sizeof v);
    return;
  }
  for (int i = 0; i < count; ++i) to[i] = v[i];
}

template <class V> INLINE V abs(V x) { return x < 0 ? -x : x; }
template <class V> INLINE V maximum(V a, V b) { return a > b || a != a ? a : b; }  // NaN if either is

template <class V, class F> INLINE V by_lane(V x, F function) {
  for (unsigned i = 0; i < sizeof(V) / sizeof(x[0]); ++i) x[i] = function(x[i]);
  return x;
}

// (e^x - 1 - x) / x^2 by the first `terms` terms of its series.
template <int terms, class V> INLINE V taylor_remainder(V x) {
  constexpr double factorials[] = {1, 1, 2, 6, 24, 120, 720, 5040, 40320, 362880, 3628800, 39916800, 479001600,
                                   6227020800, 87178291200, 1307674368000};
  using T = Element<V>;
  V value = all<T>(static_cast<T>(1 / factorials[terms + 1]));
  for (int k = terms; k > 1; --k) value = value * x + static_cast<T>(1 / factorials[k]);
  return value;
}

// e^x and e^x - 1 for x <= 0.
template <class V> struct Exponentials {
  V exp, expm1;
};

// With x = n log 2 + r, e^x = 2^n + 2^n (e^r - 1). Nothing cancels in 2^n - 1 + 2^n (e^r - 1).
INLINE Exponentials<Floats> exponentials(Floats x) {
  const float rounder = 12582912;  // 1.5 * 2^23: adding it rounds to an integer
  Floats bounded = x < -87 ? all<float>(-87) : x;
  Floats shifted = bounded * 1.44269504f + rounder;
  Floats n = shifted - rounder;
  Floats r = bounded - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Floats grown = r + r * r * taylor_remainder<6>(r);
  Int32s bits = ((Int32s)shifted + (127 - 0x4B400000)) << 23;
  Floats power = (Floats)bits;
  return {x < -87 ? Floats{} : power * grown + power, power * grown + (power - 1)};
}

INLINE Exponentials<Doubles> exponentials(Doubles x) {
  return {by_lane(x, [](double v) { return std::exp(v); }), by_lane(x, [](double v) { return std::expm1(v); })};
}

// log(sum + lost) for sum > 0 and what rounding the sum has lost. With sum + lost = 2^k (1 + t), log(1 + t) =
// t - t^2 Q(t) for t between sqrt(1/2) - 1 and sqrt(2) - 1, where the polynomial Q, fitted by weighted least
// squares, has a relative error of 6e-9.
INLINE Floats log_of_sum(Floats sum, Floats lost) {
  constexpr float q[] = {0.49999988079071045f, -0.33333325386047363f, 0.2500157654285431f,
                         -0.20001977682113647f, 0.16609200835227966f, -0.14181818068027496f,
                         0.13242115080356598f, -0.1290418654680252f, 0.076234370470047f};
  Int32s bits = (Int32s)sum;
  Int32s k = (bits - 0x3F3504F3) >> 23;
  Floats power = (Floats)((127 - k) << 23);
  Floats t = ((Floats)(bits - (k << 23)) - 1) + lost * power;
  Floats value = all<float>(q[8]);
  for (int i = 7; i >= 0; --i) value = value * t + q[i];
  value = __builtin_convertvector(k, Floats) * 0.693147181f + (t - t * t * value);
  return sum > 0 ? value : (sum == 0 ? all<float>(-kInfinity<float>) : sum);
}

INLINE Doubles log_of_sum(Doubles sum, Doubles lost) {
  return by_lane(sum, [](double v) { return std::log(v); }) + lost / sum;
}

// log(1 + x) for -1 <= x <= 0.
INLINE Floats log1p(Floats x) {
  Floats sum = x + 1;
  return log_of_sum(sum, x - (sum - 1));
}

INLINE Doubles log1p(Doubles x) {
  return by_lane(x, [](double v) { return std::log1p(v); });
}

// p (e^x - 1 - x) >= 0 with x = log m - log p and difference = m - p.
template <class V> INLINE V kl_terms(V p, V x, V difference) {
  constexpr int terms = sizeof(Element<V>) == 4 ? 8 : 14;
  V near = p * (x * x) * taylor_remainder<terms>(x);
  V far = difference - (p == 0 ? V{} : p * x);
  return abs(x) < 0.5f ? near : (far < 0 ? V{} : far);
}

template <class V> INLINE V mul_zero_safe(V p, V x) { return p == 0 ? V{} : p * x; }

}  // namespace fused_distill
