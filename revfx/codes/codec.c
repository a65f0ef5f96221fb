/* Codes of values next to their predictions, made and undone in one pass over memory. For the format see format.py.
 *
 * Plain C11: loops over blocks that fit the first cache, which compilers vectorise, compiled for several instruction
 * sets where the loader can choose. Compile with -O3 -ffp-contract=off: y - h must round once, as in torch.
 *
 * The file includes itself, once for each size of elements.
 */
#ifndef ELEMENT

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 256  /* elements; byte i of a packed block holds elements i, i + 256/F, ...: F = 8/width of them */
#define GROUP 2048 /* elements with one span of escapes */
#define ROW 128    /* words of 32 bits that have one key in a fingerprint */
#define SAMPLE 16  /* elements of a fingerprint */
#define MAX_THREADS 64
#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

#if !defined(__x86_64__) || !defined(__gnu_linux__) || defined(ONE_TARGET)
#define TARGETS
#elif !defined(__clang__) && __GNUC__ >= 12
#define TARGETS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else /* compilers that know no levels */
#define TARGETS __attribute__((target_clones("avx2", "default")))
#endif

/* Elements of memory of any type; views begin anywhere. */
typedef uint8_t __attribute__((may_alias)) any_8;
typedef uint16_t __attribute__((may_alias, aligned(1))) any_16;
typedef uint32_t __attribute__((may_alias, aligned(1))) any_32;
typedef uint64_t __attribute__((may_alias, aligned(1))) any_64;
typedef float __attribute__((may_alias, aligned(1))) any_float;
typedef double __attribute__((may_alias, aligned(1))) any_double;

enum { GIVEN, DIFFERENCE, SUM }; /* the prediction is a, a - b, a + b */
enum { NARROW = 4 };             /* besides: of a in float32, and b in bfloat16 */

typedef struct {
    int width, size, kind;
    int64_t n;
    const void *x, *a, *b;
    uint8_t *packed;
    int32_t *spans;
    void *out;
    const void *values;
    const uint16_t *places;
} Job;

/* The escapes that one thread found. */
typedef struct {
    char *values;
    uint16_t *places;
    int64_t count, room;
} Escapes;

/* A part of a job: some groups, which one thread runs. */
typedef struct Part {
    void (*run)(struct Part *);
    const Job *job;
    int64_t first, last;
    uint64_t total;
    int64_t counts[4];
    int failed;
    Escapes escapes;
} Part;

static int has_room(Escapes *e, int64_t more, int size) {
    if (e->count + more <= e->room) return 1;
    int64_t room = 2 * (e->room + more);
    char *values = realloc(e->values, room * size);
    if (values) e->values = values;
    uint16_t *places = realloc(e->places, room * sizeof *places);
    if (places) e->places = places;
    if (!values || !places) return 0;
    e->room = room;
    return 1;
}

/* Random weights: any change of one word, and any exchange of two, changes the sum of 64 bits. */
static uint32_t weights[ROW];

__attribute__((constructor)) static void make_weights(void) {
    for (uint32_t j = 0; j < ROW; j++) {
        uint32_t w = (j + 1) * 0x9E3779B1u;
        w = (w ^ (w >> 15)) * 0x85EBCA6Bu;
        weights[j] = w ^ (w >> 13);
    }
}

INLINE uint64_t key_of(int64_t row) {
    uint64_t k = (uint64_t)(row + 1) * 0x9E3779B97F4A7C15u;
    return (k ^ (k >> 32)) | 1;
}

INLINE uint64_t row_sum(const any_32 *words) {
    uint64_t sum = 0;
    for (int j = 0; j < ROW; j++) sum += (uint64_t)words[j] * weights[j];
    return sum;
}

/* Return the fingerprint of some bytes of memory that begin with a row. */
INLINE uint64_t fingerprint_of(const char *at, int64_t nbytes, int64_t row) {
    uint64_t total = 0;
    for (; nbytes >= 4 * ROW; nbytes -= 4 * ROW, at += 4 * ROW) total += key_of(row++) * row_sum((const any_32 *)at);
    if (nbytes) {
        char rest[4 * ROW] = {0};
        memcpy(rest, at, nbytes);
        total += key_of(row) * row_sum((const any_32 *)rest);
    }
    return total;
}

static void sample(const void *t, int64_t n, int size, int64_t *words) {
    int64_t count = n < SAMPLE ? n : SAMPLE, step = n / SAMPLE > 1 ? n / SAMPLE : 1;
    memset(words + 1, 0, SAMPLE * size);
    for (int64_t i = 0; i < count; i++)
        memcpy((char *)(words + 1) + i * size, (const char *)t + i * step * size, size);
}

static void *run_part(void *part) {
    ((Part *)part)->run(part);
    return NULL;
}

/* Run a job in so many threads. */
static void run(const Job *job, void (*function)(Part *), Part *parts, int threads) {
    int64_t groups = (job->n + GROUP - 1) / GROUP;
    pthread_t ids[MAX_THREADS];
    int started[MAX_THREADS] = {0};
    for (int t = 0; t < threads; t++) {
        parts[t] = (Part){.run = function, .job = job, .first = groups * t / threads, .last = groups * (t + 1) / threads};
        if (t) started[t] = !pthread_create(&ids[t], NULL, run_part, &parts[t]);
    }
    function(&parts[0]);
    for (int t = 1; t < threads; t++) {
        if (started[t]) pthread_join(ids[t], NULL);
        else function(&parts[t]);
    }
}

/* A product moves the lowest bits of eight bytes into the highest byte: the sum of 2^(7k). */
INLINE uint8_t gathered(uint64_t eight) { return (uint8_t)(eight * 0x0102040810204080u >> 56); }

/* The reverse: the sum of 2^(7k) for k to 7, but the highest bit would meet the next lowest one. */
INLINE uint64_t spread(uint8_t byte) {
    return ((byte & 0x7Fu) * 0x0002040810204081u & 0x0101010101010101u) | (uint64_t)(byte >> 7) << 56;
}

/* Which NaN a sum of two gives is the compiler's choice, so it is always the same one. */
INLINE void predict_16(int kind, const any_16 *a, const void *second, any_16 *p) {
    const any_16 *b = second;
    if (kind == GIVEN) {
        memcpy(p, a, BLOCK * sizeof *p);
        return;
    }
    for (int i = 0; i < BLOCK; i++) { /* bfloat16, by float32 and one rounding */
        union { uint32_t bits; float number; } y = {(uint32_t)a[i] << 16}, h = {(uint32_t)b[i] << 16}, r;
        r.number = kind == DIFFERENCE ? y.number - h.number : y.number + h.number;
        uint32_t rounded = (r.bits + 0x7FFF + ((r.bits >> 16) & 1)) >> 16;
        p[i] = r.number == r.number ? (uint16_t)rounded : 0x7FC0;
    }
}

#define PREDICT(SIZE, FLOAT, NAN_BITS)                                                                \
    INLINE void predict_##SIZE(int kind, const any_##SIZE *a, const void *b, any_##SIZE *p) {         \
        const FLOAT *y = (const FLOAT *)a, *h = b;                                                    \
        uint##SIZE##_t widened[BLOCK];                                                                \
        if (kind == GIVEN) {                                                                          \
            memcpy(p, a, BLOCK * sizeof *p);                                                          \
            return;                                                                                   \
        }                                                                                             \
        if (kind & NARROW) {                                                                          \
            for (int i = 0; i < BLOCK; i++) widened[i] = (uint32_t)((const any_16 *)b)[i] << 16;      \
            h = (const FLOAT *)widened;                                                               \
        }                                                                                             \
        for (int i = 0; i < BLOCK; i++) {                                                             \
            union { FLOAT number; uint##SIZE##_t bits; } r = {y[i]};                                  \
            r.number = (kind & ~NARROW) == DIFFERENCE ? r.number - h[i] : r.number + h[i];            \
            p[i] = r.number == r.number ? r.bits : NAN_BITS;                                          \
        }                                                                                             \
    }
PREDICT(32, any_float, 0x7FC00000u)
PREDICT(64, any_double, 0x7FF8000000000000u)

#define ELEMENT any_16
#define SIGNED int16_t
#define NAMED(f) f##_16
#include "codec.c"
#define ELEMENT any_32
#define SIGNED int32_t
#define NAMED(f) f##_32
#include "codec.c"
#define ELEMENT any_64
#define SIGNED int64_t
#define NAMED(f) f##_64
#include "codec.c"

TARGETS static void fingerprint_part(Part *part) {
    const Job *job = part->job; /* its elements are bytes */
    int64_t end = part->last * GROUP < job->n ? part->last * GROUP : job->n, at = part->first * GROUP;
    if (at < end) part->total = fingerprint_of((const char *)job->x + at, end - at, at / (4 * ROW));
}

/* Pack zeros and ones, a byte each, as bits. */
TARGETS static void pack_bools_part(Part *part) {
    const Job *job = part->job;
    int64_t end = part->last * GROUP < job->n ? part->last * GROUP : job->n;
    for (int64_t at = part->first * GROUP; at < end; at += 8) {
        uint64_t eight = 0;
        memcpy(&eight, (const char *)job->x + at, end - at < 8 ? end - at : 8);
        job->packed[at / 8] = gathered(eight);
    }
}

/* Write elements that are zero or `values[0]`, by their bits. */
#define UNPACK(SIZE)                                                                                        \
    TARGETS static void unpack_part_##SIZE(Part *part) {                                                    \
        const Job *job = part->job;                                                                         \
        const uint##SIZE##_t one = *(const any_##SIZE *)job->values;                                        \
        int64_t end = part->last * GROUP < job->n ? part->last * GROUP : job->n;                            \
        for (int64_t at = part->first * GROUP; at < end; at += BLOCK) {                                     \
            int n = end - at < BLOCK ? (int)(end - at) : BLOCK;                                             \
            any_##SIZE *restrict out = (any_##SIZE *)job->out + at;                                         \
            uint8_t marks[BLOCK];                                                                           \
            for (int i = 0; 8 * i < n; i++) {                                                               \
                uint64_t eight = spread(job->packed[at / 8 + i]);                                           \
                memcpy(marks + 8 * i, &eight, 8);                                                           \
            }                                                                                               \
            for (int i = 0; i < n; i++) out[i] = marks[i] ? one : 0;                                        \
        }                                                                                                   \
    }
UNPACK(8)
UNPACK(16)
UNPACK(32)
UNPACK(64)

#define BY_SIZE(size, f) ((size) == 2 ? f##_16 : (size) == 4 ? f##_32 : f##_64)

static int limited(int threads) { return threads < 1 ? 1 : threads > MAX_THREADS ? MAX_THREADS : threads; }

/* Move the escapes that `revfx_encode` found; NULL: let them go. */
EXPORT void revfx_take(void *found, int size, char *values, uint16_t *places) {
    for (Part *part = found; part->job; part++) { /* the job itself is gone */
        Escapes *e = &part->escapes;
        if (values && e->count) {
            memcpy(values, e->values, e->count * size);
            memcpy(places, e->places, e->count * sizeof *places);
            values += e->count * size;
            places += e->count;
        }
        free(e->values);
        free(e->places);
    }
    free(found);
}

/* Return the version of these functions: c.py takes no library with another one. */
EXPORT int revfx_version(void) { return 2; }

/* Write packed distances, spans, a fingerprint of x to `words`, and the number of escapes. Return the handle that `revfx_take`
 * moves these from to where they stay; NULL if there was no memory for them. */
EXPORT void *revfx_encode(int width, int size, int kind, int64_t n, const void *x, const void *a, const void *b,
                          uint8_t *packed, int32_t *spans, int64_t *words, int64_t *count, int threads) {
    Job job = {.width = width, .size = size, .kind = kind, .n = n, .x = x, .a = a, .b = b, .packed = packed, .spans = spans};
    threads = limited(threads);
    Part *parts = malloc((threads + 1) * sizeof *parts);
    if (!parts) return NULL;
    run(&job, BY_SIZE(size, encode_part), parts, threads);
    int failed = 0;
    uint64_t total = *count = 0;
    for (int t = 0; t < threads; t++) {
        for (int64_t s = 2 * parts[t].first; s < 2 * parts[t].last; s++) spans[s] += *count;
        *count += parts[t].escapes.count;
        total += parts[t].total;
        failed |= parts[t].failed;
    }
    parts[threads].job = NULL; /* the end */
    if (failed) {
        revfx_take(parts, size, NULL, NULL);
        return NULL;
    }
    words[0] = total;
    sample(x, n, size, words);
    return parts;
}

/* Write the value of a code to `out`, which may be `a` or `b`, and its fingerprint to `words`. */
EXPORT void revfx_decode(int width, int size, int kind, int64_t n, const void *a, const void *b, const uint8_t *packed,
                         const int32_t *spans, const void *values, const uint16_t *places, void *out, int64_t *words,
                         int threads) {
    Job job = {.width = width, .size = size, .kind = kind, .n = n, .a = a, .b = b, .packed = (uint8_t *)packed,
               .spans = (int32_t *)spans, .values = values, .places = places, .out = out};
    Part parts[MAX_THREADS];
    threads = limited(threads);
    run(&job, BY_SIZE(size, decode_part), parts, threads);
    words[0] = 0;
    for (int t = 0; t < threads; t++) words[0] = (uint64_t)words[0] + parts[t].total;
    sample(out, n, size, words);
}

/* Count the escapes that widths 0, 2, 4 and 8 would have. */
EXPORT void revfx_count(int size, int kind, int64_t n, const void *x, const void *a, const void *b, int64_t *counts,
                        int threads) {
    Job job = {.size = size, .kind = kind, .n = n, .x = x, .a = a, .b = b};
    Part parts[MAX_THREADS];
    threads = limited(threads);
    run(&job, BY_SIZE(size, count_part), parts, threads);
    for (int w = 0; w < 4; w++) {
        counts[w] = 0;
        for (int t = 0; t < threads; t++) counts[w] += parts[t].counts[w];
    }
}

/* Write the fingerprint of n elements to `words`. */
EXPORT void revfx_fingerprint(const void *t, int64_t n, int size, int64_t *words, int threads) {
    Job job = {.n = n * size, .x = t};
    Part parts[MAX_THREADS];
    threads = limited(threads);
    run(&job, fingerprint_part, parts, threads);
    words[0] = 0;
    for (int p = 0; p < threads; p++) words[0] = (uint64_t)words[0] + parts[p].total;
    sample(t, n, size, words);
}

/* Pack one bit for each of n elements: whether it is not zero; if `positive`, whether it is positive or no number.
 * `limits` are two elements: the bits of a number but for its sign, and those of infinity. Of one byte: zeros and ones. */
EXPORT void revfx_pack_marks(int size, int positive, int64_t n, const void *x, const void *limits, uint8_t *packed,
                             int threads) {
    Job job = {.kind = positive, .n = n, .x = x, .values = limits, .packed = packed};
    Part parts[MAX_THREADS];
    run(&job, size == 1 ? pack_bools_part : BY_SIZE(size, pack_part), parts, limited(threads));
}

/* Write n elements of some bytes: zeros, and copies of the element `one` where a bit is set. */
EXPORT void revfx_unpack_marks(int size, int64_t n, const uint8_t *packed, const void *one, void *out, int threads) {
    Job job = {.n = n, .packed = (uint8_t *)packed, .values = one, .out = out};
    Part parts[MAX_THREADS];
    run(&job, size == 1 ? unpack_part_8 : BY_SIZE(size, unpack_part), parts, limited(threads));
}

#else /* --- for one size of elements */

/* Return bits so that they are ordered as the numbers are: of negative ones, all but the sign turn. */
INLINE ELEMENT NAMED(ordered)(ELEMENT bits) {
    return bits ^ (ELEMENT)((ELEMENT)((SIGNED)bits >> (8 * sizeof bits - 1)) >> 1);
}

/* Write the predictions of the block at `at`, of which `n` elements are there, and 0 beyond. */
INLINE void NAMED(predicted)(const Job *job, int64_t at, size_t n, ELEMENT *restrict p) {
    const size_t size = job->kind & NARROW ? sizeof(any_16) : sizeof(ELEMENT);
    const ELEMENT *a = (const ELEMENT *)job->a + at;
    const char *b = job->b ? (const char *)job->b + at * size : (const char *)a;
    if (n == BLOCK) {
        NAMED(predict)(job->kind, a, b, p);
    } else {
        ELEMENT padded[2][BLOCK] = {{0}};
        memcpy(padded[0], a, n * sizeof *a);
        memcpy(padded[1], b, n * size);
        NAMED(predict)(job->kind, padded[0], padded[1], p);
    }
}

/* Write the distances of the elements of a block from their predictions, each plus `half`. */
INLINE void NAMED(distances)(const Job *job, int64_t at, size_t n, ELEMENT half, ELEMENT *restrict d) {
    const ELEMENT *x = (const ELEMENT *)job->x + at;
    ELEMENT padded[BLOCK], p[BLOCK];
    NAMED(predicted)(job, at, n, p);
    if (n < BLOCK) {
        memcpy(padded, p, sizeof p);
        x = memcpy(padded, x, n * sizeof *x);
    }
    for (int i = 0; i < BLOCK; i++) d[i] = NAMED(ordered)(x[i]) - NAMED(ordered)(p[i]) + half;
}

/* Write the lowest bits of distances; return whether one has others. */
INLINE int NAMED(pack)(const ELEMENT *restrict d, int width, uint8_t *restrict packed) {
    const int bytes = width * (BLOCK / 8);
    const ELEMENT mask = (ELEMENT)(((uint64_t)1 << width) - 1);
    ELEMENT any = 0;
    if (width == 0)
        for (int i = 0; i < BLOCK; i++) any |= d[i];
    for (int i = 0; i < bytes; i++) {
        ELEMENT byte = 0;
        for (int first = 0, shift = 0; first < BLOCK; first += bytes, shift += width) {
            any |= d[i + first];
            byte |= (ELEMENT)((d[i + first] & mask) << shift);
        }
        packed[i] = (uint8_t)byte;
    }
    return (any & (ELEMENT)~mask) != 0;
}

/* Append the escapes of a block. */
INLINE void NAMED(escape)(const ELEMENT *restrict d, int width, const ELEMENT *x, int place, Escapes *e) {
    const ELEMENT mask = (ELEMENT)(((uint64_t)1 << width) - 1);
    uint8_t beyond[BLOCK];
    ELEMENT *values = (ELEMENT *)e->values;
    for (int i = 0; i < BLOCK; i++) beyond[i] = d[i] > mask;
    for (int first = 0; first < BLOCK; first += 64) {
        uint64_t found = 0, eight;
        for (int i = 0; i < 8; i++) { /* of eight bytes, the lowest bits come to lie beside each other */
            memcpy(&eight, beyond + first + 8 * i, 8);
            found |= (uint64_t)gathered(eight) << (8 * i);
        }
        for (; found; found &= found - 1) {
            int i = first + __builtin_ctzll(found);
            values[e->count] = x[i];
            e->places[e->count++] = (uint16_t)(place + i);
        }
    }
}

INLINE void NAMED(encode_groups)(Part *part, int width) {
    const Job *job = part->job;
    const size_t bytes = width * (BLOCK / 8);
    const ELEMENT half = (ELEMENT)(((uint64_t)1 << width) >> 1);
    Escapes *e = &part->escapes;
    for (int64_t g = part->first; g < part->last; g++) {
        int64_t begin = g * GROUP, end = begin + GROUP < job->n ? begin + GROUP : job->n;
        const ELEMENT *x = job->x;
        job->spans[2 * g] = (int32_t)e->count;
        if (!has_room(e, GROUP, sizeof(ELEMENT))) {
            part->failed = 1;
            return;
        }
        for (int64_t at = begin; at < end; at += BLOCK) {
            size_t n = end - at < BLOCK ? end - at : BLOCK;
            ELEMENT d[BLOCK];
            uint8_t rest[BLOCK], *packed = job->packed + at / BLOCK * bytes;
            NAMED(distances)(job, at, n, half, d);
            if (NAMED(pack)(d, width, n < bytes ? rest : packed))
                NAMED(escape)(d, width, x + at, (int)(at - begin), e);
            if (n < bytes) memcpy(packed, rest, n);
        }
        job->spans[2 * g + 1] = (int32_t)e->count;
        part->total += fingerprint_of((const char *)(x + begin), (end - begin) * sizeof *x, begin * sizeof *x / (4 * ROW));
    }
}

/* Add packed distances to predictions. */
INLINE void NAMED(correct)(const ELEMENT *restrict p, int width, const uint8_t *restrict packed, ELEMENT *restrict x) {
    const int bytes = width * (BLOCK / 8);
    const ELEMENT half = (ELEMENT)(((uint64_t)1 << width) >> 1), mask = (ELEMENT)(((uint64_t)1 << width) - 1);
    if (width == 0) memcpy(x, p, BLOCK * sizeof *x);
    for (int first = 0, shift = 0; bytes && first < BLOCK; first += bytes, shift += width)
        for (int i = 0; i < bytes; i++) {
            ELEMENT k = (ELEMENT)(packed[i] >> shift & mask) - half;
            x[first + i] = NAMED(ordered)(NAMED(ordered)(p[first + i]) + k);
        }
}

INLINE void NAMED(decode_groups)(Part *part, int width) {
    const Job *job = part->job;
    const size_t bytes = width * (BLOCK / 8);
    for (int64_t g = part->first; g < part->last; g++) {
        int64_t begin = g * GROUP, end = begin + GROUP < job->n ? begin + GROUP : job->n;
        ELEMENT *out = (ELEMENT *)job->out + begin;
        for (int64_t at = begin; at < end; at += BLOCK) {
            size_t n = end - at < BLOCK ? end - at : BLOCK;
            ELEMENT p[BLOCK], x[BLOCK];
            uint8_t rest[BLOCK] = {0};
            const uint8_t *packed = job->packed + at / BLOCK * bytes;
            NAMED(predicted)(job, at, n, p);
            if (n < bytes) packed = memcpy(rest, packed, n);
            NAMED(correct)(p, width, packed, n < BLOCK ? x : out + (at - begin));
            if (n < BLOCK) memcpy(out + (at - begin), x, n * sizeof *x);
        }
        for (int32_t i = job->spans[2 * g]; i < job->spans[2 * g + 1]; i++)
            out[job->places[i]] = ((const ELEMENT *)job->values)[i];
        part->total += fingerprint_of((const char *)out, (end - begin) * sizeof *out, begin * sizeof *out / (4 * ROW));
    }
}

TARGETS static void NAMED(encode_part)(Part *part) {
    switch (part->job->width) {
    case 0: NAMED(encode_groups)(part, 0); break;
    case 2: NAMED(encode_groups)(part, 2); break;
    case 4: NAMED(encode_groups)(part, 4); break;
    default: NAMED(encode_groups)(part, 8);
    }
}

TARGETS static void NAMED(decode_part)(Part *part) {
    switch (part->job->width) {
    case 0: NAMED(decode_groups)(part, 0); break;
    case 2: NAMED(decode_groups)(part, 2); break;
    case 4: NAMED(decode_groups)(part, 4); break;
    default: NAMED(decode_groups)(part, 8);
    }
}

TARGETS static void NAMED(count_part)(Part *part) {
    const Job *job = part->job;
    int64_t end = part->last * GROUP < job->n ? part->last * GROUP : job->n;
    for (int64_t at = part->first * GROUP; at < end; at += BLOCK) {
        ELEMENT d[BLOCK];
        int32_t counts[4] = {0};
        NAMED(distances)(job, at, end - at < BLOCK ? end - at : BLOCK, 128, d);
        for (int i = 0; i < BLOCK; i++) {
            counts[0] += d[i] != 128;
            counts[1] += (ELEMENT)(d[i] - 126) > 3;
            counts[2] += (ELEMENT)(d[i] - 120) > 15;
            counts[3] += d[i] > 255;
        }
        for (int w = 0; w < 4; w++) part->counts[w] += counts[w];
    }
}

TARGETS static void NAMED(pack_part)(Part *part) {
    const Job *job = part->job;
    const ELEMENT *restrict limits = job->values;
    const ELEMENT magnitude = limits[0], infinity = limits[1];
    int64_t end = part->last * GROUP < job->n ? part->last * GROUP : job->n;
    for (int64_t at = part->first * GROUP; at < end; at += BLOCK) {
        int n = end - at < BLOCK ? (int)(end - at) : BLOCK;
        const ELEMENT *restrict x = (const ELEMENT *)job->x + at;
        uint8_t marks[BLOCK];
        uint64_t eight;
        if (n < BLOCK) memset(marks, 0, sizeof marks);
        if (job->kind)
            for (int i = 0; i < n; i++) marks[i] = ((SIGNED)x[i] > 0) | ((ELEMENT)(x[i] & magnitude) > infinity);
        else
            for (int i = 0; i < n; i++) marks[i] = (ELEMENT)(x[i] & magnitude) != 0;
        for (int i = 0; 8 * i < n; i++) {
            memcpy(&eight, marks + 8 * i, 8);
            job->packed[at / 8 + i] = gathered(eight);
        }
    }
}

#undef ELEMENT
#undef SIGNED
#undef NAMED
#endif
