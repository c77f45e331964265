// What the processor has and the operating system keeps, read from the processor itself: compilers differ in the names
// that they know, and in whether their runtime library has asked it.

#pragma once

#include <cpuid.h>

#include <cstdint>
#include <initializer_list>

namespace sparse {

struct Features {
    uint32_t basic, b, c, d;  // leaf 1, ecx; leaf 7, ebx, ecx and edx
    uint32_t kept;            // registers that the operating system saves
};

static inline Features features() {
    Features f{};
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return f;
    f.basic = c;
    if (c >> 27 & 1) asm volatile("xgetbv" : "=a"(f.kept), "=d"(d) : "c"(0));
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) f.b = b, f.c = c, f.d = d;
    return f;
}

static inline bool all(uint32_t word, std::initializer_list<int> bits) {
    for (int bit : bits)
        if (!(word >> bit & 1)) return false;
    return true;
}

// FMA, POPCNT, AVX, F16C; BMI, AVX2, BMI2
static inline bool has_avx2() {
    const Features f = features();
    return all(f.kept, {1, 2}) && all(f.basic, {12, 23, 28, 29}) && all(f.b, {3, 5, 8});
}

// F, DQ, BW, VL; VBMI, VBMI2, VNNI
static inline bool has_avx512() {
    const Features f = features();
    return has_avx2() && all(f.kept, {5, 6, 7}) && all(f.b, {16, 17, 30, 31}) && all(f.c, {1, 6, 11});
}

// bfloat16, tiles, int8
static inline bool has_amx() {
    const Features f = features();
    return has_avx512() && all(f.kept, {17, 18}) && all(f.d, {22, 24, 25});
}

}  // namespace sparse
