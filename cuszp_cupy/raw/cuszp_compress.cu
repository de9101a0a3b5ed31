// cuszp_compress: one array to its cuszp stream, in one pass: read once, write the stream.
//
//   in   x[n]        T     any values; T-aligned
//        n           i64   1 <= n < 2^31
//        r           T     0.5 / eb, rounded in T
//   out  stream      u8    max_stream_bytes(n) bytes; 4-byte aligned
//        size        u64   bytes of the stream
//   i/o  workspace   u64   1 + tiles words, zero before and after (cuszp_common.cuh)
//   grid  tiles = 1024 nc / (32 WARPS)     block  32 WARPS     shared  4 KiB a warp, static
//
// Guarantee: the bytes of reference.compress, whatever WARPS and the order of the CTAs; nothing is
// written past `size`. Format: format.py section 1. Upstream: cuSZp 6ab90a5,
// src/cuSZp_kernels_1D_f32.cu. Every operation on T rounds by itself: part of the format.

#include "cuszp_common.cuh"

// 1.1. PTX: conversion saturates; NaN gives 0 from float, INT_MIN from double, as specified.
__device__ __forceinline__ u32 quantise(float x, float r) {
    const float s = __fmul_rn(x, r);
    return u32(__float2int_rz(__fadd_rn(s, 0.5f))) - (s >= -0.5f ? 0 : 1);
}

__device__ __forceinline__ u32 quantise(double x, double r) {
    const double s = __dmul_rn(x, r);
    return u32(__double2int_rz(__dadd_rn(s, 0.5))) - (s >= -0.5 ? 0 : 1);
}

__device__ __forceinline__ int bits(int a) { return 32 - __clz(max(a, 0)); }

// Writes bytes from..to-1 of a word of the tile. The words at both ends of a payload of mode outlier
// are shared with the neighbouring blocks.
__device__ __forceinline__ void put_bytes(u32 *tile_words, u32 w, u32 word, u32 from, u32 to) {
    u8 *bytes = reinterpret_cast<u8 *>(tile_words + swizzled(w));
#pragma unroll
    for (u32 b = 0; b < 4; ++b) {
        if (from <= b && b < to) bytes[b] = u8(word >> 8 * b);
    }
}

template <typename T, int MODE, int WARPS>
__global__ void __launch_bounds__(32 * WARPS)
    cuszp_compress(const T *x, i64 n, T r, u8 *stream, u64 *size, u64 *workspace) {
    // First the quantised values, a row of 32 words a block; then the payloads, packed.
    __shared__ __align__(16) u32 tile_words[1024 * WARPS];

    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 tile = take_tile(workspace);
    const u32 block = tile * 32 * WARPS + threadIdx.x;

    // A warp loads its 32 blocks, lane = value.
    const i64 first_value = (i64(tile) * WARPS + warp) * 1024;
    const i64 remaining = n - first_value;
    constexpr int BATCH = 128 / sizeof(T);  // loads in flight
#pragma unroll
    for (int batch = 0; batch < 32; batch += BATCH) {
        T value[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int at = 32 * (batch + i) + lane;
            value[i] = at < remaining ? __ldcs(x + first_value + at) : T(0);
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            tile_words[swizzled(1024 * warp + 32 * (batch + i) + lane)] = quantise(value[i], r);
        }
    }
    __syncwarp();

    // 1.2. From here on lane = block; word[bit_of(i)] is value i.
    u32 word[32];
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
        const uint4 quad = *reinterpret_cast<const uint4 *>(tile_words + swizzled(32 * threadIdx.x + i));
        word[bit_of(i)] = quad.x;
        word[bit_of(i + 1)] = quad.y;
        word[bit_of(i + 2)] = quad.z;
        word[bit_of(i + 3)] = quad.w;
    }
    if (MODE != FIXED) {
#pragma unroll
        for (int i = 31; i > 0; --i) word[bit_of(i)] -= word[bit_of(i - 1)];
    }
    const i64 num_values = n - i64(block) * 32;
    if (num_values < 32) {
#pragma unroll
        for (int i = 0; i < 32; ++i) {
            if (i >= num_values) word[bit_of(i)] = 0;
        }
    }
    u32 signs = 0;
#pragma unroll
    for (int i = 31; i >= 0; --i) signs = __funnelshift_l(word[i], signs, 1);
    int largest = 0;  // of all magnitudes but the first; INT_MIN stays negative, so it is left out
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        const int v = int(word[i]);
        word[i] = v < 0 ? 0u - word[i] : word[i];
        if (i != bit_of(0)) largest = max(largest, int(word[i]));
    }

    // 1.3, 1.4
    const u32 first = word[bit_of(0)];
    u32 planes = bits(max(largest, int(first)));
    u32 bytes = planes ? 4 + 4 * planes : 0, outlier_bytes = 0, rate = planes;
    if (MODE == OUTLIER) {
        const u32 k2 = bits(largest), ob = (bits(int(first)) + 7) / 8;
        if (bytes > 4 + 4 * k2 + ob) {
            planes = k2, outlier_bytes = ob, bytes = 4 + 4 * k2 + ob;
            rate = 0x80 | (ob - 1) << 5 | k2;
            word[bit_of(0)] = 0;
        }
    }
    stream[block] = u8(rate);  // the grid covers the whole rate area: padding is written here too

    u32 tile_bytes;
    u32 at = scan_tile<WARPS>(bytes, workspace, tile, tile_bytes);
    transpose(word);
    if constexpr (MODE == OUTLIER) {
        for (u32 i = 0; i < outlier_bytes; ++i, ++at) {
            put_bytes(tile_words, at / 4, first >> 8 * i << 8 * (at % 4), at % 4, at % 4 + 1);
        }
    }
    if (bytes) {
        const u32 skew = at % 4;  // 0 but in mode outlier
        u32 w = at / 4, before = signs;
        if (MODE == OUTLIER && skew) {
            put_bytes(tile_words, w, signs << 8 * skew, skew, 4);
        } else {
            tile_words[swizzled(w)] = signs;
        }
#pragma unroll
        for (u32 p = 0; p < 31; ++p) {
            if (p < planes) {
                const u32 shifted = __funnelshift_l(before, word[p], 8 * skew);
                tile_words[swizzled(++w)] = MODE == OUTLIER ? shifted : word[p];
                before = word[p];
            }
        }
        if (MODE == OUTLIER && skew) put_bytes(tile_words, w + 1, before >> (32 - 8 * skew), 0, skew);
    }

    const u64 tile_offset = offset_of_tile(workspace, tile, tile_bytes);
    u8 *out = stream + 32 * WARPS * u64(gridDim.x) + tile_offset;
    if (tile == gridDim.x - 1 && threadIdx.x == 0) *size = out + tile_bytes - stream;

    // The tile's payloads to global memory, in words of global memory: `skew` bytes apart again.
    const u32 skew = MODE == OUTLIER ? reinterpret_cast<u64>(out) % 4 : 0;
    u32 *out_words = reinterpret_cast<u32 *>(out - skew);
    for (u32 w = threadIdx.x; 4 * w < skew + tile_bytes; w += 32 * WARPS) {
        const u32 after = 4 * w < tile_bytes ? tile_words[swizzled(w)] : 0;
        if (MODE != OUTLIER) {
            out_words[w] = after;
            continue;
        }
        const u32 before = w ? tile_words[swizzled(w - 1)] : 0;
        const u32 shifted = __funnelshift_l(before, after, 8 * skew);
        const u32 from = w ? 0 : skew, to = min(skew + tile_bytes - 4 * w, 4u);
        if (from == 0 && to == 4) {
            out_words[w] = shifted;
        } else {
            for (u32 b = from; b < to; ++b) reinterpret_cast<u8 *>(out_words + w)[b] = u8(shifted >> 8 * b);
        }
    }
}
