"""Memory of CPU tensors: huge pages under weights and large tensors, and returning freed memory."""
