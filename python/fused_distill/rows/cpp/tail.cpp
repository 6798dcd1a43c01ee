// Passes over the columns outside a top-k support, which hold -inf: see `TorchTail` in ../tail_torch.py.
//
// A thread computes maxima and sums of one row after another, so that the row is still in its cache for the sums.
#include "rows.h"

namespace fused_distill {

// Layout shared with `_Arguments` in ../tail_cpp.py.
template <class T> struct TailArguments {
  int64_t rows, columns, threads;
  T* logits;
  int64_t stride;
  const T* bias;  // (columns,) or null
  const double* scalars;  // (13,) as in ../../config.py
  int64_t has_softcap;
  double *max_z, *sum_z, *max_y, *sum_y;  // (rows,)
  // For the gradient, else null: (rows,) factors of e^(z - max_z), and of e^(y - max_y) or null.
  const double *factor_z, *factor_y;
  T* grad;
  int64_t grad_stride;
};

template <class T, bool rounds> class TailRow {
 public:
  using V = Values<T>;

  TailRow(const TailArguments<T>& a, int64_t row)
      : a_(a),
        row_(row),
        logits_(a.logits + row * a.stride),
        transform_(student_transform(a.bias, a.scalars, a.has_softcap)) {}

  void statistics() const {
    V max_z = all<T>(-kInfinity<T>), max_y = max_z;
    for_columns<T>(
        a_.columns,
        [&](int64_t j, int count) INLINE_LAMBDA {
          V y = temperature_1(j, count);
          max_z = maximum(max_z, y * inv_temperature());
          max_y = maximum(max_y, y);
        },
        [] {});
    a_.max_z[row_] = largest<T>(max_z);
    a_.max_y[row_] = largest<T>(max_y);
    const T shift_z = finite(a_.max_z[row_]), shift_y = finite(a_.max_y[row_]);
    Sum<T> sum_z, sum_y;
    for_columns<T>(
        a_.columns,
        [&](int64_t j, int count) INLINE_LAMBDA {
          prefetch(logits_ + a_.stride + j);
          V y = temperature_1(j, count);
          sum_z.part += exponentials(y * inv_temperature() - shift_z).exp;
          if (!one_softmax()) sum_y.part += exponentials(y - shift_y).exp;
          // Every term is added in double: losses between close models need all digits of the log-sum-exp.
          sum_z.flush();
          if (!one_softmax()) sum_y.flush();
        },
        [] {});
    a_.sum_z[row_] = sum_z.total();
    a_.sum_y[row_] = one_softmax() ? sum_z.total() : sum_y.total();
  }

  void gradient() const {
    const T shift_z = finite(a_.max_z[row_]), shift_y = finite(a_.max_y[row_]);
    const T factor_z = T(a_.factor_z[row_]), factor_y = a_.factor_y == nullptr ? 0 : T(a_.factor_y[row_]);
    T* grad = a_.grad + row_ * a_.grad_stride;
    for_columns<T>(
        a_.columns,
        [&](int64_t j, int count) INLINE_LAMBDA {
          V y = temperature_1(j, count);
          V by_y = factor_z * exponentials(y * inv_temperature() - shift_z).exp;
          if (a_.factor_y != nullptr) by_y += factor_y * exponentials(y - shift_y).exp;
          store(grad + j, mul_zero_safe(by_y, transform_.derivative(y)), count);
        },
        [] {});
  }

 private:
  T inv_temperature() const { return rounds ? T(transform_.inv_temperature) : 1; }
  bool one_softmax() const { return !rounds || transform_.inv_temperature == 1; }

  // 0 for -inf, so that e^(-inf - maximum) is 0 in a row without a tail.
  static T finite(double maximum) { return maximum == -kInfinity<double> ? 0 : T(maximum); }

  INLINE V temperature_1(int64_t j, int count) const {
    V x = load_part(logits_ + j, count, -kInfinity<T>);
    if constexpr (!rounds) return x;
    V y = transform_.at_temperature_1(x, j, count);
    return x == -kInfinity<T> ? x : y;
  }

  const TailArguments<T>& a_;
  const int64_t row_;
  const T* logits_;
  const Transform<T> transform_;
};

template <class T, bool rounds> void run(const TailArguments<T>& a) {
  for_rows(a.rows, a.threads, [&](int64_t i) {
    const TailRow<T, rounds> row(a, i);
    a.grad == nullptr ? row.statistics() : row.gradient();
  });
}

template <class T> void run(const TailArguments<T>* a) {
  const bool rounds = student_transform(a->bias, a->scalars, a->has_softcap).rounds();
  rounds ? run<T, true>(*a) : run<T, false>(*a);
}

}  // namespace fused_distill

extern "C" void tail_float(const fused_distill::TailArguments<float>* a) { fused_distill::run(a); }
extern "C" void tail_double(const fused_distill::TailArguments<double>* a) { fused_distill::run(a); }
