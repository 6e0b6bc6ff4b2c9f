// FASTCAM_MULTIVERSION before a function compiles its plain loops for several instruction sets; the best one is chosen
// when the module is loaded. What such a function calls must be FASTCAM_INLINE, or it runs at the lowest instruction
// set.
#pragma once

#define FASTCAM_INLINE inline __attribute__((always_inline))

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && !defined(FASTCAM_SANITIZE)
#define FASTCAM_MULTIVERSION __attribute__((target_clones("default", "avx2", "arch=x86-64-v4")))
#else
#define FASTCAM_MULTIVERSION
#endif
