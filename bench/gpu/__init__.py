"""python -m bench.gpu: kernels and models on the GPU of this machine, beside stock and other libraries."""
