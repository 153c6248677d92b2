"""`torchrecycle cuts --model ...`: models by name and by folder, what is printed, and how a mistake looks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    ASTConfig,
    ASTModel,
    BartConfig,
    BertConfig,
    BertModel,
    CLIPConfig,
    DistilBertConfig,
    PreTrainedModel,
    T5Config,
    ViTConfig,
    WhisperConfig,
)
from typer.testing import CliRunner

from small_models import gpt2_config, llama_config, wav2vec2_config
from torchrecycle.cli import app
from torchrecycle.cli.cuts import _advice, _shortened
from torchrecycle.models import ModelError, load_model

runner = CliRunner(env={"COLUMNS": "80"})

SMALL: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)
TWO_HALVES: dict[str, Any] = dict(
    d_model=32,
    encoder_layers=3,
    decoder_layers=3,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=64,
    decoder_ffn_dim=64,
    vocab_size=60,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
)
EYES: dict[str, Any] = dict(**SMALL, image_size=32, patch_size=8)


def _cuts(*arguments: str) -> Any:
    return runner.invoke(app, ["cuts", "--model", *arguments])


def _json(*arguments: str) -> dict[str, Any]:
    result = _cuts(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def _is_refused(*arguments: str) -> str:
    """The one line on stderr."""
    result = _cuts(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_the_table_fits_80_columns_and_ends_with_the_call_to_make():
    result = _cuts("timm/resnet18", "--size", "64")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("ResNet: 11.7 M parameters; a forward of 2 objects: ")
    assert lines[1] == "example: input [2, 3, 64, 64]"
    assert [line for line in lines if "random" in line] == [lines[2]]
    rows = {line.split()[0]: line.split()[1:] for line in lines[4:-2]}
    assert list(rows) == ["layer1", "layer2", "layer3", "layer4", "global_pool"]
    assert rows["layer2"][:2] == ["0.50", "683,072"]
    assert rows["layer2"][-2:] == [f"{128 * 8 * 8 * 4:,}", "1"]
    assert lines[-1] == "recycle(model, example, cut='layer2', store=...)"


def test_numbers_stand_under_each_other():
    lines = _cuts("timm/resnet18", "--size", "64").stdout.splitlines()
    assert len({len(line.rstrip()) for line in lines[3:-2]}) == 1


def test_json_is_one_document_and_nothing_else():
    found = _json("timm/resnet18", "--size", "64")
    assert found["parameters"] == 11_689_512
    assert found["nearest_to_half"] == "layer2"
    assert found["objects"] == 2
    assert found["seconds"] > 0
    assert found["flops"] > 1e8
    layer = found["cuts"][1]
    assert (layer["name"], layer["level"], layer["valid"], layer["leaves"]) == ("layer2", 0.5, True, 1)


def test_all_shows_every_module_and_batch_is_what_is_timed(tmp_path):
    folder = _without_weights(BertConfig(**{**SMALL, "num_hidden_layers": 1}, vocab_size=60), tmp_path)
    found = _json(folder, "--tokens", "5", "--batch", "3", "--all")
    names = [cut["name"] for cut in found["cuts"]]
    assert {"embeddings", "encoder.layer.0.attention.self.query", "encoder.layer.0.output.LayerNorm"} <= set(names)
    assert found["example"] == {"input_ids": [3, 5], "attention_mask": [3, 5]}
    assert found["objects"] == 3


def test_a_vit_is_made_for_the_size_that_is_asked_for():
    found = _json("timm/vit_tiny_patch16_224", "--size", "64")
    assert [cut["name"] for cut in found["cuts"]][:12] == [f"blocks.{number}" for number in range(12)]
    assert found["cuts"][0]["bytes_per_object"] == 4 * 192 * (1 + 16)


@pytest.mark.parametrize(
    ("name", "shape", "first"),
    [
        ("resnet18", [2, 3, 32, 32], "layer1"),
        ("lraspp_mobilenet_v3_large", [2, 3, 32, 32], "backbone.0"),
        ("r3d_18", [2, 3, 16, 32, 32], "layer1"),
    ],
)
def test_models_of_torchvision_have_an_example_of_their_kind(name, shape, first):
    found = _json(f"torchvision/{name}", "--size", "32")
    assert found["example"] == {"input": shape}
    assert found["cuts"][0]["name"] == first
    assert found["cuts"][0]["valid"]


def _without_weights(config: Any, folder: Path) -> str:
    config.save_pretrained(folder)
    return str(folder)


FOLDERS = {
    "bert": (BertConfig(**SMALL, vocab_size=60), "encoder.layer.", 3),
    "gpt2": (gpt2_config(), "h.", 4),
    "llama": (llama_config(), "layers.", 4),
    "vit": (ViTConfig(**EYES), "layers.", 3),
    "wav2vec2": (wav2vec2_config(), "encoder.layers.", 4),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_with_only_a_config_gives_random_weights_and_says_so(name, tmp_path):
    config, prefix, count = FOLDERS[name]
    found = _json(_without_weights(config, tmp_path), "--tokens", "7")
    assert "random" in found["weights"]
    blocks = [cut for cut in found["cuts"] if cut["name"].startswith(prefix)]
    assert len(blocks) == count
    assert all(cut["valid"] for cut in blocks[:-1])
    assert all(shape[0] == 2 for shape in found["example"].values())


TWO_LISTS = {
    "t5": (
        T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=3, num_heads=2, vocab_size=60),
        ["encoder.block.", "decoder.block."],
    ),
    "bart": (BartConfig(**TWO_HALVES), ["encoder.layers.", "decoder.layers."]),
    "whisper": (
        WhisperConfig(**TWO_HALVES, num_mel_bins=8, max_source_positions=20, suppress_tokens=None),
        ["encoder.layers.", "decoder.layers."],
    ),
    "clip": (
        CLIPConfig(
            text_config=dict(SMALL, vocab_size=60, eos_token_id=2, bos_token_id=1, pad_token_id=0),
            vision_config=dict(EYES),
            projection_dim=16,
        ),
        ["vision_model.encoder.layers.", "text_model.encoder.layers."],
    ),
}


@pytest.mark.parametrize("name", TWO_LISTS)
def test_both_lists_of_blocks_are_shown_in_running_order(name, tmp_path):
    config, prefixes = TWO_LISTS[name]
    found = _json(_without_weights(config, tmp_path), "--tokens", "7")
    names = [cut["name"] for cut in found["cuts"]]
    blocks = [f"{prefix}{number}" for prefix in prefixes for number in range(3)]
    assert [name for name in names if name in blocks] == blocks
    levels = {cut["name"]: cut["level"] for cut in found["cuts"]}
    assert [levels[block] for block in blocks] == pytest.approx([(i + 1) / 6 for i in range(6)], abs=1e-3)


def test_a_folder_with_weights_gives_them(tmp_path):
    model = BertModel(BertConfig(**SMALL, vocab_size=60))
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), tokens=5)
    assert loaded.weights == "from the folder"
    assert torch.equal(loaded.model.state_dict()["pooler.dense.weight"], model.pooler.dense.weight)
    assert loaded.shapes() == {"input_ids": [2, 5], "attention_mask": [2, 5]}


def test_spectrograms_have_the_length_that_the_model_takes(tmp_path):
    config = ASTConfig(**SMALL, max_length=64, num_mel_bins=32, patch_size=8, time_stride=8, frequency_stride=8)
    loaded = load_model(_without_weights(config, tmp_path))
    assert isinstance(loaded.model, ASTModel)
    assert loaded.shapes() == {"input_values": [2, 64, 32]}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_checkpoint_gives_its_weights(tmp_path, suffix):
    from safetensors.torch import save_file
    from timm import create_model

    model = create_model("resnet18")
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pt":
        torch.save({"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, file)
    else:
        save_file(model.state_dict(), file)
    loaded = load_model("timm/resnet18", size=32, checkpoint=file)
    assert torch.equal(loaded.model.state_dict()["fc.weight"], model.state_dict()["fc.weight"])
    assert loaded.weights == f"from {file.name}"


def test_a_checkpoint_of_another_architecture_is_refused_with_three_names_of_each_kind(tmp_path):
    file = tmp_path / "other.pt"
    torch.save({**{f"trunk.{n}.weight": torch.zeros(2) for n in range(9)}, "conv1.weight": torch.zeros(3)}, file)
    line = _is_refused("timm/resnet18", "--checkpoint", str(file))
    assert "bn1.weight, bn1.bias, bn1.running_mean and 118 more are missing in it" in line
    assert "trunk.0.weight, trunk.1.weight, trunk.2.weight and 6 more are unexpected" in line


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    from timm import create_model

    file = tmp_path / "five.pt"
    torch.save(create_model("resnet18", num_classes=5).state_dict(), file)
    line = _is_refused("timm/resnet18", "--checkpoint", str(file))
    assert "'fc.weight' is [5, 512] in it and [1000, 512] in the model" in line


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "there is no file"), (b"no weights", "cannot be read"), ({"epoch": 3}, "holds no state dict")],
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content, words):
    file = tmp_path / "file.pt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        torch.save(content, file)
    assert words in _is_refused("timm/resnet18", "--checkpoint", str(file))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tim/resnet18"], "Did you mean timm/resnet18?"),
        (["nowhere/at/all"], "there is no folder 'nowhere/at/all': expected timm/NAME, torchvision/NAME, or a folder"),
        (["timm/resnet19"], "timm has no model 'resnet19'. Near: resnet18"),
        (["torchvision/resnet19"], "torchvision has no model 'resnet19'. Near: resnet18"),
        (["torchvision/fasterrcnn_resnet50_fpn"], "is a detector: it takes a list of images"),
        (["torchvision/vit_b_32", "--size", "100"], "Leave --size 100 out, or take another"),
        (["timm/vit_tiny_patch16_224", "--size", "7"], "timm/vit_tiny_patch16_224"),
    ],
)
def test_a_mistake_in_the_name_or_the_size_is_one_line(arguments, words):
    assert words in _is_refused(*arguments)


def test_a_folder_that_holds_no_model_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("none")
    assert "has no config.json, so it is no transformers model; it holds notes.txt" in _is_refused(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "no such thing"}')
    assert "transformers cannot make a model" in _is_refused(str(tmp_path))


def test_more_tokens_than_a_model_has_places_for_are_refused(tmp_path):
    folder = _without_weights(gpt2_config(n_positions=16), tmp_path)
    assert "does not run on input_ids [2, 32]" in _is_refused(folder)


def test_what_cannot_be_cut_says_why_under_the_table(tmp_path):
    config = DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=64, vocab_size=60)
    lines = _cuts(_without_weights(config, tmp_path), "--tokens", "5").stdout.splitlines()
    last = next(line for line in lines if line.startswith("transformer.layer.1"))
    assert last.split()[-2:] == ["no", "1"]
    assert "no 1: nothing would be left to train after it" in lines
    assert lines[-1] == "recycle(model, example, cut='transformer.layer.0', store=...)"
    assert max(map(len, lines)) <= 80


def test_where_no_cut_is_valid_there_is_no_call_to_make():
    assert _advice(None) == "No cut of these is valid; --all shows every module."


def test_a_library_that_is_not_installed_is_named_with_what_to_do():
    code = (
        "import sys; sys.modules['timm'] = None\n"  # what an import of a missing package looks like
        "from torchrecycle.cli import app; app(['cuts', '--model', 'timm/resnet18'])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr == "torchrecycle: timm is not installed: pip install timm\n"


def test_loading_leaves_the_training_flags_and_draws_no_random_number_for_the_example():
    loaded = load_model("timm/resnet18", size=32)
    assert all(module.training for module in loaded.model.modules())
    assert torch.equal(loaded.example, load_model("timm/resnet18", size=32).example)


def test_a_mistake_is_a_value_error_too():
    with pytest.raises(ValueError, match="no model"):
        load_model("timm/nothing_of_the_kind")
    assert issubclass(ModelError, ValueError)


def test_long_names_lose_their_middle():
    assert _shortened("encoder.layers.encoder_layer_11", 20) == "encode..der_layer_11"
    assert _shortened("layer1", 20) == "layer1"


def test_the_loaded_model_is_a_plain_one(tmp_path):
    loaded = load_model(_without_weights(BertConfig(**SMALL, vocab_size=60), tmp_path))
    assert isinstance(loaded.model, (nn.Module, PreTrainedModel))
    assert int(loaded.example["input_ids"].max()) < 60
