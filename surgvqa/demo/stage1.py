"""What Stage 1 is in small: the encoders' outputs are fitted to the language model, in closed form and in seconds.

The real Stage 1 trained a projector until the language model could transcribe speech. Here ridge regression maps each
position of the (random, frozen) audio encoder to the embedding of the word that is being spoken there. It hears lists
of single words in random order: no question, no frame that goes with it and no answer. The real vision tower came
trained on captions. Here ridge regression maps the (random, frozen) tower's features of a square of pixels to what its
colours are called, how light and how rough it is: measured on the pixels of training frames, without a label.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from surgvqa.data.audio import audio_features
from surgvqa.data.audio_tokens import SAMPLE_RATE
from surgvqa.data.frames import frame_patches, load_frame
from surgvqa.data.processors import Processors, load_processors
from surgvqa.demo.heads import MARK, SEEN, SPOKEN, marks
from surgvqa.demo.weights import MERGE, PATCH, overwrite
from surgvqa.model.audio_qwen2vl import AudioQwen2VLForConditionalGeneration
from surgvqa.model.loading import load_model
from surgvqa.prepare.espeak import Synthesiser, draw_voice

POSITIONS_A_SECOND = 50
WORDS_A_LIST = 5
BATCH = 16
RIDGE, RIDGE_SEEN = 0.003, 0.0003
"""Of the mean eigenvalue of the Gram matrix; for hearing and for seeing."""
VIVID = 2.2
"""Scale of a look's direction in the hidden states, for a look one standard deviation from the mean."""
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
    """The merger's last layer: ridge regression from what comes into it, [tokens, 4 embed_dim], to a direction of the
    hidden states for each of `looks`, as strong as the look is; [hidden, 4 embed_dim] and the bias."""
    last, seen, meant = model.model.visual.merger.mlp[2], [], []
    hook = last.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    for frame in frames:
        patches, grid = frame_patches(load_frame(frame, image_size), processors.image_processor)
        meant.append(looks(patches, processors.image_processor.image_mean, processors.image_processor.image_std))
        model.encode_images(torch.from_numpy(patches), torch.from_numpy(grid)[None])
    hook.remove()
    x, y = torch.cat(seen).numpy().astype(np.float64), np.concatenate(meant)
    y = (y - y.mean(0)) / np.maximum(y.std(0), 1e-6)
    size, mean = last.out_features, x.mean(0)
    matrix = VIVID * (_ridge(x - mean, y, RIDGE_SEEN) @ directions(size, y.shape[1])).T
    return {
        "visual.merger.mlp.2.weight": matrix,
        "visual.merger.mlp.2.bias": -matrix @ mean + MARK * marks(size)[SEEN],
    }


def looks(patches: np.ndarray, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """[tokens, 11]: how each token's square of pixels looks, from the pixels alone: shares of dark, white, grey, blue,
    green, red and pink; lightness, its spread, and how much it differs between neighbours in a row and in a column.

    `patches`: as `frame_patches` returns them, normalised with `mean` and `std`.
    """
    squares = patches.reshape(-1, MERGE**2, 3, 2, PATCH, PATCH)[:, :, :, 0].transpose(0, 1, 3, 4, 2)
    rgb = squares * np.asarray(std) + np.asarray(mean)
    red, green, blue = np.moveaxis(rgb, -1, 0)
    light, highest, lowest = rgb.mean(-1), rgb.max(-1), rgb.min(-1)
    dark, white = highest < 0.2, lowest > 0.72
    grey = ~dark & ~white & (highest - lowest < 0.25 * np.maximum(highest, 0.05))
    coloured = ~dark & ~white & ~grey
    bluish = coloured & (blue >= green) & (blue > 1.1 * red)
    greenish = coloured & ~bluish & (green >= red)
    reddish = coloured & ~bluish & ~greenish & (green < 0.6 * red)
    pink = coloured & ~bluish & ~greenish & ~reddish
    over = (1, 2, 3)
    shares = [colour.mean(over) for colour in (dark, white, grey, bluish, greenish, reddish, pink)]
    rough = [np.abs(np.diff(light, axis=axis)).mean(over) for axis in (3, 2)]
    return np.column_stack([*shares, light.mean(over), light.std(over), *rough])


def directions(size: int, count: int) -> np.ndarray:
    """[count, size]: random orthonormal directions of the hidden states, at right angles to every mark."""
    known = marks(size).T
    free = np.random.default_rng(11).standard_normal((size, count))
    return np.linalg.qr(np.concatenate([known, free], axis=1))[0][:, known.shape[1] :].T


def _ridge(x: np.ndarray, y: np.ndarray, penalty: float) -> np.ndarray:
    """[inputs, outputs] of the regression from centred x to y; `penalty` in mean eigenvalues of the Gram matrix."""
    gram = x.T @ x
    return np.linalg.solve(gram + penalty * np.trace(gram) / len(gram) * np.eye(len(gram)), x.T @ y)


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

    embeddings = model.get_input_embeddings().get_parameter("weight").numpy()
    mark = LOUD * MARK * marks(embeddings.shape[1])[SPOKEN]
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
    matrix = _ridge(x, y - common, RIDGE).T
    return {"audio_encoder.layer_norm.bias": -mean, "audio_projector.weight": matrix}
