// kv_encode_large: codes pages of more than one chunk (1024 groups), a thread block a chunk. Each PHASE is a launch of
// its own, since it needs of a page what the one before has found in all chunks:
//
//   0 EXTREMES, 1 SUMS   the statistics of 2.7         2 SEEN    which steps 2.8 rules out; few pages have any
//   3 SIZES              words of each chunk; the last block of a page chooses the coding and takes the room
//   4 WRITE              the payload; the last block of a page writes its row
//
//   in   as for kv_encode
//   i/o  exchange[num_pages]          Exchange   zero before phase 0 (or 3, where no bound needs the ones before);
//                                                phase 4 leaves it zero
//   i/o  sizes[num_pages x chunks]    u32        of the chunks, in words
//   FAST: every thread's two groups are neighbours in one part and one row of token groups, pages are 8-byte aligned
//   grid any (chunks are taken in turn)     block, shared  as for kv_encode
//
// Guarantee: the bytes that reference.encode_page writes; places of a shared region in no particular order.
// Format: section 2.
#include "kv_encode.cuh"

#define EXTREMES 0
#define SUMS 1
#define SEEN 2
#define SIZES 3
#define WRITE 4

// What the blocks of a page share. 64 bytes.
struct Exchange {
    u32 top[2], bottom[2], fine[2], sum[2], sum_high[2];   // as in Shared
    u32 ruled_out;   // bits of maybe_seen
    u32 arrived;     // blocks
    u32 place;
    u32 words;       // of all chunks; NO_WORDS: the page is raw
    u64 check;
};
#define NO_WORDS 0xffffffffu

// Sum over the block, the same for all threads. Two barriers.
__device__ inline u32 block_total(u32 v, Shared& shared) {
    u32 total;
    block_scan(v, shared.scan, total);
    __syncthreads();
    return total;
}

// Whether this block is the last of its page's to come here; what the others wrote before is then there to read.
__device__ inline bool last_of_page(Exchange& x, u32 chunks) {
    __shared__ bool last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(&x.arrived, 1u) == chunks - 1;
        if (last) x.arrived = 0;
    }
    __syncthreads();
    __threadfence();
    return last;
}

template <typename T, bool FAST, int PHASE>
__global__ void __launch_bounds__(MAX_THREADS, FAST && PHASE != WRITE ? 2 : 1) kv_encode_large(
    const u64* __restrict__ pages, const u64* __restrict__ payloads, uint4* __restrict__ rows,
    const u32* __restrict__ regions, u32* __restrict__ cursors, u32 num_pages, u32 coding,
    Exchange* exchange, u32* sizes,
    u32 groups, u32 groups_per_row, u32 row_stride, u32 pair_stride, u32 values, u32 period, u32 kw,
    u32 tokens, u32 channels, u32 widths, u32 outer,
    int kind0, int step0, double factor0, int kind1, int step1, double factor1) {
    extern __shared__ uint4 image4[];
    __shared__ Shared shared;
    const Geometry g = {groups, groups_per_row, row_stride, pair_stride, values, period, kw, tokens, channels, widths, outer};
    const PartBound bound[2] = {{kind0, step0, factor0}, {kind1, step1, factor1}};
    const u32 tid = threadIdx.x, groups_of_chunk = 2 * blockDim.x;
    const u32 chunks = (groups + groups_of_chunk - 1) / groups_of_chunk, first_word = g.code_bytes() / 4;

    for (u32 task = blockIdx.x; task < num_pages * chunks; task += gridDim.x) {
        const u32 index = task / chunks, chunk = task - index * chunks;
        Exchange& x = exchange[index];
        Page<T, FAST> page((const u16*)pages[index], g);
        float t[2] = {0, 0};
        __syncthreads();   // nobody is at work on the chunk before any more
        if (tid == 0) {
            shared.clear();
            shared.payload = payloads[index];
            #pragma unroll
            for (int p = 0; p < 2 && PHASE > EXTREMES; p++) {
                shared.top[p] = x.top[p], shared.bottom[p] = x.bottom[p], shared.fine[p] = x.fine[p];
                if (PHASE > SUMS) shared.sum[p] = x.sum[p], shared.sum_high[p] = x.sum_high[p];
            }
        }
        __syncthreads();
        if constexpr (PHASE == EXTREMES) {
            page.load(chunk);
            find_extremes(page, bound, t, shared);
            __syncthreads();
            if (tid < 2) {
                atomicMax(&x.top[tid], shared.top[tid]);
                atomicMax(&x.bottom[tid], shared.bottom[tid]);
                atomicMax(&x.fine[tid], shared.fine[tid]);
            }
            continue;
        }
        if constexpr (PHASE == SUMS) {
            page.load(chunk);
            bool simple;
            t[0] = page.squares(0, simple), t[1] = page.squares(1, simple);
            find_sums(page, bound, t, shared);
            __syncthreads();
            if (tid < 2) {
                atomicAdd(&x.sum[tid], shared.sum[tid] & 0xfffu);
                atomicAdd(&x.sum_high[tid], shared.sum[tid] >> 12);
            }
            continue;
        }
        bool raw = coding == CODING_RAW;
        if (!raw) {
            if (tid < g.parts()) choose_step<T>(tid, {tid ? kind1 : kind0, tid ? step1 : step0, tid ? factor1 : factor0}, shared);
            __syncthreads();
            if constexpr (PHASE == SEEN) {
                if (shared.maybe_seen) {
                    const u32 begin = chunk * groups_of_chunk, end = min(begin + groups_of_chunk, groups);
                    const u32 fits = __reduce_and_sync(FULL, groups_that_fit(page, begin, end, shared.maybe_seen, shared.step));
                    if ((tid & 31) == 0) atomicOr(&x.ruled_out, ~fits);
                }
                continue;
            }
            const u32 seen = shared.maybe_seen & ~x.ruled_out;
            const u32 best = __ffs((int)(seen >> 9 * (tid & 1) & 0x1ffu));
            __syncthreads();
            if (tid < 2 && best) shared.step[tid] += 5 - (int)best;
            __syncthreads();
            raw = shared.step[0] == NO_STEP || shared.step[1] == NO_STEP;
        }
        if constexpr (PHASE == SIZES) {
            u32 words = 0;
            if (!raw) {
                page.load(chunk);
                #pragma unroll
                for (int h = 0; h < 2; h++) {
                    const Quantiser quantiser(shared.step[page.part(h)]);
                    words += code_words(page.width_code(h, page.largest_magnitude(h), quantiser));
                }
            }
            words = block_total(words, shared);
            if (tid == 0) sizes[task] = words;
            if (!last_of_page(x, chunks)) continue;
            u32 all = 0;
            for (u32 i = tid; i < chunks; i += blockDim.x) all += __ldcg(&sizes[index * chunks + i]);
            all = block_total(all, shared);
            if (tid == 0) {
                raw = raw || 4ull * (first_word + all) >= 2ull * values;
                x.words = raw ? NO_WORDS : all;
                x.place = reserve(raw ? 2 * values : 4 * (first_word + all), index, regions, cursors);
            }
        }
        if constexpr (PHASE == WRITE) {
            raw = x.words == NO_WORDS;
            if (tid == 0) shared.place = x.place;
            u64 check = 0;
            if (raw) {
                __syncthreads();
                if (chunk == 0) check = write_raw((const u16*)pages[index], values, (u32*)shared.payload + 4ull * shared.place);
            } else {
                u32 before = 0;
                for (u32 i = tid; i < chunk; i += blockDim.x) before += sizes[index * chunks + i];
                before = block_total(before, shared);
                if (tid == 0) shared.sum[0] = before;   // rather than kept in registers
                page.load(chunk);
                const Quantiser quantiser(shared.step[page.part(0)]);
                const Quantiser quantiser1 = FAST ? quantiser : Quantiser(shared.step[page.part(1)]);
                const u32 code0 = page.width_code(0, page.largest_magnitude(0), quantiser);
                const u32 code1 = page.width_code(1, page.largest_magnitude(1), quantiser1);
                const bool narrow = make_planes(page, code0, code1, quantiser, quantiser1, shared);
                u32 chunk_words;
                const u32 at = block_scan(code_words(code0) + code_words(code1), shared.scan, chunk_words);
                check = write_chunk(page, chunk, narrow, at, first_word + shared.sum[0], chunk_words, shared, image4);
            }
            check = warp_check(check);
            if ((tid & 31) == 0) atomicAdd((unsigned long long*)&x.check, (unsigned long long)check);
            if (!last_of_page(x, chunks)) continue;
            if (tid == 0) {
                const u32 s0 = raw ? 0 : shared.step[0], s1 = raw ? 0 : shared.step[1];
                const u32 word1 = (s0 + STEP_BIAS) | (s1 + STEP_BIAS) << 10 | (raw ? CODING_RAW : CODING_FIXED) << 20;
                const u32 bytes = raw ? 2 * values : 4 * (first_word + x.words);
                rows[index] = make_uint4(word1, bytes, residue(header_terms<T>(g, word1, bytes) + __ldcg(&x.check)), shared.place);
                x = Exchange{};
            }
        }
    }
}
