"""The audio-grafted Qwen2-VL on upstream transformers: its sizes, loading, adapters and layers."""
