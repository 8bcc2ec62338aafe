// Elementwise activations of rows: silu(gate) * up, or gelu_tanh(x + bias).

template <class T>
void activation_rows_typed(const ActivationArgs& a, int64_t begin, int64_t end) {
  const T* bias = static_cast<const T*>(a.bias);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.x_stride;
    T* y = static_cast<T*>(a.y) + row * a.y_stride;
    if (a.activation == Activation::swiglu) {
      const T* up = static_cast<const T*>(a.up) + row * a.up_stride;
      QVL_FOR_LANES(i, lanes, a.size) {
        store_lanes(vec_silu(load_lanes(x + i, lanes)) * load_lanes(up + i, lanes), y + i, lanes);
      }
    } else {
      QVL_FOR_LANES(i, lanes, a.size) {
        Vec value = load_lanes(x + i, lanes);
        if (bias) value = value + load_lanes(bias + i, lanes);
        store_lanes(vec_gelu_tanh(value), y + i, lanes);
      }
    }
  }
}

void activation_rows(const ActivationArgs& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto element) { activation_rows_typed<decltype(element)>(a, begin, end); });
}
