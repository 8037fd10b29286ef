"""A very small world for tests of training and evaluation: model of the real architecture, clips, questions."""

import json
import os
import sys
import wave
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

from surgvqa.config.options import EvaluateOptions, TrainOptions
from surgvqa.demo.tokenizer import write_tokenizer
from surgvqa.demo.weights import DemoSizes, write_stage1

COLOURS = {"red": (200, 40, 40), "green": (40, 180, 40), "blue": (40, 40, 200), "grey": (120, 120, 120)}
SIZES = DemoSizes(
    hidden_size=64,
    num_hidden_layers=2,
    intermediate_size=96,
    num_attention_heads=2,
    num_key_value_heads=1,
    mrope_section=(4, 6, 6),
    vision_embed_dim=32,
    vision_depth=1,
    audio_hidden_size=64,
    audio_layers=1,
    audio_ffn=64,
    audio_positions=50,
)


def one_thread() -> None:
    """A model this small loses by threads, above all on a busy machine; also for processes that we start."""
    os.environ["OMP_NUM_THREADS"] = "1"
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def build(root: Path, samples: int = 8) -> SimpleNamespace:
    """Writes checkpoint, train.jsonl (the colour of a clip, whether it is red), eval.jsonl, frames and audio."""
    one_thread()
    checkpoint = root / "checkpoint"
    checkpoint.mkdir(parents=True)
    texts = [f"The colour is {name}. Yes, it is red. No, it is not." for name in COLOURS]
    write_stage1(checkpoint, SIZES, write_tokenizer(checkpoint, texts, merges=60), seed=0)
    frames, audio = root / "frames" / "v1", root / "audio" / "v1"
    frames.mkdir(parents=True)
    audio.mkdir(parents=True)
    rows = []
    for number in range(samples):
        colour = list(COLOURS)[number % len(COLOURS)]
        names = [f"v1_{100 * number + i}" for i in range(3)]
        for name in names:
            Image.new("RGB", (84, 56), COLOURS[colour]).save(frames / f"{name}.jpg")
        kind = "colour" if number < samples // 2 else "is_red"
        yes = "yes" if colour == "red" else "no"
        rows.append(
            {
                "id": f"qa_{number}",
                "video_id": "v1",
                "frames": names,
                "question": "What colour is it?" if kind == "colour" else "Is it red?",
                "question_type": kind,
                "answer": f"The colour is {colour}."
                if kind == "colour"
                else {"yes": "Yes, it is red.", "no": "No, it is not."}[yes],
                "short_answer": colour if kind == "colour" else yes,
            }
        )
        tone = np.sin(np.arange(8000) * (0.2 if kind == "colour" else 0.5)) * 8000
        with wave.open(str(audio / f"qa_{number}.wav"), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes(tone.astype("<i2").tobytes())
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[::2]))

    def train_options(**changes) -> TrainOptions:
        return TrainOptions(
            **{
                "model_name_or_path": str(checkpoint),
                "train_data_path": str(root / "train.jsonl"),
                "frames_dir": str(root / "frames"),
                "audio_dir": str(root / "audio"),
                "num_frames": 2,
                "image_size": 84,
                "lora_r": 4,
                "gradient_accumulation_steps": 2,
                "max_steps": 3,
                "device": "cpu",
                **changes,
            }
        )

    def evaluate_options(**changes) -> EvaluateOptions:
        return EvaluateOptions(
            **{
                "checkpoint": str(checkpoint),
                "eval_data_path": str(root / "eval.jsonl"),
                "frames_dir": str(root / "frames"),
                "audio_dir": str(root / "audio"),
                "num_frames": 2,
                "image_size": 84,
                "max_new_tokens": 8,
                "batch_size": 3,
                "answer_cache": "off",  # else a test of how answers are made would find them made
                "device": "cpu",
                **changes,
            }
        )

    return SimpleNamespace(
        root=root,
        checkpoint=checkpoint,
        train=root / "train.jsonl",
        eval=root / "eval.jsonl",
        train_options=train_options,
        evaluate_options=evaluate_options,
    )
