"""The engine: merge, audit, train and evaluate an audio-grafted Qwen2-VL. It owns no screen (see tui/)."""

__version__ = "0.1.0"
