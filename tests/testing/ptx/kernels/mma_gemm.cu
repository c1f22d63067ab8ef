// C (f32) = A (bf16, M x K) B (bf16, N x K)^T: cp.async in two stages, ldmatrix, mma; blocks of 16 x 16 by one warp.
// M, N multiples of 16, K of 16. No headers: bf16 is its bits.
typedef unsigned u32;
typedef unsigned short bf16;
__device__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ void copy16(void* to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ void load4(u32 (&r)[4], const void* from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(from)) : "memory");
}
__device__ void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
extern "C" __global__ void mma_gemm(const bf16* a, const bf16* b, float* c, int n, int k) {
  __shared__ __align__(16) bf16 as[2][16][24], bs[2][16][24];  // rows of 48 bytes: no bank conflicts
  int lane = threadIdx.x, row = lane / 2, half = lane % 2 * 8;
  const bf16* from_a = a + (long long)(blockIdx.y * 16 + row) * k + half;
  const bf16* from_b = b + (long long)(blockIdx.x * 16 + row) * k + half;
  float d[2][4] = {};
  int stages = k / 16;
  copy16(&as[0][row][half], from_a);
  copy16(&bs[0][row][half], from_b);
  asm volatile("cp.async.commit_group;" ::: "memory");
  for (int s = 0; s < stages; s++) {
    if (s + 1 < stages) {
      copy16(&as[(s + 1) % 2][row][half], from_a + (s + 1) * 16);
      copy16(&bs[(s + 1) % 2][row][half], from_b + (s + 1) * 16);
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
    asm volatile("cp.async.wait_group 1;" ::: "memory");
    __syncthreads();
    u32 x[4], y[4];
    load4(x, &as[s % 2][lane % 16][lane / 16 * 8]);
    load4(y, &bs[s % 2][lane % 8 + lane / 16 * 8][lane / 8 % 2 * 8]);
    multiply(d[0], x, y[0], y[1]);
    multiply(d[1], x, y[2], y[3]);
    __syncthreads();
  }
  for (int j = 0; j < 2; j++)
    for (int i = 0; i < 4; i++)
      c[(long long)(blockIdx.y * 16 + lane / 4 + i / 2 * 8) * n + blockIdx.x * 16 + j * 8 + lane % 4 * 2 + i % 2] = d[j][i];
}
