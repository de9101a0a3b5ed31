// kv_entropy_analyse and kv_entropy_encode: one after the other they code a batch of pages with coding entropy, where it
// is smaller, after kv_encode has coded them with fixed to scratch slots: that kernel chooses the steps, and its payload
// is what a page falls back to. The first one predicts and finds classes (2.9), the second one makes the streams. They
// are two because the first takes twice the registers, and the second waits most of its time, for which others must be
// there. One thread block a page at a time; in the second one warp a stream.
//
//   in   pages[num_pages]   u64    addresses of the pages, 2-byte aligned
//   in   fixed_rows[num_pages]  uint4  what kv_encode wrote for them, without cursors
//   i/o  slots[num_pages]   u64    where kv_encode put its payloads: device memory, 16-byte aligned. Behind a raw page's
//                                  size, rounded up to 16, a slot has room for what `Slot` says
//   in   payloads, regions, cursors; out rows        as for kv_encode; payloads may be mapped pinned host memory
//   in   tables, hints, tables_id, digest, parts_in_tables, geometry          as for kv_entropy_decode
//   FAST: token groups, pages 4-byte aligned
//   grid any (pages are taken in turn)     block  32 to ENTROPY_THREADS     shared  of the second: (PART_BYTES -
//        DECODE_BYTES) a part in tables and 2048 bytes a warp
//
// Guarantee: the bytes that reference.encode_page writes; places of a shared region in no particular order.
// Format: sections 2.9 to 2.12.
#include "kv_entropy.cuh"

#define ENCODE_BYTES (PART_BYTES - DECODE_BYTES)
#define FLIGHT 2   // 16 bytes that a thread copies at a time
#if __CUDA_ARCH__ >= 900
#define BLOCKS 8   // of kv_entropy_encode on a multiprocessor: a thousand pages at a time
#else
#define BLOCKS 6   // with more, sm_80 runs out of registers
#endif

struct Shared {
    u32 place, half_words, too_large;
    u64 check[ENTROPY_WARPS];
};

// What lies in a slot: the payload of kv_encode; behind a raw page's size, rounded up to 16, what is left by
// kv_entropy_analyse, and the streams.
#define GUARD 512   // bytes; up to 160 half-words, those of a pair and of a class, are written before they are counted
struct Slot {
    const uint4* fixed;
    u16* half_words;   // 32 a group, after GUARD bytes: a stream's at the end of its region
    u32* words;        // 16 a group: word i of group k is words[i groups + k], as `analyse` leaves them
    u32* ends;         // of the streams in the payload
    u16* bases;        // as in the payload
    u8* classes;       // c | part << 6 | flag << 7 of each group

    __device__ Slot(u8* slot, u32 values, u32 groups) {
        fixed = (const uint4*)slot;
        u8* const at = slot + (2ull * values + 15) / 16 * 16;
        half_words = (u16*)(at + GUARD);
        words = (u32*)(at + GUARD + groups * 64ull);
        ends = words + groups * 16ull;
        bases = (u16*)(ends + num_streams(groups));
        classes = (u8*)(bases + 2);
    }
};

// A lane's coder. Half-words go to the stream's region from its end on.
struct Encoder {
    u16* slot;      // from the guard on
    u32 position;   // of the half-word written last, the same for all lanes
    u32 x;

    __device__ void make_room(u32 limit, bool need = true) {
        need = need && x >= limit;
        const u32 who = __ballot_sync(FULL, need), lane = threadIdx.x & 31;
        position -= __popc(who);
        if (need) {
            slot[position + __popc(who & ((1u << lane) - 1))] = (u16)x;
            x >>= 16;
        }
    }
    // entry: 2^(31 + k) / F rounded up, k = bits of F - 1; F << 21; 1024 - F; what is added << 5 | k - 1 (raw/kv.py)
    __device__ void push(uint4 entry) {
        const u32 quotient = __funnelshift_r(__umulhi(x, entry.x), 0, entry.w);
        x += (entry.w >> 5) + quotient * entry.z;
    }
    __device__ void push_bits(u32 bits, u32 n) { x = x << n | bits; }
};

// 2.10 backwards, for one value given as magnitude | sign << 15. `late`: without its sign.
struct Values {
    const uint4* entries;     // of the table
    u32 low, always_signed;   // bits behind each symbol; not 0: zeros have signs, too

    __device__ void operator()(Encoder& encoder, u32 v, bool late) const {
        const u32 magnitude = v & 0x7fffu, scaled = magnitude >> low;
        const u32 with_sign = (magnitude | always_signed) != 0 && !late;
        if (!__any_sync(FULL, scaled >= EXACT_SYMBOLS || low > 4)) {
            const uint4 entry = entries[scaled];
            const u32 n = low + with_sign;
            encoder.make_room(entry.y >> n);
            encoder.push_bits((v >> 15 & with_sign) << low | (magnitude & ~(~0u << low)), n);
            encoder.push(entry);
            return;
        }
        const bool large = scaled >= EXACT_SYMBOLS;
        const u32 symbol = large ? bit_length(scaled) + 11 : scaled, n = low + (large ? symbol - 12 : 0);
        const u32 rest = magnitude & ~(~0u << n);
        const bool wide = n > 4;
        const uint4 entry = entries[symbol];
        encoder.make_room(wide ? 1u << (35 - n - with_sign) : entry.y >> n >> with_sign);
        if (with_sign) encoder.push_bits(v >> 15, 1);
        if (wide) encoder.push_bits(rest >> 4, n - 4);
        encoder.make_room(entry.y >> 4, wide);
        encoder.push_bits(wide ? rest & 15u : rest, min(n, 4u));
        encoder.push(entry);
    }
};

// 2.9: the group at `offset`. `words`: its pairs, each half of a word sign and magnitude of v. Returns c | flag << 7.
// `hint`: the flag, or -1 where there are no hints.
template <typename T, bool FAST>
__device__ u32 analyse(const u16* page, const Geometry& g, u32 offset, int step, int hint, u32 (&words)[16]) {
    u32 largest = 0, negative_zero = 0;
    #pragma unroll
    for (u32 i = 0; i < 16; i++) {
        const u32 at = offset + i * g.pair_stride;
        if constexpr (FAST) words[i] = __ldg((const u32*)(page + at));
        else words[i] = (at < g.values ? page[at] : 0) | (at + 1 < g.values ? (u32)page[at + 1] << 16 : 0);
    }
    #pragma unroll
    for (u32 i = 0; i < 16; i++) {
        largest = Storage<T>::maximum(largest, words[i] & 0x7fff7fffu);
        negative_zero |= (words[i] & 0xffffu) == 0x8000u || words[i] >> 16 == 0x8000u;
    }
    largest = Storage<T>::maximum(largest, largest >> 16);
    const Quantiser quantiser(step);
    if (quantiser.template escapes<T>(Storage<T>::lo(largest))) return ESCAPED;
    u32 differences[16], sum = 0, sum_of_differences = 0;
    int a0 = 0, a1 = 0;
    #pragma unroll
    for (u32 i = 0; i < 16; i++) {
        const u32 magnitudes = words[i] & 0x7fff7fffu;
        const int m0 = quantiser(Storage<T>::lo(magnitudes)) & MAGNITUDE_MASK;
        const int m1 = quantiser(Storage<T>::hi(magnitudes)) & MAGNITUDE_MASK;
        const int q0 = words[i] & 0x8000u ? -m0 : m0, q1 = words[i] >> 31 ? -m1 : m1;
        const int d0 = q0 - ((a0 + 8) >> 4), d1 = q1 - ((a1 + 8) >> 4);
        a0 = i ? a0 + ((48 * q0 - 3 * a0) >> 3) : 10 * q0;
        a1 = i ? a1 + ((48 * q1 - 3 * a1) >> 3) : 10 * q1;
        sum += m0 + m1;
        sum_of_differences += abs(d0) + abs(d1);
        words[i] = m0 | m1 << 16 | (words[i] & 0x80008000u);   // of a v = 0 the sign is coded with signed zeros only
        differences[i] = abs(d0) | abs(d1) << 16 | (d0 < 0 ? 0x8000u : 0) | (d1 < 0 ? 0x80000000u : 0);
    }
    if (negative_zero) return bit_length(sum) + SIGNED_ZEROS;
    const bool predicted = hint < 0 ? sum_of_differences < sum : hint;
    if (!predicted) return bit_length(sum);
    #pragma unroll
    for (u32 i = 0; i < 16; i++) words[i] = differences[i];
    return bit_length(sum_of_differences) | 128;
}

// What `analyse` left of the group of this lane in a turn: its words, and its byte of `classes`. Zeros where it has none: c = 0
// takes nothing, so such lanes do nothing.
__device__ inline void fetch(const Slot& work, const Stream& s, u32 turn, u32 groups, u32 (&words)[16], u32& found) {
    const u32 in_stream = turn * s.lanes + (threadIdx.x & 31), group = s.first + in_stream;
    const bool here = s.has(in_stream);
    found = here ? work.classes[group] : 0;
    #pragma unroll
    for (u32 i = 0; i < 16; i++) words[i] = here ? work.words[i * groups + group] : 0;
}

// Where stream s, which ends at half-word `end` of the payload, is, counted back from there: at the end of its region.
__device__ inline u32 in_region(u32 s, u32 groups, u32 end, u32 at) { return min((s + 1) * STREAM_GROUPS, groups) * 32 - (end - at); }

// Half-words [8 i, 8 i + 8) of the payload, whatever they are: the bases and sizes, then the streams. `s`: a stream that
// does not begin behind the first one.
__device__ inline uint4 gather(u32 i, u32 s, u32 bases, const u16* regions, const u32* ends, u32 streams, u32 groups) {
    u32 word[4] = {0, 0, 0, 0};
    #pragma unroll
    for (u32 j = 0; j < 8; j++) {
        const u32 at = 8 * i + j;
        u32 half = 0;
        if (at == 0) half = bases;
        else if (at <= streams) half = ends[at - 1] - (at > 1 ? ends[at - 2] : 1 + streams);
        else {
            while (s < streams && at >= ends[s]) s++;
            if (s < streams) half = regions[in_region(s, groups, ends[s], at)];
        }
        word[j / 2] |= half << 16 * (j & 1);
    }
    return make_uint4(word[0], word[1], word[2], word[3]);
}

// Puts 16 bytes in the payload; of the last ones, the words there are. Returns their part of the checksum.
__device__ inline u64 put(u32* payload, u32 i, uint4 w, u32 bytes) {
    if (16 * i + 16 <= bytes) {
        store16(payload + 4 * i, w);
        return term4(w, PAYLOAD_INDEX + 4 * i);
    }
    const u32 word[4] = {w.x, w.y, w.z, w.w};
    u64 check = 0;
    #pragma unroll
    for (u32 j = 0; j < 4; j++) {
        const u32 at = 4 * i + j;
        if (4 * at + 4 > bytes) break;
        payload[at] = word[j];
        check += term(word[j], PAYLOAD_INDEX + at);
    }
    return check;
}

// 2.11: the payload from the streams in their regions. Returns this thread's part of the checksum.
__device__ inline u64 write_streams(u32* payload, u32 bytes, u32 bases, const Slot& work, u32 streams, u32 groups) {
    const u32 tid = threadIdx.x, heads = (1 + streams + 7) / 8;
    const u32* const ends = work.ends;
    u64 check = 0;
    for (u32 s = 0; s < streams; s++) {   // 16 bytes that are all of one stream; half-words may lie across words
        const u32 end = ends[s], first = ((s ? ends[s - 1] : 1 + streams) + 7) / 8, last = end / 8;
        const u32 at = in_region(s, groups, end, 8 * first), shift = 16 * (at % 2);
        const u32* const from = (const u32*)work.half_words + at / 2;
        #pragma unroll 1
        for (u32 begin = first + tid; begin < last; begin += FLIGHT * blockDim.x) {
            u32 word[FLIGHT][5];
            #pragma unroll
            for (u32 f = 0; f < FLIGHT; f++) {
                const u32 i = begin + f * blockDim.x;
                #pragma unroll
                for (u32 j = 0; j < 5; j++)
                    word[f][j] = i < last && (j < 4 || shift) ? from[4 * (i - first) + j] : 0;
            }
            #pragma unroll
            for (u32 f = 0; f < FLIGHT; f++) {
                const u32 i = begin + f * blockDim.x, (&w)[5] = word[f];
                if (i >= last) continue;
                check = fold(check) + put(payload, i, make_uint4(
                    __funnelshift_r(w[0], w[1], shift), __funnelshift_r(w[1], w[2], shift),
                    __funnelshift_r(w[2], w[3], shift), __funnelshift_r(w[3], w[4], shift)), bytes);
            }
        }
    }
    for (u32 j = tid; j < heads + streams; j += blockDim.x) {   // the others: where sizes are, and where streams meet
        const u32 s = j < heads ? 0 : j - heads, i = j < heads ? j : ends[s] / 8;
        if (j >= heads && (i < heads || ends[s] % 8 == 0 || (s + 1 < streams && ends[s + 1] / 8 == i))) continue;
        u32 from = s;
        while (from > 0 && ends[from - 1] > 8 * i) from--;
        check = fold(check) + put(payload, i, gather(i, from, bases, work.half_words, ends, streams, groups), bytes);
    }
    return check;
}

template <typename T, bool FAST>
__global__ void __launch_bounds__(ENTROPY_THREADS, 5) kv_entropy_analyse(
    const u64* __restrict__ pages, const uint4* __restrict__ fixed_rows, const u64* __restrict__ slots, u32 num_pages,
    const signed char* __restrict__ hints,
    u32 groups, u32 groups_per_row, u32 row_stride, u32 pair_stride, u32 values, u32 period, u32 kw,
    u32 tokens, u32 channels, u32 widths, u32 outer) {
    __shared__ int shared_sum[2];
    __shared__ u32 shared_count[2];
    const Geometry g = {groups, groups_per_row, row_stride, pair_stride, values, period, kw, tokens, channels, widths, outer};
    const u32 tid = threadIdx.x;

    for (u32 index = blockIdx.x; index < num_pages; index += gridDim.x) {
        const u16* const page = (const u16*)pages[index];
        const u32 word1 = fixed_rows[index].x;
        const Slot work((u8*)slots[index], values, groups);
        if ((word1 >> 20 & 15u) == CODING_RAW) continue;   // no steps; the same for all threads
        const int step0 = (int)(word1 & 1023) - STEP_BIAS, step1 = (int)(word1 >> 10 & 1023) - STEP_BIAS;

        if (tid < 2) shared_sum[tid] = 0, shared_count[tid] = 0;
        __syncthreads();
        int sum[2] = {0, 0};
        u32 count[2] = {0, 0};
        #pragma unroll 1
        for (u32 group = tid; group < groups; group += blockDim.x) {
            u32 part, words[16];
            const u32 offset = g.locate<FAST>(group, part), pair = hints ? group % groups_per_row : 0;
            const int shift = hints ? hints[2 * pair] : 0;
            const u32 found = analyse<T, FAST>(page, g, offset, part ? step1 : step0, hints ? hints[2 * pair + 1] & 1 : -1, words);
            const u32 c = found & 127u;
            work.classes[group] = (u8)(found | part << 6);
            #pragma unroll
            for (u32 i = 0; i < 16; i++) work.words[i * groups + group] = words[i];
            if (c == ESCAPED) continue;
            const int e = (int)scale_of(c) - shift;
            sum[0] += part ? 0 : e, sum[1] += part ? e : 0;
            count[0] += !part, count[1] += part;
        }
        #pragma unroll
        for (u32 p = 0; p < 2; p++) {
            const u32 all = warp_sum(sum[p]), n = warp_sum(count[p]);
            if ((tid & 31) == 0) {
                atomicAdd(&shared_sum[p], (int)all);
                atomicAdd(&shared_count[p], n);
            }
        }
        __syncthreads();
        if (tid < g.parts()) {   // a sum below 0 gives 0 all the same
            const u32 n = shared_count[tid];
            ((u8*)work.bases)[tid] = (u8)min((2 * (u32)max(shared_sum[tid], 0) + n) / (2 * max(n, 1u)), (u32)CLASS_LIMIT);
        }
        if (tid == 1 && g.parts() == 1) ((u8*)work.bases)[1] = 0;
        __syncthreads();
    }
}

template <typename T>
__global__ void __launch_bounds__(ENTROPY_THREADS, BLOCKS) kv_entropy_encode(
    const uint4* __restrict__ fixed_rows, const u64* __restrict__ slots, const u64* __restrict__ payloads, uint4* __restrict__ rows, const u32* __restrict__ regions,
    u32* __restrict__ cursors, u32 num_pages,
    const uint4* __restrict__ tables, const signed char* __restrict__ hints, u32 tables_id, u32 digest, u32 parts_in_tables,
    u32 groups, u32 groups_per_row, u32 row_stride, u32 pair_stride, u32 values, u32 period, u32 kw,
    u32 tokens, u32 channels, u32 widths, u32 outer) {
    extern __shared__ uint4 shared4[];   // tables, then 16 words a lane
    __shared__ Shared shared;
    const Geometry g = {groups, groups_per_row, row_stride, pair_stride, values, period, kw, tokens, channels, widths, outer};
    const u32 tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, warps = blockDim.x >> 5;
    const u32 streams = num_streams(groups);
    const uint4* const table0 = shared4;
    u32* const stage = (u32*)((u8*)shared4 + parts_in_tables * ENCODE_BYTES) + 512 * warp + lane;   // word i: stage[32 i]

    for (u32 p = 0; p < parts_in_tables; p++) {
        for (u32 i = tid; i < ENCODE_BYTES / 16; i += blockDim.x)
            shared4[p * (ENCODE_BYTES / 16) + i] = tables[(p * PART_BYTES + DECODE_BYTES) / 16 + i];
    }
    __syncthreads();

    for (u32 index = blockIdx.x; index < num_pages; index += gridDim.x) {
        const uint4 fixed = fixed_rows[index];
        const Slot work((u8*)slots[index], values, groups);
        const bool raw = (fixed.x >> 20 & 15u) == CODING_RAW;
        const u32 bases = raw ? 0 : *work.bases;
        if (tid == 0) shared.too_large = 0;
        __syncthreads();

        // 2.10, backwards
        for (u32 number = warp; number < streams && !raw; number += warps) {
            const Stream s(number, groups);
            const u32 begin = GUARD / 2 + 32 * s.first, end = begin + 32 * s.groups, least = begin + 2 * s.lanes;
            Encoder encoder = {work.half_words - GUARD / 2, end, LOWEST_STATE};
            u32 ahead[16], found_ahead;   // of the next turn's group: the words, and what `classes` says; fetched early
            fetch(work, s, s.turns - 1, groups, ahead, found_ahead);
            #pragma unroll 1
            for (u32 turn = s.turns; turn-- > 0 && encoder.position >= least;) {
                const u32 in_stream = turn * s.lanes + lane, group = s.first + in_stream;
                const bool here = s.has(in_stream), last = here && in_stream + s.lanes >= s.groups;
                const u32 c = found_ahead & 63u, part = found_ahead >> 6 & 1u, flag = found_ahead >> 7;
                const int shift = here && hints ? hints[2 * (group % groups_per_row)] : 0;
                if (last) {
                    encoder.x = 0x10000u;
                    #pragma unroll
                    for (u32 i = 0; i < 16; i++)
                        encoder.x |= (ahead[i] >> 16 & 0x7fffu) || c >= SIGNED_ZEROS ? ahead[i] >> 31 << i : 0;
                }
                #pragma unroll
                for (u32 i = 0; i < 16; i++) stage[32 * i] = ahead[i];
                if (turn) fetch(work, s, turn - 1, groups, ahead, found_ahead);
                const uint4* const table = table0 + (parts_in_tables > 1 ? part * (ENCODE_BYTES / 16) : 0);
                const Values code = {table + row_of(c) * NUM_SYMBOLS, low_of(c), c >= SIGNED_ZEROS};
                #pragma unroll 1
                for (u32 i = 16; i-- > 0 && encoder.position >= least;) {
                    const u32 word = stage[32 * i];
                    code(encoder, word >> 16, last);
                    code(encoder, word & 0xffffu, false);
                }
                const u32 symbol = c == ESCAPED ? ESCAPED : (u32)((int)c - shift - (int)(part ? bases >> 8 : bases & 255u) + CLASS_LIMIT + 78) % ESCAPED;
                const uint4 entry = table[CLASS_ROW * NUM_SYMBOLS + symbol];
                encoder.make_room(entry.y >> !hints, here);
                if (here) {
                    if (!hints) encoder.push_bits(flag, 1);
                    encoder.push(entry);
                }
            }
            if (encoder.position < least) {   // the same for all lanes
                if (lane == 0) shared.too_large = 1;
                continue;
            }
            u16* const states = encoder.slot + encoder.position - 2 * s.lanes;
            if (lane < s.lanes) states[2 * lane] = (u16)encoder.x, states[2 * lane + 1] = (u16)(encoder.x >> 16);
            if (lane == 0) {
                work.ends[number] = end - encoder.position + 2 * s.lanes;   // its size, so far
                if (encoder.position % 2) states[-1] = 0;   // read with the first one, as a word
            }
        }
        __syncthreads();
        bool entropy = !raw && !shared.too_large;   // the same for all threads
        if (tid == 0) {
            u32 end = 1 + streams;
            for (u32 number = 0; entropy && number < streams; number++) work.ends[number] = end += work.ends[number];
            shared.half_words = end;
        }
        __syncthreads();
        const u32 bytes_now = (shared.half_words + 1) / 2 * 4;
        entropy = entropy && bytes_now < fixed.y;
        const u32 bytes = entropy ? bytes_now : fixed.y;
        if (tid == 0) shared.place = reserve(bytes, index, regions, cursors);
        __syncthreads();
        u32* const payload = (u32*)payloads[index] + 4ull * shared.place;
        u64 check = 0;
        if (entropy) {
            check = write_streams(payload, bytes, bases, work, streams, groups);
        } else {
            const u32 whole = bytes / 16;
            for (u32 i = tid; i < whole; i += blockDim.x) store16(payload + 4 * i, work.fixed[i]);
            for (u32 i = 8 * whole + tid; i < bytes / 2; i += blockDim.x) ((u16*)payload)[i] = ((const u16*)work.fixed)[i];
        }
        check = warp_check(check);
        if (lane == 0) shared.check[warp] = check;
        __syncthreads();
        if (tid == 0) {
            for (u32 w = 1; w < warps; w++) check += shared.check[w];
            const u32 word1 = (fixed.x & 0xfffffu) | CODING_ENTROPY << 20 | tables_id << 24;
            check += header_terms<T>(g, word1, bytes) + term(digest, 7);
            rows[index] = entropy ? make_uint4(word1, bytes, residue(check), shared.place)
                                  : make_uint4(fixed.x, fixed.y, fixed.z, shared.place);
        }
        __syncthreads();
    }
}
