// Products on a CPU with weights as they are kept: the mixture of experts (both MXFP4 products, SwiGLU and the weighted
// sum), and those of a matrix in bf16, or in int8 with a scale for each row.
//
// Compiled by cpu_build.py once for each kind of CPU, and called through ctypes. Knows pointers and sizes; no Python, no
// torch. Sums are fp32 and in an order that depends neither on the number of threads nor on the other tokens of a step.
//
// A row of weights is read S blocks of 32 columns at a time, a step: S is what fills a register with packed nibbles.
// Decoded, a step is 8 vectors of W = 4 S values, in the order in which decoding leaves them; activations are brought into
// that order once.
// Legend: H hidden, I inner width, E experts here, T tokens, X experts a token.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
#include <new>
#include <thread>
#include <type_traits>
#include <vector>
#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int BLOCK = 32;  // columns that share a scale
constexpr int BLOCK_BYTES = 16;
constexpr int VECTORS = 8;         // of a decoded step
constexpr int GROUP = 8;           // rows that are read step by step together where several tokens read them
constexpr int AHEAD_BYTES = 2048;  // weights are asked for so long before they are read
constexpr int TILE = 32;           // tokens whose steps and sums stay in the first-level cache
constexpr int CHUNK_ROWS = 64;     // rows of one piece of work
constexpr float SWIGLU_ALPHA = 1.702f;

// ---------------------------------------------------------------- vectors
//
// S: blocks of a step. REGISTERS: of vectors. ask: prefetch. widen: W integers. split: bf16 at even and at odd places. read_blocks: some
// packed blocks, at most S, and zeros. powers: what their scale bytes stand for, 2 ** (byte - 127), each in its block's
// quarter of a vector; 255 is NaN.

constexpr uint32_t LEAST = 0x00400000, INFINITE = 0x7F800000;  // bits of 2 ** -127, and of what 255 looks like

inline float widened(uint16_t half) {  // bf16
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

#if defined(__AVX512BW__)
constexpr int S = 4, REGISTERS = 32;
using V = __m512;
using I8 = __m512i;
inline V zero() { return _mm512_setzero_ps(); }
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V x) { _mm512_storeu_ps(p, x); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(V x) { return _mm512_reduce_add_ps(x); }
inline void ask(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
inline V ones() { return _mm512_set1_ps(1.0f); }
inline I8 load8(const void* p) { return _mm512_loadu_si512(p); }
inline V widen(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline void split(const uint16_t* values, V& even, V& odd) {
    const I8 pairs = load8(values);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(0xFFFF0000)));
}
inline I8 table8(__m128i t) { return _mm512_broadcast_i32x4(t); }
inline I8 look(I8 t, I8 index) { return _mm512_shuffle_epi8(t, index); }
inline I8 low(I8 x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline I8 high(I8 x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
inline I8 read_blocks(const uint8_t* bytes, int blocks) {
    I8 packed = _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1 << 4 * blocks) - 1), bytes);
    __asm__("" : "+v"(packed));  // read once: GCC takes it from memory again for each use, across two cache lines
    return packed;
}
inline V powers(const uint8_t* scales, int blocks) {
    int32_t word;
    if (blocks == S) std::memcpy(&word, scales, sizeof word);
    else word = _mm_cvtsi128_si32(_mm_maskz_loadu_epi8(static_cast<__mmask16>((1 << blocks) - 1), scales));
    const I8 places = _mm512_set_epi32(0x03808080, 0x03808080, 0x03808080, 0x03808080, 0x02808080, 0x02808080, 0x02808080,
                                       0x02808080, 0x01808080, 0x01808080, 0x01808080, 0x01808080, 0x00808080, 0x00808080,
                                       0x00808080, 0x00808080);
    I8 bits = _mm512_srli_epi32(_mm512_shuffle_epi8(_mm512_set1_epi32(word), places), 1);
    bits = _mm512_max_epu32(bits, _mm512_set1_epi32(LEAST));
    const __mmask16 nan = _mm512_cmpeq_epi32_mask(bits, _mm512_set1_epi32(INFINITE));
    return _mm512_castsi512_ps(_mm512_mask_mov_epi32(bits, nan, _mm512_set1_epi32(-1)));
}
// c plus the products of 4 neighbouring bytes each, of a (0 to 24) and b (-127 to 127)
inline V dot(I8 a0, I8 b0, I8 a1, I8 b1, I8 c) {
    const I8 p = _mm512_add_epi16(_mm512_maddubs_epi16(a0, b0), _mm512_maddubs_epi16(a1, b1));
    return _mm512_cvtepi32_ps(_mm512_add_epi32(c, _mm512_madd_epi16(p, _mm512_set1_epi16(1))));
}
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int S = 2, REGISTERS = 16;
using V = __m256;
using I8 = __m256i;
inline V zero() { return _mm256_setzero_ps(); }
inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, V x) { _mm256_storeu_ps(p, x); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(V x) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
inline void ask(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
inline V ones() { return _mm256_set1_ps(1.0f); }
inline I8 load8(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline V widen(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline V even_halves(I8 x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
inline V odd_halves(I8 x) { return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(0xFFFF0000))); }
inline void split(const uint16_t* values, V& even, V& odd) {
    even = even_halves(load8(values)), odd = odd_halves(load8(values));
}
inline I8 table8(__m128i t) { return _mm256_broadcastsi128_si256(t); }
inline I8 look(I8 t, I8 index) { return _mm256_shuffle_epi8(t, index); }
inline I8 low(I8 x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
inline I8 high(I8 x) { return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15)); }
inline I8 read_blocks(const uint8_t* bytes, int blocks) {
    return blocks == S ? load8(bytes) : _mm256_zextsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
}
inline V powers(const uint8_t* scales, int blocks) {
    int16_t two = *scales;
    if (blocks == S) std::memcpy(&two, scales, sizeof two);
    const I8 places = _mm256_set_epi32(0x01808080, 0x01808080, 0x01808080, 0x01808080, 0x00808080, 0x00808080, 0x00808080,
                                       0x00808080);
    I8 bits = _mm256_srli_epi32(_mm256_shuffle_epi8(_mm256_set1_epi16(two), places), 1);
    bits = _mm256_max_epu32(bits, _mm256_set1_epi32(LEAST));
    return _mm256_castsi256_ps(_mm256_or_si256(bits, _mm256_cmpeq_epi32(bits, _mm256_set1_epi32(INFINITE))));
}
inline V dot(I8 a0, I8 b0, I8 a1, I8 b1, I8 c) {
    const I8 p = _mm256_add_epi16(_mm256_maddubs_epi16(a0, b0), _mm256_maddubs_epi16(a1, b1));
    return _mm256_cvtepi32_ps(_mm256_add_epi32(c, _mm256_madd_epi16(p, _mm256_set1_epi16(1))));
}
#else
#define PORTABLE
constexpr int S = 1, REGISTERS = 16;
using I8 = const uint8_t*;
struct V { float at[4]; };
template <class F> inline V each(F f) { return {{f(0), f(1), f(2), f(3)}}; }
inline V zero() { return {{0, 0, 0, 0}}; }
inline V load(const float* p) { return each([&](int i) { return p[i]; }); }
inline void store(float* p, V x) { std::memcpy(p, x.at, sizeof x.at); }
inline V mul(V a, V b) { return each([&](int i) { return a.at[i] * b.at[i]; }); }
inline V add(V a, V b) { return each([&](int i) { return a.at[i] + b.at[i]; }); }
inline V fma(V a, V b, V c) { return each([&](int i) { return a.at[i] * b.at[i] + c.at[i]; }); }
inline float sum(V x) { return (x.at[0] + x.at[2]) + (x.at[1] + x.at[3]); }
inline V ones() { return {{1, 1, 1, 1}}; }
inline void ask(const void*) {}
inline V widen(const int8_t* p) { return each([&](int i) { return static_cast<float>(p[i]); }); }
inline void split(const uint16_t* values, V& even, V& odd) {
    even = each([&](int i) { return widened(values[2 * i]); }), odd = each([&](int i) { return widened(values[2 * i + 1]); });
}
inline I8 read_blocks(const uint8_t* bytes, int) { return bytes; }
inline V powers(const uint8_t* scales, int) {
    uint32_t bits = static_cast<uint32_t>(*scales) << 23;
    bits = bits == INFINITE ? 0xFFFFFFFF : bits < LEAST ? LEAST : bits;
    float power;
    std::memcpy(&power, &bits, sizeof power);
    return each([&](int) { return power; });
}
#endif

template <class T> struct Aligned {  // to cache lines: a vector across two of them takes two reads
    using value_type = T;
    Aligned() = default;
    template <class U> Aligned(const Aligned<U>&) {}
    T* allocate(size_t count) { return static_cast<T*>(::operator new(count * sizeof(T), LINE)); }
    void deallocate(T* p, size_t) { ::operator delete(p, LINE); }
    bool operator==(const Aligned&) const { return true; }
    bool operator!=(const Aligned&) const { return false; }
    template <class U> void construct(U* p) { ::new (static_cast<void*>(p)) U; }  // not filled with zeros
    static constexpr std::align_val_t LINE{64};
};
template <class T> using Vector = std::vector<T, Aligned<T>>;

constexpr int W = 4 * S;
constexpr int STEP = VECTORS * W;  // columns of a step
constexpr int STEP_BYTES = S * BLOCK_BYTES;

// ---------------------------------------------------------------- ways to multiply
//
// A way holds a step of a row of its Matrix, decoded, of which TOGETHER fit the registers. Of a token's activations it
// keeps RECORD floats for each step, on cache lines of their own, which `arrange` makes, `stride` floats apart. Where
// the last step of a row is cut short, both are filled up with zeros.

inline int64_t steps_of(int64_t columns) { return (columns + STEP - 1) / STEP; }
// Blocks of a step, of which the last one may have fewer than S.
inline int blocks_in(int64_t columns, int64_t step) {
    return static_cast<int>(std::min<int64_t>(S, columns / BLOCK - step * S));
}

struct Mxfp4 {  // blocks [rows, columns / 32, 16], scales [rows, columns / 32]
    const uint8_t *blocks, *scales;
    int64_t columns;
    struct Row {
        const uint8_t *blocks, *scales;
    };
    Row row(int64_t r) const {
        const int64_t first = r * (columns / BLOCK);
        return {blocks + first * BLOCK_BYTES, scales + first};
    }
};

struct Step {
    I8 packed;
    V factors;
    void read(const Mxfp4::Row& row, int64_t step, int here) {
        const uint8_t* bytes = row.blocks + step * STEP_BYTES;
        ask(bytes + AHEAD_BYTES);
        packed = read_blocks(bytes, here), factors = powers(row.scales + step * S, here);
    }
};

// total plus the products of w and a record that is in the order of w.
inline V plus_products(const V w[VECTORS], V factors, const float* record, V total) {
    V a = mul(w[0], load(record)), b = mul(w[1], load(record + W));
#pragma GCC unroll 8
    for (int v = 2; v < VECTORS; v += 2) {
        a = fma(w[v], load(record + v * W), a);
        b = fma(w[v + 1], load(record + (v + 1) * W), b);
    }
    return fma(add(a, b), factors, total);
}

// place(column): where a column of a step stands in a record.
template <class Place> void put(const float* x, int64_t columns, float* records, int64_t stride, Place place) {
    for (int64_t step = 0; step < steps_of(columns); step++, records += stride)
        for (int c = 0; c < STEP; c++) records[place(c)] = step * STEP + c < columns ? x[step * STEP + c] : 0.0f;
}

// Packed bytes -> the values of their codes in decoding order.
#if defined(__AVX512BW__)
inline void decode(I8 packed, V w[VECTORS]) {  // of each 4 bytes the nibbles from low to high
    const V values = _mm512_setr_ps(0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f, -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f);
    for (int v = 0; v < VECTORS; v++) w[v] = _mm512_permutexvar_ps(_mm512_srli_epi32(packed, 4 * v), values);
}
#elif !defined(PORTABLE)
// the upper and the lower byte of each code's value as bf16, which is the upper half of the same value as fp32
inline void decode(I8 packed, V w[VECTORS]) {
    const I8 upper = table8(_mm_setr_epi8(0, 0x3F, 0x3F, 0x3F, 0x40, 0x40, 0x40, 0x40, char(0x80), char(0xBF), char(0xBF),
                                          char(0xBF), char(0xC0), char(0xC0), char(0xC0), char(0xC0)));
    const I8 lower = table8(_mm_setr_epi8(0, 0, char(0x80), char(0xC0), 0, 0x40, char(0x80), char(0xC0), 0, 0, char(0x80),
                                          char(0xC0), 0, 0x40, char(0x80), char(0xC0)));
    const I8 codes[2] = {low(packed), high(packed)};
    for (int nibble = 0; nibble < 2; nibble++) {
        const I8 a = look(lower, codes[nibble]), b = look(upper, codes[nibble]);
        const I8 left = _mm256_unpacklo_epi8(a, b), right = _mm256_unpackhi_epi8(a, b);
        w[4 * nibble] = even_halves(left), w[4 * nibble + 1] = odd_halves(left);
        w[4 * nibble + 2] = even_halves(right), w[4 * nibble + 3] = odd_halves(right);
    }
}
#else
const float FP4[16] = {0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f, -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f};
inline void decode(I8 packed, V w[VECTORS]) {
    for (int v = 0; v < VECTORS; v++)
        w[v] = each([&](int lane) { return FP4[packed[4 * lane + v / 2] >> 4 * (v & 1) & 15]; });
}
#endif

struct Exact {
    using Matrix = Mxfp4;
    static constexpr int RECORD = STEP, TOGETHER = REGISTERS / 2 / VECTORS;
    Step step;
    V w[VECTORS];
    void read(const Matrix::Row& row, int64_t at, int here) {
        step.read(row, at, here);
        decode(step.packed, w);
    }
    V plus(const float* record, V total) const { return plus_products(w, step.factors, record, total); }
    static void arrange(const float* x, int64_t columns, float* records, int64_t stride) {
        put(x, columns, records, stride, [](int c) {
#if defined(__AVX2__) && !defined(__AVX512BW__)
            const int in = c % BLOCK, v = (in & 1) * 4 + in / 16 * 2 + in % 4 / 2, lane = c / BLOCK * 4 + in % 16 / 4;
#else
            const int v = c % VECTORS, lane = c / VECTORS;
#endif
            return v * W + lane;
        });
    }
};

#if !defined(PORTABLE)
// Activations as int8 with one scale for each block: x = factor * byte, |byte| <= 127. As the CPU multiplies bytes
// without sign by bytes with one, codes stand for their doubled values plus SHIFT, from 0 to 24.
struct Int8 {
    using Matrix = Mxfp4;
    static constexpr int SHIFT = 12;
    // bytes of even columns, and of odd ones; int32 [W], what takes SHIFT times a lane's bytes away again; factors [W]
    static constexpr int RECORD = 8 * S + W + W, TOGETHER = 2;
    Step step;
    I8 even, odd;
    void read(const Matrix::Row& row, int64_t at, int here) {
        step.read(row, at, here);
        const I8 values = table8(_mm_setr_epi8(12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0));
        even = look(values, low(step.packed)), odd = look(values, high(step.packed));
    }
    V plus(const float* record, V total) const {
        const V value = dot(even, load8(record), odd, load8(record + 4 * S), load8(record + 8 * S));
        return fma(mul(value, load(record + 8 * S + W)), step.factors, total);
    }
    static void arrange(const float* x, int64_t columns, float* records, int64_t stride) {
        for (int64_t block = 0; block < steps_of(columns) * S; block++) {
            float* to = records + block / S * stride + block % S * 4;
            float largest = 0.0f;
            for (int64_t at = block * BLOCK; at < columns && at < (block + 1) * BLOCK; at++)
                largest = std::fmax(largest, std::fabs(x[at]));
            const float factor = largest / 127.0f, inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
            int8_t bytes[2][BLOCK / 2] = {};
            int32_t shift[4] = {};
            for (int i = 0; i < BLOCK && block * BLOCK + i < columns; i++) {
                const int byte = static_cast<int>(std::nearbyint(x[block * BLOCK + i] * inverse));
                bytes[i & 1][i / 2] = static_cast<int8_t>(byte);
                shift[i / 8] -= SHIFT * byte;
            }
            const float factors[4] = {0.5f * factor, 0.5f * factor, 0.5f * factor, 0.5f * factor};
            std::memcpy(to, bytes[0], sizeof bytes[0]);
            std::memcpy(to + 4 * S, bytes[1], sizeof bytes[1]);
            std::memcpy(to + 8 * S, shift, sizeof shift);
            std::memcpy(to + 8 * S + W, factors, sizeof factors);
        }
    }
};
#endif

template <class T> struct Dense {  // [rows, columns]; columns are whole blocks
    const T* values;
    int64_t columns;
    using Row = const T*;
    Row row(int64_t r) const { return values + r * columns; }
};

struct Bf16 {
    using Matrix = Dense<uint16_t>;
    static constexpr int RECORD = STEP, TOGETHER = REGISTERS / 2 / VECTORS;
    V w[VECTORS];
    void read(Matrix::Row row, int64_t step, int here) {
        const uint16_t* values = row + step * STEP;
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v += 2) {
            w[v] = w[v + 1] = zero();
            if (v * W >= here * BLOCK) continue;
            ask(values + v * W + AHEAD_BYTES / 2);
            split(values + v * W, w[v], w[v + 1]);
        }
    }
    V plus(const float* record, V total) const { return plus_products(w, ones(), record, total); }
    static void arrange(const float* x, int64_t columns, float* records, int64_t stride) {
        put(x, columns, records, stride, [](int c) { return (c / (2 * W) * 2 + c % 2) * W + c % (2 * W) / 2; });
    }
};

struct Codes {  // int8, whose row has a scale that the sum is multiplied with
    using Matrix = Dense<int8_t>;
    static constexpr int RECORD = STEP, TOGETHER = REGISTERS / 2 / VECTORS;
    V w[VECTORS];
    void read(Matrix::Row row, int64_t step, int here) {
        const int8_t* codes = row + step * STEP;
        ask(codes + AHEAD_BYTES);
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; v++) w[v] = v * W < here * BLOCK ? widen(codes + v * W) : zero();
    }
    V plus(const float* record, V total) const { return plus_products(w, ones(), record, total); }
    static void arrange(const float* x, int64_t columns, float* records, int64_t stride) {
        put(x, columns, records, stride, [](int c) { return c; });
    }
};

// ---------------------------------------------------------------- products

// One row times one token. x [steps, RECORD].
template <class Way> float row_product(const typename Way::Matrix& matrix, int64_t r, const float* x) {
    const int64_t whole = matrix.columns / STEP;
    const auto row = matrix.row(r);
    V total = zero();
    auto add = [&](int64_t step, int here) {
        Way way;
        way.read(row, step, here);
        total = way.plus(x + step * Way::RECORD, total);
    };
    for (int64_t step = 0; step < whole; step++) add(step, S);
    if (whole * STEP < matrix.columns) add(whole, blocks_in(matrix.columns, whole));
    return sum(total);
}

// R rows in one step, which is decoded once for all tokens. here: its blocks. x [tokens, RECORD], totals [tokens, R, W].
template <class Way, int R>
inline void rows_step(const typename Way::Matrix::Row* rows, int64_t step, int here, const float* x, int tokens,
                      float* totals) {
    Way way[R];
    for (int i = 0; i < R; i++) way[i].read(rows[i], step, here);
    for (int t = 0; t < tokens; t++, x += Way::RECORD, totals += R * W) {
        V total[R];
        for (int i = 0; i < R; i++) total[i] = way[i].plus(x, load(totals + i * W));
        for (int i = 0; i < R; i++) store(totals + i * W, total[i]);
    }
}

// Rows [first, last), at most GROUP, times at most TILE tokens. x [steps, tokens, RECORD], y [tokens, GROUP].
template <class Way>
void group_product(const typename Way::Matrix& matrix, int64_t first, int64_t last, const float* x, int tokens,
                   float* y) {
    constexpr int R = Way::TOGETHER;
    const int rows = static_cast<int>(last - first), whole = rows / R * R;
    if (tokens == 1) {
        for (int r = 0; r < rows; r++) y[r] = row_product<Way>(matrix, first + r, x);
        return;
    }
    typename Way::Matrix::Row row[GROUP];
    for (int r = 0; r < rows; r++) row[r] = matrix.row(first + r);
    alignas(64) float totals[GROUP * TILE * W];  // [rows / R, tokens, R, W], then single rows
    std::memset(totals, 0, sizeof(float) * rows * tokens * W);
    for (int64_t step = 0; step < steps_of(matrix.columns); step++, x += tokens * Way::RECORD) {
        const int here = blocks_in(matrix.columns, step);
        for (int r = 0; r < whole; r += R)
            rows_step<Way, R>(row + r, step, here, x, tokens, totals + r * tokens * W);
        for (int r = whole; r < rows; r++)
            rows_step<Way, 1>(row + r, step, here, x, tokens, totals + r * tokens * W);
    }
    for (int r = 0; r < rows; r++) {
        const int together = r < whole ? R : 1, i = r < whole ? r % R : 0;
        for (int t = 0; t < tokens; t++) y[t * GROUP + r] = sum(load(totals + ((r - i) * tokens + t * together + i) * W));
    }
}

// Rows of a piece of work times at most TILE tokens: take(row, token, value).
template <class Way, class Take>
void chunk_product(const typename Way::Matrix& matrix, int64_t chunk, int64_t rows, const float* x, int tokens,
                   Take&& take) {
    const int64_t end = std::min(rows, (chunk + 1) * CHUNK_ROWS);
    float y[TILE * GROUP];
    for (int64_t first = chunk * CHUNK_ROWS; first < end; first += GROUP) {
        const int64_t last = std::min(end, first + GROUP);
        group_product<Way>(matrix, first, last, x, tokens, y);
        for (int64_t r = first; r < last; r++)
            for (int t = 0; t < tokens; t++) take(r, t, y[t * GROUP + r - first]);
    }
}

inline int64_t chunks_of(int64_t rows) { return (rows + CHUNK_ROWS - 1) / CHUNK_ROWS; }

// ---------------------------------------------------------------- threads

// Threads that wait for work between calls; the caller is one of them. Pieces are handed out one by one, so that a core
// that is taken away for a while holds up nothing but its own piece.
class Pool {
  public:
    // cpus: where each thread runs; nullptr leaves that to the system. The caller's own place is never changed.
    Pool(int threads, const int* cpus) {
        for (int index = 1; index < threads; index++)
            workers_.emplace_back([this, cpu = cpus ? cpus[index] : -1] { work(cpu); });
    }
    ~Pool() {
        {
            std::lock_guard<std::mutex> hold(mutex_);
            ends_ = true;
        }
        begin_.notify_all();
        for (auto& worker : workers_) worker.join();
    }
    template <class F> void run(int64_t pieces, bool alone, F&& piece) {
        if (workers_.empty() || pieces < 2 || alone) {
            for (int64_t index = 0; index < pieces; index++) piece(index);
            return;
        }
        {
            std::lock_guard<std::mutex> hold(mutex_);
            call_ = [](void* f, int64_t index) { (*static_cast<std::remove_reference_t<F>*>(f))(index); };
            argument_ = &piece, pieces_ = pieces, next_ = 0, open_ = true;
            round_.fetch_add(1, std::memory_order_release);
        }
        begin_.notify_all();
        take();
        for (int spin = 0; spin < SPINS && active_.load(std::memory_order_acquire) != 0; spin++) pause();
        std::unique_lock<std::mutex> hold(mutex_);
        open_ = false;  // a thread that has not come yet is not waited for
        done_.wait(hold, [&] { return active_.load(std::memory_order_acquire) == 0; });
    }
    std::mutex one_call;  // calls from several threads take turns

  private:
    static constexpr int SPINS = 500;  // some 10 us: between the two products of a layer, not between steps
    static void pause() {
#if defined(__AVX2__)
        _mm_pause();
#endif
    }
    void take() {
        for (int64_t index; (index = next_.fetch_add(1)) < pieces_;) call_(argument_, index);
    }
    void work(int cpu) {
#if defined(__linux__)
        if (cpu >= 0) {
            cpu_set_t set;
            CPU_ZERO(&set);
            CPU_SET(cpu, &set);
            pthread_setaffinity_np(pthread_self(), sizeof set, &set);  // where it may not, it runs anywhere
        }
#else
        (void)cpu;
#endif
        uint64_t seen = 0;
        for (;;) {
            for (int spin = 0; spin < SPINS && round_.load(std::memory_order_acquire) == seen; spin++) pause();
            {
                std::unique_lock<std::mutex> hold(mutex_);
                begin_.wait(hold, [&] { return ends_ || (open_ && round_.load(std::memory_order_relaxed) != seen); });
                if (ends_) return;
                seen = round_.load(std::memory_order_relaxed);
                active_.fetch_add(1, std::memory_order_relaxed);
            }
            take();
            if (active_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
                std::lock_guard<std::mutex> hold(mutex_);
                done_.notify_all();
            }
        }
    }
    std::vector<std::thread> workers_;
    std::mutex mutex_;
    std::condition_variable begin_, done_;
    std::atomic<uint64_t> round_{0};
    std::atomic<int64_t> next_{0};
    std::atomic<int> active_{0};
    bool open_ = false, ends_ = false;
    void (*call_)(void*, int64_t) = nullptr;
    void* argument_ = nullptr;
    int64_t pieces_ = 0;
};

// ---------------------------------------------------------------- the operation

float swiglu(float gate, float up, float limit) {
    gate = gate > limit ? limit : gate;  // NaN stays NaN
    up = up > limit ? limit : up < -limit ? -limit : up;
    return gate / (1.0f + std::exp(-SWIGLU_ALPHA * gate)) * (up + 1.0f);
}

constexpr int64_t ALONE_BYTES = 64 << 10;  // work that is done before another thread is awake

struct Experts {  // one product of all experts: [E, rows, blocks, 16], [E, rows, blocks], [E, rows]
    const uint8_t *blocks, *scales;
    const void* bias;
    int64_t rows, columns;
    int bias_is_bf16;
    Mxfp4 of(int64_t expert) const {
        const int64_t first = expert * rows * (columns / BLOCK);
        return {blocks + first * BLOCK_BYTES, scales + first, columns};
    }
    float bias_at(int64_t expert, int64_t r) const {
        int64_t at = expert * rows + r;
        return bias_is_bf16 ? widened(static_cast<const uint16_t*>(bias)[at]) : static_cast<const float*>(bias)[at];
    }
};

struct Mixture {
    const float *x, *weights;
    const int64_t* chosen;
    int64_t T, X, E, first_expert;
    float limit;
    Experts up, down;
    float* out;
};

struct Pair {
    int64_t token;
    float weight;
};

struct Batch {  // `count` pairs of one expert, from `first` on
    int64_t expert, first;
    int count;
};

template <class Way> void mix(Pool& pool, const Mixture& m) {
    const int64_t hidden = m.up.columns, inner = m.down.columns;
    std::memset(m.out, 0, sizeof(float) * m.T * hidden);
    std::vector<std::vector<Pair>> by_expert(m.E);
    for (int64_t at = 0; at < m.T * m.X; at++) {
        const int64_t expert = m.chosen[at] - m.first_expert;
        if (expert >= 0 && expert < m.E) by_expert[expert].push_back({at / m.X, m.weights[at]});
    }
    std::vector<Pair> pairs;
    std::vector<Batch> batches;
    for (int64_t expert = 0; expert < m.E; expert++) {
        const auto& mine = by_expert[expert];
        for (size_t first = 0; first < mine.size(); first += TILE) {
            const int count = static_cast<int>(std::min(mine.size() - first, static_cast<size_t>(TILE)));
            batches.push_back({expert, static_cast<int64_t>(pairs.size() + first), count});
        }
        pairs.insert(pairs.end(), mine.begin(), mine.end());
    }
    const int64_t count = static_cast<int64_t>(pairs.size()), tiles = static_cast<int64_t>(batches.size());
    const bool alone = tiles * inner * hidden * 2 < ALONE_BYTES && count * inner * hidden < (1 << 20);

    // a pair's activations for both products, and what is between them; a batch's lie together, step by step
    const int64_t width = std::max(steps_of(hidden), steps_of(inner)) * Way::RECORD;
    Vector<float> records(count * width), values(count * inner);
    auto arrange = [&](int64_t columns, auto&& from) {
        pool.run(tiles, alone, [&](int64_t index) {
            const Batch& batch = batches[index];
            for (int t = 0; t < batch.count; t++)
                Way::arrange(from(batch.first + t), columns, records.data() + batch.first * width + t * Way::RECORD,
                             batch.count * Way::RECORD);
        });
    };

    arrange(hidden, [&](int64_t pair) { return m.x + pairs[pair].token * hidden; });
    const int64_t up_chunks = chunks_of(m.up.rows);
    pool.run(tiles * up_chunks, alone, [&](int64_t index) {
        const Batch& batch = batches[index / up_chunks];
        const float* x = records.data() + batch.first * width;
        auto take = [&](int64_t r, int t, float value) {
            // a gate waits in its place for the up value of the next row
            float& place = values[(batch.first + t) * inner + r / 2];
            value += m.up.bias_at(batch.expert, r);
            place = r % 2 == 0 ? value : swiglu(place, value, m.limit);
        };
        chunk_product<Way>(m.up.of(batch.expert), index % up_chunks, m.up.rows, x, batch.count, take);
    });
    arrange(inner, [&](int64_t pair) { return values.data() + pair * inner; });
    // each piece has its rows of the result to itself and goes through the experts in ascending order
    pool.run(chunks_of(hidden), alone, [&](int64_t chunk) {
        for (const Batch& batch : batches) {
            auto take = [&](int64_t r, int t, float value) {
                const Pair& pair = pairs[batch.first + t];
                m.out[pair.token * hidden + r] += (value + m.down.bias_at(batch.expert, r)) * pair.weight;
            };
            const float* x = records.data() + batch.first * width;
            chunk_product<Way>(m.down.of(batch.expert), chunk, hidden, x, batch.count, take);
        }
    });
}

// out[T, rows] = x [T, columns] times the rows of a matrix, times a scale for each row where there are some, plus bias.
template <class Way>
void multiply(Pool& pool, const float* x, int64_t T, const typename Way::Matrix& matrix, int64_t rows,
              const float* scales, const float* bias, float* out) {
    const int64_t columns = matrix.columns, width = steps_of(columns) * Way::RECORD, tiles = (T + TILE - 1) / TILE;
    const bool alone = rows * columns * 2 < ALONE_BYTES && T * rows * columns < (1 << 20);
    Vector<float> records(T * width);
    auto tokens_of = [&](int64_t tile) { return static_cast<int>(std::min<int64_t>(TILE, T - tile * TILE)); };
    pool.run(T, alone, [&](int64_t t) {
        const int64_t tile = t / TILE, stride = tokens_of(tile) * Way::RECORD;
        Way::arrange(x + t * columns, columns, records.data() + tile * TILE * width + t % TILE * Way::RECORD, stride);
    });
    pool.run(tiles * chunks_of(rows), alone, [&](int64_t index) {
        const int64_t tile = index % tiles;
        auto take = [&](int64_t r, int t, float value) {
            if (scales) value *= scales[r];
            out[(tile * TILE + t) * rows + r] = bias ? value + bias[r] : value;
        };
        chunk_product<Way>(matrix, index / tiles, rows, records.data() + tile * TILE * width, tokens_of(tile), take);
    });
}

}  // namespace

extern "C" {

void* pool_new(int threads, const int* cpus) { return new Pool(threads, cpus); }
void pool_delete(void* pool) { delete static_cast<Pool*>(pool); }
int has_int8() {
#if defined(PORTABLE)
    return 0;
#else
    return 1;
#endif
}

// out[T, H] = the weighted sum over each token's experts that are here, whose global numbers begin with first_expert.
// x [T, H] fp32, weights [T, X] fp32, chosen [T, X]; gate and up rows alternate in gate_up: 2 I rows, H columns.
// int8: activations are rounded to 8 bits before each product; only where has_int8.
void experts(void* handle, const float* x, const float* weights, const int64_t* chosen, int64_t T, int64_t X, int64_t H,
             int64_t I, int64_t E, int64_t first_expert, float limit, const uint8_t* up_blocks,
             const uint8_t* up_scales, const void* up_bias, const uint8_t* down_blocks, const uint8_t* down_scales,
             const void* down_bias, int bias_is_bf16, int int8, float* out) {
    Pool& pool = *static_cast<Pool*>(handle);
    std::lock_guard<std::mutex> turn(pool.one_call);
    const Experts up{up_blocks, up_scales, up_bias, 2 * I, H, bias_is_bf16};
    const Experts down{down_blocks, down_scales, down_bias, H, I, bias_is_bf16};
    const Mixture mixture{x, weights, chosen, T, X, E, first_expert, limit, up, down, out};
#if !defined(PORTABLE)
    if (int8) return mix<Int8>(pool, mixture);
#endif
    (void)int8;
    mix<Exact>(pool, mixture);
}

// A matrix of bf16, or with scales [rows] of int8; bias [rows] or none. Columns are whole blocks.
void linear(void* handle, const float* x, int64_t T, const void* matrix, int64_t rows, int64_t columns,
            const float* scales, const float* bias, float* out) {
    Pool& pool = *static_cast<Pool*>(handle);
    std::lock_guard<std::mutex> turn(pool.one_call);
    if (scales)
        multiply<Codes>(pool, x, T, {static_cast<const int8_t*>(matrix), columns}, rows, scales, bias, out);
    else
        multiply<Bf16>(pool, x, T, {static_cast<const uint16_t*>(matrix), columns}, rows, nullptr, bias, out);
}

// Reads `bytes` bytes and does next to nothing with them: what the memory gives at most.
uint64_t read_all(void* handle, const uint8_t* memory, int64_t bytes) {
    Pool& pool = *static_cast<Pool*>(handle);
    std::lock_guard<std::mutex> turn(pool.one_call);
    constexpr int64_t PIECE = 1 << 20;
    std::atomic<uint64_t> total{0};
    pool.run((bytes + PIECE - 1) / PIECE, false, [&](int64_t index) {
        const int64_t last = (index + 1) * PIECE < bytes ? (index + 1) * PIECE : bytes;
        uint64_t sums[8] = {};
        for (int64_t at = index * PIECE; at + 64 <= last; at += 64) {
            uint64_t words[8];
            std::memcpy(words, memory + at, 64);
            for (int i = 0; i < 8; i++) sums[i] ^= words[i];
        }
        total ^= sums[0] ^ sums[1] ^ sums[2] ^ sums[3] ^ sums[4] ^ sums[5] ^ sums[6] ^ sums[7];
    });
    return total;
}
}
