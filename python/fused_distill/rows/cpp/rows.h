// A row's projections and what is shared by all passes over its columns.
#pragma once

#include "elementwise.h"

namespace fused_distill {

// Columns in vectors: calls function(column, count) for kLanes<T> columns at a time, and flush() after every 32
// of these calls and at the end. The last count may be less.
template <class T, class Function, class Flush>
INLINE void for_columns(int64_t columns, Function function, Flush flush) {
  const int64_t whole = columns / kLanes<T> * kLanes<T>, step = 32 * kLanes<T>;
  for (int64_t start = 0; start < whole; start += step) {
    const int64_t end = start + step < whole ? start + step : whole;
    for (int64_t j = start; j < end; j += kLanes<T>) function(j, kLanes<T>);
    flush();
  }
  if (whole < columns) {
    function(whole, static_cast<int>(columns - whole));
    flush();
  }
}

// A sum over columns: in T over at most 32 terms a lane, then in double.
template <class T> struct Sum {
  Values<T> part{};
  double total = 0;

  INLINE void flush() {
    for (int i = 0; i < kLanes<T>; ++i) total += part[i];
    part = Values<T>{};
  }
};

template <class T> INLINE T largest(Values<T> lanes) {
  T value = lanes[0];
  for (int i = 1; i < kLanes<T>; ++i) value = value > lanes[i] || value != value ? value : lanes[i];
  return value;
}

// What turns one model's projections into logits: softcap * tanh(scale * (x + bias) / softcap).
template <class T> struct Transform {
  const T* bias;  // (columns,) or null
  double scale, softcap;  // softcap 0: none
  double inv_temperature;

  bool rounds() const { return bias != nullptr || scale != 1 || softcap != 0 || inv_temperature != 1; }

  // Logits at temperature 1 of the columns from `column` on, in the type of the projections x.
  template <class V> INLINE V at_temperature_1(V x, int64_t column, int count) const {
    using U = Element<V>;
    if (bias != nullptr) {
      for (int i = 0; i < count; ++i) x[i] += static_cast<U>(bias[column + i]);
    }
    x = x * static_cast<U>(scale);
    if (softcap == 0) return x;
    const U cap = static_cast<U>(softcap);
    return cap * by_lane(x / cap, [](U v) { return std::tanh(v); });
  }

  // Derivative of a logit y at temperature 1 with respect to its projection.
  template <class V> INLINE V derivative(V y) const {
    using U = Element<V>;
    V ratio = softcap == 0 ? V{} : y / static_cast<U>(softcap);
    return (1 - ratio * ratio) * static_cast<U>(scale);
  }
};

// The transform of a model from the options' scalars, where `scale` and `softcap` are their places in ../../config.py.
template <class T>
Transform<T> transform_of(const T* bias, const double* scalars, int scale, int softcap, bool has_softcap) {
  return {bias, scalars[scale], has_softcap ? scalars[softcap] : 0, scalars[5]};
}

template <class T> Transform<T> student_transform(const T* bias, const double* scalars, bool has_softcap) {
  return transform_of(bias, scalars, 6, 8, has_softcap);
}

template <class T> Transform<T> teacher_transform(const T* bias, const double* scalars, bool has_softcap) {
  return transform_of(bias, scalars, 7, 9, has_softcap);
}

// Maxima of both models' logits over temperature.
struct Maxima {
  double student, teacher;
};

// (z_t - z_s) - (max_t - max_s) without loss of digits, and 0 where both logits are -inf.
template <class V> INLINE V gap_beyond(V z_s, V z_t, Maxima max) {
  using U = Element<V>;
  const U offset = static_cast<U>(std::nearbyint((max.teacher - max.student) / 16) * 16);
  const U rest = (static_cast<U>(max.teacher) - offset) - static_cast<U>(max.student);
  V gap = ((z_t - offset) - z_s) - rest;
  return maximum(z_s, z_t) == -kInfinity<U> ? V{} : gap;
}

}  // namespace fused_distill
