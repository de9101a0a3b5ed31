// What kv_decode.cu and kv_decode_large.cu share. Section numbers are those of format.py.
#include "kv_common.cuh"

#define BAD_ROW 1u
#define BAD_CODES 2u
#define BAD_CHECKSUM 4u

struct Shared {
    Grid grid[2];   // of the parts
    __align__(16) u32 codes[MAX_THREADS / 4];
    u64 check[MAX_WARPS];
    u32 scan[MAX_WARPS], bad[MAX_WARPS];
};

extern __shared__ uint4 image4[];   // plane words of a chunk, from a multiple of 4 words on

// What a table row says (2.1).
struct Row {
    bool raw;
    int s0, s1;
    bool good;   // could be an encoder's, as far as the row alone shows

    __device__ Row(const uint4& row, const Geometry& g) {
        const u32 coding = row.x >> 20, bytes = row.y;
        raw = coding == CODING_RAW;
        s0 = (int)(row.x & 1023) - STEP_BIAS, s1 = (int)(row.x >> 10 & 1023) - STEP_BIAS;
        good = raw ? bytes == 2 * g.values && s0 == 0 && s1 == 0
                   : coding == CODING_FIXED && bytes % 4 == 0 && bytes >= g.code_bytes() && bytes < 2 * g.values &&
                         abs(s0) <= STEP_LIMIT && abs(s1) <= (g.kw == g.period ? 0 : STEP_LIMIT);
    }
};

// Width code i of the chunk.
__device__ inline u32 code_of(const Shared& shared, u32 i) { return ((const u8*)shared.codes)[i / 2] >> i % 2 * 4 & 15; }

// Words [begin, begin + count) of a payload of `bytes` bytes to `image`, which starts at word begin rounded down
// to a multiple of 4. A last word that an odd payload has only half of is filled with zeros. Returns this
// thread's part of the checksum.
__device__ inline u64 load_words(const u8* payload, u32 bytes, u32 begin, u32 count, uint4* image) {
    const u32 end = begin + count, base = begin & ~3u, whole = min(end, bytes / 16 * 4);
    const uint4* const from = (const uint4*)payload;
    u64 check = 0;
    for (u32 i = base + 4 * threadIdx.x; i < whole; i += 4 * blockDim.x) {
        const uint4 w = from[i / 4];
        image[(i - base) / 4] = w;
        if (i >= begin && i + 4 <= end) {
            check += term4(w, PAYLOAD_INDEX + i);
            continue;
        }
        const u32 word[4] = {w.x, w.y, w.z, w.w};
        #pragma unroll
        for (u32 j = 0; j < 4; j++) {
            if (i + j >= begin && i + j < end) check += term(word[j], PAYLOAD_INDEX + i + j);
        }
    }
    const u32 i = max(whole, begin) + threadIdx.x;   // at most 3 words and a half
    if (i < end) {
        u32 word = *(const u16*)(payload + 4 * (u64)i);
        if (4 * (u64)i + 4 <= bytes) word |= (u32) * (const u16*)(payload + 4 * (u64)i + 2) << 16;
        ((u32*)image)[i - base] = word;
        check += term(word, PAYLOAD_INDEX + i);
    }
    return check;
}

// Puts a group's values in a page, pair by pair.
template <bool FAST>
struct Writer {
    u16* data;
    const Geometry& g;
    bool present;
    u32 offset;

    __device__ void operator()(u32 i, u32 pair) const {
        u16* const p = data + offset + i * g.pair_stride;
        if constexpr (FAST) {
            if (present) *(u32*)p = pair;
        } else {
            const u32 at = offset + i * g.pair_stride;
            if (present && at < g.values) p[0] = (u16)pair;
            if (present && at + 1 < g.values) p[1] = (u16)(pair >> 16);
        }
    }
};

// 2.3 and 2.5 for one group whose words lie at `words`. The whole warp comes here together; `code` is 0 for a
// thread that has no group.
template <typename T, bool FAST>
__device__ void dequantise(const u32* words, u32 code, const Grid& grid, const Writer<FAST>& put) {
    const u32 magnitudes = code == CODE_ESCAPE ? 15 : code - 1;   // planes before the plane of signs
    if (__all_sync(FULL, code <= NARROW_CODE)) {
        u32 r[8];
        #pragma unroll
        for (u32 p = 0; p < 7; p++) r[p] = p + 1 < code ? words[p] : 0;
        r[7] = code ? words[magnitudes] : 0;
        swap_bits(r, 0);
        // bytes of r[i]: pair i's first value, pair i + 8's first, pair i's second, pair i + 8's second
        #pragma unroll
        for (int i = 0; i < 8; i++) {
            const u32 q = r[i] & 0x7f7f7f7fu;
            const float a = __uint_as_float(__byte_perm(q, MAGIC_BITS, 0x7440));
            const float b = __uint_as_float(__byte_perm(q, MAGIC_BITS, 0x7442));
            const float c = __uint_as_float(__byte_perm(q, MAGIC_BITS, 0x7441));
            const float d = __uint_as_float(__byte_perm(q, MAGIC_BITS, 0x7443));
            put(i, Storage<T>::pack(grid.point(a), grid.point(b)) | (__byte_perm(r[i], 0, 0x2404) & 0x80008000u));
            put(i + 8, Storage<T>::pack(grid.point(c), grid.point(d)) | (__byte_perm(r[i], 0, 0x3414) & 0x80008000u));
        }
        return;
    }
    u32 v[16];
    #pragma unroll
    for (u32 p = 0; p < 15; p++) v[p] = code && p < magnitudes ? words[p] : 0;
    v[15] = code ? words[magnitudes] : 0;
    transpose(v);
    #pragma unroll
    for (int i = 0; i < 16; i++) {
        const u32 q = v[i] & 0x7fff7fffu;
        const float a = __uint_as_float(__byte_perm(q, MAGIC_BITS, 0x7410));
        const float b = __uint_as_float(__byte_perm(q, MAGIC_BITS, 0x7432));
        const u32 y = Storage<T>::pack(grid.point(a), grid.point(b)) | (v[i] & 0x80008000u);
        put(i, code == CODE_ESCAPE ? v[i] : y);
    }
}

// Words of a chunk before this thread's first group, and in the upper half the words of second groups before its
// second; the sums over the block to `sums`. Of `codes` width codes, those from `groups` on must be 0.
__device__ inline u32 scan_words(Shared& shared, u32 codes, u32 groups, u32& sums, u32& bad) {
    u32 both = 0;
    #pragma unroll
    for (u32 h = 0; h < 2; h++) {
        const u32 i = h * blockDim.x + threadIdx.x;
        const u32 code = i < codes ? code_of(shared, i) : 0;
        if (code && i >= groups) bad |= BAD_CODES;
        both |= code_words(code) << 16 * h;
    }
    return block_scan(both, shared.scan, sums);
}

// `count` raw values of the image to a page.
__device__ inline void write_raw(u16* page, u32 count, const uint4* image) {
    u32 done = 0;
    if ((u64)page % 16 == 0) {
        for (u32 i = threadIdx.x; i < count / 8; i += blockDim.x) ((uint4*)page)[i] = image[i];
        done = count / 8 * 8;
    }
    for (u32 i = done + threadIdx.x; i < count; i += blockDim.x) page[i] = ((const u16*)image)[i];
}

// This thread's groups to a page: the chunk's groups threadIdx.x, and threadIdx.x + blockDim.x, whose words begin
// at `first` and at `second` of the image. `before` groups lie in the chunks before.
template <typename T, bool FAST>
__device__ void write_groups(
    const Shared& shared, const Geometry& g, u32 before, const uint4* image, u32 first, u32 second, u16* page) {
    #pragma unroll 1   // one group in registers at a time
    for (u32 h = 0; h < 2; h++) {
        const u32 i = h * blockDim.x + threadIdx.x, group = before + i;
        const bool present = group < g.groups;
        u32 part = 0, offset = 0;
        if (FAST) offset = g.locate(group, part);
        else if (present) offset = g.offset(group), part = g.part(group);
        dequantise<T, FAST>((const u32*)image + (h ? second : first), present ? code_of(shared, i) : 0, shared.grid[part],
                            Writer<FAST>{page, g, present, offset});
    }
}
