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
//   FAST: every thread's two groups are neighbours in one part and one row of token groups, pages are 8-byte aligned
//   grid any (pages are taken in turn)     block  a multiple of 32 up to 512 that covers a page, two groups a thread;
//        larger pages: kv_encode_large     shared  64 bytes a group + 16
//
// Guarantee: the bytes that reference.encode_page writes; places of a shared region in no particular order. A page is
// read once. Format: section 2.
#include "kv_encode.cuh"

template <typename T, bool FAST>
__global__ void __launch_bounds__(MAX_THREADS, FAST ? 2 : 1) kv_encode(
    const u64* __restrict__ pages, const u64* __restrict__ payloads, uint4* __restrict__ rows,
    const u32* __restrict__ regions, u32* __restrict__ cursors, u32 num_pages, u32 coding,
    u32 groups, u32 groups_per_row, u32 row_stride, u32 pair_stride, u32 values, u32 period, u32 kw,
    u32 tokens, u32 channels, u32 widths, u32 outer,
    int kind0, int step0, double factor0, int kind1, int step1, double factor1) {
    extern __shared__ uint4 image4[];   // plane words of a chunk, shifted so that 16-byte stores line up
    __shared__ Shared shared;
    const Geometry g = {groups, groups_per_row, row_stride, pair_stride, values, period, kw, tokens, channels, widths, outer};
    const PartBound bound[2] = {{kind0, step0, factor0}, {kind1, step1, factor1}};
    const u32 tid = threadIdx.x;
    const u32 first_word = g.code_bytes() / 4;

    for (u32 index = blockIdx.x; index < num_pages; index += gridDim.x) {
        Page<T, FAST> page((const u16*)pages[index], g);
        bool raw = coding == CODING_RAW;
        u32 largest0 = 0, largest1 = 0;
        if (!raw) page.load(0);
        if (tid == 0) {
            shared.clear();
            shared.payload = payloads[index];
        }
        __syncthreads();
        if (!raw) {
            if (kind0 != KIND_ABS || kind1 != KIND_ABS) {
                statistics(page, bound, shared);
                __syncthreads();
            }
            if (tid < g.parts()) choose_step<T>(tid, {tid ? kind1 : kind0, tid ? step1 : step0, tid ? factor1 : factor0}, shared);
            largest0 = page.largest_magnitude(0), largest1 = page.largest_magnitude(1);   // meanwhile
            __syncthreads();
            if (shared.maybe_seen) {   // rare: look at every value
                const u32 fits = __reduce_and_sync(FULL, groups_that_fit(page, 0, groups, shared.maybe_seen, shared.step));
                __syncthreads();
                if ((tid & 31) == 0) atomicAnd(&shared.maybe_seen, fits);
                __syncthreads();
                const u32 best = __ffs((int)(shared.maybe_seen >> 9 * (tid & 1) & 0x1ffu));
                if (tid < 2 && best) shared.step[tid] += 5 - (int)best;
                __syncthreads();
                page.load(0);   // rather than keeping it in registers meanwhile
            }
            raw = shared.step[0] == NO_STEP || shared.step[1] == NO_STEP;
        }
        u32 words = 0;
        u64 check = 0;
        if (!raw) {
            const Quantiser quantiser(shared.step[page.part(0)]);
            const Quantiser quantiser1 = FAST ? quantiser : Quantiser(shared.step[page.part(1)]);
            const u32 code0 = page.width_code(0, largest0, quantiser), code1 = page.width_code(1, largest1, quantiser1);
            const bool narrow = make_planes(page, code0, code1, quantiser, quantiser1, shared);
            const u32 at = block_scan(code_words(code0) + code_words(code1), shared.scan, words);
            raw = 4 * (first_word + words) >= 2 * values;
            if (!raw) {
                if (tid == 0) shared.place = reserve(4 * (first_word + words), index, regions, cursors);
                check = write_chunk(page, 0, narrow, at, first_word, words, shared, image4);
            }
        }
        if (raw) {
            __syncthreads();   // nobody reads the place of the page before any more
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
