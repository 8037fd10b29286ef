"""The options of `split` and `speak`, which prepare data for training; see `options`."""

from __future__ import annotations

from dataclasses import dataclass

from surgvqa.config.settings import Path_, option


@dataclass(kw_only=True)
class SplitOptions:
    """Divides samples into train, eval and test files that share no video, cluster or clip."""

    files: list[Path_] = option(help="JSONL files of samples")
    output: Path_ = option(Path_("split"), "folder for train.jsonl, eval.jsonl and test.jsonl; made if missing")
    eval_share: float = option(0.2, "share of the samples for eval.jsonl, 0..1", above=0, below=1)
    test_share: float = option(0.0, "share of the samples for test.jsonl, 0..1; 0 = no such file", least=0, below=1)
    by: str = option(
        "video",
        "what stays in one file: a video, or only a cluster of clips within a second of each other (for samples of few "
        "videos; the score then says nothing about new videos)",
        choices=("video", "cluster"),
    )
    split_seed: int = option(0, "seed that chooses among equally good splits", least=0)
    force: bool = option(False, "replace an earlier split")


@dataclass(kw_only=True)
class SpeakOptions:
    """Speaks the questions of a file of samples in several wordings, voices, speeds and noise levels; some held out."""

    file: Path_ = option(help="JSONL file of samples", metavar="FILE")
    output: Path_ = option(
        Path_("spoken"), "folder for the samples and their recordings; the same command continues an interrupted one"
    )
    wordings: Path_ | None = option(
        None,
        "TOML file of paraphrases: lists of wordings by question type in the tables [wordings] and [held_out] "
        "(default: as written)",
    )
    engine: str = option(
        "espeak",
        "speech engine: eSpeak NG, or the voices of Microsoft Edge over the network (needs the extra edge-tts)",
        choices=("espeak", "edge"),
    )
    voices: list[str] | None = option(
        None, "voices to choose from, e.g. en-us+m1 (default: six of eSpeak's, five of Edge's)", metavar="VOICE"
    )
    held_out_voices: list[str] | None = option(
        None, "voices used only in the held-out file (default: two; none: only its wordings differ)", metavar="VOICE"
    )
    speeds: list[float] = option(
        (0.9, 1.0, 1.15), "speeds to choose from, 1 = the voice's usual speed", metavar="SPEED", least=0.5, below=2
    )
    noise_db: list[str] = option(
        ("none", "20", "10"),
        "noise levels to choose from: by how many dB the speech is louder than noise of its own spectrum, or none",
        metavar="DB",
    )
    speak_seed: int = option(0, "seed that assigns wordings, voices, speeds and noise", least=0)
    force: bool = option(False, "replace recordings that were made with other settings")
