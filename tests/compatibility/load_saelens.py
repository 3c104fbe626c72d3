"""Runs inside the environment of sae-lens: what its own loaders make of our exports.

In: the folder that `prepared.py` filled. Out: `sae-lens.safetensors` in it, with the results computed here under the
names `HOW:WHAT`; the version on standard output.
"""

import sys
import warnings
from pathlib import Path

import sae_lens
import torch
from safetensors.torch import load_file, save_file

FOLDER = Path(sys.argv[1])


def check_facts(transcoder, layer: int) -> None:
    """What the configuration must have become in their hands."""
    metadata = transcoder.cfg.metadata
    assert type(transcoder).__name__ == "JumpReLUTranscoder", type(transcoder)
    assert metadata.hook_name == f"blocks.{layer}.ln2.hook_normalized", metadata
    assert metadata.hook_name_out == f"blocks.{layer}.hook_mlp_out", metadata
    assert metadata.context_size == 128, metadata
    assert str(layer) in metadata.deltascope["alpha"], metadata


@torch.inference_mode()
def main() -> None:
    warnings.simplefilter("ignore")
    given = load_file(FOLDER / "inputs.safetensors")
    layers = sorted(int(name.removeprefix("x.")) for name in given if name.startswith("x."))
    results, transcoders = {}, []
    for layer in layers:
        from_disk = sae_lens.SAE.load_from_disk(FOLDER / "saelens" / f"layer_{layer}")
        from_hub = sae_lens.SAE.from_pretrained("deltascope/saelens", f"layer_{layer}")
        for how, transcoder in {"load_from_disk": from_disk, "from_pretrained": from_hub}.items():
            check_facts(transcoder, layer)
            results[f"{how}:output.{layer}"] = transcoder(given[f"x.{layer}"])
        transcoders.append(from_disk)
    for name in ("sandwich_norm", "pre_norm"):
        bridge = sae_lens.SAETransformerBridge.boot_transformers(str(FOLDER / name), device="cpu")
        logits = bridge.run_with_saes(given["tokens"], saes=transcoders)
        results[f"run_with_saes in {name}:{name}.logits"] = logits
    save_file({name: value.contiguous() for name, value in results.items()}, FOLDER / "sae-lens.safetensors")
    print(sae_lens.__version__)


main()
