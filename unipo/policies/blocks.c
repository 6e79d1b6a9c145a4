/* What is not a product in the blocks of a Llama-like model, forward and backward: the native twin of kernels.py.

   Everything is float32, row-major. Sizes: n rows, d width, H heads, K key heads, h head size. Sums over rows go by pieces of
   PIECE rows, so that results do not depend on the number of threads. A pointer that is said to be optional may be null. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

/* LANES numbers in a register */
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
#define ALWAYS inline __attribute__((always_inline))
#define PIECE 64 /* rows of one partial sum; kernels.py knows it */
#define QUERIES 32 /* queries that go through attention together */
#define UP(n) (((n) + LANES - 1) / LANES * LANES)

typedef float lanes_t __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* e^x to 1e-7 relative within [-87, 87], and constant beyond; a polynomial that compilers turn into vector code */
static ALWAYS float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 87.0f ? 87.0f : x;
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

/* ---- norms: y = w x / sqrt(mean x^2 + eps) ------------------------------------------------------------------------- */
static ALWAYS float inverse_rms(const float *x, int64_t d, float eps) {
    float square = 0.0f;
    for (int64_t i = 0; i < d; i++) square += x[i] * x[i];
    return 1.0f / sqrtf(square / (float)d + eps);
}

/* dx of one row from g = dy; adds to dw. `more` (optional) is added to dx. */
static ALWAYS void norm_row_back(int64_t d, const float *restrict g, const float *restrict more, const float *restrict x,
                                 const float *restrict w, float inverse, float *restrict dx, float *restrict dw) {
    float along = 0.0f;
    for (int64_t i = 0; i < d; i++) {
        along += g[i] * w[i] * x[i];
        dw[i] += g[i] * x[i] * inverse;
    }
    along *= inverse * inverse / (float)d;
    if (more)
        for (int64_t i = 0; i < d; i++) dx[i] = inverse * (g[i] * w[i] - x[i] * along) + more[i];
    else
        for (int64_t i = 0; i < d; i++) dx[i] = inverse * (g[i] * w[i] - x[i] * along);
}

/* y [n, d] of x, or of sum = x + delta (delta and sum optional); inverse [n] */
void norm(int64_t n, int64_t d, const float *x, const float *delta, const float *w, double eps, float *sum, float *y,
          float *inverse, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < n; r++) {
        const float *from = x + r * d;
        if (delta) {
            float *restrict to = sum + r * d;
            for (int64_t i = 0; i < d; i++) to[i] = from[i] + delta[r * d + i];
            from = to;
        }
        float scale = inverse[r] = inverse_rms(from, d, (float)eps), *restrict out = y + r * d;
        for (int64_t i = 0; i < d; i++) out[i] = from[i] * scale * w[i];
    }
}

/* dx [n, d]; dw [pieces, d], zero before */
void norm_back(int64_t n, int64_t d, const float *g, const float *more, const float *x, const float *w,
               const float *inverse, float *dx, float *dw, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t p = 0; p < n; p += PIECE)
        for (int64_t r = p; r < n && r < p + PIECE; r++)
            norm_row_back(d, g + r * d, more ? more + r * d : 0, x + r * d, w, inverse[r], dx + r * d, dw + p / PIECE * d);
}

/* ---- rotations of heads, behind a norm of each head if w (optional) is there ----------------------------------------- */
/* y [n, H, h] of x; cos and sin [n, h]; inverse [n, H] */
void turn(int64_t n, int64_t H, int64_t h, const float *x, const float *w, double eps, const float *cos, const float *sin,
          float *y, float *inverse, int threads) {
    int64_t half = h / 2;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < n; r++)
        for (int64_t j = r * H; j < (r + 1) * H; j++) {
            const float *a = x + j * h, *b = a + half, *c = cos + r * h, *s = sin + r * h;
            float *restrict out = y + j * h, scale = 1.0f;
            if (w) scale = inverse[j] = inverse_rms(a, h, (float)eps);
            for (int64_t i = 0; i < half; i++) {
                float p = a[i] * scale * (w ? w[i] : 1.0f), q = b[i] * scale * (w ? w[i + half] : 1.0f);
                out[i] = p * c[i] - q * s[i];
                out[i + half] = q * c[i + half] + p * s[i + half];
            }
        }
}

/* dx [n, H, h] from g = dy; dw [pieces, h], zero before */
void turn_back(int64_t n, int64_t H, int64_t h, const float *g, const float *x, const float *w, const float *inverse,
               const float *cos, const float *sin, float *dx, float *dw, int threads) {
    int64_t half = h / 2;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t p = 0; p < n; p += PIECE) {
        float turned[h];
        for (int64_t r = p; r < n && r < p + PIECE; r++)
            for (int64_t j = r * H; j < (r + 1) * H; j++) {
                const float *a = g + j * h, *b = a + half, *c = cos + r * h, *s = sin + r * h;
                float *restrict out = w ? turned : dx + j * h;
                for (int64_t i = 0; i < half; i++) {
                    out[i] = a[i] * c[i] + b[i] * s[i + half];
                    out[i + half] = b[i] * c[i + half] - a[i] * s[i];
                }
                if (w) norm_row_back(h, turned, 0, x + j * h, w, inverse[j], dx + j * h, dw + p / PIECE * h);
            }
    }
}

/* ---- gates: y = gate sigmoid(gate) up ----------------------------------------------------------------------------- */
void gate(int64_t n, const float *restrict a, const float *restrict up, float *restrict y, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < n; i++) y[i] = a[i] * up[i] / (1.0f + exponential(-a[i]));
}

void gate_back(int64_t n, const float *restrict g, const float *restrict a, const float *restrict up, float *restrict da,
               float *restrict dup, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < n; i++) {
        float open = 1.0f / (1.0f + exponential(-a[i])), half = g[i] * open;
        da[i] = half * up[i] * (1.0f + a[i] * (1.0f - open));
        dup[i] = half * a[i];
    }
}

/* ---- small products ------------------------------------------------------------------------------------------------ */
/* c [R, W * LANES] (+)= a b for a [R, k] with steps `down` and `right`, b [k, .] and c with rows `lead_b` and `lead` apart */
static ALWAYS void tile(const int R, const int W, int64_t k, const float *a, int64_t down, int64_t right, const float *b,
                        int64_t lead_b, float *c, int64_t lead, int keep) {
    lanes_t sum[4][4];
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int j = 0; j < W; j++) sum[r][j] = keep ? *(lanes_t *)(c + r * lead + j * LANES) : (lanes_t){0};
    for (int64_t i = 0; i < k; i++) {
        const float *row = b + i * lead_b, *column = a + i * right;
#pragma GCC unroll 4
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int j = 0; j < W; j++) sum[r][j] += column[r * down] * *(const lanes_t *)(row + j * LANES);
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int j = 0; j < W; j++) *(lanes_t *)(c + r * lead + j * LANES) = sum[r][j];
}

static ALWAYS void tiles(const int W, int64_t m, int64_t k, const float *a, int64_t down, int64_t right, const float *b,
                         int64_t lead_b, float *c, int64_t lead, int keep) {
    int64_t r = 0;
    for (; r + 4 <= m; r += 4) tile(4, W, k, a + r * down, down, right, b, lead_b, c + r * lead, lead, keep);
    for (; r < m; r++) tile(1, W, k, a + r * down, down, right, b, lead_b, c + r * lead, lead, keep);
}

/* c [m, n] (+)= a [m, k] b [k, n]; n is a multiple of LANES */
static void product(int64_t m, int64_t n, int64_t k, const float *a, int64_t down, int64_t right, const float *b,
                    int64_t lead_b, float *c, int64_t lead, int keep) {
    int64_t j = 0;
    for (; j + 4 * LANES <= n; j += 4 * LANES) tiles(4, m, k, a, down, right, b + j, lead_b, c + j, lead, keep);
    for (; j + 2 * LANES <= n; j += 2 * LANES) tiles(2, m, k, a, down, right, b + j, lead_b, c + j, lead, keep);
    for (; j < n; j += LANES) tiles(1, m, k, a, down, right, b + j, lead_b, c + j, lead, keep);
}

/* ---- attention ------------------------------------------------------------------------------------------------------ */
typedef struct { /* a run of `length` tokens from `start`, behind the `front` tokens from `first` */
    int64_t start, length, first, front;
} run_t;

typedef struct { /* states [T, H or K, h]; norm [T, H]: log of the sum of e^score; scores are scaled by `scale` */
    const float *query, *key, *value;
    float *out, *norm;
    const float *grad;
    float *dquery, *dkey, *dvalue;
    const run_t *run;
    const int64_t *family; /* [families + 1]: runs of a family follow one another, the one that others lie behind first */
    int64_t families, heads, kv, size, longest;
    double scale;
} attention_t;

typedef struct { /* memory of one thread, rows of `wide` = UP(h) or `columns` = UP(longest) numbers */
    float *k, *v, *kt, *vt, *dk, *dv; /* [columns, wide], the t ones [wide, columns] */
    float *q, *g, *o;                 /* [QUERIES, wide] */
    float *p, *dp;                    /* [QUERIES, columns] */
    float *all;
} scratch_t;

static scratch_t scratch_of(const attention_t *m) {
    int64_t wide = UP(m->size), columns = UP(m->longest), big = wide * columns, few = QUERIES * wide;
    scratch_t s = {.all = malloc(sizeof(float) * (size_t)(6 * big + 3 * few + 2 * QUERIES * columns))};
    float **parts[] = {&s.k, &s.v, &s.kt, &s.vt, &s.dk, &s.dv, &s.q, &s.g, &s.o, &s.p, &s.dp}, *at = s.all;
    for (int i = 0; i < 11; i++) {
        *parts[i] = at;
        at += i < 6 ? big : i < 9 ? few : QUERIES * columns;
    }
    return s;
}

/* to [n, UP(h)] = scale * rows of x that are `step` apart, 0 beyond h */
static void gather(int64_t n, int64_t h, const float *x, int64_t step, float scale, float *restrict to) {
    int64_t wide = UP(h);
    for (int64_t r = 0; r < n; r++) {
        for (int64_t i = 0; i < h; i++) to[r * wide + i] = x[r * step + i] * scale;
        for (int64_t i = h; i < wide; i++) to[r * wide + i] = 0.0f;
    }
}

/* x = scale * from [n, UP(h)], or x += */
static void scatter(int64_t n, int64_t h, const float *from, float scale, int add, float *restrict x, int64_t step) {
    int64_t wide = UP(h);
    for (int64_t r = 0; r < n; r++)
        for (int64_t i = 0; i < h; i++) x[r * step + i] = (add ? x[r * step + i] : 0.0f) + from[r * wide + i] * scale;
}

/* to [wide, lead] = transposed x [n, wide], 0 beyond n */
static void transpose(int64_t n, int64_t wide, const float *x, int64_t lead, float *restrict to) {
    for (int64_t i = 0; i < wide; i++) {
        for (int64_t t = 0; t < n; t++) to[i * lead + t] = x[t * wide + i];
        for (int64_t t = n; t < UP(n); t++) to[i * lead + t] = 0.0f;
    }
}

/* a run's keys or values of head g, those in front of it first */
static void gather_seen(const attention_t *m, const run_t *run, int64_t g, const float *x, float *to) {
    int64_t h = m->size, step = m->kv * h;
    gather(run->front, h, x + run->first * step + g * h, step, 1.0f, to);
    gather(run->length, h, x + run->start * step + g * h, step, 1.0f, to + run->front * UP(h));
}

/* p [n, columns]: exponentials of the scores of n queries, the first of which sees `seen` columns and each later one more;
   0 beyond. With `known` the norms [n, step] are given and p are probabilities, otherwise they are made and p is divided. */
static void soften(int64_t n, int64_t seen, int64_t lead, float *p, float *norm, int64_t step, int known) {
    int64_t columns = UP(seen + n - 1);
    for (int64_t r = 0; r < n; r++) {
        float *restrict s = p + r * lead, top = s[0], sum = 0.0f;
        int64_t own = seen + r;
        if (known)
            top = norm[r * step];
        else
            for (int64_t t = 1; t < own; t++) top = s[t] > top ? s[t] : top;
        for (int64_t t = 0; t < own; t++) sum += s[t] = exponential(s[t] - top);
        for (int64_t t = own; t < columns; t++) s[t] = 0.0f;
        if (known) continue;
        norm[r * step] = top + logf(sum);
        sum = 1.0f / sum;
        for (int64_t t = 0; t < own; t++) s[t] *= sum;
    }
}

/* out and norm of a run's queries of the heads that read key head g */
static void run_forward(const attention_t *m, const run_t *run, int64_t g, const scratch_t *s) {
    int64_t H = m->heads, h = m->size, wide = UP(h), lead = UP(m->longest), many = H / m->kv;
    gather_seen(m, run, g, m->key, s->k);
    gather_seen(m, run, g, m->value, s->v);
    transpose(run->front + run->length, wide, s->k, lead, s->kt);
    for (int64_t j = g * many; j < (g + 1) * many; j++)
        for (int64_t i = 0; i < run->length; i += QUERIES) {
            int64_t n = run->length - i < QUERIES ? run->length - i : QUERIES, seen = run->front + i + n;
            int64_t at = ((run->start + i) * H + j) * h;
            gather(n, h, m->query + at, H * h, (float)m->scale, s->q);
            product(n, UP(seen), h, s->q, wide, 1, s->kt, lead, s->p, lead, 0);
            soften(n, run->front + i + 1, lead, s->p, m->norm + (run->start + i) * H + j, H, 0);
            product(n, wide, seen, s->p, lead, 1, s->v, wide, s->o, wide, 0);
            scatter(n, h, s->o, 1.0f, 0, m->out + at, H * h);
        }
}

/* dquery of n queries of head j from row i of a run; adds to dk and dv of the scratch */
static void queries_back(const attention_t *m, const run_t *run, int64_t j, int64_t i, int64_t n, const scratch_t *s) {
    int64_t H = m->heads, h = m->size, wide = UP(h), lead = UP(m->longest), seen = run->front + i + n;
    int64_t at = ((run->start + i) * H + j) * h;
    gather(n, h, m->query + at, H * h, (float)m->scale, s->q);
    gather(n, h, m->grad + at, H * h, 1.0f, s->g);
    gather(n, h, m->out + at, H * h, 1.0f, s->o);
    product(n, UP(seen), h, s->q, wide, 1, s->kt, lead, s->p, lead, 0);
    soften(n, run->front + i + 1, lead, s->p, m->norm + (run->start + i) * H + j, H, 1);
    product(seen, wide, n, s->p, 1, lead, s->g, wide, s->dv, wide, 1);
    product(n, UP(seen), h, s->g, wide, 1, s->vt, lead, s->dp, lead, 0);
    for (int64_t r = 0; r < n; r++) {
        float along = 0.0f, *restrict p = s->p + r * lead;
        for (int64_t t = 0; t < wide; t++) along += s->g[r * wide + t] * s->o[r * wide + t];
        for (int64_t t = 0; t < UP(seen); t++) p[t] *= s->dp[r * lead + t] - along;
    }
    product(n, wide, seen, s->p, lead, 1, s->k, wide, s->o, wide, 0);
    scatter(n, h, s->o, (float)m->scale, 0, m->dquery + at, H * h);
    product(seen, wide, n, s->p, 1, lead, s->q, wide, s->dk, wide, 1);
}

/* the gradients of a run; those of what it lies behind are added */
static void run_back(const attention_t *m, const run_t *run, int64_t g, const scratch_t *s) {
    int64_t h = m->size, wide = UP(h), lead = UP(m->longest), many = m->heads / m->kv, step = m->kv * h;
    int64_t front = run->front, all = front + run->length;
    gather_seen(m, run, g, m->key, s->k);
    gather_seen(m, run, g, m->value, s->v);
    transpose(all, wide, s->k, lead, s->kt);
    transpose(all, wide, s->v, lead, s->vt);
    memset(s->dk, 0, sizeof(float) * (size_t)(all * wide));
    memset(s->dv, 0, sizeof(float) * (size_t)(all * wide));
    for (int64_t j = g * many; j < (g + 1) * many; j++)
        for (int64_t i = 0; i < run->length; i += QUERIES)
            queries_back(m, run, j, i, run->length - i < QUERIES ? run->length - i : QUERIES, s);
    scatter(front, h, s->dk, 1.0f, 1, m->dkey + run->first * step + g * h, step);
    scatter(front, h, s->dv, 1.0f, 1, m->dvalue + run->first * step + g * h, step);
    scatter(run->length, h, s->dk + front * wide, 1.0f, 0, m->dkey + run->start * step + g * h, step);
    scatter(run->length, h, s->dv + front * wide, 1.0f, 0, m->dvalue + run->start * step + g * h, step);
}

/* every run and head: out and norm, or with `back` the gradients */
void attend(const attention_t *m, int back, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        scratch_t s = scratch_of(m);
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t f = 0; f < m->families; f++)
            for (int64_t g = 0; g < m->kv; g++)
                for (int64_t r = m->family[f]; r < m->family[f + 1]; r++) (back ? run_back : run_forward)(m, m->run + r, g, &s);
        free(s.all);
    }
}
