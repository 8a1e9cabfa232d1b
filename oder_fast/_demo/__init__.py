"""Demonstrations: a slice measured sparsely, and reconstructed directly, by RED and by ODER."""
