// Forward and backward of one layer; coefficients.py explains the mathematics.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <utility>

#include "arrays.h"
#include "sums.h"

namespace batch_norm {

// The sums of x over each channel, followed by those of x^2.
template <typename T>
Vector sums_of(const T* x, const Layout& l) {
  Vector sums(2 * l.channels);
  for (int64_t n = 0; n < l.outer; ++n)
    for (int64_t c = 0; c < l.channels; ++c, x += l.inner) {
      double first = 0, second = 0;
#pragma omp simd reduction(+ : first, second)
      for (int64_t i = 0; i < l.inner; ++i) {
        const double value = x[i];
        first += value;
        second += value * value;
      }
      sums[c] += first;
      sums[l.channels + c] += second;
    }
  return sums;
}

// to = slope x + offset, channel by channel.
template <typename T>
void line(const T* x, const Layout& l, const Vector& slope, const Vector& offset, T* to, bool add) {
  for (int64_t n = 0; n < l.outer; ++n)
    for (int64_t c = 0; c < l.channels; ++c, x += l.inner, to += l.inner)
      for (int64_t i = 0; i < l.inner; ++i)
        to[i] = static_cast<T>(slope[c] * x[i] + offset[c] + (add ? double(to[i]) : 0));
}

struct Moments {
  double samples;
  Vector mean, variance, inverse;

  Moments() = default;
  Moments(const Vector& sums, double count, double epsilon) : samples(count) {
    const size_t channels = sums.size() / 2;
    for (size_t c = 0; c < channels; ++c) {
      const double m = sums[c] / count;
      mean.push_back(m);
      variance.push_back(std::max(sums[channels + c] / count - m * m, 0.));
      inverse.push_back(1 / std::sqrt(variance[c] + epsilon));
    }
  }
};

class Operator {
 public:
  Operator(std::shared_ptr<Sum> sum, int axis, double epsilon, bool scale)
      : sum_(sum), axis_(axis), epsilon_(epsilon), scale_(scale) {}

  // x, gamma, beta; kernel_gamma, kernel_beta, pair; running_mean, running_var
  bool forward(const Arrays& arrays, const int* requests, bool is_train) {
    const Array x = arrays[0];
    gamma_ = arrays[1].read();
    if (!scale_) gamma_.assign(gamma_.size(), 1);
    Vector beta = arrays[2].read(), gamma = gamma_;
    Vector mean = arrays[6].read(), variance = arrays[7].read();
    is_train_ = is_train;
    if (is_train) {
      if (!sum_moments(x)) return false;
      for (size_t c = 0; c < gamma.size(); ++c) {
        ratio_[c] = whole_.inverse[c] / local_.inverse[c];
        shift_[c] = whole_.inverse[c] * (local_.mean[c] - whole_.mean[c]);
        beta[c] += gamma[c] * shift_[c];
        gamma[c] *= ratio_[c];
      }
      if (whole_.samples) mean = whole_.mean, variance = whole_.variance;
    }
    Vector pair;
    for (size_t c = 0; c < mean.size(); ++c)
      for (int sign : {-1, 1}) pair.push_back(mean[c] + sign * std::sqrt(variance[c]));
    arrays[3].write(gamma, requests[0]);
    arrays[4].write(beta, requests[1]);
    arrays[5].write(pair, requests[2]);
    return true;
  }

  // gradients of the three outputs; x, gamma, beta; the outputs; gradients of x, gamma, beta; ...
  bool backward(const Arrays& arrays, const int* requests) {
    const Array x = arrays[3], d_x = arrays[9];
    Vector kernel_sum = arrays[0].read(), beta_sum = arrays[1].read();
    const size_t channels = beta_sum.size();
    Vector gamma_sum = kernel_sum, slope(channels), offset(channels);
    if (is_train_) {
      if (!local_.samples) kernel_sum = beta_sum = Vector(channels);
      for (size_t c = 0; c < channels; ++c)
        gamma_sum[c] = ratio_[c] * kernel_sum[c] + shift_[c] * beta_sum[c];
      Vector total = gamma_sum;
      total.insert(total.end(), beta_sum.begin(), beta_sum.end());
      if (!(*sum_)(&total)) return false;
      if (local_.samples) missing_gradient(kernel_sum, beta_sum, total, &slope, &offset);
    }
    if (requests[0] != kNull)
      x.visit([&](auto* data) {
        line(data, x.layout(axis_), slope, offset, static_cast<decltype(data)>(d_x.data),
             requests[0] == kAdd);
      });
    arrays[10].write(gamma_sum, requests[1]);
    arrays[11].write(beta_sum, requests[2]);
    return true;
  }

 private:
  bool sum_moments(const Array& x) {
    const Layout layout = x.layout(axis_);
    Vector sums;
    x.visit([&](auto* data) { sums = sums_of(data, layout); });
    local_ = Moments(sums, layout.samples(), epsilon_);
    if (*api.batch_is_empty) {
      sums.assign(sums.size(), 0);
      local_.samples = 0;
    }
    sums.push_back(local_.samples);
    if (!(*sum_)(&sums)) return false;
    const double samples = sums.back();
    sums.pop_back();
    whole_ = samples ? Moments(sums, samples, epsilon_) : local_;
    ratio_.resize(layout.channels);
    shift_.resize(layout.channels);
    return true;
  }

  // The difference to the kernel's gradient, as a line in x; see Coefficients._missing_gradient.
  void missing_gradient(const Vector& kernel_sum, const Vector& beta_sum, const Vector& total,
                        Vector* slope, Vector* offset) const {
    const size_t channels = beta_sum.size();
    for (size_t c = 0; c < channels; ++c) {
      const double gamma_mean = total[c] / whole_.samples;
      const double beta_mean = total[channels + c] / whole_.samples;
      const double scale = gamma_[c] * whole_.inverse[c];
      const double k = scale * (kernel_sum[c] / local_.samples - ratio_[c] * gamma_mean);
      const double b = scale * (beta_sum[c] / local_.samples - beta_mean - shift_[c] * gamma_mean);
      (*slope)[c] = k * local_.inverse[c];  // k and b are those of a line in (x - m) i
      (*offset)[c] = b - (*slope)[c] * local_.mean[c];
    }
  }

  const std::shared_ptr<Sum> sum_;
  const int axis_;
  const double epsilon_;
  const bool scale_;
  bool is_train_ = false;
  Moments local_, whole_;
  Vector gamma_, ratio_, shift_;
};

}  // namespace batch_norm
