"""The prompt, with exactly the tokens of the author's training, and the tokens to be learned.

    <|im_start|>user
    <|audio_bos|>{audio token x N}<|audio_eos|>
    You are a helpful assistant.<|im_end|>
    <|im_start|>user
    {for each frame: <|vision_start|>{image token x n}<|vision_end|>}{text}<|im_end|>
    <|im_start|>assistant
    {answer}<|im_end|>

`<|audio_bos|>` and `<|audio_eos|>` are plain text here, because they are not special tokens in the author's tokenizer
and the model has learned their pieces. N is the number of audio encoder positions in use (all with audio_span full), n
the number of a frame's patches after merging.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from surgvqa.config.options import INPUT_MODES
from surgvqa.data.processors import Processors
from surgvqa.errors import UsageError

INSTRUCTION = "Answer the question concisely based on the visual and audio evidence."
IGNORED = -100
"""Label of a token that the loss ignores (PyTorch's ignore_index)."""


def image_tokens(grid: Iterable[int], merge_size: int) -> int:
    """Number of tokens of one frame: t·h·w patches, merge_size² per token."""
    t, h, w = (int(n) for n in grid)
    return t * h * w // merge_size**2


def prompt_ids(
    processors: Processors, grids: Iterable[Iterable[int]], audio_tokens: int, question: str, input_mode: str
) -> list[int]:
    """Token ids of the prompt, up to where the answer starts.

    `grids`: (t, h, w) in patches of each frame. `audio_tokens`: number of audio tokens of the spoken question.
    `input_mode`: audio_only (the question is only spoken), audio_text (it is also written, as in the old script) or
    text_only (it is only written, and the first line has no audio). A question cannot contain special tokens, because
    text is tokenised as text. Raises UsageError for another input mode.
    """
    p = processors

    def text(content: str) -> list[int]:
        return plain_text_ids(p, content)

    if input_mode not in INPUT_MODES:
        raise UsageError(f"input_mode is {input_mode!r}, expected {' or '.join(INPUT_MODES)}")
    asked = INSTRUCTION if input_mode == "audio_only" else f"User Question: {question}\n{INSTRUCTION}"
    if input_mode == "text_only":
        ids = [p.im_start_token_id, *text("user\nYou are a helpful assistant.")]
    else:
        ids = [p.im_start_token_id, *text("user\n<|audio_bos|>"), *[p.audio_token_id] * audio_tokens]
        ids += text("<|audio_eos|>\nYou are a helpful assistant.")
    ids += [p.im_end_token_id, *text("\n")]
    ids += [p.im_start_token_id, *text("user\n")]
    for grid in grids:
        images = [p.image_token_id] * image_tokens(grid, p.merge_size)
        ids += [p.vision_start_token_id, *images, p.vision_end_token_id]
    ids += [*text(asked), p.im_end_token_id, *text("\n")]
    return [*ids, p.im_start_token_id, *text("assistant\n")]


def answer_ids(processors: Processors, answer: str) -> list[int]:
    """Token ids of the answer and its end of turn, which are learned."""
    return [*plain_text_ids(processors, answer), processors.im_end_token_id, *plain_text_ids(processors, "\n")]


def mrope_positions(processors: Processors, ids: np.ndarray, grids: Iterable[Iterable[int]]) -> np.ndarray:
    """M-RoPE positions int64 [3, L] (time, height, width) of one sample's tokens (Qwen2-VL paper, section 2.1).

    Text, including audio tokens, counts up in all three. A frame's tokens have their positions in its grid, and the
    following text counts up from the largest. The same as upstream's `get_rope_index`, without a model.
    """
    parts, place, position = [], 0, 0
    image = ids == processors.image_token_id
    for t, h, w in grids:
        h, w = int(h) // processors.merge_size, int(w) // processors.merge_size
        before = int(image[place:].argmax())
        parts.append(np.tile(np.arange(before) + position, (3, 1)))
        parts.append(np.indices((int(t), h, w)).reshape(3, -1) + position + before)
        position += before + max(h, w)
        place += before + int(t) * h * w
    parts.append(np.tile(np.arange(len(ids) - place) + position, (3, 1)))
    return np.concatenate(parts, axis=1)


def plain_text_ids(processors: Processors, text: str) -> list[int]:
    """Token ids of plain text; `<|im_end|>` in it is tokenised as ordinary characters."""
    ids: list[int] = processors.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return ids
