// kv_decode_large: decodes pages of more than one chunk (1024 groups), a thread block a chunk. Where a chunk's words begin
// follows from the width codes before it, so kv_decode_sizes goes first and adds them up, a warp a chunk: payloads may
// lie in host memory, where each block would otherwise read all those codes anew over the link.
//
//   in, out   as for kv_decode
//   i/o  exchange[num_pages]        Exchange   zero before, and after
//   i/o  sizes[num_pages x chunks]  u32        of the chunks, in words, but for each page's last
//   FAST: token groups, pages 4-byte aligned
//   grid any (chunks are taken in turn)     block, shared  as for kv_decode
//
// Guarantee: as kv_decode's, but of a damaged page some chunks may be written. Format: section 2.
#include "kv_decode.cuh"

// What the blocks of a page share, in the 64 bytes that kv_encode_large has.
struct Exchange {
    u64 check;
    u32 bad, arrived;
    u64 rest[6];
};

// Words of the groups whose width codes are the nibbles of w.
__device__ inline u32 words_of(u32 w) {
    u32 words = 0;
    #pragma unroll
    for (u32 i = 0; i < 8; i++) words += code_words(w >> 4 * i & 15);
    return words;
}

__global__ void __launch_bounds__(MAX_THREADS) kv_decode_sizes(
    const u64* __restrict__ payloads, const uint4* __restrict__ rows, u32 num_pages, u32* __restrict__ sizes,
    u32 groups, u32 groups_per_row, u32 row_stride, u32 pair_stride, u32 values, u32 period, u32 kw,
    u32 tokens, u32 channels, u32 widths, u32 outer) {
    const Geometry g = {groups, groups_per_row, row_stride, pair_stride, values, period, kw, tokens, channels, widths, outer};
    const u32 lane = threadIdx.x & 31, warps = blockDim.x / 32;
    const u32 chunks = (groups + 2 * MAX_THREADS - 1) / (2 * MAX_THREADS);
    for (u32 task = blockIdx.x * warps + threadIdx.x / 32; task < num_pages * chunks; task += gridDim.x * warps) {
        const u32 index = task / chunks, chunk = task - index * chunks;
        const uint4 row = rows[index];
        const Row said(row, g);
        if (!said.good || said.raw || chunk + 1 == chunks) continue;
        const uint4 w = ((const uint4*)(payloads[index] + 16ull * row.w))[MAX_THREADS / 16 * chunk + lane];
        const u32 words = __reduce_add_sync(FULL, words_of(w.x) + words_of(w.y) + words_of(w.z) + words_of(w.w));
        if (lane == 0) sizes[task] = words;
    }
}

template <typename T, bool FAST>
__global__ void __launch_bounds__(MAX_THREADS, FAST ? 2 : 1) kv_decode_large(
    const u64* __restrict__ payloads, const uint4* __restrict__ rows, const u64* __restrict__ pages,
    u32* __restrict__ status, u32 num_pages, Exchange* exchange, const u32* __restrict__ sizes,
    u32 groups, u32 groups_per_row, u32 row_stride, u32 pair_stride, u32 values, u32 period, u32 kw,
    u32 tokens, u32 channels, u32 widths, u32 outer) {
    __shared__ Shared shared;
    const Geometry g = {groups, groups_per_row, row_stride, pair_stride, values, period, kw, tokens, channels, widths, outer};
    const u32 tid = threadIdx.x, lane = tid & 31;
    const u32 chunks = (groups + 2 * blockDim.x - 1) / (2 * blockDim.x);
    const u32 first_word = g.code_bytes() / 4;

    for (u32 task = blockIdx.x; task < num_pages * chunks; task += gridDim.x) {
        const u32 index = task / chunks, chunk = task - index * chunks;
        Exchange& x = exchange[index];
        const uint4 row = rows[index];
        const u8* const payload = (const u8*)payloads[index] + 16ull * row.w;
        u16* const page = (u16*)pages[index];
        const Row said(row, g);
        if (!said.good) {   // the same for all threads
            if (tid == 0 && chunk == 0) status[index] = BAD_ROW;
            continue;
        }
        const u32 bytes = row.y, all_words = (bytes + 3) / 4;
        u64 check = tid == 0 && chunk == 0 ? header_terms<T>(g, row.x, bytes) : 0;
        u32 bad = 0, words = 0;   // in the chunks before
        __syncthreads();   // nobody is at work on the chunk before any more
        if (tid < 2) shared.grid[tid] = Grid(tid ? said.s1 : said.s0);
        if (!said.raw && chunk) {
            for (u32 i = tid; i < chunk; i += blockDim.x) words += sizes[index * chunks + i];
            block_scan(words, shared.scan, words);
            __syncthreads();
        }
        do {   // once; left where the chunk is damaged
            const u32 first_group = 2 * chunk * blockDim.x;   // this thread's: first_group + tid, and + blockDim.x
            const bool last = chunk + 1 == chunks;
            u32 at = 0, words_before = 0;
            if (said.raw) {
                const u32 begin = chunk * blockDim.x * 32;
                check += load_words(payload, bytes, begin, min(all_words - begin, blockDim.x * 32), image4);
                __syncthreads();
            } else {
                const u32 code_words_here = min(blockDim.x, 4 * first_word - chunk * blockDim.x) / 4;
                check += load_words(payload, bytes, chunk * blockDim.x / 4, code_words_here, (uint4*)shared.codes);
                __syncthreads();
                u32 sums;
                at = scan_words(shared, 8 * code_words_here, groups - first_group, sums, bad);
                words_before = sums & 0xffffu;
                const u32 chunk_words = words_before + (sums >> 16);
                const u32 start = first_word + words;
                if (last ? start + chunk_words != all_words : start + chunk_words > all_words) {
                    bad |= BAD_CODES;   // the same for all threads: nothing more is read
                    break;
                }
                words_before += start & 3, at += start & 3;
                check += load_words(payload, bytes, start, chunk_words, image4);
                __syncthreads();
            }
            if (said.raw) {
                const u32 begin = chunk * blockDim.x * 64, count = min(values - begin, blockDim.x * 64);
                write_raw(page + begin, count, image4);
            } else {
                write_groups<T, FAST>(shared, g, first_group, image4, at & 0xffffu, words_before + (at >> 16), page);
            }
        } while (false);
        check = warp_check(check);
        bad = __reduce_or_sync(FULL, bad);
        if (lane == 0) {
            atomicAdd((unsigned long long*)&x.check, (unsigned long long)check);
            if (bad) atomicOr(&x.bad, bad);
        }
        __threadfence();
        __syncthreads();
        if (tid == 0 && atomicAdd(&x.arrived, 1u) == chunks - 1) {   // the last of the page's
            __threadfence();
            bad = __ldcg(&x.bad);
            if (residue(__ldcg(&x.check)) != row.z) bad |= BAD_CHECKSUM;
            status[index] = bad;
            x = Exchange{};
        }
    }
}
