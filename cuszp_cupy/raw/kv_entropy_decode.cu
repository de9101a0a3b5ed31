// kv_entropy_decode: decodes those pages of a batch that have coding entropy; kv_decode has to come before it, since
// it decodes the others and writes a status of all. One thread block a page at a time, one warp a stream.
//
//   in   payloads, rows, pages, status, geometry   as for kv_decode; payloads in device memory (mapped host memory is
//        right, too, but read in small pieces)
//   in   tables    the tables of both parts (kv_entropy.cuh); tables_id and digest of format.py 2.12; parts_in_tables:
//        1 where both parts have the same
//   in   hints     int8 o and f of each pair of channels, or null
//   out  status    of pages of this coding: 0 good; 1 the row, 2 the streams, 4 the checksum, 8 other tables (bits may
//        add up)
//   FAST: token groups, pages 4-byte aligned
//   grid any (pages are taken in turn)     block  32 to ENTROPY_THREADS     shared  DECODE_BYTES a part in tables and
//        512 bytes a warp, 2560 unless FAST
//
// Guarantee: the page that reference.decode_page returns. Whatever row, payload and tables of right size hold, nothing
// outside the payload and the page is touched; a page whose row or checksum is wrong is not written at all.
// Format: sections 2.9 to 2.12.
#include "kv_entropy.cuh"

#define BAD_ROW 1u
#define BAD_STREAMS 2u
#define BAD_CHECKSUM 4u
#define BAD_TABLES 8u

// A lane's coder. The stream's next half-words lie in a ring of the warp: byte i of the payload in place i % 512.
// Between two calls of `advance` up to 128 half-words may be taken.
struct Decoder {
    const u32* words;      // of the payload
    u32 last_word;         // of the payload: reads of damaged streams stop there
    u32* ring;             // the 4 chunks of 128 bytes from `chunk` on
    u32 lanes_before;      // as bits
    u32 position, chunk;   // the next half-word, in bytes, the same for all lanes; position / 128 at the last `advance`
    u32 ahead;             // this lane's word of chunk + 4
    u32 x;

    __device__ u32 word(u32 c) const { return words[min(32 * c + (threadIdx.x & 31), last_word)]; }
    __device__ void open(u32 from) {
        position = from, chunk = from / 128;
        __syncwarp();
        #pragma unroll
        for (u32 i = 0; i < 4; i++) ring[32 * (chunk + i & 3) + (threadIdx.x & 31)] = word(chunk + i);
        ahead = word(chunk + 4);
        __syncwarp();
    }
    __device__ void advance() {
        if (position / 128 == chunk) return;   // the same for all lanes
        __syncwarp();
        #pragma unroll 1
        do {
            ring[32 * (chunk & 3) + (threadIdx.x & 31)] = ahead;
            ahead = word(++chunk + 4);
        } while (position / 128 != chunk);
        __syncwarp();
    }
    __device__ void refill(bool need) {
        const u32 who = __ballot_sync(FULL, need);
        const u32 next = *(const u16*)((const u8*)ring + (position + 2 * __popc(who & lanes_before) & 511));
        if (need) x = x << 16 | next;
        position += 2 * __popc(who);
    }
    __device__ void refill() { refill(x < LOWEST_STATE); }
    // The F, C << 16 and so on of the symbol (kv_entropy.cuh).
    __device__ uint2 read(const u8* slots, const uint2* entries) {
        const u32 slot = x & 1023u;
        const uint2 entry = entries[slots[slot]];
        x = (entry.x & 0xffffu) * (x >> 10) + slot - (entry.x >> 16);
        return entry;
    }
    __device__ u32 bits(u32 n) {
        const u32 value = x & ~(~0u << n);
        x >>= n;
        return value;
    }
    // 1, or -1 for a negative value; nothing is read unless `there`. With the refill behind it.
    __device__ int sign(bool there) {
        const u32 n = there ? 1 : 0, one = x & n;
        x >>= n;
        refill();
        return 1 - 2 * (int)one;
    }
};

// 2.10: magnitudes, of which `sign` and a refill are still to come.
struct Magnitudes {
    const u8* slots;        // of the table
    const uint2* entries;   // of the part
    u32 low;                // bits behind each symbol

    __device__ u32 operator()(Decoder& decoder) const {
        const uint2 entry = decoder.read(slots, entries);
        const u32 n = low + (entry.y >> 16);
        u32 rest;
        if (__any_sync(FULL, n > 4)) {
            rest = decoder.bits(min(n, 4u));
            decoder.refill(n > 4 && decoder.x < LOWEST_STATE);
            if (n > 4) rest |= decoder.bits(n - 4) << 4;
        } else {
            rest = decoder.bits(n);
        }
        return ((entry.y & 0xffffu) << low) + rest;
    }
};

// Puts a group's values in a page, pair by pair.
template <bool FAST>
__device__ inline void put(u16* data, u32 at, u32 values, u32 pair) {
    if constexpr (FAST) {
        *(u32*)(data + at) = pair;
    } else {
        if (at < values) data[at] = (u16)pair;
        if (at + 1 < values) data[at + 1] = (u16)(pair >> 16);
    }
}

// 2.9 backwards, for the two sequences of a group: signed v to storage bits, but for the signs of zeros.
template <typename T>
struct Restorer {
    Grid grid;
    int predicted;            // all bits or none
    int a0 = 8, a1 = 8;       // a + 8
    int weight = 80;          // 8 x 10 for the first pair, 3 x 16 for the others
    u32 any = 0;              // of all magnitudes of q

    __device__ u32 operator()(int v0, int v1) {
        const int q0 = v0 + (a0 >> 4 & predicted), q1 = v1 + (a1 >> 4 & predicted);
        a0 += (weight * q0 + (24 - 3 * a0)) >> 3;
        a1 += (weight * q1 + (24 - 3 * a1)) >> 3;
        weight = 48;
        const u32 m0 = abs(q0), m1 = abs(q1);
        any |= m0 | m1;
        // too large ones, of damaged streams, give any value
        const u32 y = Storage<T>::pack(grid.point(__uint_as_float(MAGIC_BITS | m0)), grid.point(__uint_as_float(MAGIC_BITS | m1)));
        return y | ((u32)q0 >> 16 & 0x8000u) | ((u32)q1 & 0x80000000u);
    }
};

template <typename T, bool FAST>
__global__ void __launch_bounds__(ENTROPY_THREADS, 8) kv_entropy_decode(
    const u64* __restrict__ payloads, const uint4* __restrict__ rows, const u64* __restrict__ pages,
    u32* __restrict__ status, u32 num_pages,
    const uint4* __restrict__ tables, const signed char* __restrict__ hints, u32 tables_id, u32 digest, u32 parts_in_tables,
    u32 groups, u32 groups_per_row, u32 row_stride, u32 pair_stride, u32 values, u32 period, u32 kw,
    u32 tokens, u32 channels, u32 widths, u32 outer) {
    extern __shared__ uint4 shared4[];   // tables, then a ring for each warp, and 16 words a lane
    __shared__ u64 shared_check[ENTROPY_WARPS];
    __shared__ u32 shared_bad[ENTROPY_WARPS];
    const Geometry g = {groups, groups_per_row, row_stride, pair_stride, values, period, kw, tokens, channels, widths, outer};
    const u32 tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, warps = blockDim.x >> 5;
    const u32 streams = num_streams(groups);
    const u8* const table0 = (const u8*)shared4;
    u32* const ring = (u32*)(table0 + parts_in_tables * DECODE_BYTES) + (FAST ? 128 : 640) * warp;
    u32* const stage = ring + 128 + lane;   // not FAST: word i: stage[32 i]

    for (u32 p = 0; p < parts_in_tables; p++) {
        for (u32 i = tid; i < DECODE_BYTES / 16; i += blockDim.x)
            shared4[p * (DECODE_BYTES / 16) + i] = tables[p * (PART_BYTES / 16) + i];
    }
    __syncthreads();

    for (u32 index = blockIdx.x; index < num_pages; index += gridDim.x) {
        const uint4 row = rows[index];
        if ((row.x >> 20 & 15u) != CODING_ENTROPY) continue;   // kv_decode has seen to it
        const u8* const payload = (const u8*)payloads[index] + 16ull * row.w;
        u16* const page = (u16*)pages[index];
        const int step0 = (int)(row.x & 1023) - STEP_BIAS, step1 = (int)(row.x >> 10 & 1023) - STEP_BIAS;
        const u32 bytes = row.y, id = row.x >> 24;
        const bool row_good = bytes % 4 == 0 && bytes >= 4 + 2 * streams && bytes < 2 * values &&
                              abs(step0) <= STEP_LIMIT && abs(step1) <= (kw == period ? 0 : STEP_LIMIT);
        if (!row_good || id != tables_id) {   // the same for all threads
            if (tid == 0) status[index] = row_good ? BAD_TABLES : BAD_ROW;
            continue;
        }

        u64 check = tid == 0 ? header_terms<T>(g, row.x, bytes) + term(digest, 7) : 0;
        const uint4* const from = (const uint4*)payload;
        for (u32 i = tid; i < bytes / 16; i += blockDim.x) check = fold(check) + term4(from[i], PAYLOAD_INDEX + 4 * i);
        for (u32 i = bytes / 16 * 4 + tid; i < bytes / 4; i += blockDim.x) check += term(((const u32*)payload)[i], PAYLOAD_INDEX + i);
        check = warp_check(check);
        if (lane == 0) shared_check[warp] = check;
        __syncthreads();
        check = warp_check(lane < warps ? shared_check[lane] : 0);
        u32 bad = residue(check) != row.z ? BAD_CHECKSUM : 0;

        // 2.11: bases and sizes. Every warp looks at all sizes.
        const u16* const half_words = (const u16*)payload;
        const u32 bases = half_words[0], base0 = bases & 255u, base1 = bases >> 8;
        if (base0 > CLASS_LIMIT || base1 > (kw == period ? 0 : CLASS_LIMIT)) bad |= BAD_STREAMS;
        u32 end = 1 + streams;
        for (u32 i = lane; i < streams; i += 32) {
            const Stream s(i, groups);
            const u32 count = half_words[1 + i];
            if (count < 2 * s.lanes || count > 32 * s.groups) bad |= BAD_STREAMS;
        }
        for (u32 i = 0; i < streams; i += 32) end += warp_sum(i + lane < streams ? half_words[1 + i + lane] : 0);
        if ((end + 1) / 2 != bytes / 4 || (end % 2 && half_words[end] != 0)) bad |= BAD_STREAMS;
        bad = __reduce_or_sync(FULL, bad);   // the same for all warps

        u32 start = 1 + streams;
        for (u32 number = 0; number < streams && !bad; number++) {
            const u32 count = half_words[1 + number], here_start = start;
            start += count;
            if (number % warps != warp) continue;
            const Stream s(number, groups);
            Decoder decoder = {(const u32*)payload, bytes / 4 - 1, ring, (1u << lane) - 1};
            decoder.open(2 * here_start + 4 * s.lanes);
            decoder.x = LOWEST_STATE;
            if (lane < s.lanes) {
                const u16* const first = half_words + here_start + 2 * lane;
                decoder.x = first[0] | (u32)first[1] << 16;
            }
            if (decoder.x < LOWEST_STATE || decoder.x >> 31) bad |= BAD_STREAMS;
            bad = __reduce_or_sync(FULL, bad);
            if (bad) break;

            for (u32 turn = 0; turn < s.turns; turn++) {
                const u32 in_stream = turn * s.lanes + lane, group = s.first + in_stream;
                const bool here = s.has(in_stream);
                const bool last = here && in_stream + s.lanes >= s.groups;
                u32 part = 0;
                const u32 offset = here ? g.locate<FAST>(group, part) : 0;
                const u8* const slots = table0 + (parts_in_tables > 1 ? part * DECODE_BYTES : 0);
                const uint2* const entries = (const uint2*)(slots + SLOT_BYTES);
                int shift = 0;
                u32 flag = 0, c = 0;   // as c = 0 takes nothing, lanes without a group do nothing
                if (here) {
                    if (hints) {
                        const u32 pair = group % groups_per_row;
                        shift = hints[2 * pair], flag = hints[2 * pair + 1] & 1;
                    }
                    c = decoder.read(slots + CLASS_ROW * 1024, entries).y;
                    if (c != ESCAPED) c = (u32)((int)c - CLASS_LIMIT + (int)(part ? base1 : base0) + shift + 78) % ESCAPED;
                    if (!hints) flag = decoder.bits(1);
                }
                decoder.refill();
                decoder.advance();

                const bool plain = c < SIGNED_ZEROS;
                const Magnitudes next = {slots + row_of(c) * 1024, entries, low_of(c)};
                Restorer<T> restore = {Grid(part ? step1 : step0), flag && plain ? -1 : 0};
                if (!__any_sync(FULL, last || !plain)) {
                    #pragma unroll 1
                    for (u32 i = 0, at = offset; i < 16; i++, at += g.pair_stride) {
                        u32 v = next(decoder);
                        const int v0 = decoder.sign(v != 0) * (int)v;
                        v = next(decoder);
                        const int v1 = decoder.sign(v != 0) * (int)v;
                        const u32 pair = restore(v0, v1);
                        if (here) put<FAST>(page, at, values, pair);
                        decoder.advance();
                    }
                    if (restore.any & ~MAGNITUDE_MASK) bad |= BAD_STREAMS;
                    continue;
                }
                // Signs come late, or zeros have some, or there are storage bits: all values first. They wait where the
                // page will be, or in shared memory where a group may reach beyond it.
                u32 any = 0;
                #pragma unroll 1
                for (u32 i = 0; i < 16; i++) {
                    const u32 v0 = next(decoder);
                    u32 word = (v0 & 0x7fffu) | (decoder.sign(v0 != 0 || !plain) < 0 ? 0x8000u : 0);
                    const u32 v1 = next(decoder);
                    word |= (v1 & 0x7fffu) << 16 | (decoder.sign((v1 != 0 || !plain) && !last) < 0 ? 0x80000000u : 0);
                    any |= v0 | v1;
                    if (!FAST) stage[32 * i] = word;
                    else if (here) *(u32*)(page + offset + i * g.pair_stride) = word;
                    decoder.advance();
                }
                if (any >> 15 || (last && decoder.x >> 16 != 1)) bad |= BAD_STREAMS;
                #pragma unroll 1
                for (u32 i = 0; i < 16 && here; i++) {
                    const u32 at = offset + i * g.pair_stride;
                    u32 word = FAST ? *(const u32*)(page + at) : stage[32 * i];
                    if (last) {
                        const u32 sign = decoder.x >> i & 1u;
                        if (sign && plain && !(word >> 16)) bad |= BAD_STREAMS;
                        word |= sign << 31;
                    }
                    if (c != ESCAPED) {
                        const int v0 = word & 0x7fffu, v1 = word >> 16 & 0x7fffu;
                        const u32 zero_signs = plain ? 0 : word & 0x80008000u;   // of other values the same as v's
                        word = restore(word & 0x8000u ? -v0 : v0, word >> 31 ? -v1 : v1) | zero_signs;
                    }
                    put<FAST>(page, at, values, word);
                }
                if (restore.any & ~MAGNITUDE_MASK) bad |= BAD_STREAMS;
            }
            if (decoder.position != 2 * start) bad |= BAD_STREAMS;
            bad = __reduce_or_sync(FULL, bad);   // lanes that found nothing must not go on to the next stream alone
        }
        if (lane == 0) shared_bad[warp] = bad;
        __syncthreads();
        if (tid == 0) {
            for (u32 w = 1; w < warps; w++) bad |= shared_bad[w];
            status[index] = bad;
        }
        __syncthreads();
    }
}
