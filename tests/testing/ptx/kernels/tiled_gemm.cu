// C = A B in tiles of 16 through shared memory, float32; any M, N, K.
extern "C" __global__ void tiled_gemm(const float* a, const float* b, float* c, int m, int n, int k) {
  __shared__ float as[16][16], bs[16][16];
  int tx = threadIdx.x, ty = threadIdx.y, row = blockIdx.y * 16 + ty, col = blockIdx.x * 16 + tx;
  float sum = 0;
  for (int k0 = 0; k0 < k; k0 += 16) {
    as[ty][tx] = row < m && k0 + tx < k ? a[(long long)row * k + k0 + tx] : 0.f;
    bs[ty][tx] = col < n && k0 + ty < k ? b[(long long)(k0 + ty) * n + col] : 0.f;
    __syncthreads();
    for (int i = 0; i < 16; i++) sum += as[ty][i] * bs[i][tx];
    __syncthreads();
  }
  if (row < m && col < n) c[(long long)row * n + col] = sum;
}
