"""python -m bench.compile_check: every Triton kernel compiled for every architecture, without a GPU, and read back."""
