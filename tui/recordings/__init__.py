"""Runs that were recorded on a GPU, for the demo.

`h100-train.jsonl`: a training at real size (8.93 B random parameters,
192 samples, 144 steps, no evaluation) on one NVIDIA H100 80GB, 26 November 2026; samples of the GPU thinned, figures
rounded. The losses of random weights mean nothing."""
