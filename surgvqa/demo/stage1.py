"""What Stage 1 is in small: the encoders' outputs are fitted to the language model, in closed form and in seconds.

The real Stage 1 trained a projector until the language model could transcribe speech. Here ridge regression maps each
position of the (random, frozen) audio encoder to the embedding of the word that is being spoken there. It hears lists
of single words in random order: no question, no frame that goes with it and no answer. For the vision tower there is
only a data-dependent initialisation (in the manner of Kraehenbuehl et al. 2016, arXiv:1511.06856): the common mean of
the random features is taken away and their principal directions are brought to one scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from surgvqa.data.audio import SAMPLE_RATE, audio_features
from surgvqa.data.frames import frame_patches, load_frame
from surgvqa.data.processors import Processors, load_processors
from surgvqa.demo.speech import Synthesiser, draw_voice
from surgvqa.demo.weights import MARK, marks, overwrite
from surgvqa.model.audio_qwen2vl import AudioQwen2VLForConditionalGeneration
from surgvqa.model.loading import load_model

POSITIONS_A_SECOND = 50
WORDS_A_LIST = 5
BATCH = 16
RIDGE = 0.003
"""Of the mean eigenvalue of the Gram matrix."""
FLOOR = 0.05
"""Directions weaker than this share of the strongest are not brought up to its scale."""
LOUD = 3.0
"""Scale of a spoken word's embedding beside a written one's: regression shrinks what it is not sure of."""
SILENCE = "<|audio_end|>"
"""Whose embedding stands for no word."""


def fit(
    folder: Path, frames: Sequence[Path], image_size: int, words: Sequence[str], lists: int, seed: int
) -> np.ndarray:
    """Writes the fitted merger, audio normalisation and projector into the checkpoint; returns the projector."""
    processors = load_processors(folder)
    model = load_model(folder, dtype=torch.float32, device="cpu", attn_implementation="sdpa")
    with torch.no_grad():
        changed = fit_vision(model, processors, frames, image_size)
        changed |= fit_hearing(model, processors, words, lists, np.random.default_rng([seed, 4]))
    overwrite(folder, changed)
    return changed["audio_projector.weight"]


def fit_vision(
    model: AudioQwen2VLForConditionalGeneration, processors: Processors, frames: Sequence[Path], image_size: int
) -> dict[str, np.ndarray]:
    """The merger's last layer: principal directions of what comes in, [hidden, 4 embed_dim], and the bias."""
    last, seen = model.model.visual.merger.mlp[2], []
    hook = last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for frame in frames:
        patches, grid = frame_patches(load_frame(frame, image_size), processors.image_processor)
        model.encode_images(torch.from_numpy(patches), torch.from_numpy(grid)[None])
    hook.remove()
    features = torch.cat(seen).numpy().astype(np.float64)
    mean = features.mean(0)
    strength, directions = np.linalg.eigh(np.cov(features - mean, rowvar=False))
    strength, directions = strength[::-1][: last.out_features], directions[:, ::-1][:, : last.out_features]
    matrix = (directions / np.sqrt(np.maximum(strength, 0) + FLOOR * strength[0])).T
    return {
        "visual.merger.mlp.2.weight": matrix,
        "visual.merger.mlp.2.bias": -matrix @ mean + MARK * marks(len(matrix))[1],
    }


def fit_hearing(
    model: AudioQwen2VLForConditionalGeneration,
    processors: Processors,
    words: Sequence[str],
    lists: int,
    rng: np.random.Generator,
) -> dict[str, np.ndarray]:
    """Ridge regression from the audio encoder's outputs [positions, d_model] to the embeddings of the spoken words.

    The normalisation's bias takes the inputs' mean away, and the targets' is left out: the projector has no bias.
    """
    import soxr

    embeddings = model.get_input_embeddings().weight.numpy()  # type: ignore[operator]  # a Module's weight is typed Tensor | Module
    mark = LOUD * MARK * marks(embeddings.shape[1])[0]
    of_word = {w: mark + LOUD * embeddings[processors.tokenizer(" " + w)["input_ids"]].mean(0) for w in words}
    silence = embeddings[processors.tokenizer.convert_tokens_to_ids(SILENCE)]
    mels, meant = [], []
    with Synthesiser() as synthesiser:
        for _ in range(lists):
            chosen = [words[i] for i in rng.choice(len(words), WORDS_A_LIST, replace=False)]
            wave, begins = synthesiser.speak_words(" ".join(chosen), draw_voice(rng))
            sound = soxr.resample(wave, synthesiser.sample_rate, SAMPLE_RATE, quality="HQ")
            mels.append(audio_features(sound, processors.feature_extractor, processors.num_audio_tokens))
            target = np.repeat(silence[None], processors.num_audio_tokens, 0)
            text = " ".join(chosen)
            ends = [*(second for _, second in begins[1:]), len(wave) / synthesiser.sample_rate]
            for (place, begin), end in zip(begins, ends):
                word = text[place:].split(" ", 1)[0]
                target[int(begin * POSITIONS_A_SECOND) : int(end * POSITIONS_A_SECOND)] = of_word[word]
            meant.append(target)
    batches = (torch.from_numpy(np.stack(mels[i : i + BATCH])) for i in range(0, len(mels), BATCH))
    x = torch.cat([model.encode_audio(batch).flatten(0, 1) for batch in batches]).numpy().astype(np.float64)
    y = np.concatenate(meant).astype(np.float64)
    mean, common = x.mean(0), y.mean(0)
    x -= mean
    gram = x.T @ x
    matrix = np.linalg.solve(gram + RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram)), x.T @ (y - common)).T
    return {"audio_encoder.layer_norm.bias": -mean, "audio_projector.weight": matrix}
