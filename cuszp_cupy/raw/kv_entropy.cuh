// What kv_entropy_encode.cu and kv_entropy_decode.cu share: classes, streams, tables in shared memory.
// Section numbers are those of format.py.
#include "kv_common.cuh"

#define SIGNED_ZEROS 20u
#define ESCAPED 39u
#define CLASS_LIMIT 19
#define EXACT_CLASS 7u
#define EXACT_SYMBOLS 16u
#define NUM_TABLES 8u
#define NUM_SYMBOLS 19u
#define CLASS_ROW 9u          // rows 0 .. 8: for classes without a table, for e = 1 .. 8; row 9: of classes
#define ENTRIES (CLASS_ROW * NUM_SYMBOLS + ESCAPED + 1)
#define LOWEST_STATE 0x8000u
#define STREAM_GROUPS 256u
#define ENTROPY_THREADS 128   // a warp a stream, taken in turn
#define ENTROPY_WARPS 4

// A part's tables in device memory, as raw/kv.py lays them out. For the decoder: the entry (row x 19 + symbol) of each of 1024 slots
// of each row; then two words a symbol: F | C << 16, and the magnitude it stands for | bits behind it << 16, or the class. For
// the encoder: four words a symbol, which divide by F.
#define SLOT_BYTES ((CLASS_ROW + 1) * 1024)
#define DECODE_BYTES 11936u   // a multiple of 16
#define PART_BYTES 15312u     // and for the encoder

// e of class c; row of its table.
__device__ inline u32 scale_of(u32 c) { return c >= SIGNED_ZEROS ? c - SIGNED_ZEROS : c; }
__device__ inline u32 row_of(u32 c) { return c == ESCAPED ? 0 : min(scale_of(c), NUM_TABLES); }
// 2.10: bits behind each symbol that the class asks for.
__device__ inline u32 low_of(u32 c) { return c == ESCAPED ? 15 : max(scale_of(c), EXACT_CLASS) - EXACT_CLASS; }
__device__ inline u32 bit_length(u32 v) { return 32 - __clz(v); }

// 2.11.
struct Stream {
    u32 first, groups, lanes, turns;

    __device__ Stream(u32 number, u32 all_groups) {
        first = number * STREAM_GROUPS;
        groups = min(all_groups - first, STREAM_GROUPS);
        lanes = min((groups + 7) / 8, 32u);
        turns = (groups + lanes - 1) / lanes;
    }
    // Whether this lane has the group of that number, one of its turns.
    __device__ bool has(u32 in_stream) const { return (threadIdx.x & 31) < lanes && in_stream < groups; }
};
__device__ inline u32 num_streams(u32 groups) { return (groups + STREAM_GROUPS - 1) / STREAM_GROUPS; }
