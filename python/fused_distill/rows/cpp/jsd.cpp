// Row loss for a full-vocabulary teacher: see `TorchJSD` in ../full_torch.py, whose four stages these are.
//
// A thread takes a row through all requested stages at once, so that the row stays in its cache: the logits of
// one row and two models take 256 KiB for a vocabulary of 32,768. The losses stage overwrites the logits with
// what the gradient needs, so that no exponential is computed again: the student's with the slopes, and the
// teacher's with p_s.
#include "divergences.h"
#include "rows.h"

namespace fused_distill {

enum Stage { MAXIMA, SUMS, LOSSES, GRADIENT };

// Numbers of one row, which the stages read and write. The Python side names the columns in the same order.
struct State {
  double max_s, max_t, max_y;  // of logits over temperature, and of the student's at temperature 1
  double sum_s, sum_t, sum_y;  // of e^(logit - maximum)
  double diff_sum;  // of e^(z_t - max_t) - e^(z_s - max_s)
  double lse_diff;  // log(sum_t / sum_s)
  double shift;  // finite, about the reverse KL where the gradient takes that off, else 0
  double loss;
  double centre, teacher_led;  // what the gradient subtracts; for the total variation two sums
  double student_entropy, teacher_entropy, forward_kl, reverse_kl, top1_agreement;
  double label_derivative;  // of the label's logit with respect to its projection
};

// Layout shared with `_Arguments` in ../full_cpp.py.
template <class T> struct Arguments {
  int64_t rows, columns, threads;
  T* student;
  int64_t student_stride;
  T* teacher;
  int64_t teacher_stride;
  const T* student_bias;
  const T* teacher_bias;
  const int64_t* labels;  // (rows,) or null
  const T* reverse_weight;  // (rows,) or null
  const double* scalars;  // (13,) as in ../../config.py
  int64_t form, clips, return_stats, student_has_softcap, teacher_has_softcap;
  int64_t first_stage, last_stage;
  const T* weight;  // (rows,)
  T* grad;
  int64_t grad_stride;
  State* state;  // (rows,)
};

template <class T> struct Logits {
  Values<T> y_s, z_s, z_t;
};

// With `rounds`, logits over temperature are not the projections themselves.
template <class T, bool rounds> class Row {
 public:
  using V = Values<T>;

  Row(const Arguments<T>& a, int64_t i)
      : a_(a),
        s_(a.state[i]),
        student_(a.student + i * a.student_stride),
        teacher_(a.teacher + i * a.teacher_stride),
        grad_(a.grad == nullptr ? nullptr : a.grad + i * a.grad_stride),
        label_(a.labels == nullptr ? -1 : a.labels[i]),
        weight_(a.weight == nullptr ? 0 : a.weight[i]) {
    const double* scalar = a.scalars;
    numbers_ = {T(scalar[0]), T(scalar[1]), T(scalar[2]), T(scalar[3]), T(scalar[4]), T(scalar[12]),
                Form(a.form), a.clips != 0};
    if (a.reverse_weight != nullptr) {
      const T b = a.reverse_weight[i];
      numbers_.of_teacher = 1 - b;
      numbers_.of_student = b;
      numbers_.imbalance = 1 - 2 * b;
    }
    of_student_ = student_transform(a.student_bias, scalar, a.student_has_softcap);
    of_teacher_ = teacher_transform(a.teacher_bias, scalar, a.teacher_has_softcap);
    hard_weight_ = T(scalar[10]);
    soft_weight_ = T(scalar[11]);
    slope_factor_ = T(scalar[5] * scalar[11]);
  }

  void run(int64_t first, int64_t last) {
    if (first <= MAXIMA) maxima();
    if (first <= SUMS && SUMS <= last) sums();
    if (first <= LOSSES && LOSSES <= last) losses();
    if (last == GRADIENT) gradient();
  }

 private:
  bool one_softmax() const { return of_student_.inv_temperature == 1; }

  INLINE static V part_of(const T* from, int count) { return load_part(from, count, -kInfinity<T>); }

  // Lanes from `count` on hold -inf.
  static INLINE V exclude(V x, int count) {
    for (int i = count; i < kLanes<T>; ++i) x[i] = -kInfinity<T>;
    return x;
  }

  INLINE Logits<T> logits(int64_t j, int count) const {
    V x_s = part_of(student_ + j, count), x_t = part_of(teacher_ + j, count);
    if constexpr (!rounds) return {x_s, x_s, x_t};
    const T inv_temperature = T(of_student_.inv_temperature);
    V y_s = exclude(of_student_.at_temperature_1(x_s, j, count), count);
    V y_t = exclude(of_teacher_.at_temperature_1(x_t, j, count), count);
    return {y_s, y_s * inv_temperature, y_t * inv_temperature};
  }

  INLINE V gap(int64_t j, int count, const Logits<T>& l) const {
    if constexpr (!rounds) return gap_beyond(l.z_s, l.z_t, maxima_());
    return wide_gap(j, count);
  }

  Maxima maxima_() const { return {s_.max_s, s_.max_t}; }

  // From the projections in double, because float logits have been rounded.
  V wide_gap(int64_t j, int count) const {
    V result{};
    constexpr int lanes = kLanes<double>;
    for (int first = 0; first < count; first += lanes) {
      const int n = count - first < lanes ? count - first : lanes;
      Doubles x_s{}, x_t{};
      for (int i = 0; i < n; ++i) {
        x_s[i] = student_[j + first + i];
        x_t[i] = teacher_[j + first + i];
      }
      const double inv_temperature = of_student_.inv_temperature;
      Doubles z_s = of_student_.at_temperature_1(x_s, j + first, n) * inv_temperature;
      Doubles z_t = of_teacher_.at_temperature_1(x_t, j + first, n) * inv_temperature;
      Doubles gap = gap_beyond(z_s, z_t, maxima_());
      for (int i = 0; i < n; ++i) result[first + i] = static_cast<T>(gap[i]);
    }
    return result;
  }

  void maxima() {
    V max_s = all<T>(-kInfinity<T>), max_t = max_s, max_y = max_s;
    for_columns<T>(
        a_.columns,
        [&](int64_t j, int count) INLINE_LAMBDA {
          Logits<T> l = logits(j, count);
          max_s = maximum(max_s, l.z_s);
          max_t = maximum(max_t, l.z_t);
          max_y = maximum(max_y, l.y_s);
        },
        [] {});
    s_.max_s = largest<T>(max_s);
    s_.max_t = largest<T>(max_t);
    s_.max_y = largest<T>(max_y);
  }

  void sums() {
    const T max_y = T(s_.max_y);
    const bool sums_y = rounds && a_.labels != nullptr && !one_softmax();
    const bool estimates = takes_reverse_kl();
    Sum<T> sum_s, sum_t, sum_y, difference, gaps;
    for_columns<T>(
        a_.columns,
        [&](int64_t j, int count) INLINE_LAMBDA {
          Logits<T> l = logits(j, count);
          V gap = this->gap(j, count, l);
          Outcomes<V> o = outcomes(l, gap, 1, 1);
          sum_s.part += o.p_s;
          sum_t.part += o.p_t;
          difference.part += o.difference;
          if (estimates) gaps.part += mul_zero_safe(o.p_s, gap);
          if (sums_y) sum_y.part += exponentials(l.y_s - max_y).exp;
        },
        [&] {
          sum_s.flush();
          sum_t.flush();
          difference.flush();
          if (estimates) gaps.flush();
          if (sums_y) sum_y.flush();
        });
    s_.sum_s = sum_s.total();
    s_.sum_t = sum_t.total();
    s_.sum_y = sums_y ? sum_y.total() : sum_s.total();
    s_.diff_sum = difference.total();
    const double excess = s_.diff_sum / s_.sum_s;
    s_.lse_diff = std::abs(excess) < 0.5 ? std::log1p(excess) : std::log(s_.sum_t / s_.sum_s);
    const double reverse_kl = s_.lse_diff - gaps.total() / s_.sum_s;
    s_.shift = estimates && std::isfinite(reverse_kl) ? double(T(reverse_kl)) : 0;
  }

  INLINE Outcomes<V> outcomes(int64_t j, int count, const Logits<T>& l) const {
    return outcomes(l, gap(j, count, l) - T(s_.lse_diff), T(1 / s_.sum_s), T(1 / s_.sum_t));
  }

  // Exponentials of logits beyond their maximum times a factor of each model, given the log of their ratio d. One
  // model's follow from the other's and d, unless d comes from logits that are not rounded.
  INLINE Outcomes<V> outcomes(const Logits<T>& l, V d, T factor_s, T factor_t) const {
    Exponentials<V> ratio = exponentials(-abs(d));
    V below_s = l.z_s - T(s_.max_s), below_t = l.z_t - T(s_.max_t);
    V p_s, p_t, larger;
    if constexpr (rounds) {
      p_s = exponentials(below_s).exp * factor_s;
      p_t = exponentials(below_t).exp * factor_t;
      larger = d > 0 ? p_t : p_s;
    } else {
      larger = exponentials(d > 0 ? below_t : below_s).exp * (d > 0 ? all<T>(factor_t) : all<T>(factor_s));
      V smaller = larger * ratio.exp;
      p_s = d > 0 ? smaller : larger;
      p_t = d > 0 ? larger : smaller;
    }
    V shrunk = larger * ratio.expm1;
    return {p_s, p_t, d, d > 0 ? -shrunk : shrunk, ratio};
  }

  INLINE Terms<V> terms_of(const Outcomes<V>& o) const {
    Terms<V> t = terms(o, numbers_, T(s_.shift));
    return numbers_.clips ? clipped(o, numbers_, t) : t;
  }

  void losses() {
    const T log_sum_s = T(std::log(s_.sum_s)), log_sum_t = T(std::log(s_.sum_t));
    const bool total_variation = numbers_.form == TOTAL_VARIATION;
    const bool stores = grad_ != nullptr && !total_variation;
    const bool has_stats = a_.return_stats != 0;
    const bool has_label = label_ >= 0;
    const bool is_local = has_label && label_ < a_.columns;
    if (is_local) read_label();
    const T max_y = T(s_.max_y), hard = T(hard_weight_ / s_.sum_y);
    Sum<T> term, centre, teacher_led, entropy_s, entropy_t, forward, reverse;
    Mask<T> agrees{};
    for_columns<T>(
        a_.columns,
        [&](int64_t j, int count) INLINE_LAMBDA {
          prefetch(student_ + a_.student_stride + j);
          prefetch(teacher_ + a_.teacher_stride + j);
          Logits<T> l = logits(j, count);
          Outcomes<V> o = outcomes(j, count, l);
          Terms<V> t = terms_of(o);
          term.part += t.term;
          if (total_variation) {
            centre.part += T(0.5) * o.p_s + t.slope;
            teacher_led.part += T(0.5) * o.p_s - t.slope;
          } else {
            centre.part += t.centre;
          }
          if (has_stats) {
            V below_s = l.z_s - T(s_.max_s), below_t = l.z_t - T(s_.max_t);
            entropy_s.part += mul_zero_safe(o.p_s, log_sum_s - below_s);
            entropy_t.part += mul_zero_safe(o.p_t, log_sum_t - below_t);
            forward.part += kl_terms(o.p_t, -o.d, -o.difference);
            reverse.part += kl_terms(o.p_s, o.d, o.difference);
            agrees |= (l.z_s == T(s_.max_s)) & (l.z_t == T(s_.max_t));
          }
          if (stores) {
            V slope = t.slope * slope_factor_, p_s = o.p_s * slope_factor_;
            if (has_label) slope += hard * exponentials(l.y_s - max_y).exp;
            if (rounds && of_student_.softcap != 0) {
              V derivative = of_student_.derivative(l.y_s);
              slope = slope * derivative;
              p_s = p_s * derivative;
            }
            store(student_ + j, slope, count);
            if (subtracts()) store(teacher_ + j, p_s, count);
          }
        },
        [&] {
          term.flush();
          centre.flush();
          if (total_variation) teacher_led.flush();
          if (has_stats) {
            entropy_s.flush();
            entropy_t.flush();
            forward.flush();
            reverse.flush();
          }
        });
    s_.loss = soft_weight_ * term.total();
    if (is_local) s_.loss += hard_weight_ * (std::log(s_.sum_y) + (s_.max_y - label_logit_));
    s_.centre = centre.total();
    s_.teacher_led = teacher_led.total();
    s_.student_entropy = entropy_s.total();
    s_.teacher_entropy = entropy_t.total();
    s_.forward_kl = forward.total();
    s_.reverse_kl = reverse.total();
    s_.top1_agreement = 0;
    for (int i = 0; i < kLanes<T>; ++i) s_.top1_agreement = agrees[i] ? 1 : s_.top1_agreement;
  }

  // True if the gradient takes the centre, times p_s, off the slopes.
  bool subtracts() const { return numbers_.form != FORWARD_KL || numbers_.clips; }

  // True if the gradient is, or contains, p_s (-d - KL(p_s || p_t)).
  bool takes_reverse_kl() const {
    return !numbers_.clips && (numbers_.form == REVERSE_KL || numbers_.form == MIXED_KL);
  }

  // The factor of the centre: the weight of the KL divergence whose sum it is, or 1 for a sum of slopes.
  double centre_factor() const {
    const bool by_kl = !numbers_.clips && (numbers_.form == MIXTURE || numbers_.form == MIXED_KL);
    return by_kl ? numbers_.of_student : 1;
  }

  void read_label() {
    Values<T> x{};
    x[0] = student_[label_];
    x = of_student_.at_temperature_1(x, label_, 1);
    label_logit_ = x[0];
    s_.label_derivative = of_student_.derivative(x)[0];
  }

  void gradient() {
    if (grad_ == nullptr) return;
    if (numbers_.form == TOTAL_VARIATION) {
      total_variation_gradient();
    } else {
      const T factor = of_student_.softcap == 0 ? weight_ * T(of_student_.scale) : weight_;
      const T centre = centre_factor() == 0 ? 0 : T(centre_factor() * (s_.centre - s_.shift));
      const bool subtracts = this->subtracts();
      for_columns<T>(
          a_.columns,
          [&](int64_t j, int count) INLINE_LAMBDA {
            V slope = part_of(student_ + j, count);
            if (subtracts) {
              V p_s = part_of(teacher_ + j, count);
              slope -= mul_zero_safe(p_s, all<T>(centre));
            }
            store(grad_ + j, slope * factor, count);
          },
          [] {});
    }
    if (label_ >= 0 && label_ < a_.columns) grad_[label_] -= weight_ * hard_weight_ * T(s_.label_derivative);
  }

  void total_variation_gradient() {
    const T by_teacher = T(s_.teacher_led) * slope_factor_, by_student = T(s_.centre) * slope_factor_;
    const T max_y = T(s_.max_y), hard = T(hard_weight_ / s_.sum_y);
    for_columns<T>(
        a_.columns,
        [&](int64_t j, int count) INLINE_LAMBDA {
          Logits<T> l = logits(j, count);
          Outcomes<V> o = outcomes(j, count, l);
          V slope = terms_of(o).slope;
          V factor = slope < 0 ? all<T>(-by_student) : all<T>(T(0.5) * (by_teacher - by_student));
          V grad = o.p_s * (slope > 0 ? all<T>(by_teacher) : factor);
          if (label_ >= 0) grad += hard * exponentials(l.y_s - max_y).exp;
          store(grad_ + j, grad * of_student_.derivative(l.y_s) * weight_, count);
        },
        [] {});
  }

  const Arguments<T>& a_;
  State& s_;
  T* student_;
  T* teacher_;
  T* grad_;
  int64_t label_;
  T weight_;
  Numbers<T> numbers_;
  Transform<T> of_student_, of_teacher_;
  T hard_weight_, soft_weight_, slope_factor_;
  double label_logit_ = 0;
};

template <class T, bool rounds> void run(const Arguments<T>& arguments) {
  for_rows(arguments.rows, arguments.threads, [&](int64_t i) {
    Row<T, rounds>(arguments, i).run(arguments.first_stage, arguments.last_stage);
  });
}

template <class T> void run(const Arguments<T>* arguments) {
  const auto& a = *arguments;
  const bool rounds = student_transform(a.student_bias, a.scalars, a.student_has_softcap).rounds() ||
                      teacher_transform(a.teacher_bias, a.scalars, a.teacher_has_softcap).rounds();
  rounds ? run<T, true>(a) : run<T, false>(a);
}

}  // namespace fused_distill

extern "C" void jsd_float(const fused_distill::Arguments<float>* arguments) { fused_distill::run(arguments); }
extern "C" void jsd_double(const fused_distill::Arguments<double>* arguments) { fused_distill::run(arguments); }
