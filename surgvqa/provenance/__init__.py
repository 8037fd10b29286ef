"""The provenance of a result: hashes of files, versions, GPUs, the commit. No torch, no numpy."""
