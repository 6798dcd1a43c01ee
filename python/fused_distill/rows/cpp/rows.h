// A row's projections and what is shared by all passes over its columns.
#pragma once

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#include "elementwise.h"

namespace fused_distill {

// Reads memory into the second-level cache ahead of its use: arithmetic of one row hides the reading of the next.
// Addresses after the last row do no harm.
INLINE void prefetch(const void* from) { __builtin_prefetch(from, 0, 2); }

// Calls function(row) for every row, by threads that each take the next few rows. GCC's OpenMP has PyTorch's pool
// of threads. Clang's would be a second pool, whose idle threads spin while matrix products run.
template <class Function> void for_rows(int64_t rows, int64_t threads, Function function) {
  const int64_t at_once = std::clamp<int64_t>(rows / (4 * threads), 1, 8);
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, at_once) num_threads(threads)
  for (int64_t row = 0; row < rows; ++row) function(row);
#else
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t first; (first = next.fetch_add(at_once)) < rows;) {
      for (int64_t row = first; row < std::min(first + at_once, rows); ++row) function(row);
    }
  };
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < std::min(threads, rows); ++i) others.emplace_back(work);
  } catch (const std::system_error&) {  // no more threads can be started: those that run do the work
  }
  work();
  for (std::thread& other : others) other.join();
#endif
}

constexpr int kTermsPerFlush = 8;

// Columns in vectors: calls function(column, count) for kLanes<T> columns at a time, and flush() after every
// kTermsPerFlush of these calls and at the end. The last count may be less.
template <class T, class Function, class Flush>
INLINE void for_columns(int64_t columns, Function function, Flush flush) {
  const int64_t whole = columns / kLanes<T> * kLanes<T>, step = kTermsPerFlush * kLanes<T>;
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

// A sum over columns: in T over at most kTermsPerFlush terms a lane, then in double.
template <class T> class Sum {
 public:
  Values<T> part{};

  INLINE void flush() {
    for (int i = 0; i < kPieces; ++i) {
      Piece piece;
      std::memcpy(&piece, reinterpret_cast<const char*>(&part) + i * sizeof piece, sizeof piece);
      total_[i] += __builtin_convertvector(piece, Doubles);
    }
    part = Values<T>{};
  }

  double total() const {
    double sum = 0;
    for (Doubles lanes : total_) {
      for (int i = 0; i < kLanes<double>; ++i) sum += lanes[i];
    }
    return sum;
  }

 private:
  // As many T as there are lanes of double.
  typedef T Piece __attribute__((vector_size(kLanes<double> * sizeof(T))));
  static constexpr int kPieces = kLanes<T> / kLanes<double>;
  Doubles total_[kPieces] = {};
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
