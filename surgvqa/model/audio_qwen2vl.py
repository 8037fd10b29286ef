"""The audio-grafted Qwen2-VL: upstream's model plus a Whisper encoder and a projector, without a fork or patches.

A question's mel spectrogram goes through the Whisper encoder and a linear projector. The results replace the prompt's
audio pad tokens, just as the vision tower's outputs replace the image pad tokens. M-RoPE treats audio tokens as text.
Everything else is upstream's `Qwen2VLForConditionalGeneration`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, WhisperConfig
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.whisper.modeling_whisper import WhisperEncoder
from transformers.utils import can_return_tuple

from surgvqa.errors import SurgvqaError
from surgvqa.model.last_layer import can_read_at, reading_at
from surgvqa.model.transformers_internals import (
    attention_of,
    is_flash_attention_requested,
    set_attention,
    share_weight_names,
)
from surgvqa.model.vision import sizes_of

IGNORED = -100
"""The label of an unsupervised position (torch's and transformers' convention)."""


class AudioQwen2VLForConditionalGeneration(Qwen2VLForConditionalGeneration):
    """Qwen2-VL with audio input. `config.audio_encoder_config` has WhisperConfig's sizes (see `checkpoint_config`)."""

    accepts_loss_kwargs = True  # read by Trainer from the class; this model divides by num_items_in_batch itself

    def __init__(self, config: Qwen2VLConfig):
        super().__init__(config)
        audio_config = WhisperConfig(**config.audio_encoder_config)
        set_attention(audio_config, attention_of(config))
        self.audio_encoder = WhisperEncoder(audio_config)
        self.divided = False
        """Whether the language model's layers are gathered from several ranks in each pass (divide.py)."""
        self.audio_projector = nn.Linear(
            audio_config.d_model, self.model.language_model.config.hidden_size, bias=config.audio_projector_bias
        )

    @property
    def device(self) -> torch.device:
        """The language model's device. The frozen encoders and the token embeddings may be on the host."""
        return self.lm_head.weight.device

    # --- the token embeddings ----------------------------------------------------------------------------------------

    def embeddings_to_host(self) -> None:
        """Moves the token embeddings to the host: 1.09 GB, of which a sample needs some 70 rows.

        Does nothing when they are tied to the head, which uses all of them.
        """
        if self.get_input_embeddings().weight is not self.lm_head.weight:
            self.get_input_embeddings().to("cpu")

    def embed(self, input_ids: Tensor, host_ids: np.ndarray | None = None) -> Tensor:
        """Token embeddings [B, L, hidden] of `input_ids` [B, L], on the device of `input_ids`.

        If the table is on the host, the row of each distinct token is copied once; nearly all tokens are pads, which
        features replace. `host_ids`: see `forward`.
        """
        table: Any = self.get_input_embeddings()
        if table.weight.device == input_ids.device:
            return table(input_ids)
        tokens, places = np.unique(_on_host(input_ids, host_ids), return_inverse=True)
        trained = table.weight.requires_grad
        rows = table(torch.from_numpy(tokens)).pin_memory() if trained else rows_of(table.weight, tokens, pinned=True)
        numbers = torch.from_numpy(places.reshape(input_ids.shape)).pin_memory()
        # From pinned memory; otherwise the copies would wait for all queued work of the GPU.
        return F.embedding(
            numbers.to(input_ids.device, non_blocking=True), rows.to(input_ids.device, non_blocking=True)
        )

    # --- the encoders ------------------------------------------------------------------------------------------------

    def encode_images(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Tensor:
        """Vision features after the merger: [image tokens, hidden] from patches [P, 1176] and grids [F, 3] (t, h, w).

        Grids should be on the host; from the GPU, the host has to wait for them. Computed without gradient unless
        something in the vision tower is trainable.
        """
        visual = self.model.visual
        sizes = sizes_of(visual, image_grid_thw, pixel_values.device)
        with _grad_if_trainable(visual):
            return visual(pixel_values.to(visual.dtype), grid_thw=image_grid_thw, **sizes).pooler_output

    def encode_audio(self, input_features: Tensor) -> Tensor:
        """Whisper's encoder states before the projector: [B, N, d_model] from log-mel spectrograms [B, mels, 2N]."""
        with _grad_if_trainable(self.audio_encoder):
            return self.audio_encoder(input_features.to(self.audio_encoder.conv1.weight.dtype)).last_hidden_state

    def train(self, mode: bool = True) -> AudioQwen2VLForConditionalGeneration:
        """Like nn.Module.train, but a frozen encoder stays in eval mode."""
        super().train(mode)
        for encoder in (self.model.visual, self.audio_encoder):
            encoder.train(mode and _trainable(encoder))
        return self

    # --- forward -----------------------------------------------------------------------------------------------------

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        input_features: Tensor | None = None,
        image_features: Tensor | None = None,
        audio_features: Tensor | None = None,
        audio_tokens: Sequence[int] | None = None,
        mm_token_type_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        cu_seq_lens: Tensor | None = None,
        max_length: int | None = None,
        host_ids: np.ndarray | None = None,
        supervised: Tensor | None = None,
        read_at: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and with labels the loss.

        Shapes: `input_ids`, `attention_mask`, `labels` [B, L]; `pixel_values` [P, 1176] with `image_grid_thw` [F, 3];
        `input_features` [B, mels, T]. In place of pixels and mels, the outputs of `encode_images` and `encode_audio`:
        `image_features` [image tokens, hidden] and `audio_features`, either [B, N, d_model], of which each sample uses
        the first `audio_tokens` (None: all), or [audio tokens, d_model] for all samples together.
        `position_ids` [3, B, L] default to M-RoPE's. `mm_token_type_ids` is optional.
        `inputs_embeds` [B, L, hidden] replaces the token embeddings of `input_ids`, which is still needed.

        Packed rows have several samples, one after another, that do not attend to each other. `cu_seq_lens` int32
        [samples + 1] has the start of each sample and the end of the last one. `max_length` is at least the length of
        the longest (a plain number, because every layer would wait for a tensor on the GPU). `position_ids` must be
        given, from 0 for each sample.

        Two arguments save copies from the GPU, for which the host would wait until all earlier work is done:
        `host_ids` is `input_ids` as a numpy array, and `supervised` int64 [S] has the positions in the flattened
        [B * L] whose next token has a label.

        Returns without labels: logits [B, L, vocabulary], or those of the last `logits_to_keep` positions, or
        [S, vocabulary] at the positions `read_at` int64 [S] of the flattened [B * L], in their order (the last layer
        then leaves out all others, if there is one in each row: last_layer.py). With labels: logits
        [S, vocabulary] of the S supervised positions only (the others need most of the memory of a long prompt), and
        the mean of their cross-entropy or, given `num_items_in_batch` (supervised tokens of the whole accumulation
        window), its sum divided by that.
        """
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        embeds = self.embed(input_ids, host_ids) if inputs_embeds is None else inputs_embeds
        if pixel_values is not None and image_grid_thw is not None:
            image_features = self.encode_images(pixel_values, image_grid_thw)
        if input_features is not None:
            audio_features = self.encode_audio(input_features)
        if not past:  # later steps of a generation have only text
            ids = _on_host(input_ids, host_ids)
            embeds = self._place_images(embeds, input_ids, image_features, ids)
            embeds = self._place_audio(embeds, input_ids, audio_features, audio_tokens, ids)
        if position_ids is None:
            position_ids = self._positions(input_ids, attention_mask, image_grid_thw, mm_token_type_ids, past)
        if cu_seq_lens is not None:
            if is_flash_attention_requested(self.model.language_model.config):  # its kernel uses the boundaries
                # Two tensors, because dynamo breaks a layer's graph if a Function gets the same one twice.
                kwargs |= {"cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens.clone()}
                kwargs |= {"max_length_q": max_length, "max_length_k": max_length}
            else:
                position_ids = _with_text_positions(position_ids, cu_seq_lens)
        if labels is not None and supervised is None:
            supervised = F.pad(labels[:, 1:] != IGNORED, (0, 1)).flatten().nonzero()[:, 0]
        read = read_at if labels is None else supervised
        layers = self.model.language_model.layers
        # A mask [B, L] may have padding on the left, where causal attention looks.
        unmasked = cu_seq_lens is None and not past and not isinstance(attention_mask, Tensor)
        rows, length = input_ids.shape
        alone = unmasked and can_read_at(layers, read, rows, length, one_each=labels is None)
        with reading_at(layers, read if alone else None):
            outputs = self.model.language_model(
                inputs_embeds=embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=use_cache if labels is None and cu_seq_lens is None else False,
                **kwargs,
            )
        hidden, loss = outputs.last_hidden_state, None
        if read is not None:
            logits = self.lm_head(hidden.flatten(0, 1) if alone else hidden.flatten(0, 1)[read])
        else:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(hidden[:, kept])
        if labels is not None:
            assert supervised is not None
            loss = F.cross_entropy(logits.float(), labels.flatten()[supervised + 1], reduction="sum")
            loss = loss / (max(len(supervised), 1) if num_items_in_batch is None else num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def _place_images(self, embeds: Tensor, input_ids: Tensor, features: Tensor | None, ids: np.ndarray) -> Tensor:
        places = input_ids == self.config.image_token_id
        found = int((ids == self.config.image_token_id).sum())
        given = 0 if features is None else len(features)
        if found != given:
            raise SurgvqaError(
                f"the prompt has {found} image pad tokens (id {self.config.image_token_id}) but the frames give "
                f"{given} features; both must come from the same image processor"
            )
        return embeds if features is None else _fill(embeds, places, features)

    def _place_audio(
        self,
        embeds: Tensor,
        input_ids: Tensor,
        features: Tensor | None,
        tokens: Sequence[int] | None,
        ids: np.ndarray,
    ) -> Tensor:
        places = input_ids == self.config.audio_token_id
        found = (ids == self.config.audio_token_id).sum(1).tolist()
        if features is None:
            tokens = []
        elif features.dim() == 3:
            length = features.shape[1]
            tokens = [length] * len(features) if tokens is None else tokens
            kept = [states[:count] for states, count in zip(features, tokens)]
            features = features.flatten(0, 1) if set(tokens) == {length} else torch.cat(kept)
        elif tokens is None:
            tokens = found if sum(found) == len(features) else [len(features)]
        given = 0 if features is None else len(features)
        if sum(tokens) != given or sum(found) != given or (len(found) == len(tokens) and list(tokens) != found):
            raise SurgvqaError(
                f"the prompts have {', '.join(map(str, found))} audio pad tokens (id {self.config.audio_token_id}) "
                f"but the audio gives {', '.join(map(str, tokens)) or 'no'} features; a question needs one "
                f"pad token for each encoder position in use (of {self.audio_encoder.max_source_positions})"
            )
        if features is None:
            return embeds
        # Outside autocast, a float32 projector (as in training) needs a float32 input.
        return _fill(embeds, places, self.audio_projector(features.to(self.audio_projector.weight.dtype)))

    def _positions(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        image_grid_thw: Tensor | None,
        mm_token_type_ids: Tensor | None,
        past: int,
    ) -> Tensor:
        """M-RoPE positions [3, B, L] (time, height, width) of the tokens after `past` cached ones."""
        if past and self.model.rope_deltas is not None:
            batch, length = input_ids.shape
            if attention_mask is not None:
                text = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
            else:
                text = torch.arange(past, past + length, device=input_ids.device).expand(batch, -1)
            return (text + self.model.rope_deltas.to(text.device)).expand(3, -1, -1)
        positions, self.model.rope_deltas = self.model.get_rope_index(
            input_ids,
            mm_token_type_ids=self.modalities(input_ids) if mm_token_type_ids is None else mm_token_type_ids,
            image_grid_thw=image_grid_thw,
            attention_mask=attention_mask,
        )
        return positions

    def modalities(self, input_ids: Tensor) -> Tensor:
        """Upstream's `mm_token_type_ids` [B, L]: 1 for image tokens, else 0 (audio counts as text)."""
        return (input_ids == self.config.image_token_id).int()

    # --- generation --------------------------------------------------------------------------------------------------

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Upstream's generate with `mm_token_type_ids`, without which it would silently use 1-D positions."""
        input_ids = kwargs.get("input_ids", inputs)
        if input_ids is not None:
            kwargs.setdefault("mm_token_type_ids", self.modalities(input_ids))
        upstream: Any = super()
        return upstream.generate(inputs, *args, **kwargs)

    def prepare_inputs_for_generation(  # type: ignore[override]  # upstream also takes these by position, which nobody uses
        self, input_ids: Tensor, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Like upstream's, but also drops our own inputs after the first step."""
        upstream: Any = super()
        prepared: dict[str, Any] = upstream.prepare_inputs_for_generation(
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            for name in ("image_features", "audio_features", "audio_tokens"):
                prepared.pop(name, None)
        return prepared


share_weight_names("Qwen2VLForConditionalGeneration", AudioQwen2VLForConditionalGeneration)


def _on_host(input_ids: Tensor, host_ids: np.ndarray | None) -> np.ndarray:
    return input_ids.numpy(force=True) if host_ids is None else host_ids


def rows_of(weight: Tensor, numbers: np.ndarray, pinned: bool) -> Tensor:
    """These rows of the frozen `weight` [N, width], which is on the host, in pinned memory if asked.

    By numpy, because torch would divide the 0.5 MB between threads, which data loaders keep waiting for a core.
    """
    rows = torch.empty(len(numbers), weight.shape[1], dtype=weight.dtype, pin_memory=pinned)
    rows.view(torch.uint8).numpy()[:] = weight.detach().view(torch.uint8).numpy()[numbers]
    return rows


def _fill(embeds: Tensor, places: Tensor, features: Tensor) -> Tensor:
    """`embeds` [B, L, hidden] with `features` [n, hidden] put, in order, at the n True positions of `places` [B, L]."""
    return embeds.masked_scatter(places.unsqueeze(-1), features.to(embeds.device, embeds.dtype))


def _with_text_positions(position_ids: Tensor, cu_seq_lens: Tensor) -> Tensor:
    """[4, 1, L]: each token's position in its sample, followed by the packed row's M-RoPE positions [3, 1, L].

    Upstream recognises a packed row by this shape and makes its block-diagonal causal mask once for all layers.
    """
    place = torch.arange(position_ids.shape[-1], dtype=cu_seq_lens.dtype, device=cu_seq_lens.device)
    begin = cu_seq_lens[torch.searchsorted(cu_seq_lens, place, right=True) - 1]
    return torch.cat([(place - begin).expand(1, 1, -1), position_ids])


def _trainable(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _grad_if_trainable(encoder: nn.Module):
    return torch.set_grad_enabled(torch.is_grad_enabled() and _trainable(encoder))
