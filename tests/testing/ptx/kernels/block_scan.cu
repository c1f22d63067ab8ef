// counts[e] of ids, then its exclusive sum over up to blockDim.x bins, then a scatter by atomics.
extern "C" __global__ void block_scan(const int* ids, int n, int bins, int* offsets, int* order) {
  __shared__ int count[256], sum[256], start[256];
  int t = threadIdx.x;
  if (t < bins) count[t] = 0;
  __syncthreads();
  for (int i = t; i < n; i += blockDim.x)
    if (ids[i] >= 0) atomicAdd(&count[ids[i]], 1);
  __syncthreads();
  sum[t] = t < bins ? count[t] : 0;
  __syncthreads();
  for (int d = 1; d < blockDim.x; d *= 2) {
    int v = t >= d ? sum[t - d] : 0;
    __syncthreads();
    sum[t] += v;
    __syncthreads();
  }
  if (t < bins) start[t] = offsets[t + 1] = sum[t];
  if (t == 0) offsets[0] = 0;
  __syncthreads();
  for (int i = t; i < n; i += blockDim.x)
    if (ids[i] >= 0) order[atomicSub(&start[ids[i]], 1) - 1] = i;
}
