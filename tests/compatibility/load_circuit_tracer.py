"""Runs inside the environment of circuit-tracer: what its own loaders make of our exports.

In: the folder that `prepared.py` filled. Out: `circuit-tracer.safetensors` in it, with the results computed here under
the names `HOW:WHAT`; the version on standard output.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import torch
from circuit_tracer import ReplacementModel
from circuit_tracer.transcoder.single_layer_transcoder import load_gemma_scope_transcoder
from circuit_tracer.utils.caching import load_transcoders_from_cache
from circuit_tracer.utils.hf_utils import load_transcoder_from_hub
from safetensors.torch import load_file, save_file
from transformer_lens.loading_from_pretrained import get_pretrained_model_config, get_pretrained_state_dict

FOLDER = Path(sys.argv[1])
CPU = torch.device("cpu")


def replacement_model(folder: str, transcoders):
    """Its replacement model of a local Llama: `from_pretrained_and_transcoders` knows models of the hub only."""
    config = get_pretrained_model_config(folder, fold_ln=False, dtype=torch.float32, device="cpu")
    config.tokenizer_name = None  # saved by transformers 5, which the transformers here cannot read
    model = ReplacementModel.from_config(config, transcoders)
    weights = get_pretrained_state_dict(folder, config, dtype=torch.float32)
    moved = {".mlp.": ".mlp.old_mlp.", "unembed.": "unembed.old_unembed."}  # it wraps these two modules
    for old, new in moved.items():
        weights = {name.replace(old, new): weight for name, weight in weights.items()}
    missing = model.load_state_dict(weights, strict=False).missing_keys
    learned = [name for name, _ in model.named_parameters() if not name.startswith("transcoders.")]
    assert not set(missing) & set(learned), missing
    return model


@torch.no_grad()
def main() -> None:
    given = load_file(FOLDER / "inputs.safetensors")
    layers = sorted(int(name.removeprefix("x.")) for name in given if name.startswith("x."))
    from_cache, config = load_transcoders_from_cache("circuit_tracer", cache_dir=FOLDER, device=CPU)
    from_hub, _ = load_transcoder_from_hub("deltascope/circuit_tracer", device=CPU, use_cache=False)
    results = {}
    for how, transcoders in {"load_transcoders_from_cache": from_cache, "load_transcoder_from_hub": from_hub}.items():
        hooks = (transcoders.feature_input_hook, transcoders.feature_output_hook)
        assert hooks == ("ln2.hook_normalized", "hook_mlp_out"), hooks
        assert len(transcoders) == 4, f"{len(transcoders)} layers, the model has 4"
        for layer, transcoder in enumerate(transcoders):
            x = given.get(f"x.{layer}", given[f"x.{layers[0]}"])  # a layer of padding alone gives 0 for any input
            results[f"{how}:output.{layer}"] = transcoder(x)
    for layer in layers:
        (npz,) = FOLDER.glob(f"gemma_scope/layer_{layer}/*/*/params.npz")
        transcoder = load_gemma_scope_transcoder(str(npz), layer, device=CPU)
        results[f"load_gemma_scope_transcoder:output.{layer}"] = transcoder(given[f"x.{layer}"])

    _, acts = replacement_model(config["model_name"], from_cache).get_activations(given["tokens"])
    for layer in layers:
        results[f"get_activations in pre_norm:pre_norm.acts.{layer}"] = acts[layer]
    save_file({name: value.contiguous() for name, value in results.items()}, FOLDER / "circuit-tracer.safetensors")
    print(version("circuit-tracer"))


main()
