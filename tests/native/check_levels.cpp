// Multiplies random matrices of every kind, form and block with the kernels of every level that the processor has, and
// compares them with the plain ones: the kernels without Python and torch, for whatever machine or simulator is at hand.
// Prints a line for each level and each difference; returns how many differ.

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

extern "C" int64_t secateur_sparse_multiply(const void* const* pointers, const int64_t* numbers);
extern "C" int64_t secateur_sparse_level();

namespace {

enum { F32, BF16, F16, I8, I4 };
enum { BITMASK, INDEX, DENSE, SQUARES, OF_NM };  // from OF_NM on 2:4, 1:4, 8:16, 4:16, 2:16
const char* const KINDS[] = {"float32", "bfloat16", "float16", "int8", "int4"};

uint64_t state = 88172645463325252ull;

uint32_t chance(uint32_t below) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return uint32_t((state >> 20) % below);
}

float number() { return float(int(chance(4001)) - 2000) / 512; }

struct Matrix {
    int64_t form, kind, block, rows, columns, scales;
    std::vector<uint64_t> mask;
    std::vector<uint16_t> counts;
    std::vector<uint8_t> index, values, codes;
    std::vector<int64_t> offsets{0};
    std::vector<float> scale, bias;
    int8_t codebook[16] = {0, 1, 2, 3, 4, 5, 6, 7, 0, -7, -6, -5, -4, -3, -2, -1};

    void put() {
        const float value = number();
        uint32_t bits;
        std::memcpy(&bits, &value, 4);
        if (kind == F32) append(&bits, 4);
        const uint16_t high = uint16_t(bits >> 16), half = uint16_t(chance(0x7c00) | chance(2) << 15);
        if (kind == BF16) append(&high, 2);
        if (kind == F16) append(&half, 2);
        const int8_t byte = int8_t(int(chance(255)) - 127);
        if (kind == I8) append(&byte, 1);
        if (kind == I4) codes.push_back(uint8_t(1 + (chance(15) + 7) % 15));
    }

    void append(const void* from, int bytes) {
        values.insert(values.end(), (const uint8_t*)from, (const uint8_t*)from + bytes);
    }

    Matrix(int64_t form, int64_t kind, int64_t block, int64_t rows, int64_t columns, double density)
        : form(form), kind(kind), block(block), rows(rows), columns(columns), scales(1) {
        if (kind == I4 && columns % 128 == 0) scales = columns / 128;
        if (form >= OF_NM || (form == DENSE && kind == I4)) {
            of_nm(density);
            return;
        }
        const int64_t width = form == SQUARES ? 4 : 1, units = (columns + width - 1) / width;
        const int64_t groups = (rows + block - 1) / block, words = (units + 63) / 64, spans = (units + 255) / 256;
        mask.resize(groups * words), counts.resize(groups * spans);
        int64_t at = 0;
        for (int64_t group = 0; group < groups; ++group) {
            for (int64_t column = 0; column < units; ++column) {
                if (form != DENSE && chance(1000) >= density * 1000) continue;
                mask[group * words + column / 64] |= uint64_t(1) << (column % 64);
                ++counts[group * spans + column / 256], index.push_back(uint8_t(column % 256));
                for (int64_t i = 0; i < block * width; ++i, ++at) put();
            }
            if (kind == I4 && form == BITMASK && at % 2) codes.push_back(0), ++at;
            offsets.push_back(at);
        }
        if (kind == I4) {
            codes.push_back(0);
            for (size_t i = 0; i + 1 < codes.size(); i += 2) values.push_back(uint8_t(codes[i] | codes[i + 1] << 4));
        }
        finish();
    }

    // Indices at random: what they name is what both sides take
    void of_nm(double density) {
        const bool dense = form == DENSE;  // of 4-bit codes
        const int64_t kept[] = {8, 4, 8, 4, 2}, bits = form < OF_NM + 2 ? 2 : 4, lanes = kind >= I8 ? 32 : 8;
        const int64_t reach = 16 * lanes / (dense ? 16 : kept[form - OF_NM]), filled = 256 / lanes / bits;
        if (columns % reach || (scales > 1 && columns / scales % reach && reach != 2 * columns / scales)) scales = 1;
        const int64_t met = (columns + reach - 1) / reach, vectors = kind == I4 ? met + met % 2 : met;
        for (int64_t row = 0; row < rows; ++row) {
            for (int64_t i = 0; i < vectors * lanes; ++i) {
                const size_t before = values.size(), codes_before = codes.size();
                put();
                if (chance(1000) < density * 1000) continue;
                for (size_t at = before; at < values.size(); ++at) values[at] = 0;
                for (size_t at = codes_before; at < codes.size(); ++at) codes[at] = 0;
            }
            for (int64_t i = 0; !dense && i < (met + filled - 1) / filled * 32; ++i) index.push_back(uint8_t(chance(256)));
            offsets.push_back((row + 1) * vectors * lanes);
        }
        for (size_t i = 0; i + 1 < codes.size(); i += 2) values.push_back(uint8_t(codes[i] | codes[i + 1] << 4));
        finish();
    }

    // Scales and bias, and no room behind the last of anything but the 64 bytes that kernels may read
    void finish() {
        values.resize(values.size() + 64);
        if (kind >= I8)
            for (int64_t i = 0; i < rows * scales; ++i) scale.push_back(0.5f + float(chance(1000)) / 1000);
        for (int64_t i = 0; i < rows; ++i) bias.push_back(number());
        // a sanitizer sees who reads there
        mask.shrink_to_fit(), counts.shrink_to_fit(), index.shrink_to_fit(), values.shrink_to_fit();
        offsets.shrink_to_fit(), scale.shrink_to_fit(), bias.shrink_to_fit();
    }

    std::vector<float> times(const std::vector<float>& x, int64_t batch, int64_t way, int64_t level) const {
        std::vector<float> y(batch * rows);
        const void* pointers[] = {
            mask.data(), counts.data(), index.data(), values.data(), offsets.data(), scale.empty() ? nullptr : scale.data(),
            codebook, x.data(), batch % 2 ? bias.data() : nullptr, y.data()
        };
        const int64_t numbers[] = {form, kind, block, rows, columns, scales, batch, way, 1, level};
        if (secateur_sparse_multiply(pointers, numbers)) y.assign(y.size(), NAN);
        return y;
    }
};

int compare(const Matrix& m, int64_t batch, int64_t way, int64_t level) {
    std::vector<float> x(batch * m.columns);
    for (float& each : x) each = number();
    if (m.kind == BF16 && batch % 2)  // tile registers take inputs that are bfloat16, the others have another way
        for (float& each : x) {
            uint32_t bits;
            std::memcpy(&bits, &each, 4);
            bits &= 0xffff0000;
            std::memcpy(&each, &bits, 4);
        }
    const std::vector<float> expected = m.times(x, batch, way, 0), found = m.times(x, batch, way, level);
    float largest = 1e-20f;
    for (float each : expected) largest = std::fmax(largest, std::fabs(each));
    // where terms of about 4 cancel, sums of them differ by their own rounding: a float32 holds 2^-24 of its size
    const float least = m.kind <= F16 && m.columns > 5000 ? 2.6e-7f * 4 * float(m.columns) : 0;
    for (size_t i = 0; i < found.size(); ++i)
        if (!(std::fabs(found[i] - expected[i]) <= 1e-5f * largest + least)) {
            std::printf("level %d: %s, form %d, block %d, %d x %d, batch %d, way %d: %g instead of %g at %d\n", int(level),
                        KINDS[m.kind], int(m.form), int(m.block), int(m.rows), int(m.columns), int(batch), int(way),
                        found[i], expected[i], int(i));
            return 1;
        }
    return 0;
}

}  // namespace

int main() {
    const int64_t shapes[][2] = {{1, 1}, {5, 63}, {17, 64}, {33, 130}, {37, 257}, {18, 384}, {5, 9000}, {6, 4224}};
    int wrong = 0;
    for (int64_t level = 1; level <= secateur_sparse_level(); ++level) {
        int count = 0;
        for (int64_t kind = F32; kind <= I4; ++kind)
            for (int64_t block : std::vector<int64_t>{1, 4, 16})
                for (int64_t form = BITMASK; form < OF_NM + 5; ++form) {
                    if (form == SQUARES ? kind != I8 || block != 4 : form != BITMASK && block > 1) continue;
                    if (form == DENSE && kind < I8) continue;
                    for (const auto& shape : shapes)
                        for (double density : {0.0, 0.1, 0.5, 1.0}) {
                            const Matrix m(form, kind, block, shape[0], shape[1], density);
                            for (int64_t batch : {1, 2, 3, 4, 5, 9, 17, 40, 101}) {
                                if (form >= OF_NM && batch > (kind < I8 ? 17 : 5)) continue;
                                if (form == DENSE && kind == I4 && batch > 5) continue;
                                if (batch > 100 && (form == INDEX || kind == F32 || kind == F16)) continue;
                                if (shape[1] > 1000 && batch > 5) continue;
                                for (int64_t way = 0; way < ((form < OF_NM || kind < I8) && !(form == DENSE && kind == I4) ? 2 : 1); ++way, ++count) wrong += compare(m, batch, way, level);
                            }
                        }
                }
        std::printf("level %d: %d products compared, %d differ so far\n", int(level), count, wrong);
        std::fflush(stdout);
    }
    return wrong;
}
