// What kv_encode.cu and kv_encode_large.cu share: a thread's two groups, statistics, the step, planes.
// Section numbers are those of format.py.
#include "kv_common.cuh"

#define KIND_ABS 0
#define KIND_REL 1
#define KIND_RMS 2
#define NO_STEP (-1000)          // the page must be raw
#define INFINITE_BITS 0x7f800000u

struct PartBound {
    int kind, step;
    double factor;
};

// What the threads of a block share about a page. thread 0 clears it between two barriers.
struct Shared {
    __align__(16) u32 codes[MAX_THREADS / 4];   // width codes of a chunk, one byte a thread
    u32 scan[MAX_WARPS];
    u32 top[2], bottom[2];        // 2.7. rms: largest t. rel: keys of the largest value and of the smallest, negated
    u32 fine[2];                  // 1000 - exponent of the lowest bit set in a sample of the values; UNKNOWN
    u32 sum[2], sum_high[2];      // 2.7, rms: S = sum + 2^12 sum_high
    int step[2];
    u32 maybe_seen;               // 2.8: candidates not ruled out: bit 9 p + d stands for step[p] + 4 - d
    u32 check, check_high;        // of the checksum: check + 2^16 check_high
    u32 place;
    u64 payload;                  // payloads[index], fetched early

    __device__ void clear() {
        #pragma unroll
        for (int p = 0; p < 2; p++) top[p] = bottom[p] = fine[p] = sum[p] = sum_high[p] = step[p] = 0;
        maybe_seen = check = check_high = 0;
    }
};
#define UNKNOWN 0xffffffffu

// Denormals: CuPy compiles all kernels with -ftz=true, so arithmetic and comparisons of float take them for zeros. Where
// that matters, bits are looked at.

// A float's bits in an order-preserving way, so that integer maxima serve.
__device__ inline u32 float_key(u32 b) { return b ^ ((int)b >> 31 | 0x80000000u); }
__device__ inline u32 key_bits(u32 key) { return key & 0x80000000u ? key ^ 0x80000000u : ~key; }

// The value of a finite float's bits; exact.
__device__ inline double to_double(u32 b) {
    const double magnitude = b << 1 >> 24 ? (double)__uint_as_float(b & 0x7fffffffu) : __dmul_rn((b & 0x7fffffu), 0x1p-149);
    return (int)b < 0 ? -magnitude : magnitude;
}

// 1000 - exponent of the lowest bit set in x; 0 for zeros. Denormals count as finer than they are, which is finer
// than any step all the same.
__device__ inline u32 fineness(float x) {
    const u32 b = __float_as_uint(x) & 0x7fffffffu;
    return b == 0 ? 0 : 1150 - (b >> 23) - (__ffs((b & 0x7fffffu) | 0x800000u) - 1);
}

// 2.7: the step number for two_eb 2^exponent, or for its square. Positive doubles are compared by their bits.
__device__ inline int step_number(double two_eb, int exponent, bool squared) {
    const long long bits = __double_as_longlong(two_eb);
    const int e = (int)(bits >> 52) - 1023 + exponent, k = squared ? e >> 1 : e;
    const long long ratio = (bits & 0xfffffffffffffll) | (long long)(1023 + e - (squared ? 2 * k : k)) << 52;
    int m = 0;
    #pragma unroll
    for (int i = 0; i < 3; i++) {
        const double f = (1.25 + 0.25 * i) * (1 + 1.0 / 65536);
        m += ratio >= __double_as_longlong(squared ? f * f : f);
    }
    return 4 * k + m;
}

template <typename T, bool FAST>
struct Page {
    const u16* data;
    const Geometry& g;
    u32 pair[2][16];   // the two groups of this thread
    u32 first;         // the number of the first of them
    u32 parts[2];      // their parts

    __device__ Page(const u16* data, const Geometry& g) : data(data), g(g) {}
    __device__ bool present(int h) const { return first + (FAST ? 0 : h) < g.groups; }
    __device__ u32 part(int h) const { return parts[FAST ? 0 : h]; }

    __device__ void load(u32 chunk) {
        first = (chunk * blockDim.x + threadIdx.x) * 2;
        if constexpr (FAST) {
            // a thread without groups loads the first ones again: it is left out later
            const u32 offset = g.locate(present(0) ? first : 0, parts[0]);
            const uint2* p = (const uint2*)(data + offset);
            const u32 stride = g.pair_stride / 4;
            #pragma unroll
            for (int i = 0; i < 16; i++, p += stride) {
                uint2 v = __ldg(p);
                pair[0][i] = v.x;
                pair[1][i] = v.y;
            }
        } else {
            #pragma unroll
            for (int h = 0; h < 2; h++) {
                parts[h] = present(h) ? g.part(first + h) : 0;
                if (present(h) && g.flat() && (u64)data % 16 == 0 && (first + h + 1) * 32 <= g.values) {
                    const uint4* p = (const uint4*)(data + (first + h) * 32);
                    #pragma unroll
                    for (int i = 0; i < 4; i++) {
                        uint4 v = __ldg(p + i);
                        pair[h][4 * i] = v.x, pair[h][4 * i + 1] = v.y;
                        pair[h][4 * i + 2] = v.z, pair[h][4 * i + 3] = v.w;
                    }
                    continue;
                }
                #pragma unroll
                for (int i = 0; i < 16; i++) pair[h][i] = present(h) ? pair_at(first + h, i) : 0;
            }
        }
    }

    __device__ u32 pair_at(u32 group, u32 i) const {
        const u32 at = g.offset(group) + i * g.pair_stride;
        return (at < g.values ? data[at] : 0) | (at + 1 < g.values ? (u32)data[at + 1] << 16 : 0);
    }

    // 2.7, rms: t of group h. A group with non-finite values is summed again without them, one whose squares
    // underflow counts as the smallest denormal, so that it is told from zeros. `simple`: neither happened.
    __device__ float squares(int h, bool& simple) const {
        float a = 0, b = 0;
        u32 any = 0;
        #pragma unroll
        for (int i = 0; i < 16; i++) {
            float x = Storage<T>::lo(pair[h][i]), y = Storage<T>::hi(pair[h][i]);
            a = __fmaf_rn(x, x, a);
            b = __fmaf_rn(y, y, b);
            any |= pair[h][i];
        }
        float t = __fadd_rn(a, b);
        simple = t < __uint_as_float(INFINITE_BITS) && (t > 0 || (any & 0x7fff7fffu) == 0);
        if (simple) return t;
        a = b = 0;   // rare: read again, so that no registers are kept for it
        bool nonzero = false;
        #pragma unroll 1
        for (int i = 0; i < 16 && present(h); i++) {
            const u32 v = pair_at(first + h, i);
            float x = Storage<T>::lo(v), y = Storage<T>::hi(v);
            x = finite(x) ? x : 0;
            y = finite(y) ? y : 0;
            nonzero |= ((__float_as_uint(x) | __float_as_uint(y)) & 0x7fffffffu) != 0;
            a = __fmaf_rn(x, x, a);
            b = __fmaf_rn(y, y, b);
        }
        t = __fadd_rn(a, b);
        return t == 0 && nonzero ? __uint_as_float(1) : t;
    }

    // 2.7, rel: keys of the largest and of the negated smallest finite value of group h; 0 if there is none.
    // Returns whether all values are finite.
    __device__ bool extremes(int h, u32& top, u32& bottom) const {
        bool all_finite = true;
        top = bottom = 0;
        #pragma unroll
        for (int i = 0; i < 16; i++) {
            float x[2] = {Storage<T>::lo(pair[h][i]), Storage<T>::hi(pair[h][i])};
            #pragma unroll
            for (int j = 0; j < 2; j++) {
                const bool good = finite(x[j]);
                const bool counts = good && (FAST || (first + h) * 32 + 2 * i + j < g.values);   // no padding
                all_finite &= good;
                top = max(top, counts ? float_key(__float_as_uint(x[j])) : 0);
                bottom = max(bottom, counts ? float_key(__float_as_uint(x[j]) ^ 0x80000000u) : 0);
            }
        }
        return all_finite;
    }

    static __device__ bool finite(float x) { return fabsf(x) < __uint_as_float(INFINITE_BITS); }

    // The largest magnitude in group h; NaN if there is one.
    __device__ u32 largest_magnitude(int h) const {
        u32 largest = 0;
        #pragma unroll
        for (int i = 0; i < 16; i++) largest = Storage<T>::maximum(largest, pair[h][i] & 0x7fff7fffu);
        return Storage<T>::maximum(largest, largest >> 16);
    }

    // 2.5: the width code of group h.
    __device__ u32 width_code(int h, u32 largest, const Quantiser& quantiser) const {
        const float x = Storage<T>::lo(largest);
        u32 code = quantiser.template escapes<T>(x) ? CODE_ESCAPE : 33 - __clz(quantiser(x) & MAGNITUDE_MASK);
        if (code == 1) {   // every magnitude is 0: signs matter only for -0.0
            code = 0;
            #pragma unroll 1
            for (int i = 0; i < 16 && present(h); i++) {
                const u32 v = pair_at(first + h, i);
                code |= (v & 0xffffu) == 0x8000u || v >> 16 == 0x8000u;
            }
        }
        return present(h) ? code : 0;
    }

    // 2.5 and 2.6: pair[h] becomes the plane words of the group, the plane of signs last.
    __device__ void planes(int h, u32 code, const Quantiser& quantiser) {
        if (code != CODE_ESCAPE) {
            #pragma unroll
            for (int i = 0; i < 16; i++) {
                const u32 magnitude = pair[h][i] & 0x7fff7fffu;
                const u32 a = quantiser(Storage<T>::lo(magnitude)), b = quantiser(Storage<T>::hi(magnitude));
                pair[h][i] = __byte_perm(a, b, 0x5410) | (pair[h][i] & 0x80008000u);
            }
        }
        transpose(pair[h]);
    }

    // The same for width codes up to NARROW_CODE: 7 planes of magnitudes, and the plane of signs in pair[h][7].
    // LOW: up to LOW_CODE. Magnitudes are put together by multiply-adds, as logical operations are the bottleneck here:
    // of MAGIC_BITS, only those of the first one are not shifted out, and CANCEL of the third, shifted, makes them 0.
    template <bool LOW> __device__ void narrow_planes(int h, const Quantiser& quantiser) {
        constexpr u32 CANCEL = (0u - MAGIC_BITS) >> 16;
        #pragma unroll
        for (int i = 0; i < 8; i++) {
            const u32 p = pair[h][i] & 0x7fff7fffu, q = pair[h][i + 8] & 0x7fff7fffu;
            const u32 firsts = quantiser.template narrow<LOW>(Storage<T>::lo(p)) +
                               256 * quantiser.template narrow<LOW>(Storage<T>::lo(q));
            const u32 seconds = quantiser.template narrow<LOW, CANCEL>(Storage<T>::hi(p)) +
                                256 * quantiser.template narrow<LOW>(Storage<T>::hi(q));
            const u32 signs = __byte_perm(pair[h][i], pair[h][i + 8], 0x7351) & 0x80808080u;
            pair[h][i] = firsts + 65536 * seconds | signs;
        }
        swap_bits(pair[h], 0);
    }
};

// 2.8: whether x lies on the grid of s; sets `escaped` if its group is escaped there.
template <typename T>
__device__ bool on_grid(float x, int s, bool& escaped) {
    const Quantiser quantiser(s);
    const u32 magnitude = __float_as_uint(x) & 0x7fffffffu;
    x = __uint_as_float(magnitude);
    escaped |= quantiser.escapes<T>(x);
    return __float_as_uint(Grid(s).point(__uint_as_float(quantiser(x)))) == magnitude;
}

// 2.8, exactly: those bits of shared.maybe_seen on whose grids all groups of this thread among [begin, end) lie.
template <typename T, bool FAST>
__device__ u32 groups_that_fit(const Page<T, FAST>& page, u32 begin, u32 end, u32 fits, const int (&step)[2]) {
    #pragma unroll 1
    for (u32 group = begin + threadIdx.x; group < end; group += blockDim.x) {
        const int p = page.g.part(group);
        #pragma unroll 1
        for (int d = 0; d < 9; d++) {
            const int candidate = step[p] + 4 - d;
            if (!(fits >> (9 * p + d) & 1)) continue;
            bool all_on = true, escaped = false;
            #pragma unroll 1
            for (int i = 0; i < 16; i++) {
                const u32 v = page.pair_at(group, i);
                all_on &= on_grid<T>(Storage<T>::lo(v), candidate, escaped);
                all_on &= on_grid<T>(Storage<T>::hi(v), candidate, escaped);
            }
            if (!all_on && !escaped) fits &= ~(1u << (9 * p + d));
        }
    }
    return fits;
}

// 2.7: the statistics of the parts whose bound needs them, of what is loaded; in `shared` after the caller's next
// barrier. First the extremes; `t` is for the sums.
template <typename T, bool FAST>
__device__ void find_extremes(const Page<T, FAST>& page, const PartBound (&bound)[2], float (&t)[2], Shared& shared) {
    const bool first_lane = (threadIdx.x & 31) == 0;
    const u32 parts = page.g.parts();
    u32 top[2] = {0, 0}, bottom[2] = {0, 0}, fine[2] = {0, 0};

    #pragma unroll
    for (int h = 0; h < 2; h++) {
        const bool one = page.part(h);
        const int kind = one ? bound[1].kind : bound[0].kind;
        if (kind == KIND_ABS || !page.present(h)) continue;
        u32 group_top = 0, group_bottom = 0;
        bool simple;
        if (kind == KIND_RMS) {
            t[h] = page.squares(h, simple);
            group_top = __float_as_uint(t[h]);
        } else {
            simple = page.extremes(h, group_top, group_bottom);
        }
        const u32 group_fine = !simple ? UNKNOWN : h == 0 ? fineness(Storage<T>::lo(page.pair[h][0])) : 0;
        #pragma unroll
        for (int p = 0; p < 2; p++) {
            top[p] = max(top[p], one == p ? group_top : 0);
            bottom[p] = max(bottom[p], one == p ? group_bottom : 0);
            fine[p] = max(fine[p], one == p ? group_fine : 0);
        }
    }
    #pragma unroll
    for (int p = 0; p < 2; p++) {
        if (p >= parts || bound[p].kind == KIND_ABS) continue;
        top[p] = __reduce_max_sync(FULL, top[p]);
        fine[p] = __reduce_max_sync(FULL, fine[p]);
        if (bound[p].kind == KIND_REL) bottom[p] = __reduce_max_sync(FULL, bottom[p]);
        if (first_lane) {
            atomicMax(&shared.top[p], top[p]);
            atomicMax(&shared.fine[p], fine[p]);
            if (bound[p].kind == KIND_REL) atomicMax(&shared.bottom[p], bottom[p]);
        }
    }
}

// 2.7, rms: the sums, less than 2^30, once `shared.top` is that of the page.
template <typename T, bool FAST>
__device__ void find_sums(const Page<T, FAST>& page, const PartBound (&bound)[2], const float (&t)[2], Shared& shared) {
    const bool first_lane = (threadIdx.x & 31) == 0;
    const u32 parts = page.g.parts();
    u32 sum[2] = {0, 0};
    #pragma unroll
    for (int h = 0; h < 2; h++) {
        const bool one = page.part(h);
        if ((one ? bound[1].kind : bound[0].kind) != KIND_RMS || !page.present(h)) continue;
        // 2^(20-E), E = exponent of the largest t + 1; limited where the page will be raw anyway
        const u32 scale = 127 + 20 + 126 - max(shared.top[one] >> 23, 20u);
        const u32 term = (u32)__fmul_rn(t[h], __uint_as_float(scale << 23));
        sum[0] += one ? 0 : term;
        sum[1] += one ? term : 0;
    }
    #pragma unroll
    for (int p = 0; p < 2; p++) {
        if (p >= parts) continue;
        sum[p] = warp_sum(sum[p]);
        if (first_lane) atomicAdd(&shared.sum[p], sum[p]);
    }
}

// Both, for a page in one block's registers.
template <typename T, bool FAST>
__device__ void statistics(const Page<T, FAST>& page, const PartBound (&bound)[2], Shared& shared) {
    float t[2] = {0, 0};
    find_extremes(page, bound, t, shared);
    if (bound[0].kind != KIND_RMS && bound[1].kind != KIND_RMS) return;
    __syncthreads();
    find_sums(page, bound, t, shared);
}

// 2.7, by one thread a part, from the statistics: step[p], NO_STEP where the page must be raw; and whether 2.8 may
// apply. It does not if the sampled values have bits below the finest candidate's, and no group can be escaped.
template <typename T>
__device__ void choose_step(u32 p, const PartBound& bound, Shared& shared) {
    int s = bound.step;
    int limit = 0;   // 2^limit: an upper limit of the magnitudes
    bool zeros = false;
    if (bound.kind == KIND_RMS) {
        const u32 top = shared.top[p];
        const int exponent = (int)(top >> 23) - 126;
        limit = (exponent + 1) >> 1;
        zeros = top == 0;
        if (zeros) s = 0;
        else if (exponent < -99 || top >= INFINITE_BITS) s = NO_STEP;
        else {
            const double sum = __dadd_rn((double)shared.sum[p], __dmul_rn(4096.0, (double)shared.sum_high[p]));
            s = step_number(__dmul_rn(bound.factor, sum), exponent - 20, true);
        }
    } else if (bound.kind == KIND_REL) {
        const u32 highest = key_bits(shared.top[p]), lowest = key_bits(shared.bottom[p]);   // lowest: negated
        const double two_eb = __dmul_rn(bound.factor, __dadd_rn(to_double(highest), to_double(lowest)));
        const u32 largest = max(highest & 0x7fffffffu, lowest & 0x7fffffffu);
        limit = (int)(largest >> 23) - 126;
        zeros = shared.top[p] == 0 || largest == 0;   // no finite value, or none but zeros
        s = zeros ? 0 : two_eb > 0 ? step_number(two_eb, 0, false) : NO_STEP;
    }
    s = s < Storage<T>::lowest_step ? NO_STEP : min(s, STEP_LIMIT);
    shared.step[p] = s;
    if (bound.kind == KIND_ABS || zeros || s == NO_STEP) return;
    const int finest = ((s - 4) >> 2) - 2;   // exponent of the finest candidate's unit
    const int k = s >> 2;   // below 2^(k+12) no magnitude reaches 2^13, nor a step 2^(k+2)
    if ((int)shared.fine[p] <= 1000 - finest || limit > k + 11 || max(limit, k + 3) >= Storage<T>::top) {   // 2^13 of the finest candidate's 2^k
        u32 candidates = 0;
        for (int d = 0; d < 9; d++) candidates |= (u32)(abs(s + 4 - d) <= STEP_LIMIT) << d;
        atomicOr(&shared.maybe_seen, candidates << 9 * p);
    }
}

// Copies the page as it is. Returns this thread's part of the checksum.
__device__ inline u64 write_raw(const u16* data, u32 values, u32* payload) {
    u64 check = 0;
    u32 done = 0;
    if ((u64)data % 16 == 0) {
        const uint4* from = (const uint4*)data;
        for (u32 i = threadIdx.x; i < values / 8; i += blockDim.x) {
            uint4 w = __ldg(from + i);
            store16(payload + 4 * i, w);
            check = fold(check) + term4(w, PAYLOAD_INDEX + 4 * i);
        }
        done = values / 8 * 4;
    }
    for (u32 i = done + threadIdx.x; i < values / 2; i += blockDim.x) {
        u32 w = load_pair(data + 2 * i);
        payload[i] = w;
        check = fold(check) + term(w, PAYLOAD_INDEX + i);
    }
    if (values % 2 && threadIdx.x == 0) {
        ((u16*)payload)[values - 1] = data[values - 1];
        check += term(data[values - 1], PAYLOAD_INDEX + values / 2);
    }
    return check;
}

// 2.5: the groups of this thread become plane words; their width codes go to `shared`. Returns whether the whole warp
// has the narrow ones.
template <typename T, bool FAST>
__device__ __forceinline__ bool make_planes(
    Page<T, FAST>& page, u32 code0, u32 code1, const Quantiser& quantiser, const Quantiser& quantiser1, Shared& shared) {
    ((u8*)shared.codes)[threadIdx.x] = (u8)(code0 | code1 << 4);
    const bool narrow = __all_sync(FULL, max(code0, code1) <= NARROW_CODE);
    if (narrow) {
        if (__all_sync(FULL, max(code0, code1) <= LOW_CODE)) {
            page.template narrow_planes<true>(0, quantiser);
            page.template narrow_planes<true>(1, quantiser1);
        } else {
            page.template narrow_planes<false>(0, quantiser);
            page.template narrow_planes<false>(1, quantiser1);
        }
    } else {
        page.planes(0, code0, quantiser);
        page.planes(1, code1, quantiser1);
    }
    return narrow;
}

// Puts a chunk's width codes and plane words in the payload, at shared.place: of a page's words, this thread's first is
// number `at` of the chunk, which has `chunk_words` from word `start` of the payload on. A barrier. Returns this
// thread's part of the checksum.
template <typename T, bool FAST>
__device__ __forceinline__ u64 write_chunk(
    const Page<T, FAST>& page, u32 chunk, bool narrow, u32 at, u32 start, u32 chunk_words, Shared& shared, uint4* image4) {
    const u32 tid = threadIdx.x, shift = start & 3;
    u32* const image = (u32*)image4;
    u64 check = 0;
    at += shift;
    #pragma unroll
    for (int h = 0; h < 2; h++) {
        const u32 code = ((const u8*)shared.codes)[tid] >> 4 * h & 15;   // rather than kept in registers
        const u32 magnitudes = code == CODE_ESCAPE ? 15 : code - 1;
        if (narrow) {
            #pragma unroll
            for (u32 p = 0; p < 7; p++) {
                if (p + 1 < code) image[at + p] = page.pair[h][p];
            }
            if (code) image[at + magnitudes] = page.pair[h][7];
        } else if (code) {
            #pragma unroll
            for (u32 p = 0; p < 15; p++) {
                if (p < magnitudes) image[at + p] = page.pair[h][p];
            }
            image[at + magnitudes] = page.pair[h][15];
        }
        at += code_words(code);
    }
    __syncthreads();
    u32* const payload = (u32*)shared.payload + 4ull * shared.place;
    // codes: 16 bytes a thread
    const u32 code_bytes = min(blockDim.x, page.g.code_bytes() - chunk * blockDim.x);
    if (tid < code_bytes / 16) {
        const uint4 w = ((const uint4*)shared.codes)[tid];
        const u32 i = chunk * (blockDim.x / 16) + tid;
        store16(payload + 4 * i, w);
        check += term4(w, PAYLOAD_INDEX + 4 * i);
    }
    const u32 end = shift + chunk_words, base = start - shift;
    for (u32 i = 4 * tid; i < end; i += 4 * blockDim.x) {
        const uint4 w = image4[i / 4];
        if (i >= shift && i + 4 <= end) {
            store16(payload + base + i, w);
            check += term4(w, PAYLOAD_INDEX + base + i);
            continue;
        }
        const u32 word[4] = {w.x, w.y, w.z, w.w};   // the edges of the chunk
        #pragma unroll
        for (u32 j = 0; j < 4; j++) {
            if (i + j < shift || i + j >= end) continue;
            payload[base + i + j] = word[j];
            check += term(word[j], PAYLOAD_INDEX + base + i + j);
        }
    }
    return check;
}
