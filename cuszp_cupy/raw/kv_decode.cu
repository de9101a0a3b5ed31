// kv_decode: decodes a batch of independent pages, one thread block a page at a time, each thread two groups.
//
//   in   payloads[num_pages]  u64    addresses, 16-byte aligned, device or mapped pinned host memory; the payload
//                                    lies 16 x the row's place after it. Nothing past its payload bytes is read
//   in   rows[num_pages]      uint4  table rows (format.py 2.1); device or mapped pinned host memory
//   out  pages[num_pages]     u64    addresses of the pages, 2-byte aligned (4 or 16: wide stores)
//   out  status[num_pages]    u32    0: good. Else nothing of the page is to be used: 1 the row, 2 the width codes,
//                                    4 the checksum (bits may add up)
//   in   geometry
//   FAST: token groups, pages 4-byte aligned, and the block's threads cover a page
//   grid any (pages are taken in turn)     block  a multiple of 32 up to 512: two groups a thread; larger
//        pages go in chunks     shared  64 bytes a group of a chunk + 16
//
// Guarantee: the page that reference.decode_page returns, for every row and payload an encoder writes. Whatever
// row and payload hold, nothing outside the payload and the page is touched; a damaged page of one chunk is not
// written at all. Format: section 2.
#include "kv_common.cuh"

// Blocks of MAX_THREADS that share a multiprocessor: 40 registers do without spills, but not on sm_100.
#if __CUDA_ARCH__ >= 1000
#define BLOCKS 2
#else
#define BLOCKS 3
#endif
#define BAD_ROW 1u
#define BAD_CODES 2u
#define BAD_CHECKSUM 4u

struct Shared {
    Grid grid[2];   // of the parts
    u32 codes[MAX_THREADS / 4];
    u64 check[MAX_WARPS];
    u32 scan[MAX_WARPS], bad[MAX_WARPS];
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

template <typename T, bool FAST>
__global__ void __launch_bounds__(MAX_THREADS, FAST ? BLOCKS : 1) kv_decode(
    const u64* __restrict__ payloads, const uint4* __restrict__ rows, const u64* __restrict__ pages,
    u32* __restrict__ status, u32 num_pages,
    u32 groups, u32 groups_per_row, u32 row_stride, u32 pair_stride, u32 values, u32 period, u32 kw,
    u32 tokens, u32 channels, u32 widths, u32 outer) {
    extern __shared__ uint4 image4[];   // plane words of a chunk, from a multiple of 4 words on
    u32* const image = (u32*)image4;
    __shared__ Shared shared;
    const Geometry g = {groups, groups_per_row, row_stride, pair_stride, values, period, kw, tokens, channels, widths, outer};
    const u32 tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const u32 chunks = FAST ? 1 : (groups + 2 * blockDim.x - 1) / (2 * blockDim.x);
    const u32 first_word = g.code_bytes() / 4;

    for (u32 index = blockIdx.x; index < num_pages; index += gridDim.x) {
        const uint4 row = rows[index];
        const u8* const payload = (const u8*)payloads[index] + 16ull * row.w;
        u16* const page = (u16*)pages[index];
        const int s0 = (int)(row.x & 1023) - STEP_BIAS, s1 = (int)(row.x >> 10 & 1023) - STEP_BIAS;
        const u32 coding = row.x >> 20, bytes = row.y;
        const bool raw = coding == CODING_RAW;
        const bool row_good = raw ? bytes == 2 * values && s0 == 0 && s1 == 0
                                  : coding == CODING_FIXED && bytes % 4 == 0 && bytes >= 4 * first_word &&
                                        bytes < 2 * values && abs(s0) <= STEP_LIMIT &&
                                        abs(s1) <= (kw == period ? 0 : STEP_LIMIT);
        if (!row_good) {   // the same for all threads
            if (tid == 0) status[index] = BAD_ROW;
            continue;
        }
        const u32 all_words = (bytes + 3) / 4;
        u64 check = tid == 0 ? header_terms<T>(g, row.x, bytes) : 0;
        u32 bad = 0, words = 0;
        if (tid < 2) shared.grid[tid] = Grid(tid ? s1 : s0);
        for (u32 chunk = 0; chunk < chunks; chunk++) {
            const u32 first_group = 2 * chunk * blockDim.x;   // this thread's: first_group + tid, and + blockDim.x
            const bool last = chunk + 1 == chunks;
            u32 at = 0, words_before = 0;
            if (raw) {
                const u32 begin = chunk * blockDim.x * 32;
                check += load_words(payload, bytes, begin, min(all_words - begin, blockDim.x * 32), image4);
                __syncthreads();
            } else {
                const u32 code_words_here = min(blockDim.x, 4 * first_word - chunk * blockDim.x) / 4;
                check += load_words(payload, bytes, chunk * blockDim.x / 4, code_words_here, (uint4*)shared.codes);
                if (FAST) check += load_words(payload, bytes, first_word, all_words - first_word, image4);
                __syncthreads();
                u32 both = 0;   // words of the first group, and of the second in the upper half
                #pragma unroll
                for (u32 h = 0; h < 2; h++) {
                    const u32 i = h * blockDim.x + tid;
                    const u32 code = i < 8 * code_words_here ? code_of(shared, i) : 0;
                    if (code && first_group + i >= groups) bad |= BAD_CODES;
                    both |= code_words(code) << 16 * h;
                }
                u32 sums;
                at = block_scan(both, shared.scan, sums);
                words_before = sums & 0xffffu;
                const u32 chunk_words = words_before + (sums >> 16);
                const u32 start = first_word + words;
                if (last ? start + chunk_words != all_words : start + chunk_words > all_words) {
                    bad |= BAD_CODES;   // the same for all threads: nothing more is read
                    break;
                }
                words_before += start & 3, at += start & 3;
                if (!FAST) {
                    check += load_words(payload, bytes, start, chunk_words, image4);
                    __syncthreads();
                }
                words += chunk_words;
            }
            if (last) {   // the verdict, before the last chunk (of most pages: the only one) is written
                check = warp_check(check);
                bad = __reduce_or_sync(FULL, bad);
                if (lane == 0) shared.check[warp] = check, shared.bad[warp] = bad;
                __syncthreads();
                check = warp_check(lane < blockDim.x >> 5 ? shared.check[lane] : 0);
                bad = __reduce_or_sync(FULL, lane < blockDim.x >> 5 ? shared.bad[lane] : 0);
                if (residue(check) != row.z) bad |= BAD_CHECKSUM;
                if (bad) break;
            }
            if (raw) {
                const u32 begin = chunk * blockDim.x * 64, count = min(values - begin, blockDim.x * 64);
                if ((u64)page % 16 == 0) {
                    for (u32 i = tid; i < count / 8; i += blockDim.x) ((uint4*)(page + begin))[i] = image4[i];
                    for (u32 i = count / 8 * 8 + tid; i < count; i += blockDim.x) page[begin + i] = ((u16*)image)[i];
                } else {
                    for (u32 i = tid; i < count; i += blockDim.x) page[begin + i] = ((u16*)image)[i];
                }
            } else {
                #pragma unroll 1   // one group in registers at a time
                for (u32 h = 0; h < 2; h++) {
                    const u32 i = h * blockDim.x + tid, group = first_group + i;
                    const bool present = group < groups;
                    u32 part = 0, offset = 0;
                    if (FAST) offset = g.locate(group, part);
                    else if (present) offset = g.offset(group), part = g.part(group);
                    dequantise<T, FAST>(image + (h ? words_before + (at >> 16) : at & 0xffffu),
                                        present ? code_of(shared, i) : 0, shared.grid[part],
                                        Writer<FAST>{page, g, present, offset});
                }
            }
            check = fold(check);
            __syncthreads();   // the image is free for the next chunk or page
        }
        if (tid == 0) status[index] = bad;
        __syncthreads();
    }
}
