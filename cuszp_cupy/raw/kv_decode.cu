// kv_decode: decodes a batch of independent pages, one thread block a page at a time, each thread two groups.
//
//   in   payloads[num_pages]  u64    addresses, 16-byte aligned, device or mapped pinned host memory; the payload
//                                    lies 16 x the row's place after it. Nothing past its payload bytes is read
//   in   rows[num_pages]      uint4  table rows (format.py 2.1); device or mapped pinned host memory
//   out  pages[num_pages]     u64    addresses of the pages, 2-byte aligned (4 or 16: wide stores)
//   out  status[num_pages]    u32    0: good. Else nothing of the page is to be used: 1 the row, 2 the width codes,
//                                    4 the checksum (bits may add up)
//   in   geometry
//   FAST: token groups, pages 4-byte aligned
//   grid any (pages are taken in turn)     block  a multiple of 32 up to 512 that covers a page, two groups a thread;
//        larger pages: kv_decode_large     shared  64 bytes a group + 16
//
// Guarantee: the page that reference.decode_page returns, for every row and payload an encoder writes. Whatever
// row and payload hold, nothing outside the payload and the page is touched; a damaged page is not
// written at all. Format: section 2.
#include "kv_decode.cuh"

// Blocks of MAX_THREADS that share a multiprocessor: 40 registers do without spills, but not on sm_100.
#if __CUDA_ARCH__ >= 1000
#define BLOCKS 2
#else
#define BLOCKS 3
#endif

template <typename T, bool FAST>
__global__ void __launch_bounds__(MAX_THREADS, FAST ? BLOCKS : 1) kv_decode(
    const u64* __restrict__ payloads, const uint4* __restrict__ rows, const u64* __restrict__ pages,
    u32* __restrict__ status, u32 num_pages,
    u32 groups, u32 groups_per_row, u32 row_stride, u32 pair_stride, u32 values, u32 period, u32 kw,
    u32 tokens, u32 channels, u32 widths, u32 outer) {
    __shared__ Shared shared;
    const Geometry g = {groups, groups_per_row, row_stride, pair_stride, values, period, kw, tokens, channels, widths, outer};
    const u32 tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const u32 first_word = g.code_bytes() / 4;

    for (u32 index = blockIdx.x; index < num_pages; index += gridDim.x) {
        const uint4 row = rows[index];
        const u8* const payload = (const u8*)payloads[index] + 16ull * row.w;
        u16* const page = (u16*)pages[index];
        const Row said(row, g);
        if (!said.good) {   // the same for all threads
            if (tid == 0) status[index] = BAD_ROW;
            continue;
        }
        const u32 bytes = row.y, all_words = (bytes + 3) / 4;
        u64 check = tid == 0 ? header_terms<T>(g, row.x, bytes) : 0;
        u32 bad = 0;
        if (tid < 2) shared.grid[tid] = Grid(tid ? said.s1 : said.s0);
        do {   // once; left where the page is damaged. This thread's groups: tid, and tid + blockDim.x
            u32 at = 0, words_before = 0;
            if (said.raw) {
                check += load_words(payload, bytes, 0, all_words, image4);
                __syncthreads();
            } else {
                check += load_words(payload, bytes, 0, first_word, (uint4*)shared.codes);
                check += load_words(payload, bytes, first_word, all_words - first_word, image4);
                __syncthreads();
                u32 sums;
                at = scan_words(shared, 8 * first_word, groups, sums, bad);
                words_before = sums & 0xffffu;
                if (first_word + words_before + (sums >> 16) != all_words) {
                    bad |= BAD_CODES;   // the same for all threads: nothing more is read
                    break;
                }
            }
            // the verdict, before anything is written
            check = warp_check(check);
            bad = __reduce_or_sync(FULL, bad);
            if (lane == 0) shared.check[warp] = check, shared.bad[warp] = bad;
            __syncthreads();
            check = warp_check(lane < blockDim.x >> 5 ? shared.check[lane] : 0);
            bad = __reduce_or_sync(FULL, lane < blockDim.x >> 5 ? shared.bad[lane] : 0);
            if (residue(check) != row.z) bad |= BAD_CHECKSUM;
            if (bad) break;
            if (said.raw) {
                write_raw(page, values, image4);
            } else {
                write_groups<T, FAST>(shared, g, 0, image4, at & 0xffffu, words_before + (at >> 16), page);
            }
        } while (false);
        if (tid == 0) status[index] = bad;
        __syncthreads();
    }
}
