// The loops of units.inl.h for matrix units: four sums, as in the GEMM.
template <class Dot>
inline double tile_unit(int64_t steps, int per_word) {
  alignas(64) uint16_t values[kTileBytes / 2];
  for (uint16_t& value : values) value = 0x3f33;  // bf16 0.7
  TileRegion region;
  tile_zero_sums<2, 2>();
  Tiles::load<4>(values, kTileRowBytes);
  Tiles::load<5>(values, kTileRowBytes);
  Tiles::load<6>(values, kTileRowBytes);
  Tiles::load<7>(values, kTileRowBytes);
  for (int64_t step = 0; step < steps; ++step) {
    Dot::template dot<0, 4, 6>();
    Dot::template dot<1, 4, 7>();
    Dot::template dot<2, 5, 6>();
    Dot::template dot<3, 5, 7>();
  }
  return 4.0 * 2 * kTileRows * kTileRows * kTileWords * per_word * double(steps);
}

double tile_run_unit(ComputeUnit unit, int64_t steps) {
  switch (unit) {
    case ComputeUnit::bf16_tiles:
      return tile_unit<DotBf16>(steps, 2);
    case ComputeUnit::int8_tiles:
      return tile_unit<DotInt8>(steps, 4);
    default:
      return run_unit(unit, steps);
  }
}
