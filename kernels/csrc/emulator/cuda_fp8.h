// e4m3: 4 bits of exponent with bias 7, 3 of mantissa, no infinity, 0x7f is NaN; conversion saturates to 448.
#pragma once
#include "cuda_runtime.h"

using __nv_fp8_storage_t = unsigned char;
enum __nv_saturation_t { __NV_NOSAT, __NV_SATFINITE };
enum __nv_fp8_interpretation_t { __NV_E4M3, __NV_E5M2 };

inline float hm_emulated_e4m3(unsigned char bits) {
    int exponent = (bits >> 3) & 15, mantissa = bits & 7;
    float sign = bits & 0x80 ? -1.0f : 1.0f;
    if (exponent == 15 && mantissa == 7) return NAN;
    return sign * (exponent == 0 ? std::ldexp(float(mantissa), -9) : std::ldexp(float(8 + mantissa), exponent - 10));
}
inline __nv_fp8_storage_t __nv_cvt_float_to_fp8(float value, __nv_saturation_t, __nv_fp8_interpretation_t) {
    if (value != value) return 0x7f;
    unsigned char sign = std::signbit(value) ? 0x80 : 0;
    float size = std::fabs(value);
    if (size == 0.0f) return sign;
    if (size >= 448.0f) return sign | 0x7e;
    int exponent;
    std::frexp(size, &exponent);  // size = m * 2^exponent, m in [0.5, 1)
    // A step is 2^(exponent - 4) for normal numbers, 2^-9 at least.
    int step = exponent - 4 < -9 ? -9 : exponent - 4;
    int steps = int(std::nearbyint(std::ldexp(size, -step)));  // up to 16
    if (step == -9 && steps < 8) return sign | (unsigned char)steps;
    if (steps == 16) { steps = 8; step += 1; }
    return sign | (unsigned char)(((step + 10) << 3) | (steps - 8));
}
