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
#define UP(n) (((n) + 15) / 16 * 16) /* a multiple of LANES, and of the rows of a tile */

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
static ALWAYS void turn_row(int64_t H, const int64_t h, const float *x, const float *w, float eps, const float *c,
                            const float *s, float *y, float *inverse) {
    const int64_t half = h / 2;
    for (int64_t j = 0; j < H; j++) {
        const float *restrict a = x + j * h;
        float *restrict out = y + j * h, scaled[h];
        float scale = w ? inverse_rms(a, h, eps) : 1.0f;
        if (w) inverse[j] = scale;
        for (int64_t i = 0; i < h; i++) scaled[i] = w ? a[i] * scale * w[i] : a[i];
        for (int64_t i = 0; i < half; i++) out[i] = scaled[i] * c[i] - scaled[i + half] * s[i];
        for (int64_t i = 0; i < half; i++) out[i + half] = scaled[i + half] * c[i + half] + scaled[i] * s[i + half];
    }
}

static ALWAYS void turn_row_back(int64_t H, const int64_t h, const float *g, const float *x, const float *w,
                                 const float *inverse, const float *c, const float *s, float *dx, float *dw) {
    const int64_t half = h / 2;
    for (int64_t j = 0; j < H; j++) {
        const float *restrict a = g + j * h;
        float turned[h], *restrict out = w ? turned : dx + j * h;
        for (int64_t i = 0; i < half; i++) out[i] = a[i] * c[i] + a[i + half] * s[i + half];
        for (int64_t i = 0; i < half; i++) out[i + half] = a[i + half] * c[i + half] - a[i] * s[i];
        if (w) norm_row_back(h, turned, 0, x + j * h, w, inverse[j], dx + j * h, dw);
    }
}

/* the same row, compiled for the usual head sizes */
#define SIZED(row, H, h, ...)                                                                                                \
    switch (h) {                                                                                                             \
        case 32: row(H, 32, __VA_ARGS__); break;                                                                             \
        case 64: row(H, 64, __VA_ARGS__); break;                                                                             \
        case 128: row(H, 128, __VA_ARGS__); break;                                                                           \
        default: row(H, h, __VA_ARGS__);                                                                                     \
    }

/* y [n, H, h] of x; cos and sin [n, h]; inverse [n, H] */
void turn(int64_t n, int64_t H, int64_t h, const float *x, const float *w, double eps, const float *cos, const float *sin,
          float *y, float *inverse, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t r = 0; r < n; r++) {
        int64_t at = r * H * h;
        SIZED(turn_row, H, h, x + at, w, (float)eps, cos + r * h, sin + r * h, y + at, w ? inverse + r * H : 0)
    }
}

/* dx [n, H, h] from g = dy; dw [pieces, h], zero before */
void turn_back(int64_t n, int64_t H, int64_t h, const float *g, const float *x, const float *w, const float *inverse,
               const float *cos, const float *sin, float *dx, float *dw, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t p = 0; p < n; p += PIECE)
        for (int64_t r = p; r < n && r < p + PIECE; r++) {
            int64_t at = r * H * h;
            SIZED(turn_row_back, H, h, g + at, w ? x + at : 0, w, w ? inverse + r * H : 0, cos + r * h, sin + r * h, dx + at,
                  w ? dw + p / PIECE * h : 0)
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
    lanes_t sum[8][4];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int j = 0; j < W; j++) sum[r][j] = keep ? *(lanes_t *)(c + r * lead + j * LANES) : (lanes_t){0};
    for (int64_t i = 0; i < k; i++) {
        const float *row = b + i * lead_b, *column = a + i * right;
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int j = 0; j < W; j++) sum[r][j] += column[r * down] * *(const lanes_t *)(row + j * LANES);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int j = 0; j < W; j++) *(lanes_t *)(c + r * lead + j * LANES) = sum[r][j];
}

static ALWAYS void tiles(const int W, int64_t m, int64_t k, const float *a, int64_t down, int64_t right, const float *b,
                         int64_t lead_b, float *c, int64_t lead, int keep) {
    int64_t r = 0;
    for (; W < 4 && r + 4 < m; r += 8) tile(8, W, k, a + r * down, down, right, b, lead_b, c + r * lead, lead, keep);
    for (; r < m; r += 4) tile(4, W, k, a + r * down, down, right, b, lead_b, c + r * lead, lead, keep);
}

/* c [m, n] (+)= a [m, k] b [k, n]; n is a multiple of LANES, and there is memory for m rounded up to eight, also filled */
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
    size_t size; /* bytes */
} scratch_t;

static scratch_t scratch_of(const attention_t *m) {
    int64_t wide = UP(m->size), columns = UP(m->longest), big = wide * columns, few = QUERIES * wide;
    scratch_t s = {.size = sizeof(float) * (size_t)(6 * big + 3 * few + 2 * QUERIES * columns)};
    s.all = malloc(s.size);
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

/* to [wide, lead] = transposed x [n, wide], LANES rows at a time */
static void transpose(int64_t n, int64_t wide, const float *x, int64_t lead, float *restrict to) {
    for (int64_t t = 0; t < n; t += LANES) {
        int64_t last = n - t < LANES ? n - t : LANES;
        for (int64_t i = 0; i < wide; i++)
            for (int64_t l = 0; l < last; l++) to[i * lead + t + l] = x[(t + l) * wide + i];
    }
}

/* a run's keys or values of head g and their transpose (optional), those in front of it first, unless they are `there` */
static void gather_seen(const attention_t *m, const run_t *run, int64_t g, int there, const float *x, float *to, float *turned) {
    int64_t h = m->size, wide = UP(h), step = m->kv * h, from = there ? run->front : 0, lead = UP(m->longest);
    if (!there) gather(run->front, h, x + run->first * step + g * h, step, 1.0f, to);
    gather(run->length, h, x + run->start * step + g * h, step, 1.0f, to + run->front * wide);
    if (turned) transpose(run->front + run->length - from, wide, to + from * wide, lead, turned + from);
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
static void run_forward(const attention_t *m, const run_t *run, int64_t g, int there, const scratch_t *s) {
    int64_t H = m->heads, h = m->size, wide = UP(h), lead = UP(m->longest), many = H / m->kv;
    gather_seen(m, run, g, there, m->key, s->k, s->kt);
    gather_seen(m, run, g, there, m->value, s->v, 0);
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

/* the gradients of a run; those of what it lies behind are added up in the scratch */
static void run_back(const attention_t *m, const run_t *run, int64_t g, int there, const scratch_t *s) {
    int64_t h = m->size, wide = UP(h), many = m->heads / m->kv, step = m->kv * h;
    int64_t front = run->front, all = front + run->length, from = there ? front : 0;
    gather_seen(m, run, g, there, m->key, s->k, s->kt);
    gather_seen(m, run, g, there, m->value, s->v, s->vt);
    memset(s->dk + from * wide, 0, sizeof(float) * (size_t)((all - from) * wide));
    memset(s->dv + from * wide, 0, sizeof(float) * (size_t)((all - from) * wide));
    for (int64_t j = g * many; j < (g + 1) * many; j++)
        for (int64_t i = 0; i < run->length; i += QUERIES)
            queries_back(m, run, j, i, run->length - i < QUERIES ? run->length - i : QUERIES, s);
    scatter(run->length, h, s->dk + front * wide, 1.0f, 0, m->dkey + run->start * step + g * h, step);
    scatter(run->length, h, s->dv + front * wide, 1.0f, 0, m->dvalue + run->start * step + g * h, step);
}

/* the runs of a family for key head g: what is in front of the later ones stays in the scratch */
static void family(const attention_t *m, const run_t *run, const run_t *end, int64_t g, int back, const scratch_t *s) {
    int64_t h = m->size, step = m->kv * h, front = end[-1].front, at = end[-1].first * step + g * h;
    for (const run_t *r = run; r < end; r++) (back ? run_back : run_forward)(m, r, g, r->front && r > run && r[-1].front, s);
    if (!back) return;
    scatter(front, h, s->dk, 1.0f, 1, m->dkey + at, step);
    scatter(front, h, s->dv, 1.0f, 1, m->dvalue + at, step);
}

/* every family and head: out and norm, or with `back` the gradients */
void attend(const attention_t *m, int back, int threads) {
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        scratch_t s = scratch_of(m);
        memset(s.all, 0, s.size); /* columns beyond those in use are multiplied, and then dropped: they must be numbers */
#pragma omp for collapse(2) schedule(dynamic)
        for (int64_t f = 0; f < m->families; f++)
            for (int64_t g = 0; g < m->kv; g++) family(m, m->run + m->family[f], m->run + m->family[f + 1], g, back, &s);
        free(s.all);
    }
}
