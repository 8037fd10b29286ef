"""The child process of compile_ahead.py: runs a model of two layers as a training would, so that torch compiles it.

Reads the job as a JSON line from its stdin and writes JSON lines to its stdout: begun, then done (seconds) or failed
(why). Ends, with the processes of its compiler, when its stdin is closed.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from surgvqa.checkpoint.folder import open_checkpoint
from surgvqa.config.options import LoraOptions
from surgvqa.errors import SurgvqaError, first_line
from surgvqa.model import layers
from surgvqa.model.adapter import add_lora
from surgvqa.model.audio_qwen2vl import AudioQwen2VLForConditionalGeneration
from surgvqa.model.compile_ahead import LayerJob, end_with_parent
from surgvqa.model.loading import checkpoint_config
from surgvqa.model.torch_internals import compilations, start_compiler
from surgvqa.model.transformers_internals import set_attention


def main() -> None:
    """Does the job that stdin names."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(**words: Any) -> None:
        print(json.dumps(words), file=answers, flush=True)

    asked = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        began = time.monotonic()
        start_compiler()
        say(begun=True)
        compile_layer(LayerJob(**asked["job"]))
        Path(asked["mark"]).touch()
    except Exception as error:
        say(failed=f"{type(error).__name__}: {first_line(error)}")
    else:
        say(done=time.monotonic() - began)


def compile_layer(job: LayerJob) -> None:
    """Runs a layer's forward and backward pass as in training. Raises SurgvqaError if it could not be compiled."""
    device = torch.device(job.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    model = add_lora(_small_model(job, device), LoraOptions(**job.lora))
    layers.configure(model, recomputing=0, autocast=job.autocast, keep=job.keep)
    model.train()
    for recomputes in job.recomputing:
        layers.checkpoint_layers(model, int(recomputes))
        for needs_grad in job.input_needs_grad:
            _step(model, job, device, needs_grad)
    counted = compilations()
    if counted["compile_failures"] or not counted["graphs"]:
        raise SurgvqaError("torch.compile failed")
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _step(model: Any, job: LayerJob, device: torch.device, needs_grad: bool) -> None:
    base = model.get_base_model()
    size = (job.rows, job.tokens)
    embeds = torch.zeros(*size, base.config.text_config.hidden_size, dtype=base.dtype, device=device)
    if needs_grad:
        embeds = embeds.requires_grad_().clone()  # like the embeddings in training, the result of an operation
    ids = torch.zeros(size, dtype=torch.long, device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=job.autocast):
        loss = model(
            input_ids=ids,
            labels=ids,
            inputs_embeds=embeds,
            position_ids=torch.zeros(3, *size, dtype=torch.long, device=device),
            supervised=torch.zeros(1, dtype=torch.long, device=device),
        ).loss
    loss.backward()


def _small_model(job: LayerJob, device: torch.device) -> AudioQwen2VLForConditionalGeneration:
    """The checkpoint's model with random weights, small. The last of the two layers is not always compiled."""
    config = checkpoint_config(open_checkpoint(job.checkpoint))
    text: Any = config.text_config
    text.num_hidden_layers, text.layer_types = 2, text.layer_types[:2]
    text.vocab_size, text.pad_token_id, config.pad_token_id = 1, None, None
    vision: Any = config.vision_config
    vision.depth = 1
    config.audio_encoder_config = {**config.audio_encoder_config, "encoder_layers": 1}
    set_attention(config, job.attention)
    with torch.device(device):
        model = AudioQwen2VLForConditionalGeneration(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, job.dtype))
    model.requires_grad_(False).eval()
    return model


if __name__ == "__main__":
    main()
