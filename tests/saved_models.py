"""Models that the tests save, and the process that loads them: imported by both, so that classes have a name in each.

``python saved_models.py FOLDER`` loads each model in the folder with the inputs beside it, and writes down what it is
and what it gives. Whatever differs from what the test wrote before is a bug of saving.
"""

from __future__ import annotations

import enum
import functools
import json
import math
import sys
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from torchrecycle.similarity import Encoder, EncoderHead, SwitchEncoder
from torchrecycle.similarity.saving import load_module, save_module

# -- classes of users --------------------------------------------------------------------------------------------------


class Side(enum.Enum):
    LEFT = "left"
    RIGHT = "right"


@dataclass(frozen=True)
class Settings:
    scale: float
    sides: tuple[Side, ...]


class Size(NamedTuple):
    height: int
    width: int


class Vocabulary:
    """No module and no dataclass: what a user keeps beside the layers."""

    def __init__(self, words: Sequence[str]) -> None:
        self.numbers = {word: i for i, word in enumerate(words)}


def squared(x: Tensor) -> Tensor:
    return x * x


class Everything(nn.Module):
    """Holds one of each kind of value that is saved, and uses them in its forward."""

    def __init__(self, dim: int, opened: Any) -> None:
        super().__init__()
        assert opened is not None, "loading must not call the constructor"
        self.first = nn.Linear(dim, dim)
        self.tied = nn.Linear(dim, dim, bias=False)
        self.tied.weight = self.first.weight
        self.again = self.first
        self.view = nn.Linear(dim, dim, bias=False)
        self.view.weight = nn.Parameter(self.first.weight.detach())
        self.nothing = None
        self.register_module("left_out", None)
        self.register_parameter("absent", None)
        self.register_buffer("kept", torch.randn(dim))
        self.register_buffer("unkept", torch.randn(dim), persistent=False)
        self.wave = nn.Parameter(torch.randn(dim, dtype=torch.complex64), requires_grad=False)
        self.quarter = nn.Buffer(torch.randn(dim).to(torch.float8_e4m3fn))
        self.outside = [nn.Linear(dim, dim), {"deeper": nn.Sequential(nn.Linear(dim, dim), nn.Tanh())}]
        self.by_name = {"first": self.first}
        self.constant = torch.arange(dim).float()
        self.array = np.linspace(0, 1, dim, dtype=np.float32)
        self.number = np.float64(0.1)
        self.numbers = (1, 2.5, math.inf, -math.inf, 1j, True, "a", b"\x00\xff", -0.0, 10**30)
        self.not_a_number = math.nan
        self.words = {"a", "b"}
        self.frozen = frozenset({(1, 2)})
        self.by_number = {1: "one", (2, 3): Side.LEFT, "$tag": None}
        self.ordered = OrderedDict(b=1, a=2)
        self.counts: defaultdict[str, list[int]] = defaultdict(list, {"x": [1]})
        self.shape = torch.Size([2, 3])
        self.types = (torch.float16, torch.device("cpu"), torch.channels_last, torch.strided)
        self.slices = (slice(1, None, 2), range(3))
        self.settings = Settings(2.0, (Side.LEFT, Side.RIGHT))
        self.size = Size(3, 4)
        self.place = Path("some") / "where"
        self.vocabulary = Vocabulary(["a", "b"])
        self.square = squared
        self.act = F.gelu
        self.erf = torch.special.erf
        self.make = functools.partial(nn.LayerNorm, eps=1e-3)
        self.kind = nn.ReLU
        self.method = self.shifted
        self.log: list[int] = []
        self.same_log = self.log
        self.circle: list[Any] = [1]
        self.circle.append(self.circle)
        self.norm = nn.BatchNorm1d(dim)
        self.first.eval()
        self.kept_out = nn.Dropout(0.5)
        self.first.bias.requires_grad_(False)
        self._register_load_state_dict_pre_hook(self.renamed)

    def shifted(self, x: Tensor) -> Tensor:
        return x + self.constant

    def renamed(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in [name for name in state if name.startswith(f"{prefix}old.")]:
            state[name.replace("old.", "first.")] = state.pop(name)

    def forward(self, x: Tensor) -> Tensor:
        deeper: Any = self.outside[1]
        x = self.first(x) + self.tied(x) + self.view(x) + self.kept + self.unkept + self.quarter.float()
        x = deeper["deeper"](self.outside[0](x)) * self.wave.abs() + torch.from_numpy(self.array)
        x = self.method(self.erf(self.act(self.square(x)))) * self.settings.scale * self.number
        return self.make(x.shape[-1])(self.kind()(self.norm(self.kept_out(x))))


class WithConfig(EncoderHead):
    """Holds a function that nothing can write, and says how to make it again."""

    def __init__(self, dim: int, power: float = 2.0) -> None:
        super().__init__(dim)
        self.layer = nn.Linear(dim, dim)
        self.power = power
        self.act = lambda x: x.abs() ** power

    def get_config_dict(self) -> dict[str, Any]:
        return {"dim": self.layer.in_features, "power": self.power}

    @property
    def output_size(self) -> int:
        return self.layer.out_features

    def transform(self, input_vectors: Tensor) -> Tensor:
        return self.act(self.layer(input_vectors))


class ForgetfulConfig(WithConfig):
    """Its config leaves an argument out that changes what it computes."""

    def __init__(self, dim: int, power: float = 2.0, scale: float = 1.0) -> None:
        super().__init__(dim, power)
        self.act = F.relu
        self.scale = scale

    def transform(self, input_vectors: Tensor) -> Tensor:
        return super().transform(input_vectors) * self.scale


class ConfigOfAnother(nn.Module):
    """Has a method of that name for another library, whose constructor is not for us to call."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        Path(path).write_text("called")

    def get_config_dict(self) -> dict[str, Any]:
        return {"path": "called.txt"}

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class ScaledHead(EncoderHead):
    """A head of a user whose config says nothing of its own argument."""

    def __init__(self, input_embedding_size: int, scale: float = 1.0) -> None:
        super().__init__(input_embedding_size)
        self.scale = scale

    @property
    def output_size(self) -> int:
        return 8

    def transform(self, input_vectors: Tensor) -> Tensor:
        return input_vectors * self.scale


# -- encoders of users -------------------------------------------------------------------------------------------------


class Numbers(Encoder):
    """Lists of numbers to vectors; of dicts, the entry of a name."""

    def __init__(self, dim: int = 4, size: int = 6, field: str | None = None, trained: bool = False) -> None:
        super().__init__()
        self.layer = nn.Linear(dim, size)
        self.drop = nn.Dropout(0.5)
        self.field, self.trained = field, trained

    @property
    def trainable(self) -> bool:
        return self.trained

    @property
    def embedding_size(self) -> int:
        return self.layer.out_features

    def forward(self, batch: Tensor) -> Tensor:
        return self.drop(self.layer(batch))

    def get_collate_fn(self) -> Any:
        return functools.partial(stacked, field=self.field)


def stacked(objects: list[Any], field: str | None) -> Tensor:
    return torch.stack([torch.as_tensor(obj if field is None else obj[field], dtype=torch.float32) for obj in objects])


class Letters(Encoder):
    """Words to the mean of the vectors of their letters: batches of another length each."""

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.vectors = nn.EmbeddingBag(27, size, mode="mean")

    @property
    def trainable(self) -> bool:
        return True

    @property
    def embedding_size(self) -> int:
        return self.vectors.embedding_dim

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.vectors(batch["letters"], batch["starts"])

    def get_collate_fn(self) -> Any:
        return letters

    def get_meta_extractor(self) -> Any:
        return lengths


def letters(words: list[str]) -> dict[str, Tensor]:
    numbers = [max(0, ord(letter) - 96) % 27 for word in words for letter in word]
    starts = [0, *np.cumsum([len(word) for word in words])[:-1]]
    return {"letters": torch.tensor(numbers), "starts": torch.tensor(starts)}


def lengths(words: list[str]) -> list[dict[str, Any]]:
    return [{"length": len(word)} for word in words]


class WordsAndNumbers(SwitchEncoder):
    @classmethod
    def encoder_selection(cls, record: Any) -> str:
        return "words" if isinstance(record, str) else "numbers"


class OwnFiles(Numbers):
    """Saves itself as it likes, as classes written for Quaterion do."""

    def save(self, output_path: Any) -> None:
        save_file(self.state_dict(), f"{output_path}/own.safetensors")
        (Path(output_path) / "own.json").write_text(json.dumps([self.layer.in_features, self.embedding_size]))

    @classmethod
    def load(cls, input_path: Any) -> OwnFiles:
        made = cls(*json.loads((Path(input_path) / "own.json").read_text()))
        made.load_state_dict(load_file(f"{input_path}/own.safetensors"))
        return made


class Pictures(Encoder):
    """The first of two things: an image tensor ``[3, 64, 64]``, by EfficientNet-Lite0."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    @property
    def trainable(self) -> bool:
        return False

    @property
    def embedding_size(self) -> int:
        return 1280

    def forward(self, batch: Tensor) -> Tensor:
        return self.trunk(batch)

    def get_collate_fn(self) -> Any:
        return pictures_of


def pictures_of(objects: list[tuple[Tensor, str]]) -> Tensor:
    return torch.stack([picture for picture, _ in objects])


class Captions(Encoder):
    """The second of two things: a text, by MiniLM. It holds its tokenizer."""

    def __init__(self, trunk: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.trunk, self.tokenizer = trunk, tokenizer

    @property
    def trainable(self) -> bool:
        return False

    @property
    def embedding_size(self) -> int:
        return 384

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        mask = batch["attention_mask"].unsqueeze(-1).float()
        return (self.trunk(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)

    def get_collate_fn(self) -> Any:
        return self.tokens

    def tokens(self, objects: list[tuple[Tensor, str]]) -> dict[str, Tensor]:
        return dict(self.tokenizer([text for _, text in objects], padding=True, return_tensors="pt"))


# -- real models, small ------------------------------------------------------------------------------------------------


def quick_models() -> Iterator[tuple[str, nn.Module, Any]]:
    """Name, model and inputs of what is saved in each run of the tests."""
    torch.manual_seed(0)
    vectors, tokens, image = torch.randn(3, 8), torch.randn(2, 5, 8), torch.randn(2, 3, 64, 64)
    yield "everything", Everything(8, sys.stdin), vectors
    yield "everything in training", Everything(8, sys.stdin).eval().train(), vectors
    yield "config", WithConfig(8, 3.0), vectors
    yield "config inside", nn.Sequential(WithConfig(8), nn.ReLU(), WithConfig(8, 1.0)), vectors
    yield "forgetful config", ForgetfulConfig(8, 2.0, scale=3.0), vectors
    yield "head with an argument", ScaledHead(8, scale=3.0), vectors
    yield "lstm", Recurrent(), tokens
    yield "transformer", nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval(), tokens
    for name in ("weight_norm", "spectral_norm", "orthogonal"):
        parametrised = getattr(nn.utils.parametrizations, name)(nn.Linear(8, 4))
        yield name, parametrised.eval(), vectors
    yield "channels last", nn.Conv2d(3, 8, 3).to(memory_format=torch.channels_last), image
    yield "bfloat16", nn.Linear(8, 4).bfloat16(), vectors.bfloat16()
    yield from _torchvision(image)
    yield from _timm(image)
    yield from _transformers()


def _torchvision(image: Tensor) -> Iterator[tuple[str, nn.Module, Any]]:
    from torchvision import models
    from torchvision.models.vision_transformer import VisionTransformer

    for name in ("mobilenet_v3_small", "shufflenet_v2_x0_5", "mnasnet0_5"):
        yield f"torchvision {name}", models.get_model(name).eval(), image
    yield "torchvision resnet18 stage", models.resnet18().layer2.eval(), torch.randn(2, 64, 16, 16)
    yield "torchvision vit", VisionTransformer(64, 16, 2, 2, 32, 64).eval(), image
    yield "torchvision transform", models.ResNet18_Weights.DEFAULT.transforms(), torch.rand(3, 300, 280)


def _timm(image: Tensor) -> Iterator[tuple[str, nn.Module, Any]]:
    import timm

    for name in ("test_vit", "test_resnet", "test_efficientnet", "test_convnext", "test_nfnet", "test_byobnet"):
        yield f"timm {name}", timm.create_model(name, num_classes=4).eval(), torch.randn(2, 3, 160, 160)
    yield "timm features", timm.create_model("test_resnet", features_only=True).eval(), image


def _transformers() -> Iterator[tuple[str, nn.Module, Any]]:
    import transformers

    t: Any = transformers

    small: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"intermediate_size": 64}
    words = {"vocab_size": 50}
    pixels = {"image_size": 32, "patch_size": 16}
    ids = {"input_ids": torch.randint(5, 50, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    seen = {"pixel_values": torch.randn(2, 3, 32, 32)}
    yield "transformers bert", t.BertModel(t.BertConfig(**small, **words)).eval(), ids
    yield "transformers vit", t.ViTModel(t.ViTConfig(**small, **pixels)).eval(), seen
    both = t.CLIPConfig(
        text_config={**small, **words, "eos_token_id": 2, "bos_token_id": 1}, vision_config={**small, **pixels}
    )
    yield "transformers clip", t.CLIPModel(both).eval(), {**ids, **seen}
    t5 = t.T5Config(vocab_size=50, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    yield "transformers t5", t.T5Model(t5).eval(), {**ids, "decoder_input_ids": ids["input_ids"]}
    sound = t.Wav2Vec2Config(
        **small,
        vocab_size=50,
        conv_dim=(32, 32),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    yield "transformers wav2vec2", t.Wav2Vec2Model(sound).eval(), {"input_values": torch.randn(2, 800)}


def zoo(which: str) -> Iterator[tuple[str, nn.Module, Any]]:
    """Name, model and inputs of one model of each family of a library."""
    torch.manual_seed(0)
    if which == "torchvision":
        from torchvision import models

        names = (
            "alexnet convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s maxvit_t mobilenet_v2 regnet_x_400mf "
            "resnet34 resnext50_32x4d squeezenet1_0 swin_t swin_v2_t vit_b_16 fcn_resnet50 lraspp_mobilenet_v3_large"
        )
        for name in names.split():
            size = 224 if any(word in name for word in ("vit", "swin")) else 64
            backbone = {"weights_backbone": None} if name.startswith(("fcn", "lraspp")) else {}
            yield name, models.get_model(name, **backbone).eval(), torch.randn(2, 3, size, size)
        for name in ("fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large"):
            yield name, models.get_model(name, weights_backbone=None).eval(), ([torch.rand(3, 64, 64)],)
        return
    import timm
    from timm.models._registry import _model_to_module

    families: dict[str, list[str]] = {}
    for name in timm.list_models():
        families.setdefault(_model_to_module[name], []).append(name)
    for names in families.values():
        smallest = min((_parameters(name), name) for name in names[:12])
        if smallest[0] > 12e6:
            continue
        model: Any = timm.create_model(smallest[1]).eval()
        size = model.default_cfg["input_size"][-1]
        yield smallest[1], model, torch.randn(1, 3, size, size)


def _parameters(name: str) -> float:
    import timm

    with torch.device("meta"):
        try:
            return sum(parameter.numel() for parameter in timm.create_model(name).parameters())
        except NotImplementedError:  # reads a number while it is made
            return math.inf


# -- what is compared --------------------------------------------------------------------------------------------------


def facts(model: nn.Module, inputs: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a model is, and its tensors and outputs."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    ids = [id(parameter) for parameter in parameters.values()]
    said = {
        "modules": [(name, type(each).__name__, each.training) for name, each in model.named_modules()],
        "parameters": [
            (name, each.requires_grad, list(each.stride()), str(each.dtype)) for name, each in parameters.items()
        ],
        "tied": [ids.index(each) for each in ids],
        "buffers": [name for name, _ in model.named_buffers()],
        "state": list(model.state_dict()),
    }
    state = {f"state {name}": tensor.detach().clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(7)
    with torch.no_grad():
        if isinstance(inputs, dict):
            output = model(**inputs)
        else:
            output = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    found = {f"output {i}": tensor for i, tensor in enumerate(_tensors(output))}
    return said, {name: _bytes(tensor) for name, tensor in {**state, **found}.items()}


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (dict, list, tuple)):
        for each in output.values() if isinstance(output, dict) else output:
            yield from _tensors(each)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8).clone()


def write_facts(folder: Path, name: str, model: nn.Module, inputs: Any) -> None:
    said, tensors = facts(model, inputs)
    (folder / f"{name}.json").write_text(json.dumps(said), encoding="utf-8")
    save_file(tensors, folder / f"{name}.tensors")


def save_with_facts(folder: Path, name: str, model: nn.Module, inputs: Any) -> None:
    """Save a model and its inputs; what it is and gives is written after that, since a forward may change it."""
    torch.save(inputs, folder / "inputs.pt")
    save_module(model, folder / "model")
    write_facts(folder, name, model, inputs)


def main(place: str) -> None:
    torch.set_num_threads(1)
    for folder in sorted(Path(place).iterdir()):
        inputs = torch.load(folder / "inputs.pt", weights_only=True)
        write_facts(folder, "after", load_module(folder / "model"), inputs)


if __name__ == "__main__":
    import saved_models  # under its own name, as pickle too would want it

    saved_models.main(sys.argv[1])
