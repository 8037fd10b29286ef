"""The audio-grafted Qwen2-VL on upstream transformers: its sizes, loading, adapter and layers."""
