"""The GPU: detection, launches, kernel features, and what kernels share."""
