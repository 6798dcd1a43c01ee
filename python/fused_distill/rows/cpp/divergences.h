// Terms of the divergences and their slopes, as ../divergences.py, which explains them.
#pragma once

#include "elementwise.h"

namespace fused_distill {

enum Form { FORWARD_KL, REVERSE_KL, MIXTURE, SKEW_FORWARD_KL, SKEW_REVERSE_KL, MIXED_KL, TOTAL_VARIATION };

template <class T> struct Numbers {
  T of_teacher, of_student, teacher_share, student_share, imbalance, clip;
  Form form;
  bool clips;
};

template <class V> struct Outcomes {
  V p_s, p_t, d, difference;  // d = log p_t - log p_s, difference = p_t - p_s
  Exponentials<V> ratio;  // of -|d|
};

template <class V> struct Terms {
  V term, slope;
  V centre;  // what the gradient subtracts, times p_s, is a sum of these
};

// log m - log p_s and log m - log p_t for m = c p_t + (1 - c) p_s.
template <class V> struct LogRatios {
  V student, teacher;
};

// True if one model has so little of the mixture that it takes a few more operations to keep all digits.
template <class T> INLINE bool has_small_share(const Numbers<T>& n) {
  const T small = T(0.0625);
  return n.teacher_share <= small || n.student_share <= small;
}

template <class V, class T> INLINE LogRatios<V> mixture_log_ratios(const Outcomes<V>& o, const Numbers<T>& n) {
  V share = o.d > 0 ? all<T>(n.student_share) : all<T>(n.teacher_share);
  V distance = abs(o.d), below = share * o.ratio.expm1, toward_larger, toward_smaller;
  if (!has_small_share(n)) {
    toward_larger = log1p(below);
    toward_smaller = toward_larger + distance;
  } else {
    V rest = o.d > 0 ? all<T>(n.teacher_share) : all<T>(n.student_share);
    V above = -rest * o.ratio.expm1 / o.ratio.exp;
    auto by_smaller = (rest < share) & (above < 1), far = (below < T(-0.5)) & ~by_smaller;
    V excess = by_smaller ? above : below;
    V sum = far ? rest + share * o.ratio.exp : excess + 1;
    V logarithm = log_of_sum(sum, far ? V{} : excess - (sum - 1));
    toward_larger = by_smaller ? logarithm - distance : logarithm;
    toward_smaller = by_smaller ? logarithm : logarithm + distance;
  }
  return {o.d > 0 ? toward_smaller : toward_larger, o.d > 0 ? toward_larger : toward_smaller};
}

// (p_t - p_s) / m.
template <class V, class T> INLINE V mixture_ratio(const Outcomes<V>& o, const Numbers<T>& n) {
  V share = o.d > 0 ? all<T>(n.student_share) : all<T>(n.teacher_share);
  V rest = o.d > 0 ? all<T>(n.teacher_share) : all<T>(n.student_share);
  // The sum has the last bits of the golden results.
  V smaller = has_small_share(n) ? o.ratio.exp : o.ratio.expm1 + 1;
  V lead = o.ratio.expm1 / (rest + share * smaller);
  return o.d > 0 ? -lead : lead;
}

// Slopes of the reverse KL are those of d + shift, which the caller corrects. With shift close to its mean -d,
// large log ratios lose no digits.
template <class V, class T> INLINE Terms<V> terms(const Outcomes<V>& o, const Numbers<T>& n, T shift) {
  V zero{};
  switch (n.form) {
    case FORWARD_KL:
      return {kl_terms(o.p_t, -o.d, -o.difference), -o.difference, zero};
    case REVERSE_KL: {
      V reverse = kl_terms(o.p_s, o.d, o.difference);
      return {reverse, mul_zero_safe(o.p_s, -o.d - shift), reverse};
    }
    case MIXED_KL: {
      V reverse = kl_terms(o.p_s, o.d, o.difference);
      V forward = kl_terms(o.p_t, -o.d, -o.difference);
      V a = all<T>(n.of_teacher), b = all<T>(n.of_student);
      V slope = mul_zero_safe(b, mul_zero_safe(o.p_s, -o.d - shift)) - a * o.difference;
      return {mul_zero_safe(a, forward) + mul_zero_safe(b, reverse), slope, reverse};
    }
    case TOTAL_VARIATION: {
      V sign = o.d > 0 ? all<T>(1) : (o.d < 0 ? all<T>(-1) : o.d);
      return {abs(o.difference) * static_cast<T>(0.5), o.p_s * sign * static_cast<T>(-0.5), zero};
    }
    default:
      break;
  }
  LogRatios<V> ratios = mixture_log_ratios(o, n);
  V of_student = kl_terms(o.p_s, ratios.student, n.teacher_share * o.difference);
  V by_log = n.of_student * mul_zero_safe(o.p_s, -ratios.student);
  if (n.form == SKEW_REVERSE_KL || n.form == SKEW_FORWARD_KL) {
    V by_ratio = -n.imbalance * n.student_share * (o.p_s * mixture_ratio(o, n));
    if (n.form == SKEW_REVERSE_KL) return {of_student, by_log + by_ratio, by_log + by_ratio};
    return {kl_terms(o.p_t, ratios.teacher, -n.student_share * o.difference), by_ratio, by_ratio};
  }
  V of_teacher = kl_terms(o.p_t, ratios.teacher, -n.student_share * o.difference);
  return {n.of_teacher * of_teacher + n.of_student * of_student, by_log, of_student};
}

// Terms and slopes of min(T, clip), where the gradient subtracts the sum of the slopes.
template <class V, class T> INLINE Terms<V> clipped(const Outcomes<V>& o, const Numbers<T>& n, Terms<V> t) {
  V bound = n.clip - n.imbalance * o.difference;
  t.slope = t.term > bound ? n.imbalance * o.p_s : t.slope;
  t.term = t.term > bound ? bound : t.term;
  t.centre = t.slope;
  return t;
}

}  // namespace fused_distill
