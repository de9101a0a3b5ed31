// kv_encode: codes a batch of independent pages, one thread block a page at a time, each thread two groups.
//
//   in   pages[num_pages]     u64    addresses of the pages, 2-byte aligned (8 or 16: wide loads)
//   in   payloads[num_pages]  u64    addresses to write to, 16-byte aligned, device or mapped pinned host memory:
//                                    a slot of a raw page's size each, or, with cursors, the region a page shares
//   out  rows[num_pages]      uint4  table rows (format.py 2.1): word 1, payload bytes, checksum, place: the payload
//                                    lies 16 place bytes after payloads[page]
//   in   regions[num_pages]   u32    the page's index in cursors; null: 0 for all
//   i/o  cursors[]            u32    room taken in each region so far, in 16 bytes; null: slots, place is 0. A region
//                                    must hold its pages raw, each rounded up to 16 bytes
//   in   geometry, coding (0 raw, 1 fixed), and for each part: kind of bound (0 abs, 1 rel, 2 rms), the step
//        number (abs) and the factor (rel: 2 A; rms: 4 A A / n) of 2.7
//   FAST: every thread's two groups are neighbours in one part and one row of token groups, pages are 8-byte
//        aligned, and the block's threads cover a page
//   grid any (pages are taken in turn)     block  a multiple of 32 up to 512: two groups a thread; larger
//        pages go in chunks     shared  64 bytes a group of a chunk + 16
//
// Guarantee: the bytes that reference.encode_page writes; places of a shared region in no particular order. FAST
// reads a page once; otherwise up to four times, all but the first mostly from L2. Format: section 2.
#include "kv_common.cuh"

#define KIND_ABS 0
#define KIND_REL 1
#define KIND_RMS 2
#define NO_STEP (-1000)          // the page must be raw
#define MAGIC_FLOAT 8388608.0f   // 2^23: adding it rounds to an integer, which is then in the low bits
#define MAGIC_BITS 0x4b000000u
#define MAGNITUDE_MASK 0x1fffu   // magnitudes below 2^13

struct PartBound {
    int kind, step;
    double factor;
};

// Floats in an order-preserving way, so that integer maxima serve.
__device__ inline u32 float_key(float x) {
    u32 b = __float_as_uint(x);
    return b ^ ((int)b >> 31 | 0x80000000u);
}
__device__ inline float key_float(u32 key) {
    return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
}

// 2.6: |x| to 2^23 + q as a float's bits. Not below 2^23 + 2^13 where q is too large or x not finite.
struct Quantiser {
    float inverse, inverse_pow2, shifted;

    __device__ explicit Quantiser(int s) {
        inverse = __fdiv_rn(1.0f, Grid(s).step);
        inverse_pow2 = __uint_as_float((u32)(127 - (s >> 2)) << 23);
        shifted = MAGIC_FLOAT - 8.0f * (s & 3);
    }
    __device__ u32 operator()(float x) const {
        return __float_as_uint(
            fmaxf(__fmaf_rn(x, inverse, MAGIC_FLOAT), __fmaf_rn(x, inverse_pow2, shifted)));
    }
};

// 2.7: the step number for two_eb 2^exponent, or for its square.
__device__ inline int step_number(double two_eb, int exponent, bool squared) {
    int e = (int)((u64)__double_as_longlong(two_eb) >> 52 & 2047) - 1023 + exponent;
    int k = squared ? e >> 1 : e;
    u64 mantissa = (u64)__double_as_longlong(two_eb) & 0xfffffffffffffull;
    double ratio = __longlong_as_double((long long)(mantissa | (u64)(1023 + e - (squared ? 2 * k : k)) << 52));
    int m = 0;
    #pragma unroll
    for (int i = 0; i < 3; i++) {
        double f = (1.25 + 0.25 * i) * (1 + 1.0 / 65536);
        m += ratio >= (squared ? __dmul_rn(f, f) : f);
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

    __device__ bool present(int h) const { return first + (FAST ? 0 : h) < g.groups; }
    __device__ u32 part(int h) const { return parts[FAST ? 0 : h]; }

    __device__ Page(const u16* data, const Geometry& g) : data(data), g(g) {}

    __device__ void load(u32 chunk) {
        first = (chunk * blockDim.x + threadIdx.x) * 2;
        #pragma unroll
        for (int h = 0; h < 2; h++) {
            parts[h] = present(h) ? g.part(first + h) : 0;
            #pragma unroll
            for (int i = 0; i < 16; i++) pair[h][i] = 0;
        }
        if constexpr (FAST) {
            if (!present(0)) return;
            const uint2* p = (const uint2*)(data + g.offset(first));
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
                if (!present(h)) continue;
                if (g.flat() && (u64)data % 16 == 0 && (first + h + 1) * 32 <= g.values) {
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
                for (int i = 0; i < 16; i++) pair[h][i] = pair_at(first + h, i);
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
        simple = t < __int_as_float(0x7f800000) && (t > 0 || (any & 0x7fff7fffu) == 0);
        if (simple) return t;
        a = b = 0;   // rare: read again, so that no registers are kept for it
        bool nonzero = false;
        #pragma unroll 1
        for (int i = 0; i < 16; i++) {
            const u32 v = pair_at(first + h, i);
            float x = Storage<T>::lo(v), y = Storage<T>::hi(v);
            x = isfinite_(x) ? x : 0;
            y = isfinite_(y) ? y : 0;
            nonzero |= x != 0 || y != 0;
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
                if (!isfinite_(x[j])) {
                    all_finite = false;
                    continue;
                }
                top = max(top, float_key(x[j]));
                bottom = max(bottom, float_key(-x[j]));
            }
        }
        return all_finite;
    }

    static __device__ bool isfinite_(float x) { return fabsf(x) <= 3.4028234664e38f; }

    // 2.6 for group h: its width code; pair[h] becomes magnitudes with sign bits, or stays what it was (code 15).
    __device__ u32 quantise(int h, int s) {
        const Quantiser quantiser(s);
        u32 largest = 0;
        #pragma unroll
        for (int i = 0; i < 16; i++) largest = Storage<T>::maximum(largest, pair[h][i] & 0x7fff7fffu);
        largest = Storage<T>::maximum(largest, largest >> 16);
        const u32 bits = quantiser(Storage<T>::lo(largest));
        if (bits & ~(MAGIC_BITS | MAGNITUDE_MASK)) return CODE_ESCAPE;
        const u32 code = 33 - __clz(bits & MAGNITUDE_MASK);
        u32 negative_zero = 0;
        if (code == 1) {   // every magnitude is 0: signs matter only for -0.0
            #pragma unroll 1
            for (int i = 0; present(h) && i < 16; i++) {
                const u32 v = pair_at(first + h, i);
                negative_zero |= (v & 0xffffu) == 0x8000u || v >> 16 == 0x8000u;
            }
        }
        #pragma unroll
        for (int i = 0; i < 16; i++) {
            const u32 magnitude = pair[h][i] & 0x7fff7fffu;
            const u32 q = __byte_perm(quantiser(Storage<T>::lo(magnitude)), quantiser(Storage<T>::hi(magnitude)), 0x5410);
            pair[h][i] = q | (pair[h][i] & 0x80008000u);
        }
        return code == 1 ? negative_zero : code;
    }
};

// 2.8: whether x lies on the grid of s; sets `escaped` if its magnitude there is too large for a width code.
__device__ inline bool on_grid(float x, int s, bool& escaped) {
    const Grid grid(s);
    const float q = __uint_as_float(Quantiser(s)(fabsf(x))) - MAGIC_FLOAT;
    escaped |= !(q <= (float)MAGNITUDE_MASK);
    return grid.point(q) == fabsf(x);
}

// 2.8, exactly: the bits of `fits` (bit 9 p + d: step s[p] + 4 - d) on whose grids this thread's groups lie.
template <typename T, bool FAST>
__device__ u32 groups_that_fit(const Page<T, FAST>& page, u32 fits, int s0, int s1) {
    #pragma unroll 1
    for (u32 group = threadIdx.x; group < page.g.groups; group += blockDim.x) {
        const int p = page.g.part(group);
        #pragma unroll 1
        for (int d = 0; d < 9; d++) {
            const int candidate = (p ? s1 : s0) + 4 - d;
            if (!(fits >> (9 * p + d) & 1)) continue;
            bool all_on = abs(candidate) <= STEP_LIMIT, escaped = false;
            #pragma unroll 1
            for (int i = 0; all_on && i < 16; i++) {
                const u32 v = page.pair_at(group, i);
                all_on &= on_grid(Storage<T>::lo(v), candidate, escaped);
                all_on &= on_grid(Storage<T>::hi(v), candidate, escaped);
            }
            #pragma unroll 1
            for (int i = 0; !all_on && !escaped && i < 16 && abs(candidate) <= STEP_LIMIT; i++) {
                const u32 v = page.pair_at(group, i);
                on_grid(Storage<T>::lo(v), candidate, escaped);
                on_grid(Storage<T>::hi(v), candidate, escaped);
            }
            if (!all_on && !escaped) fits &= ~(1u << (9 * p + d));
        }
    }
    return fits;
}

struct Shared {
    u32 codes[MAX_THREADS / 4];   // width codes of a chunk, one byte a thread
    u32 scan[MAX_WARPS];
    u32 top[2][MAX_WARPS], bottom[2][MAX_WARPS];
    u64 sum[2][MAX_WARPS];
    u32 fits[MAX_WARPS], check[MAX_WARPS];
    u32 word1;                    // of the page's row, if it is not raw
    u32 place;                    // of the payload, in 16 bytes from payloads[page]
};

// Largest v of the block, from one slot a warp; the caller separates reuses of `slots` by a barrier.
__device__ inline u32 slots_max(const u32* slots) {
    const u32 lane = threadIdx.x & 31;
    return __reduce_max_sync(FULL, lane < blockDim.x >> 5 ? slots[lane] : 0);
}
__device__ inline u64 slots_sum(const u64* slots) {
    u64 sum = 0;
    for (u32 w = 0; w < blockDim.x >> 5; w++) sum += slots[w];
    return sum;
}

// 2.7 and 2.8: the step numbers of a page's parts. NO_STEP where the page must be raw. On return the page's last
// chunk is loaded.
template <typename T, bool FAST>
__device__ void choose_steps(Page<T, FAST>& page, u32 chunks, const PartBound (&bound)[2], Shared& shared, int (&s)[2]) {
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const u32 parts = page.g.kw == page.g.period ? 1 : 2;
    u32 top[2] = {0, 0}, bottom[2] = {0, 0};
    float t[2] = {0, 0}, largest = 0;   // largest: an upper limit of x^2 in the first group
    s[1] = 0;

    for (u32 chunk = 0; chunk < chunks; chunk++) {
        if (!FAST) page.load(chunk);
        #pragma unroll
        for (int h = 0; h < 2; h++) {
            const bool one = page.part(h);
            const int kind = one ? bound[1].kind : bound[0].kind;
            u32 group_top = 0, group_bottom = 0;
            if (kind == KIND_ABS || !page.present(h)) continue;
            if (kind == KIND_RMS) {
                bool simple;
                t[h] = page.squares(h, simple);
                if (h == 0) largest = simple ? t[h] : __int_as_float(0x7f800000);
                group_top = __float_as_uint(t[h]);
            } else {
                const bool all_finite = page.extremes(h, group_top, group_bottom);
                const float x = fmaxf(fabsf(key_float(group_top)), fabsf(key_float(group_bottom)));
                if (h == 0) largest = all_finite ? x * x : __int_as_float(0x7f800000);
            }
            top[0] = max(top[0], one ? 0 : group_top), top[1] = max(top[1], one ? group_top : 0);
            bottom[0] = max(bottom[0], one ? 0 : group_bottom), bottom[1] = max(bottom[1], one ? group_bottom : 0);
        }
    }
    #pragma unroll
    for (int p = 0; p < 2; p++) {
        u32 a = __reduce_max_sync(FULL, top[p]), b = __reduce_max_sync(FULL, bottom[p]);
        if (lane == 0) shared.top[p][warp] = a, shared.bottom[p][warp] = b;
    }
    __syncthreads();
    #pragma unroll
    for (int p = 0; p < 2; p++) top[p] = slots_max(shared.top[p]), bottom[p] = slots_max(shared.bottom[p]);

    if (bound[0].kind == KIND_RMS || bound[1].kind == KIND_RMS) {
        u64 sum[2] = {0, 0};
        for (u32 chunk = 0; chunk < chunks; chunk++) {
            if (!FAST) page.load(chunk);
            u32 chunk_sum[2] = {0, 0};
            #pragma unroll
            for (int h = 0; h < 2; h++) {
                const bool one = page.part(h);
                if ((one ? bound[1].kind : bound[0].kind) != KIND_RMS || !page.present(h)) continue;
                bool simple;
                if (!FAST) t[h] = page.squares(h, simple);
                // 2^(20-E), E = exponent of the largest t + 1; limited where the page will be raw anyway
                const int scale = 127 + 20 + 126 - (int)max((one ? top[1] : top[0]) >> 23, 20u);
                u32 part_of_sum = (u32)__fmul_rn(t[h], __uint_as_float((u32)scale << 23));
                if (one) chunk_sum[1] += part_of_sum;
                else chunk_sum[0] += part_of_sum;
            }
            #pragma unroll
            for (int p = 0; p < 2; p++) sum[p] += warp_sum(chunk_sum[p]);
        }
        if (lane == 0) shared.sum[0][warp] = sum[0], shared.sum[1][warp] = sum[1];
        __syncthreads();
    }
    bool seen[2] = {false, false};   // whether 2.8 applies
    #pragma unroll
    for (int p = 0; p < 2; p++) {
        if (p >= parts) break;
        bool zeros = false;
        if (bound[p].kind == KIND_ABS) {
            s[p] = bound[p].step;
        } else if (bound[p].kind == KIND_RMS) {
            const int exponent = (int)(top[p] >> 23) - 126;
            if (top[p] == 0) zeros = true;
            else if (exponent < -99 || top[p] >= 0x7f800000u) s[p] = NO_STEP;
            else s[p] = step_number(__dmul_rn(bound[p].factor, (double)slots_sum(shared.sum[p])), exponent - 20, true);
        } else {
            const double highest = key_float(top[p]), lowest = -key_float(bottom[p]);
            const double two_eb = __dmul_rn(bound[p].factor, __dsub_rn(highest, lowest));
            if (top[p] == 0 || (highest == 0 && lowest == 0)) zeros = true;
            else s[p] = two_eb > 0 ? step_number(two_eb, 0, false) : NO_STEP;
        }
        if (zeros) s[p] = 0;
        if (s[p] < -STEP_LIMIT) s[p] = NO_STEP;
        s[p] = min(s[p], STEP_LIMIT);
        seen[p] = bound[p].kind != KIND_ABS && !zeros;
    }
    if (s[0] == NO_STEP || s[1] == NO_STEP) return;

    // 2.8, first by one value of each group of two warps, which rules all candidates out on data not seen before
    if (!seen[0] && !seen[1]) return;
    u32 fits = (seen[0] ? 0x1ffu : 0) | (seen[1] ? 0x1ffu << 9 : 0);
    if (warp == 0 || warp == blockDim.x >> 6) {
        const int p = page.part(0);
        const int step = p ? s[1] : s[0];
        const float inverse = Quantiser(step).inverse;
        // below this limit no candidate would escape the group
        if (page.present(0) && (p ? seen[1] : seen[0]) && largest * inverse * inverse < 4194304.0f) {
            const float x = Storage<T>::lo(page.pair[0][0]);
            #pragma unroll 1
            for (int d = 0; d < 9; d++) {
                const int candidate = step + 4 - d;
                bool escaped = false;
                if (abs(candidate) > STEP_LIMIT || !on_grid(x, candidate, escaped)) {
                    fits &= ~(1u << (9 * p + d));
                }
            }
        }
    }
    fits = __reduce_and_sync(FULL, fits);
    if (lane == 0) shared.fits[warp] = fits;
    __syncthreads();
    fits = __reduce_and_sync(FULL, lane < blockDim.x >> 5 ? shared.fits[lane] : FULL);
    if (fits == 0) return;

    // rare: look at every value
    fits = groups_that_fit(page, fits, s[0], s[1]);
    fits = __reduce_and_sync(FULL, fits);
    __syncthreads();   // everybody has read shared.fits
    if (lane == 0) shared.fits[warp] = fits;
    __syncthreads();
    fits = __reduce_and_sync(FULL, lane < blockDim.x >> 5 ? shared.fits[lane] : FULL);
    if (fits & 0x1ff) s[0] += 5 - __ffs((int)(fits & 0x1ff));
    if (fits >> 9) s[1] += 5 - __ffs((int)(fits >> 9));
    if (FAST) page.load(0);   // rather than keeping it in registers meanwhile
}

// Takes room for a payload from its region and returns where it is; 0 if payloads have slots of their own.
__device__ inline u32 reserve(u32 bytes, u32 index, const u32* regions, u32* cursors) {
    return cursors ? atomicAdd(&cursors[regions ? regions[index] : 0], (bytes + 15) / 16) : 0;
}

// Copies the page as it is. Returns this thread's part of the checksum.
__device__ inline u32 write_raw(const u16* data, u32 values, u32* payload) {
    u32 check = 0;
    u32 done = 0;
    if ((u64)data % 16 == 0) {
        const uint4* from = (const uint4*)data;
        for (u32 i = threadIdx.x; i < values / 8; i += blockDim.x) {
            uint4 w = __ldg(from + i);
            ((uint4*)payload)[i] = w;
            check += mix4(w, PAYLOAD_INDEX + 4 * i);
        }
        done = values / 8 * 4;
    }
    for (u32 i = done + threadIdx.x; i < values / 2; i += blockDim.x) {
        u32 w = load_pair(data + 2 * i);
        payload[i] = w;
        check += mix(w, PAYLOAD_INDEX + i);
    }
    if (values % 2 && threadIdx.x == 0) {
        ((u16*)payload)[values - 1] = data[values - 1];
        check += mix(data[values - 1], PAYLOAD_INDEX + values / 2);
    }
    return check;
}

template <typename T, bool FAST>
__global__ void __launch_bounds__(MAX_THREADS, FAST ? 2 : 1) kv_encode(
    const u64* __restrict__ pages, const u64* __restrict__ payloads, uint4* __restrict__ rows,
    const u32* __restrict__ regions, u32* __restrict__ cursors, u32 num_pages, u32 coding,
    u32 groups, u32 groups_per_row, u32 row_stride, u32 pair_stride, u32 values, u32 period, u32 kw,
    u32 tokens, u32 channels, u32 widths, u32 outer,
    int kind0, int step0, double factor0, int kind1, int step1, double factor1) {
    extern __shared__ uint4 image4[];   // plane words of a chunk, shifted so that 16-byte stores line up
    u32* const image = (u32*)image4;
    __shared__ Shared shared;
    const Geometry g = {groups, groups_per_row, row_stride, pair_stride, values, period, kw, tokens, channels, widths, outer};
    const PartBound bound[2] = {{kind0, step0, factor0}, {kind1, step1, factor1}};
    const u32 tid = threadIdx.x;
    const u32 chunks = FAST ? 1 : (groups + 2 * blockDim.x - 1) / (2 * blockDim.x);
    const u32 first_word = g.code_bytes() / 4;

    for (u32 index = blockIdx.x; index < num_pages; index += gridDim.x) {
        Page<T, FAST> page((const u16*)pages[index], g);
        int s[2];
        u32 check = 0, words = 0;   // words: plane words of the chunks so far
        bool raw = coding == CODING_RAW;
        if (!raw) {
            if (FAST) page.load(0);
            choose_steps<T, FAST>(page, chunks, bound, shared, s);
            raw = s[0] == NO_STEP || s[1] == NO_STEP;
            if (tid == 0) shared.word1 = (s[0] + STEP_BIAS) | (s[1] + STEP_BIAS) << 10 | CODING_FIXED << 20;
        }
        if (!FAST && !raw) {   // the size first, since it decides where the payload goes
            u32 all_words = 0;
            for (u32 chunk = 0; chunk < chunks; chunk++) {
                page.load(chunk);
                u32 chunk_words = code_words(page.quantise(0, page.part(0) ? s[1] : s[0]));
                chunk_words += code_words(page.quantise(1, page.part(1) ? s[1] : s[0]));
                block_scan(chunk_words, shared.scan, chunk_words);
                all_words += chunk_words;
                __syncthreads();   // shared.scan is free again
            }
            raw = 4ull * (first_word + all_words) >= 2ull * values;
            if (tid == 0) shared.place = raw ? 0 : reserve(4 * (first_word + all_words), index, regions, cursors);
        }
        for (u32 chunk = 0; chunk < chunks && !raw; chunk++) {
            if (!FAST) page.load(chunk);
            u32 codes = page.quantise(0, page.part(0) ? s[1] : s[0]);
            codes |= page.quantise(1, page.part(1) ? s[1] : s[0]) << 4;
            ((u8*)shared.codes)[tid] = (u8)codes;
            transpose(page.pair[0]);
            transpose(page.pair[1]);
            u32 chunk_words;
            u32 at = block_scan(code_words(codes & 15) + code_words(codes >> 4), shared.scan, chunk_words);
            if (FAST) {
                raw = 4 * (first_word + chunk_words) >= 2 * values;
                if (raw) break;
                if (tid == 0) shared.place = reserve(4 * (first_word + chunk_words), index, regions, cursors);
            }
            const u32 start = first_word + words, shift = start & 3;
            at += shift;
            #pragma unroll
            for (int h = 0; h < 2; h++) {
                const u32 code = h ? codes >> 4 : codes & 15;
                const u32 magnitudes = code == CODE_ESCAPE ? 15 : code - 1;
                if (code) {
                    #pragma unroll
                    for (u32 p = 0; p < 15; p++) {
                        if (p < magnitudes) image[at + p] = page.pair[h][p];
                    }
                    image[at + magnitudes] = page.pair[h][15];
                }
                at += code_words(code);
            }
            __syncthreads();
            u32* const payload = (u32*)payloads[index] + 4ull * shared.place;
            // codes: 16 bytes a thread
            const u32 code_bytes = min(blockDim.x, g.code_bytes() - chunk * blockDim.x);
            if (tid < code_bytes / 16) {
                const uint4 w = ((const uint4*)shared.codes)[tid];
                const u32 i = chunk * (blockDim.x / 16) + tid;
                ((uint4*)payload)[i] = w;
                check += mix4(w, PAYLOAD_INDEX + 4 * i);
            }
            const u32 end = shift + chunk_words, base = start - shift;
            for (u32 i = 4 * tid; i < end; i += 4 * blockDim.x) {
                const uint4 w = image4[i / 4];
                if (i >= shift && i + 4 <= end) {
                    *(uint4*)(payload + base + i) = w;
                    check += mix4(w, PAYLOAD_INDEX + base + i);
                    continue;
                }
                const u32 word[4] = {w.x, w.y, w.z, w.w};   // the edges of the chunk
                #pragma unroll
                for (u32 j = 0; j < 4; j++) {
                    if (i + j < shift || i + j >= end) continue;
                    payload[base + i + j] = word[j];
                    check += mix(word[j], PAYLOAD_INDEX + base + i + j);
                }
            }
            words += chunk_words;
            if (!FAST) __syncthreads();   // the image and the codes are free again
        }
        if (raw) {
            if (tid == 0) shared.place = reserve(2 * values, index, regions, cursors);
            __syncthreads();
            check = write_raw((const u16*)pages[index], values, (u32*)payloads[index] + 4ull * shared.place);
        }
        check = warp_sum(check);
        if ((tid & 31) == 0) shared.check[tid >> 5] = check;
        __syncthreads();   // also: the image, the codes and every slot are free for the next page
        if (tid == 0) {
            const u32 word1 = raw ? STEP_BIAS | STEP_BIAS << 10 | CODING_RAW << 20 : shared.word1;
            const u32 payload_bytes = raw ? 2 * values : 4 * (first_word + words);
            check = header_checksum<T>(g, word1, payload_bytes);
            for (u32 w = 0; w < blockDim.x >> 5; w++) check += shared.check[w];
            rows[index] = make_uint4(word1, payload_bytes, check, shared.place);
        }
        if (index + gridDim.x < num_pages) __syncthreads();   // thread 0 has read shared.check
    }
}
