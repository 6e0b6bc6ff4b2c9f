// Colours in half units of CIE L*a*b*, by the tables and numbers of fastcam/_lab.py.
#pragma once

#include <cstdint>

#include "multiversion.h"

namespace fastcam {

// n pixels of 8-bit RGB -> 2 L, 2 a + 256, 2 b + 256.
FASTCAM_INLINE void to_lab(const uint8_t* r, const uint8_t* g, const uint8_t* b, const int32_t* gamma, const int32_t* f,
                           int64_t n, uint16_t* lab_l, uint16_t* lab_a, uint16_t* lab_b) {
  for (int64_t x = 0; x < n; ++x) {
    const int32_t red = gamma[r[x]], green = gamma[g[x]], blue = gamma[b[x]];
    const int32_t fx = f[(1777 * red + 1541 * green + 778 * blue + 2048) >> 12];
    const int32_t fy = f[(871 * red + 2929 * green + 296 * blue + 2048) >> 12];
    const int32_t fz = f[(73 * red + 448 * green + 3575 * blue + 2048) >> 12];
    lab_l[x] = static_cast<uint16_t>(((232 * fy + 8192) >> 14) - 32);
    lab_a[x] = static_cast<uint16_t>(((1000 * (fx - fy) + 8192) >> 14) + 256);
    lab_b[x] = static_cast<uint16_t>(((400 * (fy - fz) + 8192) >> 14) + 256);
  }
}

}  // namespace fastcam
