// How functions are seen from Python, and compiled twice for loops that are plain C++.

#pragma once

#define API extern "C" __attribute__((visibility("default")))

// Where the machine has AVX2 a second copy of such a function, compiled for it, is taken.
#if defined(__x86_64__) && defined(__linux__) && (defined(__GNUC__) && !defined(__clang__))
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif
