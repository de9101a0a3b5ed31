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
#define INFINITE_BITS 0x7f800000u

struct PartBound {
    int kind, step;
    double factor;
};

// What the threads of a block share about a page. thread 0 clears it between two barriers.
struct Shared {
    u32 codes[MAX_THREADS / 4];   // width codes of a chunk, one byte a thread
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

// Floats in an order-preserving way, so that integer maxima serve.
__device__ inline u32 float_key(float x) {
    u32 b = __float_as_uint(x);
    return b ^ ((int)b >> 31 | 0x80000000u);
}
__device__ inline float key_float(u32 key) {
    return __uint_as_float(key & 0x80000000u ? key ^ 0x80000000u : ~key);
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
                const bool good = finite(x[j]);
                const bool counts = good && (FAST || (first + h) * 32 + 2 * i + j < g.values);   // no padding
                all_finite &= good;
                top = max(top, counts ? float_key(x[j]) : 0);
                bottom = max(bottom, counts ? float_key(-x[j]) : 0);
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
    __device__ void narrow_planes(int h, const Quantiser& quantiser) {
        #pragma unroll
        for (int i = 0; i < 8; i++) {
            const u32 p = pair[h][i] & 0x7fff7fffu, q = pair[h][i + 8] & 0x7fff7fffu;
            const u32 firsts = __byte_perm(quantiser(Storage<T>::lo(p)), quantiser(Storage<T>::lo(q)), 0x0040);
            const u32 seconds = __byte_perm(quantiser(Storage<T>::hi(p)), quantiser(Storage<T>::hi(q)), 0x0040);
            const u32 signs = __byte_perm(pair[h][i], pair[h][i + 8], 0x7351) & 0x80808080u;
            pair[h][i] = __byte_perm(firsts, seconds, 0x5410) | signs;
        }
        swap_bits(pair[h], 0);
    }
};

// 2.8: whether x lies on the grid of s; sets `escaped` if its group is escaped there.
template <typename T>
__device__ bool on_grid(float x, int s, bool& escaped) {
    const Quantiser quantiser(s);
    x = fabsf(x);
    escaped |= quantiser.escapes<T>(x);
    return Grid(s).point(__uint_as_float(quantiser(x))) == x;
}

// 2.8, exactly: those bits of shared.maybe_seen on whose grids all of this thread's groups lie.
template <typename T, bool FAST>
__device__ u32 groups_that_fit(const Page<T, FAST>& page, u32 fits, const int (&step)[2]) {
    #pragma unroll 1
    for (u32 group = threadIdx.x; group < page.g.groups; group += blockDim.x) {
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

// 2.7: the statistics of the parts whose bound needs them, in `shared` after the caller's next barrier. On return
// the page's last chunk is loaded.
template <typename T, bool FAST>
__device__ void statistics(Page<T, FAST>& page, u32 chunks, const PartBound (&bound)[2], Shared& shared) {
    const bool first_lane = (threadIdx.x & 31) == 0;
    const u32 parts = page.g.parts();
    u32 top[2] = {0, 0}, bottom[2] = {0, 0}, fine[2] = {0, 0};
    float t[2] = {0, 0};

    for (u32 chunk = 0; chunk < chunks; chunk++) {
        if (!FAST) page.load(chunk);
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
    if (bound[0].kind != KIND_RMS && bound[1].kind != KIND_RMS) return;
    __syncthreads();
    for (u32 chunk = 0; chunk < chunks; chunk++) {
        if (!FAST) page.load(chunk);
        u32 sum[2] = {0, 0};
        #pragma unroll
        for (int h = 0; h < 2; h++) {
            const bool one = page.part(h);
            if ((one ? bound[1].kind : bound[0].kind) != KIND_RMS || !page.present(h)) continue;
            bool simple;
            if (!FAST) t[h] = page.squares(h, simple);
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
            if (!first_lane) continue;
            atomicAdd(&shared.sum[p], FAST ? sum[p] : sum[p] & 0xfffu);   // FAST: less than 2^30 in all
            if (!FAST) atomicAdd(&shared.sum_high[p], sum[p] >> 12);
        }
    }
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
        const float highest = key_float(shared.top[p]), lowest = -key_float(shared.bottom[p]);
        const double two_eb = __dmul_rn(bound.factor, __dsub_rn((double)highest, (double)lowest));
        const float largest = fmaxf(fabsf(highest), fabsf(lowest));
        limit = (int)(__float_as_uint(largest) >> 23) - 126;
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
        bool raw = coding == CODING_RAW;
        u32 largest0 = 0, largest1 = 0;
        if (FAST && !raw) page.load(0);
        if (tid == 0) {
            shared.clear();
            shared.payload = payloads[index];
        }
        __syncthreads();
        if (!raw) {
            if (kind0 != KIND_ABS || kind1 != KIND_ABS) {
                statistics(page, chunks, bound, shared);
                __syncthreads();
            }
            if (tid < g.parts()) choose_step<T>(tid, {tid ? kind1 : kind0, tid ? step1 : step0, tid ? factor1 : factor0}, shared);
            if (FAST) largest0 = page.largest_magnitude(0), largest1 = page.largest_magnitude(1);   // meanwhile
            __syncthreads();
            if (shared.maybe_seen) {   // rare: look at every value
                const u32 fits = __reduce_and_sync(FULL, groups_that_fit(page, shared.maybe_seen, shared.step));
                __syncthreads();
                if ((tid & 31) == 0) atomicAnd(&shared.maybe_seen, fits);
                __syncthreads();
                const u32 best = __ffs((int)(shared.maybe_seen >> 9 * (tid & 1) & 0x1ffu));
                if (tid < 2 && best) shared.step[tid] += 5 - (int)best;
                __syncthreads();
                if (FAST) page.load(0);   // rather than keeping it in registers meanwhile
            }
            raw = shared.step[0] == NO_STEP || shared.step[1] == NO_STEP;
        }
        u32 words = 0;   // plane words of the chunks so far
        if (!FAST && !raw) {   // the size first, since it decides where the payload goes
            for (u32 chunk = 0; chunk < chunks; chunk++) {
                page.load(chunk);
                u32 chunk_words = 0;
                #pragma unroll
                for (int h = 0; h < 2; h++) {
                    const Quantiser quantiser(shared.step[page.part(h)]);
                    chunk_words += code_words(page.width_code(h, page.largest_magnitude(h), quantiser));
                }
                block_scan(chunk_words, shared.scan, chunk_words);
                words += chunk_words;
                __syncthreads();   // shared.scan is free again
            }
            raw = 4ull * (first_word + words) >= 2ull * values;
            if (tid == 0 && !raw) shared.place = reserve(4 * (first_word + words), index, regions, cursors);
            words = 0;
        }
        u64 check = 0;
        for (u32 chunk = 0; chunk < chunks && !raw; chunk++) {
            if (!FAST) page.load(chunk);
            const Quantiser quantiser(shared.step[page.part(0)]);
            const Quantiser quantiser1 = FAST ? quantiser : Quantiser(shared.step[page.part(1)]);
            if (!FAST) largest0 = page.largest_magnitude(0), largest1 = page.largest_magnitude(1);
            const u32 code0 = page.width_code(0, largest0, quantiser), code1 = page.width_code(1, largest1, quantiser1);
            ((u8*)shared.codes)[tid] = (u8)(code0 | code1 << 4);
            const bool narrow = __all_sync(FULL, max(code0, code1) <= NARROW_CODE);
            if (narrow) {
                page.narrow_planes(0, quantiser);
                page.narrow_planes(1, quantiser1);
            } else {
                page.planes(0, code0, quantiser);
                page.planes(1, code1, quantiser1);
            }
            u32 chunk_words;
            u32 at = block_scan(code_words(code0) + code_words(code1), shared.scan, chunk_words);
            if (FAST) {
                raw = 4 * (first_word + chunk_words) >= 2 * values;
                if (raw) break;
                if (tid == 0) shared.place = reserve(4 * (first_word + chunk_words), index, regions, cursors);
            }
            const u32 start = first_word + words, shift = start & 3;
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
            const u32 code_bytes = min(blockDim.x, g.code_bytes() - chunk * blockDim.x);
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
            words += chunk_words;
            if (!FAST) check = fold(check);
            if (!FAST) __syncthreads();   // the image and the codes are free again
        }
        if (raw) {
            __syncthreads();   // nobody reads shared.place of a chunk any more
            if (tid == 0) shared.place = reserve(2 * values, index, regions, cursors);
            __syncthreads();
            check = write_raw((const u16*)pages[index], values, (u32*)shared.payload + 4ull * shared.place);
        }
        check = warp_check(check);
        if ((tid & 31) == 0) {
            atomicAdd(&shared.check, (u32)check & 0xffffu);
            atomicAdd(&shared.check_high, (u32)(check >> 16));
        }
        __syncthreads();
        if (tid == 0) {   // which clears `shared` for the next page after this, and all others wait for that
            const u32 step0 = raw ? 0 : shared.step[0], step1 = raw ? 0 : shared.step[1];
            const u32 word1 = (step0 + STEP_BIAS) | (step1 + STEP_BIAS) << 10 | (raw ? CODING_RAW : CODING_FIXED) << 20;
            const u32 payload_bytes = raw ? 2 * values : 4 * (first_word + words);
            check = header_terms<T>(g, word1, payload_bytes) + shared.check + ((u64)shared.check_high << 16);
            rows[index] = make_uint4(word1, payload_bytes, residue(check), shared.place);
        }
    }
}
