/* What an encoder layer of frozen weights computes, in bfloat16 on a CPU with AMX tiles and AVX-512.
 *
 * torch makes a pass over memory of each operation, and multiplies small matrices one by one. Here the attention of one
 * head of one text is computed while it lies in the cache; adapters, biases, what is added to a result and GELU with its
 * derivative come along with the product; weights are brought into the order of tiles once. What is exact attention,
 * GELU or layer norm there is so here, with sums in float32. kernels.py says what is passed.
 *
 * A tile is 16 rows of 64 bytes. In a product C += A B of tiles A has 16 rows of 32 bfloat16; row i of B has, for 16
 * columns, rows 2i and 2i + 1 of the matrix beside each other ("paired"); C has 16 rows of 16 float32.
 */

#include <immintrin.h>
#include <math.h>
#include <pmmintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;

int kernels_version(void) { return 4; }

/* ---- vectors ------------------------------------------------------------------------------------------------- */

static inline __m512 from_bf16(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

static inline __m256i to_bf16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

static inline __m512 load(const bf16 *x) { return from_bf16(_mm256_loadu_si256((const __m256i *)x)); }

static inline void store(bf16 *x, __m512 value) { _mm256_storeu_si256((__m256i *)x, to_bf16(value)); }

/* Results too small for float32's usual form become 0: the processor takes a hundred times as long over them. */
static inline unsigned begin_vectors(void) {
    unsigned before = _mm_getcsr();
    _mm_setcsr(before | _MM_FLUSH_ZERO_ON | _MM_DENORMALS_ZERO_ON);
    return before;
}

/* 2^x: 2^floor(x) times a polynomial of the rest, from 0 to 1, off by 3e-6 of the value at most. */
static inline __m512 exp2_of(__m512 x) {
    __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 p = _mm512_set1_ps(1.35347402e-2f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.20103042e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.41443477e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.93003705e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.00000259f));
    return _mm512_scalef_ps(p, x);
}

/* log2(x) for x >= 1, off by 2e-6 at most. */
static inline __m512 log2_of(__m512 x) {
    __m512 r = _mm512_sub_ps(_mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_zero), _mm512_set1_ps(1.0f));
    __m512 p = _mm512_set1_ps(0.0154750324f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(-0.0794245692f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.194216188f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(-0.325941398f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.473608123f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(-0.720602214f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.44266912f));
    return _mm512_fmadd_ps(p, r, _mm512_getexp_ps(x));
}

/* Pairs of 16 bfloat16 each: a[i] in the low half of element i, b[i] in the high one. */
static inline __m512i paired(__m256i a, __m256i b) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
}

/* Transposes 16 vectors of 16 elements of 32 bits. */
static inline void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) { /* of each four lanes of 128 bits: 0 and 2, 1 and 3 */
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

/* The first of so many, of `most` there are. */
static inline __mmask32 upto(int64_t count, int most) {
    return count >= most ? (__mmask32)((1ull << most) - 1) : count > 0 ? (1u << count) - 1 : 0;
}

/* ---- tiles --------------------------------------------------------------------------------------------------- */

/* The compiler does not know that the tile instructions read memory: what was written before must be there. */
#define WRITTEN(address) __asm__ volatile("" ::"r"(address) : "memory")

static void begin_tiles(void) {
    struct { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } config = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        config.bytes[i] = 64;
        config.rows[i] = 16;
    }
    WRITTEN(&config);
    _tile_loadconfig(&config);
}

/* C = A B, or C += A B: A of 16 m rows and 32 k columns, B paired, of 16 n columns. Lengths of rows are in bytes. */
static void product(const void *a, int64_t a_row, const void *b, int64_t b_row, float *c, int64_t c_row, int m, int n,
                    int k, int add) {
    const char *A = a, *B = b;
    char *C = (char *)c;
    WRITTEN(c);
    for (int i = 0; i < m; i += 2) {
        int two_rows = i + 1 < m;
        for (int j = 0; j < n; j += 2) {
            int two_columns = j + 1 < n;
            char *c0 = C + i * 16 * c_row + j * 64, *c1 = c0 + 16 * c_row;
            if (add) {
                _tile_loadd(0, c0, c_row);
                if (two_columns) _tile_loadd(1, c0 + 64, c_row);
                if (two_rows) _tile_loadd(2, c1, c_row);
                if (two_rows && two_columns) _tile_loadd(3, c1 + 64, c_row);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (int l = 0; l < k; l++) {
                const char *a0 = A + i * 16 * a_row + l * 64, *b0 = B + l * 16 * b_row + j * 64;
                _tile_loadd(4, a0, a_row);
                _tile_loadd(6, b0, b_row);
                _tile_dpbf16ps(0, 4, 6);
                if (two_columns) {
                    _tile_loadd(7, b0 + 64, b_row);
                    _tile_dpbf16ps(1, 4, 7);
                }
                if (two_rows) {
                    _tile_loadd(5, a0 + 16 * a_row, a_row);
                    _tile_dpbf16ps(2, 5, 6);
                    if (two_columns) _tile_dpbf16ps(3, 5, 7);
                }
            }
            _tile_stored(0, c0, c_row);
            if (two_columns) _tile_stored(1, c0 + 64, c_row);
            if (two_rows) _tile_stored(2, c1, c_row);
            if (two_rows && two_columns) _tile_stored(3, c1 + 64, c_row);
        }
    }
}

/* ---- one head of one text: (tokens, width) with rows apart in memory, brought into the forms that tiles read ---- */

/* Has rows that are needed next on their way. */
static inline void expect_rows(const bf16 *rows, int64_t apart, int64_t count, int64_t width) {
    for (int64_t r = 0; r < count; r++)
        for (int64_t w = 0; w < width; w += 32) _mm_prefetch(rows + r * apart + w, _MM_HINT_T0);
}

/* (padded, width), with zeros behind the last token. */
static inline void copy_rows(bf16 *to, const bf16 *from, int64_t apart, int64_t tokens, int64_t padded, int64_t width) {
    for (int64_t t = 0; t < padded; t++)
        for (int64_t w = 0; w < width; w += 32)
            _mm512_storeu_si512(to + t * width + w,
                                t < tokens ? _mm512_loadu_si512(from + t * apart + w) : _mm512_setzero_si512());
}

/* The transposed matrix, paired: (width / 2, padded) of 32 bits; and, where asked for, as it is: (width, padded). */
static void transpose_rows(uint32_t *pairs, bf16 *plain, const bf16 *from, int64_t apart, int tokens, int padded,
                           int width) {
    for (int t = 0; t < padded; t += 16) {
        for (int w = 0; w < width / 2; w += 16) {
            __m512i r[16];
            for (int i = 0; i < 16; i++)
                r[i] = t + i < tokens ? _mm512_loadu_si512(from + (t + i) * apart + 2 * w) : _mm512_setzero_si512();
            transpose(r);
            for (int i = 0; i < 16; i++) {
                if (pairs) _mm512_storeu_si512(pairs + (w + i) * padded + t, r[i]);
                if (plain) {
                    bf16 *row = plain + 2 * (w + i) * padded + t;
                    _mm256_storeu_si256((__m256i *)row, _mm512_cvtepi32_epi16(r[i]));
                    _mm256_storeu_si256((__m256i *)(row + padded), _mm512_cvtepi32_epi16(_mm512_srli_epi32(r[i], 16)));
                }
            }
        }
    }
}

/* The matrix paired: (padded / 2, width) of 32 bits. */
static void pair_rows(uint32_t *to, const bf16 *from, int64_t apart, int tokens, int padded, int width) {
    const __m256i none = _mm256_setzero_si256();
    for (int t = 0; t < padded; t += 2) {
        const bf16 *row = from + t * apart;
        for (int w = 0; w < width; w += 16) {
            __m256i a = t < tokens ? _mm256_loadu_si256((const __m256i *)(row + w)) : none;
            __m256i b = t + 1 < tokens ? _mm256_loadu_si256((const __m256i *)(row + apart + w)) : none;
            _mm512_storeu_si512(to + t / 2 * width + w, paired(a, b));
        }
    }
}

/* Rows of 32 queries or keys that are computed together. */
enum { STRIP = 32 };

static const float LOG2_E = 1.44269504f;

static inline int least(int a, int b) { return a < b ? a : b; }

/* Memory of a thread that is kept from call to call: new pages would take as long as a product. */
static char *workspace(int64_t bytes, char **memory, int64_t *size) {
    if (*size < bytes) {
        free(*memory);
        *size = (bytes + 4095) / 4096 * 4096;
        *memory = aligned_alloc(4096, *size);
        if (!*memory) {
            fprintf(stderr, "error: out of memory: %lld bytes for compiled layers\n", (long long)*size);
            abort();
        }
    }
    return *memory;
}

/* A piece of memory at an address that vectors and tiles like. */
static inline void *take(char **memory, int64_t bytes) {
    char *piece = *memory;
    *memory += (bytes + 63) / 64 * 64;
    return piece;
}

/* x * by, zeros where x is null, and behind them `none` up to padded. */
static void fill(float *to, const float *x, float by, int count, int padded, float none) {
    for (int i = 0; i < padded; i++) to[i] = i < count ? (x ? x[i] * by : 0.0f) : none;
}

/* ---- attention ----------------------------------------------------------------------------------------------- */

/* 2^(score - the row's largest) of a row of scores, times `by` and with what is added to them; gives the largest, and
 * the sum of what is stored. */
static inline void exponentials(bf16 *to, float *row, const float *plus, float by, int columns, int padded,
                                float *largest, float *sum) {
    __m512 top = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
    for (int t = 0; t < columns; t += 16) {
        __m512 x = _mm512_fmadd_ps(_mm512_load_ps(row + t), _mm512_set1_ps(by), _mm512_load_ps(plus + t));
        _mm512_store_ps(row + t, x);
        top = _mm512_max_ps(top, x);
    }
    *largest = _mm512_reduce_max_ps(top);
    for (int t = 0; t < columns; t += 16) {
        __m512 e = exp2_of(_mm512_sub_ps(_mm512_load_ps(row + t), _mm512_set1_ps(*largest)));
        total = _mm512_add_ps(total, e);
        store(to + t, e);
    }
    if (columns < padded) store(to + columns, _mm512_setzero_ps());
    *sum = _mm512_reduce_add_ps(total);
}

/* softmax(scale Q K' + added) V of each text and head.
 *
 * q: (texts, heads, asking, width), k, v: (texts, heads, tokens, width), so many elements apart in the first three, first
 * of q and then of both others; width is a multiple of 32.
 * added: (texts, tokens) or null, for keys; a text's largest is 0.
 * out: (texts, asking, heads, width).
 * sums: (texts, heads, asking) or null: logarithms to base 2; by them the backward pass finds the probabilities again. */
void attention_forward(const bf16 *q, const bf16 *k, const bf16 *v, const int64_t *apart, const float *added, bf16 *out,
                       float *sums, int64_t texts, int64_t heads, int64_t asking, int64_t tokens, int64_t width,
                       float scale, int threads) {
    const int Q = asking, T = tokens, D = width;
    const int asked = (Q + STRIP - 1) / STRIP * STRIP, padded = (T + STRIP - 1) / STRIP * STRIP, tiles = (T + 15) / 16;
    const int64_t out_apart = heads * D;
#pragma omp parallel num_threads(threads)
    {
        static __thread char *own;
        static __thread int64_t own_size;
        char *left = workspace(asked * D * 2 + padded * (D * 4 + 4) + STRIP * (padded * 6 + D * 4) + 4096, &own, &own_size);
        bf16 *queries = take(&left, asked * D * 2), *shares = take(&left, STRIP * padded * 2);
        uint32_t *keys = take(&left, padded * D * 2), *values = take(&left, padded * D * 2);
        float *plus = take(&left, padded * 4), *scores = take(&left, STRIP * padded * 4);
        float *results = take(&left, STRIP * D * 4);
        unsigned before = begin_vectors();
        begin_tiles();
#pragma omp for schedule(static)
        for (int64_t i = 0; i < texts * heads; i++) {
            const int64_t text = i / heads, head = i % heads;
            const bf16 *of_q = q + text * apart[0] + head * apart[1], *of_k = k + text * apart[3] + head * apart[4];
            const bf16 *of_v = v + text * apart[3] + head * apart[4];
            if (head + 1 < heads) {
                expect_rows(of_q + apart[1], apart[2], Q, D);
                expect_rows(of_k + apart[4], apart[5], T, D);
                expect_rows(of_v + apart[4], apart[5], T, D);
            }
            copy_rows(queries, of_q, apart[2], Q, asked, D);
            transpose_rows(keys, NULL, of_k, apart[5], T, padded, D);
            pair_rows(values, of_v, apart[5], T, padded, D);
            fill(plus, added ? added + text * T : NULL, LOG2_E, T, padded, -INFINITY);
            for (int s = 0; s < Q; s += STRIP) {
                const int count = least(STRIP, Q - s), m = (count + 15) / 16;
                product(queries + s * D, D * 2, keys, padded * 4, scores, padded * 4, m, tiles, D / 32, 0);
                float largest[STRIP] = {0}, share[STRIP] = {0};
                for (int r = 0; r < count; r++)
                    exponentials(shares + r * padded, scores + r * padded, plus, scale * LOG2_E, tiles * 16, padded,
                                 largest + r, share + r);
                for (int r = 0; r < count; r += 16) {
                    const __m512 sum = _mm512_loadu_ps(share + r);
                    const __m512 log = _mm512_add_ps(_mm512_loadu_ps(largest + r), log2_of(sum));
                    if (sums) _mm512_mask_storeu_ps(sums + i * Q + s + r, upto(count - r, 16), log);
                    _mm512_storeu_ps(share + r, _mm512_div_ps(_mm512_set1_ps(1.0f), sum));
                }
                product(shares, padded * 2, values, D * 4, results, D * 4, m, D / 16, padded / 32, 0);
                bf16 *to = out + (text * Q + s) * out_apart + head * D;
                for (int r = 0; r < count; r++)
                    for (int w = 0; w < D; w += 16)
                        store(to + r * out_apart + w,
                              _mm512_mul_ps(_mm512_load_ps(results + r * D + w), _mm512_set1_ps(share[r])));
            }
        }
        _tile_release();
        _mm_setcsr(before);
    }
}

static void store_rows(bf16 *to, int64_t apart, const float *from, int count, int width) {
    for (int r = 0; r < count; r++)
        for (int w = 0; w < width; w += 16) store(to + r * apart + w, _mm512_load_ps(from + r * width + w));
}

/* Of a key, for all queries: probabilities and the gradients of scores, by scores and gradients of probabilities. */
static inline __m256i score_gradients(bf16 *share, bf16 *grad_score, const float *score, const float *grad_share,
                                      const float *sum, const float *mean, float plus, float scale) {
    __m512 x = _mm512_fmadd_ps(_mm512_load_ps(score), _mm512_set1_ps(scale * LOG2_E), _mm512_load_ps(sum));
    __m512 p = exp2_of(_mm512_add_ps(x, _mm512_set1_ps(plus)));
    __m512 g = _mm512_fmadd_ps(_mm512_load_ps(grad_share), _mm512_set1_ps(scale), _mm512_load_ps(mean));
    __m256i low = to_bf16(_mm512_mul_ps(g, p));
    store(share, p);
    _mm256_store_si256((__m256i *)grad_score, low);
    return low;
}

/* Gradients of q, k and v, (texts, asking or tokens, heads, width) each, by `grad`, that of `out`, of the same shape, and
 * by what attention_forward was given and gave. */
void attention_backward(const bf16 *grad, const bf16 *out, const bf16 *q, const bf16 *k, const bf16 *v,
                        const int64_t *apart, const float *added, const float *sums, bf16 *grad_q, bf16 *grad_k,
                        bf16 *grad_v, int64_t texts, int64_t heads, int64_t asking, int64_t tokens, int64_t width,
                        float scale, int threads) {
    const int Q = asking, T = tokens, D = width;
    const int asked = (Q + STRIP - 1) / STRIP * STRIP, padded = (T + STRIP - 1) / STRIP * STRIP, tiles = (Q + 15) / 16;
    const int64_t row = heads * D;
#pragma omp parallel num_threads(threads)
    {
        static __thread char *own;
        static __thread int64_t own_size;
        char *left = workspace(padded * (D * 6 + 4) + asked * (D * 12 + 8) + STRIP * (asked * 14 + D * 4) + 8192, &own, &own_size);
        bf16 *keys = take(&left, padded * D * 2), *values = take(&left, padded * D * 2);
        bf16 *keys_across = take(&left, padded * D * 2);
        uint32_t *q_across = take(&left, asked * D * 2), *q_pairs = take(&left, asked * D * 2);
        uint32_t *grad_across = take(&left, asked * D * 2), *grad_pairs = take(&left, asked * D * 2);
        float *q_sums = take(&left, asked * D * 4); /* (D, asked) */
        float *plus = take(&left, padded * 4), *sum = take(&left, asked * 4), *mean = take(&left, asked * 4);
        float *scores = take(&left, STRIP * asked * 4), *grad_shares = take(&left, STRIP * asked * 4);
        float *results = take(&left, STRIP * D * 4);
        bf16 *shares = take(&left, STRIP * asked * 2), *grad_scores = take(&left, STRIP * asked * 2);
        uint32_t *grad_score_pairs = take(&left, STRIP * asked * 2);
        unsigned before = begin_vectors();
        begin_tiles();
#pragma omp for schedule(static)
        for (int64_t i = 0; i < texts * heads; i++) {
            const int64_t text = i / heads, head = i % heads, q_at = text * Q * row + head * D, k_at = text * T * row + head * D;
            const bf16 *of_q = q + text * apart[0] + head * apart[1], *of_k = k + text * apart[3] + head * apart[4];
            const bf16 *of_v = v + text * apart[3] + head * apart[4], *of_out = grad + q_at, *was = out + q_at;
            if (head + 1 < heads) {
                expect_rows(of_q + apart[1], apart[2], Q, D);
                expect_rows(of_k + apart[4], apart[5], T, D);
                expect_rows(of_v + apart[4], apart[5], T, D);
                expect_rows(of_out + D, row, Q, D);
                expect_rows(was + D, row, Q, D);
            }
            copy_rows(keys, of_k, apart[5], T, padded, D);
            copy_rows(values, of_v, apart[5], T, padded, D);
            transpose_rows(NULL, keys_across, of_k, apart[5], T, padded, D);
            transpose_rows(q_across, NULL, of_q, apart[2], Q, asked, D);
            transpose_rows(grad_across, NULL, of_out, row, Q, asked, D);
            pair_rows(q_pairs, of_q, apart[2], Q, asked, D);
            pair_rows(grad_pairs, of_out, row, Q, asked, D);
            fill(plus, added ? added + text * T : NULL, LOG2_E, T, padded, -INFINITY);
            fill(sum, sums + i * Q, -1.0f, Q, asked, -INFINITY);
            for (int t = 0; t < asked; t++) { /* of a query's gradients of probabilities, weighted by these */
                __m512 total = _mm512_setzero_ps();
                for (int w = 0; t < Q && w < D; w += 16)
                    total = _mm512_fmadd_ps(load(was + t * row + w), load(of_out + t * row + w), total);
                mean[t] = -scale * _mm512_reduce_add_ps(total);
            }
            for (int s = 0; s < T; s += STRIP) { /* rows are keys here, and columns queries */
                const int count = least(STRIP, T - s), m = (count + 15) / 16, even = (count + 1) / 2 * 2;
                product(keys + s * D, D * 2, q_across, asked * 4, scores, asked * 4, m, tiles, D / 32, 0);
                product(values + s * D, D * 2, grad_across, asked * 4, grad_shares, asked * 4, m, tiles, D / 32, 0);
                for (int r = 0; r < even; r += 2) {
                    for (int t = 0; t < tiles * 16; t += 16) {
                        const int64_t a = r * asked + t, b = a + asked;
                        __m256i low = score_gradients(shares + a, grad_scores + a, scores + a, grad_shares + a, sum + t,
                                                      mean + t, plus[s + r], scale);
                        __m256i high = score_gradients(shares + b, grad_scores + b, scores + b, grad_shares + b, sum + t,
                                                       mean + t, plus[s + r + 1], scale);
                        _mm512_store_si512(grad_score_pairs + r / 2 * asked + t, paired(low, high));
                    }
                    for (int j = r; j < r + 2 && tiles * 16 < asked; j++) { /* queries that are none */
                        store(shares + j * asked + tiles * 16, _mm512_setzero_ps());
                        store(grad_scores + j * asked + tiles * 16, _mm512_setzero_ps());
                    }
                }
                if (even < STRIP) /* keys that are none */
                    memset(grad_score_pairs + even / 2 * asked, 0, (STRIP - even) / 2 * asked * sizeof(uint32_t));
                product(shares, asked * 2, grad_pairs, D * 4, results, D * 4, m, D / 16, asked / 32, 0);
                store_rows(grad_v + k_at + s * row, row, results, count, D);
                product(grad_scores, asked * 2, q_pairs, D * 4, results, D * 4, m, D / 16, asked / 32, 0);
                store_rows(grad_k + k_at + s * row, row, results, count, D);
                product(keys_across + s, padded * 2, grad_score_pairs, asked * 4, q_sums, asked * 4, D / 16, tiles, 1,
                        s > 0);
            }
            for (int t = 0; t < Q; t += 16) {
                for (int w = 0; w < D; w += 16) {
                    __m512i r[16];
                    for (int j = 0; j < 16; j++) r[j] = _mm512_load_si512(q_sums + (w + j) * asked + t);
                    transpose(r);
                    for (int j = 0; j < least(16, Q - t); j++)
                        store(grad_q + q_at + (t + j) * row + w, _mm512_castsi512_ps(r[j]));
                }
            }
        }
        _tile_release();
        _mm_setcsr(before);
    }
}

/* ---- linear layers ------------------------------------------------------------------------------------------- */

/* What becomes of a product and its bias, x. */
enum { PLAIN, ADDED, GELU, GELU_ALONE, MULTIPLIED };

/* P(X < x) for a standard normal X, by Abramowitz and Stegun 7.1.26; it is off by 3e-5 at most, as the processor's
 * 1 / (1 + z) is. */
static inline __m512 normal(__m512 x, __m512 *density) {
    const __m512 one = _mm512_set1_ps(1.0f);
    __m512 z = _mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(0.3275911f * 0.70710678f));
    __m512 t = _mm512_rcp14_ps(_mm512_add_ps(z, one));
    __m512 e = exp2_of(_mm512_mul_ps(_mm512_mul_ps(x, x), _mm512_set1_ps(-0.5f * LOG2_E)));
    __m512 p = _mm512_set1_ps(0.5f * 1.061405429f);
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.5f * -1.453152027f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.5f * 1.421413741f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.5f * -0.284496736f));
    p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.5f * 0.254829592f));
    p = _mm512_mul_ps(_mm512_mul_ps(p, t), e); /* P(X > |x|) */
    *density = _mm512_mul_ps(e, _mm512_set1_ps(0.39894228f));
    return _mm512_mask_sub_ps(p, _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ), one, p);
}

/* GELU(x) = x P(X < x), and its derivative, P(X < x) + x density(x). */
static inline __m512 gelu(__m512 x, __m512 *slope) {
    __m512 density, p = normal(x, &density);
    *slope = _mm512_fmadd_ps(x, density, p);
    return _mm512_mul_ps(x, p);
}

/* GELU(x) = x / 2 + G(|x|): G, which is even, by a polynomial of degree two in each of 32 pieces, the last of which is what
 * it comes to, |x| / 2. Off by 2e-5 at most, which bfloat16 would show and whole numbers do not. */
enum { PIECES = 32 };
static const double PIECE = 5.0 / PIECES;
static float gelu_pieces[3][PIECES];

__attribute__((constructor)) static void fit_gelu(void) {
    for (int i = 0; i < PIECES - 1; i++) { /* through its values at the piece's three Chebyshev nodes */
        double z[3], g[3];
        for (int n = 0; n < 3; n++) {
            z[n] = PIECE * (i + 0.5 + 0.5 * cos(M_PI * (2 * n + 1) / 6));
            g[n] = z[n] * 0.5 * erf(z[n] * M_SQRT1_2);
        }
        const double slope = (g[1] - g[0]) / (z[1] - z[0]), next = (g[2] - g[1]) / (z[2] - z[1]);
        const double bend = (next - slope) / (z[2] - z[0]);
        gelu_pieces[0][i] = g[0] - z[0] * (slope - bend * z[1]);
        gelu_pieces[1][i] = slope - bend * (z[0] + z[1]);
        gelu_pieces[2][i] = bend;
    }
    gelu_pieces[1][PIECES - 1] = 0.5f;
}

static inline __m512 gelu_of_piece(__m512 x) {
    const __m512 z = _mm512_abs_ps(x);
    __m512i piece = _mm512_cvttps_epi32(_mm512_mul_ps(z, _mm512_set1_ps(PIECES / 5.0f)));
    piece = _mm512_min_epu32(piece, _mm512_set1_epi32(PIECES - 1));
    __m512 g = _mm512_setzero_ps();
    for (int i = 2; i >= 0; i--) {
        const float *by = gelu_pieces[i];
        g = _mm512_fmadd_ps(g, z, _mm512_permutex2var_ps(_mm512_loadu_ps(by), piece, _mm512_loadu_ps(by + 16)));
    }
    return _mm512_fmadd_ps(x, _mm512_set1_ps(0.5f), g);
}

/* Packs the tile of 32 rows from k on and 16 columns from n on of a (depth, width) matrix; or, `across`, of one that is
 * stored as (width, depth). */
static void pack(char *tile, const bf16 *matrix, int64_t apart, int across, int64_t k, int64_t n, int64_t depth,
                 int64_t width) {
    if (across) {
        __m512i r[16];
        const __mmask32 in = upto(depth - k, 32);
        for (int i = 0; i < 16; i++)
            r[i] = n + i < width ? _mm512_maskz_loadu_epi16(in, matrix + (n + i) * apart + k) : _mm512_setzero_si512();
        transpose(r);
        for (int i = 0; i < 16; i++) _mm512_store_si512(tile + i * 64, r[i]);
        return;
    }
    for (int i = 0; i < 16; i++) {
        const int64_t row = k + 2 * i;
        const __mmask16 in = upto(width - n, 16);
        __m256i a = _mm256_maskz_loadu_epi16(row < depth ? in : 0, matrix + row * apart + n);
        __m256i b = _mm256_maskz_loadu_epi16(row + 1 < depth ? in : 0, matrix + (row + 1) * apart + n);
        _mm512_store_si512(tile + i * 64, paired(a, b));
    }
}

/* 32 rows and columns of a result: sums of a product to which the bias is added, and what `mode` makes of them. Those of
 * int8 are int32; they stand for as many units of their row times units of their column. */
typedef struct {
    const float *sums, *row_units;
    __m512 unit0, unit1, bias0, bias1;
    bf16 *beside, *out;
    int64_t width, count; /* elements from row to row; rows that there are */
    __mmask32 in;
} result;

static inline __attribute__((always_inline)) void finish(const result *of, int64_t from, int64_t to, const int mode,
                                                         const int int8) {
    for (int64_t r = from; r < to && r < of->count; r++) {
        const float *sums = of->sums + r * 32;
        bf16 *beside = of->beside + r * of->width;
        /* Of the column after the next: rows lie too far apart for the processor to see where this goes. */
        if (mode == ADDED || mode == MULTIPLIED) _mm_prefetch(beside + 64, _MM_HINT_T0);
        __builtin_prefetch(of->out + r * of->width + 64, 1);
        __m512 x0 = _mm512_load_ps(sums), x1 = _mm512_load_ps(sums + 16);
        if (int8) {
            const __m512 unit = _mm512_set1_ps(of->row_units[r]);
            x0 = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_castps_si512(x0)), unit);
            x1 = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_castps_si512(x1)), unit);
            x0 = _mm512_fmadd_ps(x0, of->unit0, of->bias0);
            x1 = _mm512_fmadd_ps(x1, of->unit1, of->bias1);
        } else {
            x0 = _mm512_add_ps(x0, of->bias0);
            x1 = _mm512_add_ps(x1, of->bias1);
        }
        if (mode == ADDED || mode == MULTIPLIED) {
            __m512i both = _mm512_maskz_loadu_epi16(of->in, beside);
            __m512 y0 = from_bf16(_mm512_castsi512_si256(both)), y1 = from_bf16(_mm512_extracti64x4_epi64(both, 1));
            x0 = mode == ADDED ? _mm512_add_ps(x0, y0) : _mm512_mul_ps(x0, y0);
            x1 = mode == ADDED ? _mm512_add_ps(x1, y1) : _mm512_mul_ps(x1, y1);
        }
        if (mode == GELU_ALONE && int8) {
            x0 = gelu_of_piece(x0);
            x1 = gelu_of_piece(x1);
        } else if (mode == GELU || mode == GELU_ALONE) {
            __m512 slope0, slope1;
            x0 = gelu(x0, &slope0);
            x1 = gelu(x1, &slope1);
            if (mode == GELU) _mm512_mask_storeu_epi16(beside, of->in, (__m512i)_mm512_cvtne2ps_pbh(slope1, slope0));
        }
        _mm512_mask_storeu_epi16(of->out + r * of->width, of->in, (__m512i)_mm512_cvtne2ps_pbh(x1, x0));
    }
}

/* Steps of 64 bytes over which rows are multiplied by all columns while they lie in the first cache. */
enum { DEPTH = 12 };

/* Bytes of packed columns by which all rows are multiplied while they lie in the second cache. */
enum { PANEL = 5 << 18 };

/* Columns, 32 each, of a panel. */
static inline int64_t panel_columns(int64_t steps, int64_t columns) {
    const int64_t most = PANEL / (steps * 2048);
    return most < 1 ? 1 : most < columns ? most : columns;
}

/* Packs a (depth, width) matrix, or one stored as (width, depth), for `linear`: all tiles of the first 16 columns, then
 * of the next, an even number of times; depth is a multiple of 32. */
void pack_weight(const bf16 *matrix, char *to, int64_t depth, int64_t width, int across, int threads) {
    const int64_t steps = depth / 32;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t j = 0; j < (width + 31) / 32 * 2; j++)
        for (int64_t k = 0; k < steps; k++)
            pack(to + (j / 2 * steps * 2 + k * 2 + j % 2) * 1024, matrix, across ? depth : width, across, k * 32, j * 16, depth, width);
}

#define MULTIPLY_TILES(c, a, b) \
    if (int8) _tile_dpbssd(c, a, b); \
    else _tile_dpbf16ps(c, a, b)

/* Adds a product of 32 rows and 32 columns to tiles 0 to 3, while the result before is finished: the processor does
 * both at once. */
static inline __attribute__((always_inline)) void multiply(const char *a, int64_t a_row, const char *b, int64_t steps,
                                                           const result *before, const int mode, const int int8) {
    for (int64_t k = 0; k < steps; k++) {
        for (int i = 0; i < 32; i++) _mm_prefetch(b + (k + 1) * 2048 + i * 64, _MM_HINT_T0);
        _tile_loadd(4, a + k * 64, a_row);
        _tile_loadd(6, b + k * 2048, 64);
        MULTIPLY_TILES(0, 4, 6);
        _tile_loadd(7, b + k * 2048 + 1024, 64);
        MULTIPLY_TILES(1, 4, 7);
        _tile_loadd(5, a + 16 * a_row + k * 64, a_row);
        MULTIPLY_TILES(2, 5, 6);
        MULTIPLY_TILES(3, 5, 7);
        if (before) finish(before, 32 * k / steps, 32 * (k + 1) / steps, mode, int8);
    }
}

static inline void zero_sums(void) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

static inline void load_sums(const float *sums) {
    _tile_loadd(0, sums, 128);
    _tile_loadd(1, sums + 16, 128);
    _tile_loadd(2, sums + 16 * 32, 128);
    _tile_loadd(3, sums + 16 * 32 + 16, 128);
}

static inline void store_sums(float *sums) {
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    _tile_stored(2, sums + 16 * 32, 128);
    _tile_stored(3, sums + 16 * 32 + 16, 128);
}

/* What `linear` or `linear_int8` multiplies; row_bytes are those of x, a multiple of 64. */
typedef struct {
    const bf16 *bias;
    const float *column_units;
    const char *packed, *low;
    int64_t count, row_bytes, width, rank;
} product_of;

/* Rows at .. at + 32 and columns of a panel of a result, from x and y, the rows of the input and of `inner` or null;
 * row_units, beside and out are of these rows. */
static inline __attribute__((always_inline)) void block(const product_of *of, int64_t at, int64_t first, int64_t end,
                                                        const char *x, const char *y, const float *row_units,
                                                        bf16 *beside, bf16 *out, float *sums, const int mode,
                                                        const int int8) {
    const int64_t steps = of->row_bytes / 64, more = y ? of->rank / 32 : 0;
    result done = {.width = of->width, .count = of->count - at < 32 ? of->count - at : 32, .row_units = row_units};
    for (int64_t from = 0; from < steps; from += DEPTH) {
        const int64_t here = steps - from < DEPTH ? steps - from : DEPTH;
        const int last = from + here == steps;
        for (int64_t j = first; j < end; j++) {
            float *found = sums + (steps > DEPTH ? j - first : j % 2) * 1024;
            if (from)
                load_sums(found);
            else
                zero_sums();
            multiply(x + from * 64, of->row_bytes, of->packed + (j * steps + from) * 2048, here,
                     last && j > first ? &done : NULL, mode, int8);
            if (last && !int8) multiply(y, of->rank * 2, of->low + j * more * 2048, more, NULL, mode, 0);
            store_sums(found);
            if (!last) continue;
            const __mmask32 in = upto(of->width - j * 32, 32);
            const __m512i bias = of->bias ? _mm512_maskz_loadu_epi16(in, of->bias + j * 32) : _mm512_setzero_si512();
            done.sums = found;
            done.in = in;
            done.bias0 = from_bf16(_mm512_castsi512_si256(bias));
            done.bias1 = from_bf16(_mm512_extracti64x4_epi64(bias, 1));
            if (int8) {
                done.unit0 = _mm512_maskz_loadu_ps(in & 0xffff, of->column_units + j * 32);
                done.unit1 = _mm512_maskz_loadu_ps(in >> 16, of->column_units + j * 32 + 16);
            }
            done.beside = beside + j * 32;
            done.out = out + j * 32;
        }
    }
    finish(&done, 0, 32, mode, int8);
}

/* x W + inner L + bias, or what `mode` makes of it:
 * ADDED adds `beside`, MULTIPLIED multiplies by it; GELU takes GELU(x) and puts its derivative into `beside`, GELU_ALONE
 * does without.
 *
 * rows: x, (count, depth); depth is a multiple of 32. packed: W, (depth, width), by pack_weight. bias: (width) or null.
 * inner: (count, rank) or null, rank a multiple of 32; low: L, (rank, width), or, `across`, (width, rank).
 * out, beside: (count, width); they may be the same. */
void linear(const bf16 *rows, const char *packed, const bf16 *bias, const bf16 *inner, const bf16 *low, bf16 *beside,
            bf16 *out, int64_t count, int64_t depth, int64_t width, int64_t rank, int across, int mode, int threads) {
    static __thread char *shared;
    static __thread int64_t shared_size;
    const int64_t more = inner ? rank / 32 : 0, columns = (width + 31) / 32, blocks = (count + 31) / 32;
    const int64_t panel = panel_columns(depth / 32, columns), parts = panel < 2 ? 2 : panel;
    char *low_packed = workspace(columns * 2 * more * 1024 + 4096, &shared, &shared_size);
    const product_of of = {bias, NULL, packed, low_packed, count, depth * 2, width, rank};
#pragma omp parallel num_threads(threads)
    {
        static __thread char *own;
        static __thread int64_t own_size;
        char *left = workspace(parts * 4096 + 32 * (depth + rank) * 2 + 128, &own, &own_size);
        float *sums = take(&left, parts * 4096);
        bf16 *tail = take(&left, 32 * depth * 2), *inner_tail = take(&left, 32 * rank * 2);
        unsigned before = begin_vectors();
        begin_tiles();
        if (more) {
#pragma omp for schedule(static)
            for (int64_t j = 0; j < columns * 2; j++)
                for (int64_t k = 0; k < more; k++)
                    pack(low_packed + (j / 2 * more * 2 + k * 2 + j % 2) * 1024, low, across ? rank : width, across,
                         k * 32, j * 16, rank, width);
        }
        if (count % 32) {
            const int64_t at = count / 32 * 32, in = count - at;
            copy_rows(tail, rows + at * depth, depth, in, 32, depth);
            if (inner) copy_rows(inner_tail, inner + at * rank, rank, in, 32, rank);
        }
        WRITTEN(low_packed);
#pragma omp for schedule(static)
        for (int64_t part = 0; part < threads; part++) {
            const int64_t begin = blocks * part / threads, end = blocks * (part + 1) / threads;
            for (int64_t j = 0; j < columns; j += panel) {
                const int64_t to_j = j + panel < columns ? j + panel : columns;
                for (int64_t i = begin; i < end; i++) {
                    const int64_t at = i * 32;
                    const int whole = count - at >= 32;
                    const char *x = (const char *)(whole ? rows + at * depth : tail);
                    const char *y = inner ? (const char *)(whole ? inner + at * rank : inner_tail) : NULL;
                    bf16 *by = beside + at * width, *to = out + at * width;
                    if (mode == PLAIN) block(&of, at, j, to_j, x, y, NULL, by, to, sums, PLAIN, 0);
                    if (mode == ADDED) block(&of, at, j, to_j, x, y, NULL, by, to, sums, ADDED, 0);
                    if (mode == GELU) block(&of, at, j, to_j, x, y, NULL, by, to, sums, GELU, 0);
                    if (mode == GELU_ALONE) block(&of, at, j, to_j, x, y, NULL, by, to, sums, GELU_ALONE, 0);
                    if (mode == MULTIPLIED) block(&of, at, j, to_j, x, y, NULL, by, to, sums, MULTIPLIED, 0);
                }
            }
        }
        _tile_release();
        _mm_setcsr(before);
    }
}

/* ---- int8 ----------------------------------------------------------------------------------------------------- */

/* A row as whole numbers from -127 to 127, with zeros behind it up to `padded`; gives the unit that they count, 1/127 of
 * the largest. What is not finite makes the unit so, and with it the results. */
static inline float quantize_row(const bf16 *row, int8_t *to, int64_t width, int64_t padded) {
    __m512i largest = _mm512_setzero_si512(); /* the numbers without their sign are in the order of their bits */
    for (int64_t w = 0; w < width; w += 32) {
        const __m512i x = _mm512_maskz_loadu_epi16(upto(width - w, 32), row + w);
        largest = _mm512_max_epu16(largest, _mm512_and_si512(x, _mm512_set1_epi16(0x7fff)));
    }
    const __m512i even = _mm512_and_si512(largest, _mm512_set1_epi32(0xffff)), odd = _mm512_srli_epi32(largest, 16);
    const uint32_t bits = (uint32_t)_mm512_reduce_max_epi32(_mm512_max_epi32(even, odd)) << 16;
    float top;
    memcpy(&top, &bits, sizeof top);
    const __m512 by = _mm512_set1_ps(top < 1e-30f ? 0.0f : 127.0f / top);
    const __m512 whole = _mm512_set1_ps(0x1.8p23f); /* added to a small number, it leaves that, rounded, in the last bits */
    for (int64_t w = 0; w < padded; w += 32) {
        const __m512i x = _mm512_maskz_loadu_epi16(upto(width - w, 32), row + w);
        const __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
        const __m512 high = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32((int)0xffff0000)));
        const __m512i a = _mm512_castps_si512(_mm512_fmadd_ps(low, by, whole));
        const __m512i b = _mm512_castps_si512(_mm512_fmadd_ps(high, by, whole));
        const __m512i both = _mm512_mask_blend_epi16(0xaaaaaaaa, a, _mm512_slli_epi32(b, 16));
        _mm256_storeu_si256((__m256i *)(to + w), _mm512_cvtepi16_epi8(both));
    }
    return top < 1e-30f ? 0.0f : top / 127.0f;
}

/* Of rows (count, width): whole numbers (count, padded), padded being the next multiple of 64, and units (count). */
void quantize(const bf16 *rows, int8_t *to, float *units, int64_t count, int64_t width, int threads) {
    const int64_t padded = (width + 63) / 64 * 64;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t r = 0; r < count; r++) units[r] = quantize_row(rows + r * width, to + r * padded, width, padded);
}

/* x W + bias of whole numbers, or what `mode` makes of it: PLAIN, ADDED or GELU_ALONE.
 *
 * rows, row_units: x, (count, depth), depth a multiple of 64, and (count), as of `quantize`. packed, column_units: W in tiles,
 * as kernels.py makes them, and (width). bias: (width) or null. beside: (count, width), may be null where it is not read.
 * out: (count, width), in bfloat16; or null, and then as of `quantize` into out_rows and out_units. */
void linear_int8(const int8_t *rows, const float *row_units, const char *packed, const float *column_units, const bf16 *bias,
                 bf16 *beside, bf16 *out, int8_t *out_rows, float *out_units, int64_t count, int64_t depth,
                 int64_t width, int mode, int threads) {
    const int64_t columns = (width + 31) / 32, blocks = (count + 31) / 32, padded = (width + 63) / 64 * 64;
    const int64_t panel = panel_columns(depth / 64, columns), parts = panel < 2 ? 2 : panel;
    /* Blocks of 32 rows whose results are kept until the last of their columns is there. */
    const int64_t kept = panel < columns ? (blocks + threads - 1) / threads : 1;
    const product_of of = {bias, column_units, packed, NULL, count, depth, width, 0};
#pragma omp parallel num_threads(threads)
    {
        static __thread char *own;
        static __thread int64_t own_size;
        char *left = workspace(parts * 4096 + 32 * depth + (out ? 0 : kept * 32 * width * 2) + 256, &own, &own_size);
        float *sums = take(&left, parts * 4096);
        int8_t *tail = take(&left, 32 * depth);
        bf16 *results = out ? NULL : take(&left, kept * 32 * width * 2);
        unsigned before = begin_vectors();
        begin_tiles();
        if (count % 32) {
            const int64_t at = count / 32 * 32;
            memcpy(tail, rows + at * depth, (count - at) * depth);
            memset(tail + (count - at) * depth, 0, (32 - (count - at)) * depth);
            WRITTEN(tail);
        }
#pragma omp for schedule(static)
        for (int64_t part = 0; part < threads; part++) {
            const int64_t begin = blocks * part / threads, end = blocks * (part + 1) / threads;
            for (int64_t j = 0; j < columns; j += panel) {
                const int64_t to_j = j + panel < columns ? j + panel : columns;
                for (int64_t i = begin; i < end; i++) {
                    const int64_t at = i * 32;
                    const char *x = (const char *)(count - at >= 32 ? rows + at * depth : tail);
                    const float *units = row_units + at;
                    bf16 *by = beside + at * width, *to = out ? out + at * width : results + (i - begin) % kept * 32 * width;
                    if (mode == PLAIN) block(&of, at, j, to_j, x, NULL, units, by, to, sums, PLAIN, 1);
                    if (mode == ADDED) block(&of, at, j, to_j, x, NULL, units, by, to, sums, ADDED, 1);
                    if (mode == GELU_ALONE) block(&of, at, j, to_j, x, NULL, units, by, to, sums, GELU_ALONE, 1);
                    for (int64_t r = 0; !out && to_j == columns && r < 32 && at + r < count; r++)
                        out_units[at + r] = quantize_row(to + r * width, out_rows + (at + r) * padded, width, padded);
                }
            }
        }
        _tile_release();
        _mm_setcsr(before);
    }
}

/* left' right in float32, (rank, width), of (count, rank) and (count, width); rank is a multiple of 32. */
void row_products(const bf16 *left, const bf16 *right, float *out, int64_t count, int64_t rank, int64_t width,
                  int threads) {
    static __thread char *shared;
    static __thread int64_t shared_size;
    const int64_t padded = (count + 31) / 32 * 32, steps = padded / 32, columns = (width + 31) / 32;
    bf16 *across = (bf16 *)workspace(padded * rank * 2, &shared, &shared_size); /* (rank, padded) */
    transpose_rows(NULL, across, left, rank, count, padded, rank);
    WRITTEN(across);
#pragma omp parallel num_threads(threads)
    {
        static __thread char *own;
        static __thread int64_t own_size;
        char *memory = workspace(4096 + steps * 2048, &own, &own_size), *packed = memory + 4096;
        float *sums = (float *)memory;
        begin_tiles();
#pragma omp for schedule(static)
        for (int64_t j = 0; j < columns; j++) {
            for (int64_t k = 0; k < steps; k++) {
                pack(packed + k * 2048, right, width, 0, k * 32, j * 32, count, width);
                pack(packed + k * 2048 + 1024, right, width, 0, k * 32, j * 32 + 16, count, width);
            }
            WRITTEN(packed);
            const __mmask32 there = upto(width - j * 32, 32);
            for (int64_t i = 0; i < rank; i += 32) {
                zero_sums();
                multiply((const char *)(across + i * padded), padded * 2, packed, steps, NULL, PLAIN, 0);
                store_sums(sums);
                for (int64_t r = 0; r < 32; r++) {
                    float *to = out + (i + r) * width + j * 32;
                    _mm512_mask_storeu_ps(to, there & 0xffff, _mm512_load_ps(sums + r * 32));
                    _mm512_mask_storeu_ps(to + 16, there >> 16, _mm512_load_ps(sums + r * 32 + 16));
                }
            }
        }
        _tile_release();
    }
}

/* ---- norm ----------------------------------------------------------------------------------------------------- */

/* (x - mean) / deviation * weight + bias of rows of `width`, a multiple of 16; stats: (rows, 2) or null, mean and
 * 1 / deviation. */
void norm_forward(const bf16 *x, const bf16 *weight, const bf16 *bias, bf16 *to, float *stats, int64_t rows,
                  int64_t width, float eps, int threads) {
#pragma omp parallel num_threads(threads)
    {
        unsigned before = begin_vectors();
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            const bf16 *row = x + r * width;
            __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
            for (int64_t w = 0; w < width; w += 16) sum = _mm512_add_ps(sum, load(row + w));
            float mean = _mm512_reduce_add_ps(sum) / width;
            for (int64_t w = 0; w < width; w += 16) {
                __m512 apart = _mm512_sub_ps(load(row + w), _mm512_set1_ps(mean));
                squares = _mm512_fmadd_ps(apart, apart, squares);
            }
            float inverse = 1.0f / sqrtf(_mm512_reduce_add_ps(squares) / width + eps);
            for (int64_t w = 0; w < width; w += 16) {
                __m512 value = _mm512_mul_ps(_mm512_sub_ps(load(row + w), _mm512_set1_ps(mean)), _mm512_set1_ps(inverse));
                store(to + r * width + w, _mm512_fmadd_ps(value, load(weight + w), load(bias + w)));
            }
            if (stats) {
                stats[2 * r] = mean;
                stats[2 * r + 1] = inverse;
            }
        }
        _mm_setcsr(before);
    }
}

/* The gradient of x by that of the result. */
void norm_backward(const bf16 *grad, const bf16 *x, const bf16 *weight, const float *stats, bf16 *to, int64_t rows,
                   int64_t width, int threads) {
#pragma omp parallel num_threads(threads)
    {
        unsigned before = begin_vectors();
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            const bf16 *g = grad + r * width, *row = x + r * width;
            __m512 mean = _mm512_set1_ps(stats[2 * r]), inverse = _mm512_set1_ps(stats[2 * r + 1]);
            __m512 sum = _mm512_setzero_ps(), along = _mm512_setzero_ps();
            for (int64_t w = 0; w < width; w += 16) {
                __m512 value = _mm512_mul_ps(load(g + w), load(weight + w));
                sum = _mm512_add_ps(sum, value);
                along = _mm512_fmadd_ps(value, _mm512_mul_ps(_mm512_sub_ps(load(row + w), mean), inverse), along);
            }
            __m512 level = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / width);
            __m512 tilt = _mm512_set1_ps(_mm512_reduce_add_ps(along) / width);
            for (int64_t w = 0; w < width; w += 16) {
                __m512 value = _mm512_sub_ps(_mm512_mul_ps(load(g + w), load(weight + w)), level);
                value = _mm512_fnmadd_ps(_mm512_mul_ps(_mm512_sub_ps(load(row + w), mean), inverse), tilt, value);
                store(to + r * width + w, _mm512_mul_ps(value, inverse));
            }
        }
        _mm_setcsr(before);
    }
}
