// What nvcc makes of the mathematics of activations and routers, in f32 and f64, with a switch and local memory.
extern "C" __global__ void math(const float* x, float* y, const double* u, double* v, int n, int which) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  float a = x[i], table[4] = {a, a * 2, a * 3, a * 4};
  double d = u[i];
  switch (which) {
    case 0: y[i] = a / (1.f + expf(-a)); v[i] = d / (1.0 + exp(-d)); break;
    case 1: y[i] = tanhf(a); v[i] = d + 1.0; break;
    case 2: y[i] = erff(a); v[i] = d + 2.0; break;
    case 3: y[i] = logf(a * a + 1.f); v[i] = d + 3.0; break;
    case 4: y[i] = sqrtf(a * a + 2.f) / 3.f; v[i] = d + 4.0; break;
    case 5: y[i] = sinf(a) + cosf(a); v[i] = sin(d); break;
    case 6: y[i] = table[i & 3]; v[i] = (double)(i / 7 + i % 5) + (double)((long long)i * 1000003LL % 97); break;
    default: y[i] = powf(fabsf(a) + 0.5f, 1.5f); v[i] = d + 7.0;
  }
}
