// The mixture of experts on a CPU: both MXFP4 products, SwiGLU and the weighted sum, from the checkpoint's own layout.
//
// Compiled by cpu_build.py once for each kind of CPU, and called through ctypes. Knows pointers and sizes; no Python, no
// torch. Sums are fp32 and in an order that depends neither on the number of threads nor on the other tokens of a step.
//
// A row of weights is read S blocks at a time, a step: S is what fills a register with packed nibbles. Decoded, a step is
// 8 vectors of W = 4 S values, in the order in which the shuffles leave them; activations are brought into that order once.
// Legend: H hidden, I inner width, E experts here, T tokens, X experts a token, K columns of a product.

#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <mutex>
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

constexpr int BLOCK = 32;       // weights that share a scale
constexpr int BLOCK_BYTES = 16;
constexpr int VECTORS = 8;      // of a decoded step
constexpr int GROUP = 8;        // rows that are decoded together where several tokens read them
constexpr int CHUNK_ROWS = 64;  // rows of one piece of work
constexpr float SWIGLU_ALPHA = 1.702f;

// ---------------------------------------------------------------- vectors

#if defined(__AVX512BW__)
constexpr int S = 4;
using V = __m512;
using I8 = __m512i;
inline V zero() { return _mm512_setzero_ps(); }
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V x) { _mm512_storeu_ps(p, x); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(V x) { return _mm512_reduce_add_ps(x); }
inline V spread(const float* f) {  // one value for each block's quarter of a vector
    V low = _mm512_insertf32x4(_mm512_castps128_ps512(_mm_set1_ps(f[0])), _mm_set1_ps(f[1]), 1);
    return _mm512_insertf32x4(_mm512_insertf32x4(low, _mm_set1_ps(f[2]), 2), _mm_set1_ps(f[3]), 3);
}
inline I8 load8(const void* p) { return _mm512_loadu_si512(p); }
inline I8 table8(__m128i t) { return _mm512_broadcast_i32x4(t); }
inline I8 look(I8 t, I8 index) { return _mm512_shuffle_epi8(t, index); }
inline I8 low(I8 x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
inline I8 high(I8 x) { return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15)); }
inline I8 left(I8 a, I8 b) { return _mm512_unpacklo_epi8(a, b); }
inline I8 right(I8 a, I8 b) { return _mm512_unpackhi_epi8(a, b); }
inline V even(I8 x) { return _mm512_castsi512_ps(_mm512_slli_epi32(x, 16)); }
inline V odd(I8 x) { return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(0xFFFF0000))); }
// the products of 4 neighbouring bytes each, a as its magnitude with its sign moved to b
inline V dot(I8 a0, I8 b0, I8 a1, I8 b1) {
    I8 n0 = _mm512_mask_sub_epi8(b0, _mm512_movepi8_mask(a0), _mm512_setzero_si512(), b0);
    I8 n1 = _mm512_mask_sub_epi8(b1, _mm512_movepi8_mask(a1), _mm512_setzero_si512(), b1);
    I8 p = _mm512_add_epi16(_mm512_maddubs_epi16(_mm512_abs_epi8(a0), n0),
                            _mm512_maddubs_epi16(_mm512_abs_epi8(a1), n1));
    return _mm512_cvtepi32_ps(_mm512_madd_epi16(p, _mm512_set1_epi16(1)));
}
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int S = 2;
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
inline V spread(const float* f) { return _mm256_blend_ps(_mm256_broadcast_ss(f), _mm256_broadcast_ss(f + 1), 0xF0); }
inline I8 load8(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline I8 table8(__m128i t) { return _mm256_broadcastsi128_si256(t); }
inline I8 look(I8 t, I8 index) { return _mm256_shuffle_epi8(t, index); }
inline I8 low(I8 x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
inline I8 high(I8 x) { return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15)); }
inline I8 left(I8 a, I8 b) { return _mm256_unpacklo_epi8(a, b); }
inline I8 right(I8 a, I8 b) { return _mm256_unpackhi_epi8(a, b); }
inline V even(I8 x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
inline V odd(I8 x) { return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(0xFFFF0000))); }
inline V dot(I8 a0, I8 b0, I8 a1, I8 b1) {
    I8 p = _mm256_add_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(a0), _mm256_sign_epi8(b0, a0)),
                            _mm256_maddubs_epi16(_mm256_abs_epi8(a1), _mm256_sign_epi8(b1, a1)));
    return _mm256_cvtepi32_ps(_mm256_madd_epi16(p, _mm256_set1_epi16(1)));
}
#else
#define PORTABLE
constexpr int S = 1;
struct V { float at[4]; };
template <class F> inline V each(F f) { return {{f(0), f(1), f(2), f(3)}}; }
inline V zero() { return {{0, 0, 0, 0}}; }
inline V load(const float* p) { return each([&](int i) { return p[i]; }); }
inline void store(float* p, V x) { std::memcpy(p, x.at, sizeof x.at); }
inline V mul(V a, V b) { return each([&](int i) { return a.at[i] * b.at[i]; }); }
inline V add(V a, V b) { return each([&](int i) { return a.at[i] + b.at[i]; }); }
inline V fma(V a, V b, V c) { return each([&](int i) { return a.at[i] * b.at[i] + c.at[i]; }); }
inline float sum(V x) { return (x.at[0] + x.at[2]) + (x.at[1] + x.at[3]); }
inline V spread(const float* f) { return each([&](int) { return f[0]; }); }
#endif

constexpr int W = 4 * S;
constexpr int STEP = VECTORS * W;  // columns of a step
constexpr int STEP_BYTES = S * BLOCK_BYTES;

// Where a column stands in decoding order.
inline int64_t place_of(int64_t column) {
    int c = static_cast<int>(column % STEP), in = c % BLOCK;
    int v = (in & 1) * 4 + in / 16 * 2 + in % 4 / 2;
    return column - c + v * W + c / BLOCK * 4 + in % 16 / 4;
}

// ---------------------------------------------------------------- weights

struct Product {  // one product of all experts: [E, rows, blocks, 16], [E, rows, blocks], [E, rows]
    const uint8_t* blocks;
    const uint8_t* scales;
    const void* bias;
    int64_t rows, columns;
    int bias_is_bf16;
    int64_t blocks_a_row() const { return columns / BLOCK; }
    int64_t steps() const { return (blocks_a_row() + S - 1) / S; }
    const uint8_t* row(int64_t expert, int64_t r) const {
        return blocks + (expert * rows + r) * blocks_a_row() * BLOCK_BYTES;
    }
    const uint8_t* row_scales(int64_t expert, int64_t r) const { return scales + (expert * rows + r) * blocks_a_row(); }
    float bias_at(int64_t expert, int64_t r) const {
        int64_t at = expert * rows + r;
        if (!bias_is_bf16) return static_cast<const float*>(bias)[at];
        uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(bias)[at]) << 16;
        float value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    }
};

struct Scales {  // what a scale byte stands for: 2 ** (byte - 127), 255 is NaN
    float at[256];
    Scales() {
        for (int byte = 0; byte < 255; byte++) at[byte] = std::ldexp(1.0f, byte - 127);
        at[255] = std::nanf("");
    }
};
const Scales SCALES;

#if defined(PORTABLE)
// Column, within its step, of lane `lane` of vector `v`: nibble, half of the block, parity of the byte pair are v's bits.
inline int column_of(int v, int lane) {
    int nibble = v >> 2, half = v >> 1 & 1, parity = v & 1;
    return lane / 4 * BLOCK + 16 * half + 4 * (lane % 4) + 2 * parity + nibble;
}
const float FP4[16] = {0.f, .5f, 1.f, 1.5f, 2.f, 3.f, 4.f, 6.f, -0.f, -.5f, -1.f, -1.5f, -2.f, -3.f, -4.f, -6.f};
inline void decode(const uint8_t* bytes, V w[VECTORS]) {
    for (int v = 0; v < VECTORS; v++)
        w[v] = each([&](int lane) {
            int column = column_of(v, lane);
            return FP4[bytes[column / 2] >> 4 * (column & 1) & 15];
        });
}
#else
// the upper and the lower byte of each code's value as bf16, which is the upper half of the same value as fp32
inline I8 upper_bytes() {
    return table8(_mm_setr_epi8(0, 0x3F, 0x3F, 0x3F, 0x40, 0x40, 0x40, 0x40, char(0x80), char(0xBF), char(0xBF),
                                char(0xBF), char(0xC0), char(0xC0), char(0xC0), char(0xC0)));
}
inline I8 lower_bytes() {
    return table8(_mm_setr_epi8(0, 0, char(0x80), char(0xC0), 0, 0x40, char(0x80), char(0xC0), 0, 0, char(0x80),
                                char(0xC0), 0, 0x40, char(0x80), char(0xC0)));
}
inline void decode(const uint8_t* bytes, V w[VECTORS]) {
    const I8 upper = upper_bytes(), lower = lower_bytes();
    const I8 packed = load8(bytes);
    const I8 codes[2] = {low(packed), high(packed)};
    for (int nibble = 0; nibble < 2; nibble++) {
        I8 a = look(lower, codes[nibble]), b = look(upper, codes[nibble]);
        I8 l = left(a, b), r = right(a, b);
        w[4 * nibble] = even(l), w[4 * nibble + 1] = odd(l);
        w[4 * nibble + 2] = even(r), w[4 * nibble + 3] = odd(r);
    }
}
#endif

// A step's packed bytes and scales. The last step of a row may be cut short: it is filled up with zeros.
struct Step {
    const uint8_t* bytes;
    float scales[S];
    uint8_t filled[STEP_BYTES];
    Step(const uint8_t* row, const uint8_t* row_scales, int64_t step, int64_t blocks) {
        const int64_t first = step * S;
        bytes = row + first * BLOCK_BYTES;
        if (first + S <= blocks) {
            for (int b = 0; b < S; b++) scales[b] = SCALES.at[row_scales[first + b]];
            return;
        }
        const int here = static_cast<int>(blocks - first);
        std::memset(filled, 0, sizeof filled);
        std::memcpy(filled, bytes, here * BLOCK_BYTES);
        bytes = filled;
        for (int b = 0; b < S; b++) scales[b] = b < here ? SCALES.at[row_scales[first + b]] : 0.0f;
    }
};

// ---------------------------------------------------------------- exact products

inline V product_of(const V w[VECTORS], const float* x) {
    V a = mul(w[0], load(x)), b = mul(w[1], load(x + W));
    for (int v = 2; v < VECTORS; v += 2) {
        a = fma(w[v], load(x + v * W), a);
        b = fma(w[v + 1], load(x + (v + 1) * W), b);
    }
    return add(a, b);
}

// One row times one token's activations, which are in decoding order and filled up with zeros.
float row_product(const Product& p, int64_t expert, int64_t r, const float* x) {
    const uint8_t *row = p.row(expert, r), *scales = p.row_scales(expert, r);
    const int64_t steps = p.steps(), blocks = p.blocks_a_row();
    V total = zero();
    for (int64_t step = 0; step < steps; step++) {
        Step packed(row, scales, step, blocks);
        V w[VECTORS];
        decode(packed.bytes, w);
        total = fma(product_of(w, x + step * STEP), spread(packed.scales), total);
    }
    return sum(total);
}

// Up to GROUP rows times several tokens: each step is decoded once, into the first-level cache. x [steps, tokens, STEP].
// y [tokens, GROUP].
void group_product(const Product& p, int64_t expert, int64_t first, int rows, const float* x, int tokens,
                   std::vector<float>& totals, float* y) {
    const int64_t steps = p.steps(), blocks = p.blocks_a_row();
    alignas(64) float decoded[GROUP][STEP], factors[GROUP][W];
    totals.assign(static_cast<size_t>(tokens) * GROUP * W, 0.0f);
    for (int64_t step = 0; step < steps; step++) {
        for (int r = 0; r < rows; r++) {
            Step packed(p.row(expert, first + r), p.row_scales(expert, first + r), step, blocks);
            V w[VECTORS];
            decode(packed.bytes, w);
            for (int v = 0; v < VECTORS; v++) store(decoded[r] + v * W, w[v]);
            store(factors[r], spread(packed.scales));
        }
        for (int t = 0; t < tokens; t++) {
            const float* here = x + (step * tokens + t) * STEP;
            float* total = totals.data() + static_cast<size_t>(t) * GROUP * W;
            V held[VECTORS];
            for (int v = 0; v < VECTORS; v++) held[v] = load(here + v * W);
            for (int r = 0; r < rows; r++) {  // in the order of operations of product_of
                V a = mul(load(decoded[r]), held[0]), b = mul(load(decoded[r] + W), held[1]);
                for (int v = 2; v < VECTORS; v += 2) {
                    a = fma(load(decoded[r] + v * W), held[v], a);
                    b = fma(load(decoded[r] + (v + 1) * W), held[v + 1], b);
                }
                store(total + r * W, fma(add(a, b), load(factors[r]), load(total + r * W)));
            }
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int r = 0; r < rows; r++) y[t * GROUP + r] = sum(load(totals.data() + (static_cast<size_t>(t) * GROUP + r) * W));
}

// ---------------------------------------------------------------- products with int8 activations

// Activations of a token as int8 with one scale for each block: x = factor * byte, |byte| <= 127.
struct Bytes {
    int64_t steps = 0;
    std::vector<int8_t> bytes;   // [tokens, steps, 2, S * 16]: of each step the even columns, then the odd ones
    std::vector<float> factors;  // [tokens, steps, S], halved, as codes are looked up doubled
    void reserve(int64_t tokens, int64_t step_count) {
        steps = step_count;
        bytes.assign(static_cast<size_t>(tokens * steps * 2 * STEP_BYTES), 0);
        factors.assign(static_cast<size_t>(tokens * steps * S), 0.0f);
    }
    void round(int64_t token, const float* x, int64_t columns) {
        for (int64_t block = 0; block < columns / BLOCK; block++) {
            const float* from = x + block * BLOCK;
            float largest = 0.0f;
            for (int i = 0; i < BLOCK; i++) largest = std::fmax(largest, std::fabs(from[i]));
            const float factor = largest / 127.0f, inverse = largest > 0.0f ? 127.0f / largest : 0.0f;
            const int64_t step = token * steps + block / S;
            int8_t* to = bytes.data() + step * 2 * STEP_BYTES + block % S * BLOCK_BYTES;
            for (int i = 0; i < BLOCK; i++)
                to[i / 2 + (i & 1) * STEP_BYTES] = static_cast<int8_t>(std::nearbyint(from[i] * inverse));
            factors[step * S + block % S] = 0.5f * factor;
        }
    }
};

#if !defined(PORTABLE)
// One row times several tokens' activations. y[t].
void row_product_int8(const Product& p, int64_t expert, int64_t r, const Bytes& x, const int64_t* tokens, int count,
                      std::vector<float>& totals, float* y) {
    const I8 doubled = table8(_mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
    const uint8_t *row = p.row(expert, r), *scales = p.row_scales(expert, r);
    const int64_t steps = p.steps(), blocks = p.blocks_a_row();
    auto more = [&](const Step& packed, I8 a0, I8 a1, int64_t at, V total) {
        const int8_t* here = x.bytes.data() + at * 2 * STEP_BYTES;
        float factors[S];
        for (int b = 0; b < S; b++) factors[b] = packed.scales[b] * x.factors[at * S + b];
        return fma(dot(a0, load8(here), a1, load8(here + STEP_BYTES)), spread(factors), total);
    };
    if (count == 1) {
        V total = zero();
        for (int64_t step = 0; step < steps; step++) {
            Step packed(row, scales, step, blocks);
            const I8 codes = load8(packed.bytes);
            total = more(packed, look(doubled, low(codes)), look(doubled, high(codes)), tokens[0] * steps + step, total);
        }
        y[0] = sum(total);
        return;
    }
    totals.assign(static_cast<size_t>(count) * W, 0.0f);
    for (int64_t step = 0; step < steps; step++) {
        Step packed(row, scales, step, blocks);
        const I8 codes = load8(packed.bytes);
        const I8 a0 = look(doubled, low(codes)), a1 = look(doubled, high(codes));
        for (int t = 0; t < count; t++) {
            float* total = totals.data() + static_cast<size_t>(t) * W;
            store(total, more(packed, a0, a1, tokens[t] * steps + step, load(total)));
        }
    }
    for (int t = 0; t < count; t++) y[t] = sum(load(totals.data() + static_cast<size_t>(t) * W));
}
#endif

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

struct Pair {
    int64_t token, slot;  // slot: its row of what lies between the products
    float weight;
};

constexpr int64_t ALONE_BYTES = 64 << 10;  // work that is done before another thread is awake

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
    const Product up{up_blocks, up_scales, up_bias, 2 * I, H, bias_is_bf16};
    const Product down{down_blocks, down_scales, down_bias, H, I, bias_is_bf16};
    std::memset(out, 0, sizeof(float) * T * H);

    std::vector<std::vector<Pair>> by_expert(E);
    int64_t pairs = 0;
    for (int64_t t = 0; t < T; t++)
        for (int64_t k = 0; k < X; k++) {
            int64_t expert = chosen[t * X + k] - first_expert;
            if (expert >= 0 && expert < E) by_expert[expert].push_back({t, pairs++, weights[t * X + k]});
        }
    std::vector<int64_t> used;
    for (int64_t expert = 0; expert < E; expert++)
        if (!by_expert[expert].empty()) used.push_back(expert);
    if (used.empty()) return;

    const int64_t x_width = up.steps() * STEP, inner_width = down.steps() * STEP;
    // in decoding order, filled up with zeros; for int8 in their own order, until they are rounded
    std::vector<float> ordered(int8 ? 0 : T * x_width), inner(pairs * inner_width);
    Bytes bytes, inner_bytes;
    if (int8) bytes.reserve(T, up.steps()), inner_bytes.reserve(pairs, down.steps());
    const bool alone = static_cast<int64_t>(used.size()) * I * H * 2 < ALONE_BYTES && pairs * I * H < (1 << 20);
    pool.run(T, alone, [&](int64_t t) {
        if (int8) return bytes.round(t, x + t * H, H);
        for (int64_t column = 0; column < H; column++) ordered[t * x_width + place_of(column)] = x[t * H + column];
    });

    // rows [first, last) of one expert for all its tokens; take(pair, row, value without bias)
    auto products = [&](const Product& p, int64_t expert, int64_t first, int64_t last, bool by_slot, auto&& take) {
        const auto& mine = by_expert[expert];
        const int tokens = static_cast<int>(mine.size());
        const float* from = by_slot ? inner.data() : ordered.data();
        const int64_t width = p.steps() * STEP;
        std::vector<int64_t> places(tokens);
        for (int t = 0; t < tokens; t++) places[t] = by_slot ? mine[t].slot : mine[t].token;
        std::vector<float> by_step, totals, y(static_cast<size_t>(tokens) * GROUP);
#if !defined(PORTABLE)
        if (int8) {
            for (int64_t r = first; r < last; r++) {
                row_product_int8(p, expert, r, by_slot ? inner_bytes : bytes, places.data(), tokens, totals, y.data());
                for (int t = 0; t < tokens; t++) take(mine[t], r, y[t]);
            }
            return;
        }
#endif
        if (tokens == 1) {
            for (int64_t r = first; r < last; r++) take(mine[0], r, row_product(p, expert, r, from + places[0] * width));
            return;
        }
        by_step.resize(tokens * width);
        for (int t = 0; t < tokens; t++)
            for (int64_t step = 0; step < p.steps(); step++)
                std::memcpy(by_step.data() + (step * tokens + t) * STEP, from + places[t] * width + step * STEP,
                            sizeof(float) * STEP);
        for (int64_t r = first; r < last; r += GROUP) {
            const int rows = static_cast<int>(last - r < GROUP ? last - r : GROUP);
            group_product(p, expert, r, rows, by_step.data(), tokens, totals, y.data());
            for (int t = 0; t < tokens; t++)
                for (int i = 0; i < rows; i++) take(mine[t], r + i, y[t * GROUP + i]);
        }
    };

    const int64_t up_chunks = (up.rows + CHUNK_ROWS - 1) / CHUNK_ROWS;
    pool.run(static_cast<int64_t>(used.size()) * up_chunks, alone, [&](int64_t index) {
        const int64_t expert = used[index / up_chunks], first = index % up_chunks * CHUNK_ROWS;
        const int64_t last = first + CHUNK_ROWS < up.rows ? first + CHUNK_ROWS : up.rows;
        products(up, expert, first, last, false, [&](const Pair& pair, int64_t r, float value) {
            // even rows come before odd ones for the same pair: the gate waits in its place for the up value
            float& place = inner[pair.slot * inner_width + (int8 ? r / 2 : place_of(r / 2))];
            value += up.bias_at(expert, r);
            place = r % 2 == 0 ? value : swiglu(place, value, limit);
        });
    });

    if (int8)
        pool.run(pairs, alone, [&](int64_t slot) { inner_bytes.round(slot, inner.data() + slot * inner_width, I); });
    // each piece has its rows of the result to itself and goes through the experts in ascending order
    const int64_t down_chunks = (down.rows + CHUNK_ROWS - 1) / CHUNK_ROWS;
    pool.run(down_chunks, alone, [&](int64_t index) {
        const int64_t first = index * CHUNK_ROWS;
        const int64_t last = first + CHUNK_ROWS < down.rows ? first + CHUNK_ROWS : down.rows;
        for (int64_t expert : used)
            products(down, expert, first, last, true, [&](const Pair& pair, int64_t r, float value) {
                out[pair.token * H + r] += (value + down.bias_at(expert, r)) * pair.weight;
            });
    });
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
