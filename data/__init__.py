"""Storage: image sources, decoding, snapshots and Parquet tables with atomic commits."""
