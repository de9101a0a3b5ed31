// What kv_encode.cu and kv_decode.cu share: storage types, page geometry, checksum, 16 x 16 bit transpose,
// block-wide sums. Section numbers are those of format.py.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define CODE_ESCAPE 15u      // 2.5: storage bits instead of magnitudes
#define STEP_BIAS 512
#define STEP_LIMIT 400
#define CODING_RAW 0u
#define CODING_FIXED 1u
#define CODING_ENTROPY 2u
#define PAYLOAD_INDEX 8u     // 2.2: index of payload word 0
#define MAX_THREADS 512
#define MAX_WARPS 16
#define FULL 0xffffffffu
#define MAGIC_FLOAT 8388608.0f   // 2^23: an integer below 2^23 added to it stands in the low bits of the sum
#define MAGIC_BITS 0x4b000000u
#define MAGNITUDE_MASK 0x1fffu   // magnitudes below 2^13

struct float16 {};
struct bfloat16 {};

// A word holds two storage values: lo = first, hi = second value of a pair. maximum keeps NaN; pack rounds to
// nearest even.
template <typename T> struct Storage;

template <> struct Storage<bfloat16> {
    static constexpr u32 dtype = 1;
    static constexpr int lowest_step = -STEP_LIMIT;   // 2.7
    static constexpr float largest = 0x1.fep127f;     // the largest finite value, below 2^top
    static constexpr int top = 128;
    static __device__ float lo(u32 pair) { return __uint_as_float(pair << 16); }
    static __device__ float hi(u32 pair) { return __uint_as_float(pair & 0xffff0000u); }
    static __device__ u32 maximum(u32 a, u32 b) {
        asm("max.NaN.bf16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
        return a;
    }
    static __device__ u32 pack(float lo, float hi) {
        u32 pair;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
        return pair;
    }
};

template <> struct Storage<float16> {
    static constexpr u32 dtype = 0;
    static constexpr int lowest_step = -88;
    static constexpr float largest = 65504.0f;
    static constexpr int top = 16;
    static __device__ float lo(u32 pair) {
        float x;
        asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l; }" : "=f"(x) : "r"(pair));
        return x;
    }
    static __device__ float hi(u32 pair) {
        float x;
        asm("{ .reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h; }" : "=f"(x) : "r"(pair));
        return x;
    }
    static __device__ u32 maximum(u32 a, u32 b) {
        asm("max.NaN.f16x2 %0, %0, %1;" : "+r"(a) : "r"(b));
        return a;
    }
    static __device__ u32 pack(float lo, float hi) {
        u32 pair;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(hi), "f"(lo));
        return pair;
    }
};

#define NARROW_CODE 8u       // up to this width code a group has 7 magnitude planes at most, and half the work
#define LOW_CODE 6u          // up to this one no magnitude reaches 32, from where on grids are coarser

// n / d for n and d below 2^20: the quotient is never closer to an integer than the approximation is wrong.
__device__ inline u32 fast_divide(u32 n, u32 d) { return (u32)__fdividef((float)n + 0.5f, (float)d); }

// Where groups lie in a page (2.4), in values, and the header words that all pages of a batch share.
struct Geometry {
    u32 groups, groups_per_row, row_stride, pair_stride;  // flat: one group a row, strides 32 and 2
    u32 values, period, kw;                               // one part: kw = period
    u32 tokens, channels, widths, outer;                  // header words 2, 3, 4, 5

    __device__ bool flat() const { return pair_stride == 2; }
    __device__ u32 code_bytes() const { return (groups + 31) / 32 * 16; }
    __device__ u32 parts() const { return kw == period ? 1 : 2; }
    __device__ u32 offset(u32 group) const {
        u32 row = group / groups_per_row;
        return row * row_stride + 2 * (group - row * groups_per_row);
    }
    __device__ u32 part(u32 group) const {
        if (kw == period) return 0;
        u32 channel = flat() ? group * 32 : group % groups_per_row * 2;
        return channel % period >= kw;
    }
    // Both. FAST: for token groups and fewer than 2^20 groups.
    template <bool FAST = true> __device__ u32 locate(u32 group, u32& part) const {
        if constexpr (!FAST) {
            part = this->part(group);
            return offset(group);
        }
        const u32 row = fast_divide(group, groups_per_row), channel = 2 * (group - row * groups_per_row);
        part = kw != period && channel - fast_divide(channel, period) * period >= kw;
        return row * row_stride + channel;
    }
};

// The grid of a step number (2.3).
struct alignas(16) Grid {
    float step, pow2, offset, offset_pow2;

    Grid() = default;

    __device__ explicit Grid(int s) {
        const int k = s >> 2;                             // floor
        pow2 = __uint_as_float((u32)(127 + k) << 23);
        step = __fmul_rn((float)((s & 3) + 4), __uint_as_float((u32)(125 + k) << 23));
        offset = -MAGIC_FLOAT * step;
        offset_pow2 = 32.0f * (step - pow2) - MAGIC_FLOAT * pow2;   // 20 significant bits: exact
    }
    // The point of q, given as 2^23 + q; exact, since every product and sum is, q < 2^15.
    __device__ float point(float magic_q) const {
        return fminf(__fmaf_rn(magic_q, step, offset), __fmaf_rn(magic_q, pow2, offset_pow2));
    }
};

// 2.6: |x| to 2^23 + q as a float's bits. Not below 2^23 + 2^13 where q is too large or x not finite.
struct Quantiser {
    float step, inverse, inverse_pow2, shifted;

    __device__ explicit Quantiser(int s) {
        const int m = s & 3;   // + 4; 1 / step is the rounded 1 / m, scaled
        step = Grid(s).step;
        inverse = (m == 0 ? 1 / 4.0f : m == 1 ? 1 / 5.0f : m == 2 ? 1 / 6.0f : 1 / 7.0f) *
                  __uint_as_float((u32)(129 - (s >> 2)) << 23);
        inverse_pow2 = __uint_as_float((u32)(127 - (s >> 2)) << 23);
        shifted = MAGIC_FLOAT - 8.0f * (s & 3);
    }
    // 2.5: whether a group with the magnitude x needs its storage bits kept.
    template <typename T> __device__ bool escapes(float x) const {
        return (*this)(x) & ~(MAGIC_BITS | MAGNITUDE_MASK) || !(__fadd_rn(x, step) <= Storage<T>::largest);
    }
    __device__ u32 operator()(float x) const {
        return __float_as_uint(fmaxf(__fmaf_rn(x, inverse, MAGIC_FLOAT), __fmaf_rn(x, inverse_pow2, shifted)));
    }
    // The same plus OFFSET, where q is small. LOW: q < 32, to which the first of the two slopes leads.
    template <bool LOW, u32 OFFSET = 0> __device__ u32 narrow(float x) const {
        const float q = __fmaf_rn(x, inverse, MAGIC_FLOAT + OFFSET);
        return __float_as_uint(LOW ? q : fmaxf(q, __fmaf_rn(x, inverse_pow2, shifted + OFFSET)));
    }
};

// 2.2. Terms are added up in 64 bits (a term has up to 58), and folded when there are many: 2^32 = 5 mod 2^32 - 5.
__device__ inline u64 term(u32 word, u32 index) { return (u64)word * ((index + 1) * 0x9E3779B1u & 0x3ffffffu | 1u); }
__device__ inline u64 term4(uint4 w, u32 index) {
    return term(w.x, index) + term(w.y, index + 1) + term(w.z, index + 2) + term(w.w, index + 3);
}
__device__ inline u64 fold(u64 sum) { return (sum & 0xffffffffu) + 5 * (sum >> 32); }
__device__ inline u32 residue(u64 sum) {
    sum = fold(fold(sum));
    return (u32)(sum < 0xfffffffbu ? sum : sum - 0xfffffffbu);
}

template <typename T>
__device__ u64 header_terms(const Geometry& g, u32 word1, u32 payload_bytes) {
    return term('k' | 'v' << 8 | 1 << 16 | Storage<T>::dtype << 24, 0) + term(word1, 1) + term(g.tokens, 2) +
           term(g.channels, 3) + term(g.widths, 4) + term(g.outer, 5) + term(payload_bytes, 6);
}

__device__ inline u32 code_words(u32 code) { return code + (code == CODE_ESCAPE); }

// The bits of a where m has ones, those of b elsewhere: one instruction, which the compiler makes two.
__device__ inline u32 select_bits(u32 m, u32 a, u32 b) {
    u32 r;
    asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(r) : "r"(m), "r"(a), "r"(b));
    return r;
}

// Transposes two 16 x 16 bit matrices at once, in the low and the high halves: afterwards bit i of half h of
// r[p] is what bit p of half h of r[i] was. Its own inverse. The steps commute: `swap_bytes`, then `swap_bits` on
// both halves of r, or the other way round.
template <int N> __device__ inline void swap_bits(u32 (&r)[N], int from) {
    #pragma unroll
    for (int d = 4; d > 0; d >>= 1) {
        const u32 m = d == 4 ? 0x0f0f0f0fu : d == 2 ? 0x33333333u : 0x55555555u;
        #pragma unroll
        for (int i = from; i < from + 8; i++) {
            if (i & d) continue;
            u32 a = r[i], b = r[i + d];
            r[i] = select_bits(m, a, b << d);
            r[i + d] = select_bits(m, a >> d, b);
        }
    }
}

__device__ inline void transpose(u32 (&r)[16]) {
    #pragma unroll
    for (int i = 0; i < 8; i++) {
        u32 a = r[i], b = r[i + 8];
        r[i] = __byte_perm(a, b, 0x6240);
        r[i + 8] = __byte_perm(a, b, 0x7351);
    }
    swap_bits(r, 0);
    swap_bits(r, 8);
}

__device__ inline u32 warp_sum(u32 v) { return __reduce_add_sync(FULL, v); }
// Folded below 2^33 first, so that sums of 16 bits do.
__device__ inline u64 warp_check(u64 sum) {
    sum = fold(fold(sum));
    return warp_sum((u32)sum & 0xffffu) + ((u64)warp_sum((u32)(sum >> 16)) << 16);
}

// Exclusive prefix sum over the block, and its total. Two barriers' worth of care: `shared` must not be in use
// by anybody before the call; it may be reused after the next barrier of the caller.
__device__ inline u32 block_scan(u32 v, u32* shared, u32& total) {
    const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
    u32 inclusive = v;
    #pragma unroll
    for (int d = 1; d < 32; d <<= 1) {
        u32 below = __shfl_up_sync(FULL, inclusive, d);
        if (lane >= d) inclusive += below;
    }
    if (lane == 31) shared[warp] = inclusive;
    __syncthreads();
    u32 sum = lane < warps ? shared[lane] : 0;
    u32 before = warp_sum(lane < warp ? sum : 0);
    total = warp_sum(sum);
    return before + inclusive - v;
}

// One 16-byte store. Written as an assignment, the compiler may split it in four, which costs a mapped host
// buffer nine tenths of the link.
__device__ inline void store16(u32* p, uint4 w) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(w.x), "r"(w.y), "r"(w.z), "r"(w.w) : "memory");
}

// Takes room for a payload from its region and returns where it is; 0 if payloads have slots of their own.
__device__ inline u32 reserve(u32 bytes, u32 index, const u32* regions, u32* cursors) {
    return cursors ? atomicAdd(&cursors[regions ? regions[index] : 0], (bytes + 15) / 16) : 0;
}

// Two values of memory that is only 2-byte aligned.
__device__ inline u32 load_pair(const u16* p) { return p[0] | (u32)p[1] << 16; }
