"""Memory of tensors: pages that can grow in place, and huge pages under weights."""
