"""Answers one question after another: encodes clip and question once, answers, and computes label probabilities."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from surgvqa.config.options import AskOptions
from surgvqa.data.dataset import EncodedSample, encode, ids_and_labels
from surgvqa.data.frames import select_frames
from surgvqa.evaluation.answerer import load_answerer


class Asker:
    """A loaded model and the options for showing samples to it. Raises UsageError when it cannot be loaded."""

    def __init__(self, options: AskOptions):
        began = time.monotonic()
        self.options = options
        self.answerer = load_answerer(options)
        self.load_seconds = time.monotonic() - began

    def ask(
        self, frames: Sequence[str], audio: str | None, question: str | None, labels: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """`answer`, `seconds`, `frames` and `sequence_tokens`.

        With `labels` ({label: the answer that states it}) also `probabilities` {label: 0..1}, the model's probability
        of each of these answers relative to the others. Raises UsageError for an unreadable frame or recording.
        """
        began, options = time.monotonic(), self.options
        item = self._encoded(
            encode(
                self.answerer.processors,
                select_frames(frames, options.num_frames),
                audio or "",
                image_size=options.image_size,
                input_mode=options.input_mode,
                audio_span=options.audio_span,
                audio_margin_s=options.audio_margin_s,
                question=question or "",
            )
        )
        (answer,) = self.answerer.answer(self.answerer.batch([item]))
        found: dict[str, Any] = {"answer": answer, "seconds": time.monotonic() - began}
        if labels:
            found["probabilities"] = self._probabilities(item, question or "", labels)
            found["seconds_with_labels"] = time.monotonic() - began
        shown = min(len(frames), options.num_frames)
        return found | {"frames": shown, "sequence_tokens": len(item["input_ids"])}

    @torch.inference_mode()
    def _encoded(self, item: EncodedSample) -> EncodedSample:
        """The sample with the encoders' outputs, on the host, in place of frames and sound."""
        model, device = self.answerer.base_model, self.answerer.device
        pixels = torch.from_numpy(item.pop("pixel_values")).to(device, model.dtype)
        item["image_features"] = model.encode_images(pixels, torch.from_numpy(item["image_grid_thw"])).cpu()
        if "input_features" in item:
            mels = torch.from_numpy(item.pop("input_features"))[None].to(device, model.dtype)
            item["audio_features"] = model.encode_audio(mels)[0, : item["audio_tokens"]].cpu()
        return item

    @torch.inference_mode()
    def _probabilities(self, item: EncodedSample, question: str, labels: Mapping[str, str]) -> dict[str, float]:
        """{label: probability of its exact answer}, normalised over these answers."""
        weights = []
        for answer in labels.values():
            words = ids_and_labels(
                self.answerer.processors,
                item["image_grid_thw"],
                item["audio_tokens"],
                input_mode=self.options.input_mode,
                question=question,
                answer=answer,
            )
            inputs = self.answerer.batch([{**item, **words}])
            inputs.pop("tokens")  # only used in training
            logits = self.answerer.base_model(**inputs).logits.float().log_softmax(-1)
            wanted = inputs["labels"].flatten()[inputs["supervised"] + 1]
            weights.append(logits.gather(-1, wanted[:, None]).sum())
        return dict(zip(labels, torch.stack(weights).softmax(0).tolist()))
