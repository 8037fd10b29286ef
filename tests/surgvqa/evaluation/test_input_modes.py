"""Questions that are only written: trained, evaluated, asked; and recognised ones, from a Whisper checkpoint."""

import json

import pytest
import small

from surgvqa.cli import main
from surgvqa.errors import UsageError
from surgvqa.evaluation import command as evaluate
from surgvqa.evaluation.model_folders import require_model, require_whisper
from surgvqa.runs.folder import Run
from surgvqa.training import command as train

model = pytest.mark.model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small.build(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def written(world):
    """The output folder of a training on written questions, which has no recordings."""
    options = world.train_options(input_mode="text_only", audio_dir="nowhere", max_steps=2, save_strategy="no")
    train.check(options)
    with Run.create(world.root / "runs", "train") as run:
        train.run(options, run)
    return run.folder / "checkpoints"


def evaluated(options, folder):
    evaluate.check(options)
    with Run.create(folder, "evaluate", workspace=folder.parent) as run:
        outcome = evaluate.run(options, run)
    lines = (run.folder / "predictions.jsonl").read_text().splitlines()
    return outcome.data, [json.loads(line) for line in lines]


def whisper(folder):
    """A tiny random Whisper checkpoint whose tokens are bytes."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import (
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    folder.mkdir()
    words = [*sorted(ByteLevel.alphabet()), "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = WhisperTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    WhisperProcessor(WhisperFeatureExtractor(feature_size=8, chunk_length=1), tokenizer).save_pretrained(folder)
    end = tokenizer.eos_token_id
    small_ones = {name: 1 for name in ("encoder_layers", "decoder_layers")}
    small_ones |= dict.fromkeys(("d_model", "encoder_ffn_dim", "decoder_ffn_dim", "vocab_size"), 16)
    small_ones |= dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    small_ones |= {"vocab_size": len(words), "num_mel_bins": 8, "max_source_positions": 50, "max_target_positions": 110}
    tokens = dict.fromkeys(("decoder_start_token_id", "eos_token_id", "bos_token_id", "pad_token_id"), end)
    config = WhisperConfig(**small_ones, **tokens, suppress_tokens=None, begin_suppress_tokens=None)
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    return folder


def test_a_whisper_checkpoint_is_told_from_another(world, tmp_path):
    with pytest.raises(UsageError, match="model_type is 'qwen2_vl', expected 'whisper'"):
        require_whisper(str(world.checkpoint))
    with pytest.raises(UsageError, match="no such file"):
        require_whisper(str(tmp_path))
    with pytest.raises(UsageError, match="input_mode must be text_only, but is audio_only"):
        evaluate.check(world.evaluate_options(asr=str(world.checkpoint)))


@model
def test_written_questions_need_no_recording_and_no_other_adapter_answers_them(world, written, tmp_path):
    """From the cache and without it; asked as it was trained unless --force says so."""
    record = json.loads((written / "surgvqa.json").read_text())["options"]
    assert record["input_mode"] == "text_only"
    text_only = {"checkpoint": str(written), "input_mode": "text_only", "audio_dir": None}
    found = [
        evaluated(world.evaluate_options(**text_only, feature_cache=cache, answer_cache="off"), tmp_path / cache)
        for cache in ("auto", "off")
    ]
    answers = [[p["predicted_answer"] for p in predictions] for _, predictions in found]
    assert answers[0] == answers[1] and len(answers[0]) == 4
    with pytest.raises(
        UsageError, match="trained with input_mode text_only, but these options ask with audio_only; use --for"
    ):
        evaluate.check(world.evaluate_options(checkpoint=str(written)))
    evaluate.check(world.evaluate_options(checkpoint=str(written), force=True))
    require_model(world.evaluate_options())  # a checkpoint that no record belongs to


@model
def test_the_prompt_of_a_written_question_has_no_audio(world):
    from surgvqa.data.processors import load_processors
    from surgvqa.data.prompt import prompt_ids

    processors = load_processors(world.checkpoint)
    ids = prompt_ids(processors, [(1, 4, 6)], 0, "Is it red?", "text_only")
    text = processors.tokenizer.decode(ids)
    turn = "<|im_start|>user\n"
    assert text.startswith(f"{turn}You are a helpful assistant.<|im_end|>\n{turn}<|vision_start|>")
    assert "User Question: Is it red?\nAnswer the question" in text and "audio_bos" not in text
    assert processors.audio_token_id not in ids


@model
def test_what_whisper_recognises_is_asked_in_writing(world, written, tmp_path):
    from surgvqa.evaluation.asr import word_errors

    options = world.evaluate_options(
        checkpoint=str(written), input_mode="text_only", asr=str(whisper(tmp_path / "whisper"))
    )
    report, predictions = evaluated(options, tmp_path / "runs")
    assert len({p["recognised"] for p in predictions if p["question_type"] == "colour"}) == 1
    assert [p["question"] for p in predictions] == [
        json.loads(x)["question"] for x in world.eval.read_text().splitlines()
    ]
    assert report["asr_seconds"] > 0 and report["answer_seconds"] > 0 and report["word_error_rate"] > 0
    assert word_errors("Is the scope moving?", "is that scope moving") == 1
    assert word_errors("Is it red?", "") == 3 and word_errors("", "well then") == 2


@model
def test_ask_takes_a_written_question(world, written, capfd):
    row = json.loads(world.train.read_text().splitlines()[0])
    frames = [str(world.root / "frames" / "v1" / f"{name}.jpg") for name in row["frames"]]
    command = ["ask", "--checkpoint", str(written), "--frames", *frames, "--device", "cpu"]
    assert main.main(command) == 2
    assert "which needs a written question: give it with --question" in capfd.readouterr().err
    assert main.main([*command, "--question", "Is it red?", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["frames"] == 2
