// kv_entropy_encode: codes a batch of pages with coding entropy, where it is smaller, after kv_encode has coded them with
// fixed to scratch slots: that kernel chooses the steps, and its payload is what a page falls back to.
// One thread block a page at a time, one warp a stream.
//
//   in   pages[num_pages]   u64    addresses of the pages, 2-byte aligned
//   in   fixed_rows[num_pages]  uint4  what kv_encode wrote for them, without cursors
//   i/o  slots[num_pages]   u64    where kv_encode put its payloads: device memory, 16-byte aligned. Behind a raw page's
//                                  size, rounded up to 16, a slot has 64 bytes a group and 4 bytes a stream more
//   in   payloads, regions, cursors; out rows        as for kv_encode; payloads may be mapped pinned host memory
//   in   tables, hints, tables_id, digest, parts_in_tables, geometry          as for kv_entropy_decode
//   FAST: token groups, pages 4-byte aligned
//   grid any (pages are taken in turn)     block  32 to ENTROPY_THREADS     shared  (PART_BYTES - DECODE_BYTES) a part in
//        tables and 4096 bytes a warp
//
// Guarantee: the bytes that reference.encode_page writes; places of a shared region in no particular order.
// Format: sections 2.9 to 2.12.
#include "kv_entropy.cuh"

#define ENCODE_BYTES (PART_BYTES - DECODE_BYTES)

struct Shared {
    int sum[2];              // 2.9, of each part: the sum of e - o, and
    u32 count[2];            // the groups, that are not escaped
    u32 place, half_words, too_large;
    u64 check[ENTROPY_WARPS];
};

// A lane's coder. Half-words go to the stream's region from its end on.
struct Encoder {
    u16* region;
    u32 position;   // of the half-word written last, the same for all lanes
    u32 least;      // positions below stay free, for the lanes' states
    bool full;
    u32 x;

    __device__ void make_room(bool need, u32 limit) {
        need = need && x >= limit;
        const u32 who = __ballot_sync(FULL, need), lane = threadIdx.x & 31, count = __popc(who);
        full = full || position < least + count;
        if (full) return;   // the same for all lanes
        position -= count;
        if (need) {
            region[position + __popc(who & ((1u << lane) - 1))] = (u16)x;
            x >>= 16;
        }
    }
    // entry: 2^(31 + k) / F rounded up, k = bits of F - 1; F | what is added << 11 | k - 1 << 22 (raw/kv.py)
    __device__ void push(uint2 entry) {
        const u32 quotient = __umulhi(x, entry.x) >> (entry.y >> 22);
        x += (entry.y >> 11 & 0x7ffu) + quotient * (1024 - (entry.y & 0x7ffu));
    }
};

struct Group {
    u32 c, flag;
};

// 2.9: what the group of a lane is. Its pairs are left at `stage`, each half of a word sign and magnitude: word 64 i of q,
// or the storage bits; word 64 i + 32 of q - p. `hint`: the flag, where there are hints.
template <typename T, bool FAST>
__device__ Group make_group(const u16* page, const Geometry& g, u32 group, int step, bool hinted, u32 hint, u32* stage) {
    const u32 offset = g.offset(group);
    u32 largest = 0, negative_zero = 0;
    #pragma unroll 4
    for (u32 i = 0; i < 16; i++) {
        const u32 at = offset + i * g.pair_stride;
        u32 v;
        if constexpr (FAST) v = __ldg((const u32*)(page + at));
        else v = (at < g.values ? page[at] : 0) | (at + 1 < g.values ? (u32)page[at + 1] << 16 : 0);
        stage[64 * i] = v;
        largest = Storage<T>::maximum(largest, v & 0x7fff7fffu);
        negative_zero |= (v & 0xffffu) == 0x8000u || v >> 16 == 0x8000u;
    }
    largest = Storage<T>::maximum(largest, largest >> 16);
    const Quantiser quantiser(step);
    if (quantiser.template escapes<T>(Storage<T>::lo(largest))) return {ESCAPED, 0};
    u32 plain_sum = 0, predicted_sum = 0;
    Predictor first_values, second_values;
    #pragma unroll 4
    for (u32 i = 0; i < 16; i++) {
        const u32 v = stage[64 * i], magnitude = v & 0x7fff7fffu;
        const u32 a = quantiser(Storage<T>::lo(magnitude)) & MAGNITUDE_MASK, b = quantiser(Storage<T>::hi(magnitude)) & MAGNITUDE_MASK;
        const int q0 = v & 0x8000u ? -(int)a : (int)a, q1 = v >> 31 ? -(int)b : (int)b;
        const int r0 = q0 - first_values(), r1 = q1 - second_values();
        first_values.update(q0);
        second_values.update(q1);
        plain_sum += a + b;
        predicted_sum += abs(r0) + abs(r1);
        const u32 zeros = negative_zero ? v & 0x80008000u : (q0 < 0 ? 0x8000u : 0) | (q1 < 0 ? 0x80000000u : 0);
        stage[64 * i] = a | b << 16 | zeros;
        stage[64 * i + 32] = abs(r0) | (r0 < 0 ? 0x8000u : 0) | (u32)abs(r1) << 16 | (r1 < 0 ? 0x80000000u : 0);
    }
    const u32 flag = negative_zero ? 0 : hinted ? hint : predicted_sum < plain_sum;
    return {bit_length(flag ? predicted_sum : plain_sum) + (negative_zero ? SIGNED_ZEROS : 0), flag};
}

// Half-words [8 i, 8 i + 8) of the payload: the bases and sizes, then the streams, which lie at the ends of their regions.
__device__ inline uint4 gather(u32 i, u32 bases, const u16* regions, const u32* ends, u32 streams, u32 groups) {
    u32 word[4] = {0, 0, 0, 0};
    u32 s = 0;
    if (8 * i >= ends[0]) {   // the first stream that ends behind the first half-word
        u32 high = streams;
        while (s < high) {
            const u32 middle = (s + high) / 2;
            if (ends[middle] > 8 * i) high = middle;
            else s = middle + 1;
        }
    }
    #pragma unroll
    for (u32 j = 0; j < 8; j++) {
        const u32 at = 8 * i + j;
        u32 half = 0;
        if (at == 0) half = bases;
        else if (at <= streams) half = ends[at - 1] - (at > 1 ? ends[at - 2] : 1 + streams);
        else {
            while (s < streams && at >= ends[s]) s++;
            if (s < streams) half = regions[min((s + 1) * STREAM_GROUPS, groups) * 32 - (ends[s] - at)];
        }
        word[j / 2] |= half << 16 * (j & 1);
    }
    return make_uint4(word[0], word[1], word[2], word[3]);
}

template <typename T, bool FAST>
__global__ void __launch_bounds__(ENTROPY_THREADS, 4) kv_entropy_encode(
    const u64* __restrict__ pages, const uint4* __restrict__ fixed_rows, const u64* __restrict__ slots,
    const u64* __restrict__ payloads, uint4* __restrict__ rows, const u32* __restrict__ regions,
    u32* __restrict__ cursors, u32 num_pages,
    const uint4* __restrict__ tables, const signed char* __restrict__ hints, u32 tables_id, u32 digest, u32 parts_in_tables,
    u32 groups, u32 groups_per_row, u32 row_stride, u32 pair_stride, u32 values, u32 period, u32 kw,
    u32 tokens, u32 channels, u32 widths, u32 outer) {
    extern __shared__ uint4 shared4[];   // tables, then 32 words a lane
    __shared__ Shared shared;
    const Geometry g = {groups, groups_per_row, row_stride, pair_stride, values, period, kw, tokens, channels, widths, outer};
    const u32 tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, warps = blockDim.x >> 5;
    const u32 streams = num_streams(groups), raw_bytes = (2 * values + 15) / 16 * 16;
    const uint2* const table0 = (const uint2*)shared4;
    u32* const stage = (u32*)((u8*)shared4 + parts_in_tables * ENCODE_BYTES) + 1024 * warp + lane;

    for (u32 p = 0; p < parts_in_tables; p++) {
        for (u32 i = tid; i < ENCODE_BYTES / 16; i += blockDim.x)
            shared4[p * (ENCODE_BYTES / 16) + i] = tables[(p * PART_BYTES + DECODE_BYTES) / 16 + i];
    }
    __syncthreads();

    for (u32 index = blockIdx.x; index < num_pages; index += gridDim.x) {
        const u16* const page = (const u16*)pages[index];
        const uint4 fixed = fixed_rows[index];
        u8* const slot = (u8*)slots[index];
        u16* const half_words = (u16*)(slot + raw_bytes);
        u32* const ends = (u32*)(slot + raw_bytes + groups * 64ull);   // of streams, in the payload
        const int step0 = (int)(fixed.x & 1023) - STEP_BIAS, step1 = (int)(fixed.x >> 10 & 1023) - STEP_BIAS;
        const bool raw = (fixed.x >> 20 & 15u) == CODING_RAW;   // no steps

        if (tid == 0) {
            shared.sum[0] = shared.sum[1] = 0;
            shared.count[0] = shared.count[1] = shared.too_large = 0;
        }
        __syncthreads();
        // 2.9: the bases
        int sum[2] = {0, 0};
        u32 count[2] = {0, 0};
        #pragma unroll 1
        for (u32 group = tid; group < groups && !raw; group += blockDim.x) {
            const u32 part = g.part(group), pair = group % groups_per_row;
            const int shift = hints ? hints[2 * pair] : 0;
            const Group here = make_group<T, FAST>(page, g, group, part ? step1 : step0, hints != nullptr, hints ? hints[2 * pair + 1] & 1 : 0, stage);
            if (here.c == ESCAPED) continue;
            const int e = (int)scale_of(here.c) - shift;
            sum[0] += part ? 0 : e, sum[1] += part ? e : 0;
            count[0] += !part, count[1] += part;
        }
        #pragma unroll
        for (u32 p = 0; p < 2; p++) {
            const u32 all = warp_sum(sum[p]), n = warp_sum(count[p]);
            if (lane == 0) {
                atomicAdd(&shared.sum[p], (int)all);
                atomicAdd(&shared.count[p], n);
            }
        }
        __syncthreads();
        int base[2];
        #pragma unroll
        for (u32 p = 0; p < 2; p++) {   // a sum below 0 gives 0 all the same
            const u32 n = max(shared.count[p], 1u);
            base[p] = (int)min((2 * (u32)max(shared.sum[p], 0) + shared.count[p]) / (2 * n), (u32)CLASS_LIMIT);
        }

        // 2.10, backwards
        for (u32 number = warp; number < streams && !raw; number += warps) {
            const Stream s(number, groups);
            Encoder encoder = {half_words + 32 * s.first, 32 * s.groups, 2 * s.lanes, false, LOWEST_STATE};
            #pragma unroll 1
            for (u32 turn = s.turns; turn-- > 0;) {
                const u32 in_stream = turn * s.lanes + lane;
                const bool here = lane < s.lanes && in_stream < s.groups;
                const bool last = here && in_stream + s.lanes >= s.groups;
                const u32 part = here ? g.part(s.first + in_stream) : 0;
                u32 c = 0, flag = 0;
                int shift = 0;
                if (here) {
                    const u32 pair = (s.first + in_stream) % groups_per_row;
                    if (hints) shift = hints[2 * pair];
                    const Group group = make_group<T, FAST>(page, g, s.first + in_stream, part ? step1 : step0, hints != nullptr,
                                                            hints ? hints[2 * pair + 1] & 1 : 0, stage);
                    c = group.c, flag = group.flag;
                }
                const uint2* const table = table0 + (parts_in_tables > 1 ? part * (ENCODE_BYTES / 8) : 0);
                const uint2* const symbols = table + row_of(c) * NUM_SYMBOLS;
                const u32 low = low_of(c);
                const u32* const words = stage + (flag ? 32 : 0);
                if (last) {
                    u32 signs = 0;
                    #pragma unroll 4
                    for (u32 i = 0; i < 16; i++) signs |= words[64 * i] >> 31 << i;
                    encoder.x = 0x10000u | signs;
                }
                #pragma unroll 1
                for (u32 i = 16; i-- > 0;) {
                    const u32 word = here ? words[64 * i] : 0;
                    #pragma unroll
                    for (u32 k = 0; k < 2; k++) {
                        const u32 half = k ? word & 0xffffu : word >> 16, magnitude = half & 0x7fffu;   // the second first
                        const u32 scaled = magnitude >> low;
                        const bool large = scaled >= EXACT_SYMBOLS;
                        const u32 symbol = large ? bit_length(scaled) + 11 : scaled;
                        const u32 n = here ? low + (large ? symbol - 12 : 0) : 0, rest = magnitude & ((1u << n) - 1);
                        const u32 with_sign = here && (magnitude != 0 || c >= SIGNED_ZEROS) && !(!k && last);
                        const uint2 entry = symbols[symbol];
                        const u32 f = entry.y & 0x7ffu;
                        const bool wide = n > 4;
                        encoder.make_room(here, wide ? 1u << (35 - n - with_sign) : f << (21 - min(n, 4u) - with_sign));
                        if (with_sign) encoder.x = encoder.x << 1 | half >> 15;
                        if (__any_sync(FULL, wide)) {
                            if (wide) encoder.x = encoder.x << (n - 4) | rest >> 4;
                            encoder.make_room(wide, f << 17);
                        }
                        encoder.x = encoder.x << min(n, 4u) | (wide ? rest & 15u : rest);
                        if (here) encoder.push(entry);
                    }
                }
                const u32 symbol = c == ESCAPED ? ESCAPED : (u32)((int)c - shift - (part ? base[1] : base[0]) + CLASS_LIMIT + 78) % ESCAPED;
                const uint2 entry = table[CLASS_ROW * NUM_SYMBOLS + symbol];
                encoder.make_room(here, (entry.y & 0x7ffu) << (hints ? 21 : 20));
                if (!hints) encoder.x = encoder.x << 1 | flag;
                if (here) encoder.push(entry);
                if (encoder.full) break;
            }
            if (encoder.full) {
                if (lane == 0) shared.too_large = 1;
                continue;
            }
            u16* const states = encoder.region + encoder.position - 2 * s.lanes;
            if (lane < s.lanes) states[2 * lane] = (u16)encoder.x, states[2 * lane + 1] = (u16)(encoder.x >> 16);
            if (lane == 0) ends[number] = 32 * s.groups - encoder.position + 2 * s.lanes;   // its size, so far
        }
        __syncthreads();
        bool entropy = !raw && !shared.too_large;   // the same for all threads
        if (tid == 0) {
            u32 end = 1 + streams;
            for (u32 number = 0; entropy && number < streams; number++) ends[number] = end += ends[number];
            shared.half_words = end;
        }
        __syncthreads();
        const u32 bytes_now = (shared.half_words + 1) / 2 * 4;
        entropy = entropy && bytes_now < fixed.y;
        const u32 bytes = entropy ? bytes_now : fixed.y;
        if (tid == 0) {
            const u32 i = regions ? regions[index] : 0;
            shared.place = cursors ? atomicAdd(&cursors[i], (bytes + 15) / 16) : 0;
        }
        __syncthreads();
        u32* const payload = (u32*)payloads[index] + 4ull * shared.place;
        u64 check = 0;
        for (u32 i = tid; i < (bytes + 15) / 16; i += blockDim.x) {
            uint4 w = entropy ? gather(i, (u32)base[0] | (kw == period ? 0 : (u32)base[1] << 8), half_words, ends, streams, groups)
                              : ((const uint4*)slot)[i];
            const u32 word[4] = {w.x, w.y, w.z, w.w};
            if (16 * i + 16 <= bytes) store16(payload + 4 * i, w);
            #pragma unroll
            for (u32 j = 0; j < 4; j++) {
                const u32 at = 4 * i + j;
                if (4 * at + 4 <= bytes) {
                    if (16 * i + 16 > bytes) payload[at] = word[j];
                    check += term(word[j], PAYLOAD_INDEX + at);
                } else if (4 * at < bytes) {
                    *(u16*)(payload + at) = (u16)word[j];   // of a raw page of an odd number of values
                }
            }
            check = fold(check);
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
