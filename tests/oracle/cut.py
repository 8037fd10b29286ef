"""Cuts the small oracle out of the whole one: `python tests/oracle/cut.py ../shared/oracle/fork-oracle.tar.xz`.

Nothing is computed anew: every figure kept is one that the author's fork wrote. Kept are the weights that the logits of
the spoken question's positions and of those before it depend on (attention is causal, and the images come after it):
the audio encoder, the projector and the whole language model. Left out: the vision tower, rows of the vocabulary that
this sample does not use, the adapter but for some rows of one module.

The fork's weights are -s, 0 or s, at random: a bit for whether it is 0, and a sign bit where it is not.
"""

import lzma
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import torch
from oracle_kit import IDS, MERGED, ROWS, SMALL, interpolated, packed, whisper_positions
from safetensors.torch import load_file, save

POSITIONS = "audio_encoder.embed_positions.weight"


def cut(whole: Path) -> dict[str, torch.Tensor]:
    """The tensors of the small oracle, from the unpacked whole one."""
    stage1: dict[str, torch.Tensor] = {}
    for file in sorted((whole / "stage1").glob("*.safetensors")):
        stage1 |= load_file(file)
    batch, outputs = load_file(whole / "batch.safetensors"), load_file(whole / "outputs.safetensors")
    ids = batch["main.input_ids"]
    kept: dict[str, torch.Tensor] = {}
    used = ids.unique()
    stage1["model.embed_tokens.weight"] = stage1["model.embed_tokens.weight"][used.long()]
    stage1["lm_head.weight"] = stage1["lm_head.weight"][:IDS]
    for name, tensor in stage1.items():
        if name == POSITIONS:
            other = (tensor != whisper_positions(*tensor.shape)).flatten().nonzero()[:, 0]
            kept |= {"positions.where": other.int(), "positions.what": tensor.flatten()[other]}
        elif not name.startswith("visual."):
            kept |= packed(f"stage1.{name}", tensor)
    kept |= mel(batch["main.input_features"][0])
    kept |= {name: batch[f"main.{name}"] for name in ("input_ids", "image_grid_thw")}
    first_image = int((ids[0] == 2009).nonzero()[0])
    chosen = outputs["stage1.main.first.logits_sel_pos"]
    before = chosen < first_image
    kept["logits_positions"] = chosen[before]
    kept["logits"] = outputs["stage1.main.first.logits_sel"][0, before, :IDS].contiguous()
    kept["position_ids"] = outputs["stage1.main.first.position_ids"]
    adapter = load_file(whole / "stage2_adapter/adapter_model.safetensors")
    for part, rows in (("lora_A", None), ("lora_B", ROWS)):
        kept[part] = adapter[f"base_model.model.{MERGED}.{part}.weight"][:rows].contiguous()
    for file in sorted((whole / "merged").glob("*.safetensors")):
        found = load_file(file).get(f"{MERGED}.weight")
        if found is not None:
            kept["merged"] = found[:ROWS].contiguous()
    return kept


def mel(features: torch.Tensor) -> dict[str, torch.Tensor]:
    """Spectrogram bf16 [128, 3000] as the 100 points a row that it was interpolated from, and what rounding left."""
    basis = torch.nn.functional.interpolate(torch.eye(100, dtype=torch.float64)[None], 3000, mode="linear")[0]
    points = torch.linalg.lstsq(basis.T, features.double().T).solution.T.float()
    rest = features.view(torch.int16) - interpolated(points).view(torch.int16)  # modulo 2**16
    return {"mel.points": points, "mel.rest": rest}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, tarfile.open(sys.argv[1]) as tar:
        tar.extractall(folder, filter="data")
        tensors = cut(Path(folder) / "fork-oracle")
    SMALL.write_bytes(lzma.compress(save(tensors), preset=9 | lzma.PRESET_EXTREME))
    sizes = sorted(((t.nbytes, name) for name, t in tensors.items()), reverse=True)
    print(f"{SMALL}: {SMALL.stat().st_size:,} bytes; largest: {sizes[:12]}")
    print("mel.rest:", np.unique(tensors["mel.rest"].numpy(), return_counts=True))
