// The row arithmetic of torch_rows.py without a softcap. A row stays in the first-level cache for its two passes: one for
// the largest logit, and one for the sums. A row is split at its target, which is excluded from the sums.

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

using bfloat16 = uint16_t;

inline float read(float x) { return x; }

inline float read(bfloat16 x) {
    uint32_t whole = uint32_t(x) << 16;
    float y;
    std::memcpy(&y, &whole, 4);
    return y;
}

inline void write(float &to, float x) { to = x; }

inline void write(bfloat16 &to, float x) {
    uint32_t whole;
    std::memcpy(&whole, &x, 4);
    to = (whole + 0x7fff + (whole >> 16 & 1)) >> 16;
}

// e^x for x <= 88 with a relative error of 1e-7, and 0 below -87; NaN stays NaN. 2^k times the polynomial of Cephes.
inline float exponential(float x) {
    float inside = x < -87 ? -87 : x;
    float k = std::rint(inside * 1.44269504f);
    float r = inside - k * 0.693359375f + k * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1;
    uint32_t whole = uint32_t(int32_t(k) + 127) << 23;
    float power;
    std::memcpy(&power, &whole, 4);
    return x < -87 ? 0 : p * power;
}

template <class T>
float largest(const T *a, int64_t n, float factor, float m) {
#pragma omp simd reduction(max : m)
    for (int64_t j = 0; j < n; j++) {
        float z = read(a[j]) * factor;
        m = z > m ? z : m;
    }
    return m;
}

template <bool weights, bool squares, class T>
void sums(const T *a, T *w, int64_t n, float factor, float floor, float m, float &s_out, float &t_out, float &q_out) {
    float s = 0, t = 0, q = 0;
#pragma omp simd reduction(+ : s, t, q)
    for (int64_t j = 0; j < n; j++) {
        float z = read(a[j]) * factor;
        float below = (z < floor ? floor : z) - m, e = exponential(below);
        s += e;
        t += e * below;
        if (squares) q += e * e;
        if (weights) write(w[j], e);
    }
    s_out += s;
    q_out += q;
    // Summation starts with the largest terms, so that rounding is relative to the sum.
    t_out += t + m * s;
}

template <class T>
void slopes(const T *a, T *out, int64_t n, float factor, float floor, float lse, float c, float c_entropy, float mean) {
#pragma omp simd
    for (int64_t j = 0; j < n; j++) {
        float z = read(a[j]) * factor;
        z = z < floor ? floor : z;
        write(out[j], -exponential(z - lse) * (c + c_entropy * (z - mean)));
    }
}

template <bool weights, bool squares, class T>
void accumulate(const T *a, int64_t a_stride, T *w, int64_t w_stride, int64_t rows, int64_t width, int64_t first,
                int threads, float floor, const int64_t *targets, const float *factors, float *m, float *s, float *t,
                float *y, float *q, float *old) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows; i++) {
        const T *row = a + i * a_stride;
        T *to = weights ? w + i * w_stride : nullptr;
        int64_t target = targets[i] - first;
        bool here = target >= 0 && target < width;
        int64_t left = here ? target : width, right = left + here;
        float factor = factors[i];
        if (here) {
            float z = read(row[target]) * factor;
            y[i] = z < floor ? floor : z;
        }
        float top = largest(row + right, width - right, factor, largest(row, left, factor, m[i]));
        float shrink = std::exp(m[i] - top), sum = 0, mean = 0, square = 0;
        sums<weights, squares>(row, to, left, factor, floor, top, sum, mean, square);
        sums<weights, squares>(row + right, to + right, width - right, factor, floor, top, sum, mean, square);
        if (weights) {
            old[i] = shrink;
            if (here) write(to[target], 0);
        }
        m[i] = top;
        s[i] = s[i] * shrink + sum;
        t[i] = t[i] * shrink + mean;
        if (squares) q[i] = q[i] * shrink * shrink + square;
    }
}

template <class T>
void gradient(const T *a, int64_t a_stride, T *out, int64_t out_stride, int64_t rows, int64_t width, int64_t first,
              int threads, float floor, const int64_t *targets, const float *factors, const float *lse,
              const float *rest, const float *entropy, const float *c, const float *c_entropy) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows; i++) {
        const T *row = a + i * a_stride;
        T *to = out + i * out_stride;
        int64_t target = targets[i] - first;
        bool here = target >= 0 && target < width;
        int64_t left = here ? target : width, right = left + here;
        float factor = factors[i], by_entropy = c_entropy ? c_entropy[i] : 0, mean = lse[i] - entropy[i];
        if (c[i] == 0 && by_entropy == 0) {
            std::memset(to, 0, width * sizeof(T));
            continue;
        }
        // Written last, because `out` may be `a`.
        float z = here ? read(row[target]) * factor : 0;
        slopes(row, to, left, factor, floor, lse[i], c[i], by_entropy, mean);
        slopes(row + right, to + right, width - right, factor, floor, lse[i], c[i], by_entropy, mean);
        z = z < floor ? floor : z;
        if (here) write(to[target], c[i] * rest[i] - by_entropy * exponential(z - lse[i]) * (z - mean));
    }
}

}  // namespace

#define EXPORT(NAME, T)                                                                                                \
    extern "C" void accumulate_##NAME(const T *a, int64_t a_stride, T *w, int64_t w_stride, int64_t rows,              \
                                      int64_t width, int64_t first, int threads, float floor, const int64_t *targets,  \
                                      const float *factors, float *m, float *s, float *t, float *y, float *q,          \
                                      float *old) {                                                                    \
        auto run = w ? (q ? accumulate<true, true, T> : accumulate<true, false, T>)                                    \
                     : (q ? accumulate<false, true, T> : accumulate<false, false, T>);                                 \
        run(a, a_stride, w, w_stride, rows, width, first, threads, floor, targets, factors, m, s, t, y, q, old);       \
    }                                                                                                                  \
    extern "C" void gradient_##NAME(const T *a, int64_t a_stride, T *out, int64_t out_stride, int64_t rows,            \
                                    int64_t width, int64_t first, int threads, float floor, const int64_t *targets,    \
                                    const float *factors, const float *lse, const float *rest, const float *entropy,   \
                                    const float *c, const float *c_entropy) {                                          \
        gradient<T>(a, a_stride, out, out_stride, rows, width, first, threads, floor, targets, factors, lse, rest,     \
                    entropy, c, c_entropy);                                                                            \
    }

EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)
