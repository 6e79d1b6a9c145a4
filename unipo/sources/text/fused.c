/* One decoding step of a Llama-like model, and the draw of a token: the native twin of fused.py and drawing.py.

   Rows are independent of each other but for the matrix products. Everything is float32, row-major; weights [in, out] are
   panels of PANEL columns, [out / PANEL, in, PANEL], read once from front to back for every few rows. Weights in bfloat16 go
   to the BLAS that torch brings along (column-major, so that its arguments are swapped here).
   Sizes: n rows, d width, H heads, K key heads, h head size, C columns. */

#include <math.h>
#include <stdint.h>
#include <string.h>

/* LANES numbers in a register. Columns are a multiple of 16, with 16 more than are in use. ROWS * TILE registers are sums. */
#if defined(__AVX512F__)
#define LANES 16
#define TILE 4
#elif defined(__AVX__)
#define LANES 8
#define TILE 2
#else
#define LANES 4
#define TILE 2
#endif
#define ROWS 6
#define PANEL 64
#define AHEAD 24 /* rows of a panel that are fetched ahead */
#define PART 128 /* rows of a panel that stay in the nearest cache while all rows of the other side pass */
#define ALWAYS inline __attribute__((always_inline))
#define BLOCK 64 /* tokens of one sum when drawing */

typedef float lanes_t __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t mask_t __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef void (*gemm_t)(const char *, const char *, const int *, const int *, const int *, const float *, const void *,
                       const int *, const void *, const int *, const float *, float *, const int *);

typedef struct {
    const void *qkv, *out, *gate_up, *down;
    const float *qkv_bias, *qk, *out_bias, *gate_up_bias, *down_bias;
    float *keys, *values; /* [slots, K, h, C] and [slots, K, C, h] */
} layer_t;

typedef struct { /* a row's prompt, which rows share: keys [layers, K, h, P] and values [layers, K, P, h], P columns of which */
    const float *keys, *values; /* `length` are in use; its own tokens begin at column `start` of the layers' memory */
    int64_t columns, length, start, block;
} row_t;

typedef struct { /* keys [h, columns] and values [columns, h] of one head, `length` columns of which are attended to */
    const float *keys, *values;
    int64_t columns, length;
} span_t;

typedef struct {
    gemm_t narrow; /* products of bfloat16 into float32; null where weights are float32 */
    const layer_t *layer;
    const void *output;
    const float *embedding, *cos, *sin; /* cos [positions, h], sin [positions, h / 2] */
    float *x, *y, *wide;                /* [slots, d], [slots, max(d, H h)], [slots, widest] */
    uint16_t *half;                     /* [slots, max(d, H h, inner)] */
    int64_t layers, heads, kv, size, width, inner, words, columns;
    double eps;
} model_t;

/* e^x to 1e-7 relative, for x <= 88; a polynomial on [-ln 2 / 2, ln 2 / 2] that compilers turn into vector code. */
static ALWAYS float exponential(float x) {
    x = x < -87.0f ? -87.0f : x;
    float n = rintf(x * 1.44269504f), f = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * f + 1.3981999507e-3f;
    p = p * f + 8.3334519073e-3f;
    p = p * f + 4.1665795894e-2f;
    p = p * f + 1.6666665459e-1f;
    p = p * f + 5.0000001201e-1f;
    p = p * f * f + f + 1.0f;
    union {
        int32_t i;
        float f;
    } two = {((int32_t)n + 127) << 23};
    return p * two.f;
}

/* y [n, k] = x in bfloat16, rounded to nearest, rows of x being `stride` apart */
static void rounded(int64_t n, int64_t k, const float *x, int64_t stride, uint16_t *y) {
    for (int64_t r = 0; r < n; r++)
        for (int64_t i = 0; i < k; i++) {
            uint32_t bits;
            memcpy(&bits, x + r * stride + i, 4);
            y[r * k + i] = (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
        }
}

/* c [rows, TILE * LANES] = keep * c + a [rows, k] b, rows of a and c being `stride` and `lead` apart; b: part of a panel */
static ALWAYS void tile(const int rows, int64_t k, const float *a, int64_t stride, const float *b, float *c, int64_t lead,
                        int keep) {
    lanes_t sum[ROWS][TILE];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < TILE; j++) sum[r][j] = (lanes_t){0};
    for (int64_t i = 0; i < k; i++) {
        const lanes_t *row = (const lanes_t *)(b + i * PANEL);
        lanes_t value[TILE];
#pragma GCC unroll 4
        for (int j = 0; j < TILE; j++) {
            __builtin_prefetch(b + (i + AHEAD) * PANEL + j * LANES);
            value[j] = row[j];
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
            for (int j = 0; j < TILE; j++) sum[r][j] += a[r * stride + i] * value[j];
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int j = 0; j < TILE; j++) {
            lanes_t *out = (lanes_t *)(c + r * lead + j * LANES);
            if (keep)
                *out += sum[r][j];
            else
                *out = sum[r][j];
        }
}

/* the same for n rows and one panel */
static void panel(int64_t n, int64_t k, const float *a, int64_t stride, const float *b, float *c, int64_t lead, int keep) {
    for (int j = 0; j < PANEL; j += TILE * LANES) {
        int64_t r = 0;
        for (; r + ROWS <= n; r += ROWS) tile(ROWS, k, a + r * stride, stride, b + j, c + r * lead + j, lead, keep);
        const float *last = a + r * stride;
        float *out = c + r * lead + j;
        switch (n - r) {
            case 5: tile(5, k, last, stride, b + j, out, lead, keep); break;
            case 4: tile(4, k, last, stride, b + j, out, lead, keep); break;
            case 3: tile(3, k, last, stride, b + j, out, lead, keep); break;
            case 2: tile(2, k, last, stride, b + j, out, lead, keep); break;
            case 1: tile(1, k, last, stride, b + j, out, lead, keep); break;
        }
    }
}

/* c [n, w] = keep * c + a [n, k] b, rows of a being `stride` apart; keep is 0 or 1. Long panels go in parts that fit a cache. */
void product(int64_t n, int64_t k, int64_t w, const float *a, int64_t stride, const float *b, float *c, int keep) {
    int64_t whole = w / PANEL;
#pragma omp parallel for if (n * k * w > 1 << 20)
    for (int64_t p = 0; p < whole; p++)
        for (int64_t i = 0; i < k; i += PART) {
            int64_t length = k - i < PART ? k - i : PART;
            panel(n, length, a + i, stride, b + (p * k + i) * PANEL, c + p * PANEL, w, keep || i);
        }
    int64_t rest = w - whole * PANEL;
    for (int64_t r = 0; rest && r < n; r += ROWS) { /* a last panel that is not full */
        float part[ROWS * PANEL];
        int64_t rows = n - r < ROWS ? n - r : ROWS;
        panel(rows, k, a + r * stride, stride, b + whole * k * PANEL, part, PANEL, 0);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < rest; j++) {
                float *out = c + (r + i) * w + whole * PANEL + j;
                *out = part[i * PANEL + j] + (keep ? *out : 0.0f);
            }
    }
}

/* the product in the precision of the weights; b is [w, k] in bfloat16 */
static void multiply(const model_t *m, int64_t n, int64_t k, int64_t w, const float *a, int64_t stride, const void *b, float *c,
                     int keep) {
    if (!m->narrow) {
        product(n, k, w, a, stride, b, c, keep);
        return;
    }
    int rows = (int)n, inner = (int)k, columns = (int)w;
    float one = 1.0f, old = (float)keep;
    rounded(n, k, a, stride, m->half);
    m->narrow("T", "N", &columns, &rows, &inner, &one, b, &inner, m->half, &inner, &old, c, &columns);
}

/* c = a b + bias, or c += a b + bias */
static void linear(const model_t *m, int64_t n, int64_t k, int64_t w, const float *a, int64_t stride, const void *b,
                   const float *bias, float *c, int add) {
    if (bias)
        for (int64_t r = 0; r < n; r++)
            for (int64_t i = 0; i < w; i++) c[r * w + i] = (add ? c[r * w + i] : 0.0f) + bias[i];
    multiply(m, n, k, w, a, stride, b, c, bias || add);
}

/* y = x / sqrt(mean x^2 + eps) */
static inline void normalise(const float *x, float *y, int64_t d, float eps) {
    float square = 0.0f;
    for (int64_t i = 0; i < d; i++) square += x[i] * x[i];
    float scale = 1.0f / sqrtf(square / (float)d + eps);
    for (int64_t i = 0; i < d; i++) y[i] = x[i] * scale;
}

/* queries and keys of one row: norm, scale and rotation, in place */
static void rotate(float *restrict qk, int64_t heads, int64_t h, const float *scale, float eps, const float *cos,
                   const float *sin) {
    int64_t half = h / 2;
    for (int64_t j = 0; j < heads; j++) {
        float *a = qk + j * h, *b = a + half;
        if (scale) {
            normalise(a, a, h, eps);
            for (int64_t i = 0; i < h; i++) a[i] *= scale[j * h + i];
        }
        for (int64_t i = 0; i < half; i++) {
            float p = a[i], q = b[i];
            a[i] = p * cos[i] - q * sin[i];
            b[i] = q * cos[i] + p * sin[i];
        }
    }
}

static const int32_t INSIDE[32] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};

/* s = q keys [h, C] over `length` columns, in whole vectors: there is memory behind the last column, and what is in it is
   dropped. Four partial sums keep the multiplier busy. Returns how much of s is filled. */
static ALWAYS int64_t score(const float *q, const float *keys, const int64_t h, int64_t C, int64_t length, float *s) {
    int64_t whole = (length + LANES - 1) / LANES * LANES;
    lanes_t far = (lanes_t){0} - 1e30f;
    for (int64_t t = 0; t < whole; t += LANES) {
        lanes_t a = {0}, b = {0}, c = {0}, d = {0};
        for (int64_t i = 0; i < h; i += 4) {
            const float *k = keys + i * C + t;
            a += q[i] * *(const lanes_t *)k;
            b += q[i + 1] * *(const lanes_t *)(k + C);
            c += q[i + 2] * *(const lanes_t *)(k + 2 * C);
            d += q[i + 3] * *(const lanes_t *)(k + 3 * C);
        }
        mask_t in = *(const mask_t *)(INSIDE + 16 - (length - t < LANES ? length - t : LANES));
        *(mask_t *)(s + t) = (in & (mask_t)((a + b) + (c + d))) | (~in & (mask_t)far);
    }
    return whole;
}

/* out [h] += s [length] values [length, h] */
static ALWAYS void weigh(const float *s, const float *values, const int64_t h, int64_t length, float *out) {
    int64_t wide = h / LANES * LANES;
    for (int64_t i = 0; i < wide; i += LANES) {
        lanes_t even = *(lanes_t *)(out + i), odd = {0};
        const float *v = values + i;
        for (int64_t t = 0; t + 1 < length; t += 2) {
            even += s[t] * *(const lanes_t *)(v + t * h);
            odd += s[t + 1] * *(const lanes_t *)(v + (t + 1) * h);
        }
        if (length % 2) even += s[length - 1] * *(const lanes_t *)(v + (length - 1) * h);
        *(lanes_t *)(out + i) = even + odd;
    }
    for (int64_t i = wide; i < h; i++)
        for (int64_t t = 0; t < length; t++) out[i] += s[t] * values[t * h + i];
}

/* out [h]: attention of q over the prompt's columns and over the row's own; s: scratch */
static ALWAYS void attend(const float *q, const span_t *prompt, const span_t *own, const int64_t h, float *s, float *out) {
    int64_t begun = score(q, prompt->keys, h, prompt->columns, prompt->length, s);
    int64_t whole = begun + score(q, own->keys, h, own->columns, own->length, s + begun);
    float top = s[0], sum = 0.0f;
    for (int64_t t = 0; t < whole; t += LANES)
        for (int l = 0; l < LANES; l++) top = s[t + l] > top ? s[t + l] : top;
    for (int64_t t = 0; t < whole; t += LANES)
        for (int l = 0; l < LANES; l++) sum += s[t + l] = exponential(s[t + l] - top);
    for (int64_t i = 0; i < h; i++) out[i] = 0.0f;
    weigh(s, prompt->values, h, prompt->length, out);
    weigh(s + begun, own->values, h, own->length, out);
    sum = 1.0f / sum;
    for (int64_t i = 0; i < h; i++) out[i] *= sum;
}

/* the same, compiled for the usual head sizes */
static void attend_sized(const float *q, const span_t *prompt, const span_t *own, int64_t h, float *s, float *out) {
    if (h == 32)
        attend(q, prompt, own, 32, s, out);
    else if (h == 64)
        attend(q, prompt, own, 64, s, out);
    else if (h == 128)
        attend(q, prompt, own, 128, s, out);
    else
        attend(q, prompt, own, h, s, out);
}

/* rotation, the new column `now` of the cache, and attention for row r of layer w */
static void mix_row(const model_t *m, const layer_t *w, int64_t r, const row_t *row, int64_t now, float *qkv, float *out) {
    int64_t H = m->heads, K = m->kv, h = m->size, C = m->columns, P = row->columns, layer = w - m->layer;
    int64_t own_length = now + 1 - row->start, position = row->length + own_length - 1;
    float scratch[row->length + own_length + 2 * LANES];
    rotate(qkv, H + K, h, w->qk, (float)m->eps, m->cos + position * h, m->sin + position * (h / 2));
    for (int64_t g = 0; g < K; g++) {
        float *keys = w->keys + (r * K + g) * h * C, *values = w->values + (r * K + g) * h * C;
        const float *k = qkv + (H + g) * h, *v = k + K * h;
        for (int64_t i = 0; i < h; i++) keys[i * C + now] = k[i];
        memcpy(values + now * h, v, (size_t)h * sizeof(float));
        int64_t at = (layer * K + g) * h * P;
        span_t prompt = {row->keys + at, row->values + at, P, row->length};
        span_t own = {keys + row->start, values + row->start * h, C, own_length};
        for (int64_t j = g * (H / K); j < (g + 1) * (H / K); j++)
            attend_sized(qkv + j * h, &prompt, &own, h, scratch, out + j * h);
    }
}

/* logits [n, words] after `token` [n] is put into column `now` of the rows */
void step(const model_t *m, int64_t n, int64_t now, const row_t *row, const int64_t *token, float *logits) {
    int64_t d = m->width, attended = m->heads * m->size, qkv = (m->heads + 2 * m->kv) * m->size, inner = m->inner;
    float *x = m->x, *y = m->y, *wide = m->wide;
    for (int64_t r = 0; r < n; r++) memcpy(x + r * d, m->embedding + token[r] * d, (size_t)d * sizeof(float));
    for (const layer_t *w = m->layer; w < m->layer + m->layers; w++) {
        for (int64_t r = 0; r < n; r++) normalise(x + r * d, y + r * d, d, (float)m->eps);
        linear(m, n, d, qkv, y, d, w->qkv, w->qkv_bias, wide, 0);
#pragma omp parallel for if (n >= 8)
        for (int64_t r = 0; r < n; r++) mix_row(m, w, r, row + r, now, wide + r * qkv, y + r * attended);
        linear(m, n, attended, d, y, attended, w->out, w->out_bias, x, 1);
        for (int64_t r = 0; r < n; r++) normalise(x + r * d, y + r * d, d, (float)m->eps);
        linear(m, n, d, 2 * inner, y, d, w->gate_up, w->gate_up_bias, wide, 0);
#pragma omp parallel for if (n >= 8)
        for (int64_t r = 0; r < n; r++) {
            float *restrict gate = wide + r * 2 * inner;
            const float *up = gate + inner;
            for (int64_t i = 0; i < inner; i++) gate[i] *= up[i] / (1.0f + exponential(-gate[i]));
        }
        linear(m, n, inner, d, wide, 2 * inner, w->down, w->down_bias, x, 1);
    }
    for (int64_t r = 0; r < n; r++) normalise(x + r * d, y + r * d, d, (float)m->eps);
    multiply(m, n, d, m->words, y, d, m->output, logits, 0);
}

/* the first index at which the running sum of mass [n] passes *target, which becomes what is left inside it */
static int64_t passed(const double *mass, int64_t n, double *target) {
    int64_t i = 0;
    for (; i < n - 1 && *target >= mass[i]; i++) *target -= mass[i];
    return i;
}

/* token [n] by inversion of softmax(z / temperature) at u [n] in [0, 1), and its log-prob [n]; z [n, V] */
void draw(const float *z_all, int64_t n, int64_t V, double temperature, const double *u, int64_t *token, float *logp) {
    float inverse = (float)(1.0 / temperature);
    int64_t blocks = (V + BLOCK - 1) / BLOCK;
#pragma omp parallel for if (n * V >= 16384)
    for (int64_t r = 0; r < n; r++) {
        const float *z = z_all + r * V;
        double mass[blocks], inside[BLOCK], total = 0.0, small = 0.0;
        float top = z[0];
        for (int64_t i = 1; i < V; i++) top = z[i] > top ? z[i] : top;
        for (int64_t b = 0; b < blocks; b++) {
            float sum = 0.0f;
            int64_t end = (b + 1) * BLOCK < V ? (b + 1) * BLOCK : V;
            for (int64_t i = b * BLOCK; i < end; i++) sum += exponential((z[i] - top) * inverse);
            total += mass[b] = sum;
        }
        double target = u[r] * total;
        int64_t b = passed(mass, blocks, &target), first = b * BLOCK, size = V - first < BLOCK ? V - first : BLOCK;
        for (int64_t i = 0; i < size; i++) small += inside[i] = exponential((z[first + i] - top) * inverse);
        target *= small / mass[b];
        token[r] = first + passed(inside, size, &target);
        logp[r] = (z[token[r]] - top) * inverse - (float)log(total);
    }
}
