// What the kernels of stream cuszp share: tiles, their offsets, and the layout of shared memory.
//
// A tile is 32 * WARPS blocks and is worked on by one CTA; a thread owns one block of 32 values.
//
// Workspace (u64 words, all 0 between launches):
//   word 0       low half: tiles handed out; high half: tiles whose offset is known
//   word 1 + i   state of tile i: value | what it is: payload bytes of the tile (AGGREGATE), or of
//                tiles 0..i (INCLUSIVE); 0: nothing known yet
// A state is one word, written and read whole, so relaxed accesses are enough.

typedef unsigned char u8;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

enum Mode { FIXED, PLAIN, OUTLIER };  // as in format.MODES

constexpr u32 FULL = 0xffffffffu;
constexpr u64 AGGREGATE = 1ull << 62, INCLUSIVE = 2ull << 62, VALUE = AGGREGATE - 1;

__device__ __forceinline__ u64 load_state(const u64 *state) {
    u64 word;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(word) : "l"(state) : "memory");
    return word;
}

__device__ __forceinline__ void store_state(u64 *state, u64 word) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" : : "l"(state), "l"(word) : "memory");
}

// The rates of damaged streams must not lead out of bounds: a payload has at most 128 bytes.
struct Rate {
    u32 planes, outlier_bytes, bytes;
    bool legal;

    template <int MODE>
    static __device__ __forceinline__ Rate parse(u32 byte) {
        Rate rate;
        bool apart = MODE == OUTLIER && byte & 0x80;
        rate.legal = apart ? (byte & 31) < 31 : byte < 32;
        if (!rate.legal) byte = 0, apart = false;
        rate.planes = byte & 31;
        rate.outlier_bytes = apart ? (byte >> 5 & 3) + 1 : 0;
        rate.bytes = byte ? 4 + 4 * rate.planes + rate.outlier_bytes : 0;
        return rate;
    }
};

// Value i of a block is bit bit_of(i) of each plane (format.py 1.3).
__device__ constexpr int bit_of(int i) { return i ^ 7; }

// Where byte `at` of a tile lies in shared memory: 16-byte quads are permuted within 128 bytes, so that
// threads which go through blocks of 128 bytes, or through payloads of a power of two, side by side, do
// not meet in one bank.
__device__ __forceinline__ u32 swizzled(u32 at) { return at ^ (at >> 3 & 0x70); }

// swizzled(128 * row + at) for at < 128, for the compiler to see constants in.
__device__ __forceinline__ u32 in_row(u32 row, u32 at) { return 128 * row + (at ^ row % 8 * 16); }

template <typename V>
__device__ __forceinline__ V &as(u8 *address) {
    return *reinterpret_cast<V *>(address);
}

// A step of the transposition of 32 x 32 bits (bit j of word i becomes bit i of word j): exchanges the
// off-diagonal S x S squares of each 2S x 2S, in `num_words` words. The steps 16, 8, 4, 2, 1 may come in
// any order.
template <int S, int num_words>
__device__ __forceinline__ void transpose_step(u32 *word) {
    constexpr u32 low = FULL / ((1u << S) + 1);  // the S low bits of every 2S
#pragma unroll
    for (int i = 0; i < num_words; ++i) {
        if (i & S) continue;
        const u32 x = word[i], y = word[i + S];
        word[i] = (x & low) | (y << S & ~low);
        word[i + S] = (x >> S & low) | (y & ~low);
    }
}

// The steps that stay within 8 planes: left out where no block of the warp has them.
__device__ __forceinline__ void transpose_8_planes(u32 *word) {
    transpose_step<4, 8>(word);
    transpose_step<2, 8>(word);
    transpose_step<1, 8>(word);
}

// Tiles are numbered in the order in which CTAs start, so that a CTA only ever waits for running ones.
__device__ __forceinline__ u32 take_tile(u64 *workspace) {
    __shared__ u32 tile;
    if (threadIdx.x == 0) tile = atomicAdd(reinterpret_cast<u32 *>(workspace), 1u);
    __syncthreads();
    return tile;
}

// Returns the exclusive sum of `bytes` over the CTA; `tile_bytes` is its total, published for later
// tiles. A barrier: shared memory written before it can be read, and read before it rewritten.
template <int WARPS>
__device__ __forceinline__ u32 scan_tile(u32 bytes, u64 *workspace, u32 tile, u32 &tile_bytes) {
    __shared__ __align__(16) u32 warp_bytes[WARPS];  // read 16 bytes at a time: with nothing else in them
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    u32 sum = bytes;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const u32 below = __shfl_up_sync(FULL, sum, d);
        if (lane >= d) sum += below;
    }
    if (lane == 31) warp_bytes[warp] = sum;
    __syncthreads();
    u32 offset = sum - bytes;
    tile_bytes = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        if (w == warp) offset += tile_bytes;
        tile_bytes += warp_bytes[w];
    }
    if (threadIdx.x == 0) store_state(workspace + 1 + tile, tile_bytes | (tile ? AGGREGATE : INCLUSIVE));
    return offset;
}

// Returns the payload bytes of all tiles before this one (decoupled look-back, 32 tiles at a time, by
// the first warp), to every thread. A barrier. The last tile to get here leaves the workspace zero.
__device__ __forceinline__ u64 offset_of_tile(u64 *workspace, u32 tile, u32 tile_bytes) {
    __shared__ u64 tile_offset;
    __shared__ bool last;
    u64 *states = workspace + 1;
    if (threadIdx.x < 32) {
        const u32 lane = threadIdx.x;
        u64 offset = 0;
        for (i64 nearest = i64(tile) - 1; nearest >= 0; nearest -= 32) {
            const i64 i = nearest - lane;
            u64 state;
            do {
                state = i < 0 ? INCLUSIVE : load_state(states + i);
            } while (__any_sync(FULL, state < AGGREGATE));
            const u32 inclusive = __ballot_sync(FULL, state >= INCLUSIVE);
            // Lanes beyond the nearest inclusive sum are already in it.
            u64 sum = lane < __ffs(inclusive) || !inclusive ? state & VALUE : 0;
#pragma unroll
            for (int d = 16; d; d /= 2) sum += __shfl_xor_sync(FULL, sum, d);
            offset += sum;
            if (inclusive) break;
        }
        __syncwarp();  // all lanes have read, before lane 0 says so
        if (lane == 0) {
            if (tile) store_state(states + tile, (offset + tile_bytes) | INCLUSIVE);
            tile_offset = offset;
            // Nobody reads or writes states after its own count here; hence the fence before it and,
            // for the one that cleans up, the fence after.
            __threadfence();
            last = atomicAdd(reinterpret_cast<u32 *>(workspace) + 1, 1u) == gridDim.x - 1;
            __threadfence();
        }
    }
    __syncthreads();
    if (last) {
        for (u32 i = threadIdx.x; i <= gridDim.x; i += blockDim.x) workspace[i] = 0;
    }
    return tile_offset;
}
