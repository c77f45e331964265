// What the processor has and the operating system keeps, read from the processor itself: compilers differ in the names
// that they know, and in whether their runtime library has asked it.

#pragma once

#include <cpuid.h>

#include <cstdint>

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

static inline bool all(uint32_t word, uint32_t bits) { return (word & bits) == bits; }

static constexpr uint32_t bit(int number) { return 1u << number; }

static inline bool has_avx2() {
    const Features f = features();
    const uint32_t fma = bit(12), popcnt = bit(23), avx = bit(28), f16c = bit(29), bmi = bit(3), avx2 = bit(5), bmi2 = bit(8);
    return all(f.kept, bit(1) | bit(2)) && all(f.basic, fma | popcnt | avx | f16c) && all(f.b, bmi | avx2 | bmi2);
}

static inline bool has_avx512() {
    const Features f = features();
    const uint32_t basic = bit(16), dq = bit(17), bw = bit(30), vl = bit(31), vbmi = bit(1), vbmi2 = bit(6), vnni = bit(11);
    return has_avx2() && all(f.kept, bit(5) | bit(6) | bit(7)) && all(f.b, basic | dq | bw | vl) &&
           all(f.c, vbmi | vbmi2 | vnni);
}

static inline bool has_amx() {
    const Features f = features();
    const uint32_t bf16 = bit(22), tile = bit(24), int8 = bit(25);
    return has_avx512() && all(f.kept, bit(17) | bit(18)) && all(f.d, bf16 | tile | int8);
}

}  // namespace sparse
