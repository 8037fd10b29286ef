"""The engine: merge, audit, train and evaluate an audio-grafted Qwen2-VL. It owns no screen (see tui/)."""

import logging

__version__ = "0.1.0"

# PEFT imports bitsandbytes, which on a CPU complains of a 4-bit kernel that nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda said: "gemm_4bit" not in said.getMessage())
