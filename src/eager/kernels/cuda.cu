// The kernels of tk's own that a GPU runs, compiled on the machine that has it: see cuda.rs. What stands between the
// two marks is plain C too: a test compiles it for the CPU and holds it against the kernels that run there.

typedef unsigned int u32;
typedef unsigned long long u64;

// mark: the mask of dropout, as in dropout.rs
#define NONE 0xffffffffu
#define ROW 1024u

__device__ static u64 mix(u64 x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

__device__ static float factor(u64 key, u64 row, u32 column, u32 threshold, float scale) {
  u64 of_row = mix(key ^ mix(row));
  u32 x = column * 0x9e3779b9u + (u32)of_row;
  x ^= x >> 16;
  x = (x * 0x7feb352du) ^ (u32)(of_row >> 32);
  x ^= x >> 15;
  x = x * 0x846ca68bu;
  x ^= x >> 16;
  return x >= threshold ? scale : 0.0f;
}

// Of a matrix's numbers: each of its rows of so many columns has a row of the mask, or none.
__device__ static float factor_of_rows(u64 i, const u32 *rows, u32 columns, u64 key, u32 threshold, float scale) {
  u32 row = rows[i / columns];
  return row == NONE ? 0.0f : factor(key, row, (u32)(i % columns), threshold, scale);
}

// Of numbers that have no rows of their own.
__device__ static float factor_of_numbers(u64 i, u64 key, u32 threshold, float scale) {
  return factor(key, i / ROW, (u32)(i % ROW), threshold, scale);
}
// mark

extern "C" __global__ void dropout(const float *x, float *y, u64 n, u64 key, u32 threshold, float scale) {
  u64 step = (u64)gridDim.x * blockDim.x;
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
    y[i] = x[i] * factor_of_numbers(i, key, threshold, scale);
  }
}

extern "C" __global__ void dropout_of_rows(const float *x, float *y, const u32 *rows, u32 columns, u64 n, u64 key,
                                           u32 threshold, float scale) {
  u64 step = (u64)gridDim.x * blockDim.x;
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += step) {
    y[i] = x[i] * factor_of_rows(i, rows, columns, key, threshold, scale);
  }
}
