"""The GPU: which there is, how kernels are launched on it, what they share."""
