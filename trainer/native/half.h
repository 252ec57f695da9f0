// Half-precision numbers (IEEE 754 binary16), which GCC before 12 does not support.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace batch_norm {

class Half {
 public:
  explicit Half(double value) {
    const double magnitude = std::fmin(std::fabs(value), 65536);  // infinity, from here on
    const int exponent = std::max(std::ilogb(magnitude), -14);
    // The implicit leading bit, and a carry from rounding up, increment the exponent field.
    bits_ = ((exponent + 14) << 10) + std::lrint(std::ldexp(magnitude, 10 - exponent));
    if (std::isnan(value)) bits_ = 0x7e00;
    if (std::signbit(value)) bits_ |= 0x8000;
  }
  operator double() const {
    const int exponent = bits_ >> 10 & 31, fraction = bits_ & 1023;
    const double magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                             : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                            : std::ldexp(fraction, -24);
    return bits_ & 0x8000 ? -magnitude : magnitude;
  }

 private:
  uint16_t bits_;
};

}  // namespace batch_norm
