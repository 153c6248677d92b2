"""Whatever a row depends on changes the fingerprint, and nothing else does."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

from small_models import bert, efficientnet, images, resnet, texts
from torchrecycle import recycle
from torchrecycle.codec import Layout
from torchrecycle.fingerprint import Watch, settings_of, take_fingerprint, tensor_digest

PREFIX = ["conv1", "bn1", "layer1"]


def _settings(**changes: object) -> dict[str, object]:
    layout = Layout(4, 0, (), (0, 1, 2, 3), (64, 8, 8), torch.float32, torch.float32)
    arguments: dict[str, object] = {
        "cut": "layer1", "layouts": [layout], "precision": None, "autocast": None, "inputs": ["x"], "padding": ""
    }  # fmt: skip
    return settings_of(**{**arguments, **changes})  # pyright: ignore


def _hex(model: nn.Module, **changes: object) -> str:
    return take_fingerprint({name: model.get_submodule(name) for name in PREFIX}, {}, [], _settings(**changes)).hex


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return resnet().eval()


def _nudge(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        flat = tensor.view(-1)
        flat[-1] = torch.nextafter(flat[-1], torch.tensor(9.0))


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "the last bit of one weight": lambda m: _nudge(m.layer1[0].conv2.weight),
    "one buffer": lambda m: _nudge(m.bn1.running_var),
    "a write through .data": lambda m: m.conv1.weight.data.mul_(1.0001),
    "a write through NumPy": lambda m: m.conv1.weight.detach().numpy().__imul__(1.0001),
    "the sign of a zero": lambda m: m.bn1.bias.data.mul_(-1),
    "dtype": lambda m: m.half(),
    "eps": lambda m: setattr(m.bn1, "eps", 1e-3),
    "stride": lambda m: setattr(m.conv1, "stride", (1, 1)),
    "a plain attribute": lambda m: setattr(m.layer1[0], "scale", 2.0),
    "a nested attribute": lambda m: setattr(m.layer1[0], "sizes", [{"a": (1, 2)}]),
    "a tensor attribute": lambda m: setattr(m.layer1[0], "table", torch.ones(2)),
    "another class": lambda m: setattr(m.layer1[0], "relu", nn.GELU()),
    "a further module": lambda m: m.layer1.append(nn.Identity()),
    "a parameter less": lambda m: m.bn1.register_parameter("bias", None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_prefix_changes_the_fingerprint(model, name):
    before = _hex(model)
    CHANGES[name](model)
    assert _hex(model) != before


def test_nested_plain_attributes_count_with_their_content(model):
    model.layer1[0].sizes = [{"a": (1, 2)}]
    before = _hex(model)
    model.layer1[0].sizes = [{"a": (1, 3)}]
    assert _hex(model) != before


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda x: torch.relu(x), lambda x: torch.tanh(x)),
        (lambda xs: [torch.relu(x) for x in xs], lambda xs: [torch.tanh(x) for x in xs]),
    ],
    ids=["itself", "within it"],
)
def test_a_function_that_calls_another_one_is_another(model, one, other):
    """Their steps are the same, but for the names that they look up."""
    other.__qualname__ = one.__qualname__
    model.layer1[0].act = one
    before = _hex(model)
    model.layer1[0].act = other
    assert _hex(model) != before


SAME: dict[str, Callable[[nn.Module], object]] = {
    "the head": lambda m: setattr(m, "fc", nn.Linear(512, 7)),
    "the suffix": lambda m: m.layer4.requires_grad_(False).half(),
    "flags": lambda m: m.train(),
    "requires_grad": lambda m: m.requires_grad_(False),
    "gradients": lambda m: setattr(m.conv1.weight, "grad", torch.ones_like(m.conv1.weight)),
    "hooks": lambda m: m.layer1.register_forward_hook(lambda *_: None),
    "memory order": lambda m: m.to(memory_format=torch.channels_last),
    "the same weights again": lambda m: m.load_state_dict(copy.deepcopy(m.state_dict())),
}


@pytest.mark.parametrize("name", SAME)
def test_what_a_row_does_not_depend_on_does_not_change_it(model, name):
    before = _hex(model)
    SAME[name](model)
    assert _hex(model) == before


@pytest.mark.parametrize(
    "change",
    [
        {"cut": "layer2"},
        {"precision": "float16"},
        {"autocast": torch.bfloat16},
        {"inputs": ["x", "mask"]},
        {"padding": "True"},
        {"key": "user"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_setting_changes_it(model, change):
    assert _hex(model, **change) != _hex(model)


def test_an_attribute_that_the_forward_itself_sets_does_not_count(model):
    modules = {name: model.get_submodule(name) for name in PREFIX}
    model.layer1[0].calls, model.layer1[0].cache = 1, torch.zeros(2)
    written = frozenset({("layer1.0", "calls"), ("layer1.0", "cache")})
    before = take_fingerprint(modules, {}, [], _settings(), written).hex
    model.layer1[0].calls, model.layer1[0].cache = 2, torch.ones(3)
    assert take_fingerprint(modules, {}, [], _settings(), written).hex == before
    assert take_fingerprint(modules, {}, [], _settings()).hex != before


def test_the_difference_of_two_fingerprints_names_the_tensor(model):
    modules = {name: model.get_submodule(name) for name in PREFIX}
    before = take_fingerprint(modules, {}, [], _settings())
    _nudge(model.layer1[0].conv2.weight)
    assert take_fingerprint(modules, {}, [], _settings()).difference(before) == ["layer1.0.conv2.weight"]


def test_names_and_values_cannot_be_shifted_into_each_other():
    a = take_fingerprint({}, {"ab": torch.ones(2), "c": torch.zeros(2)}, [], {})
    b = take_fingerprint({}, {"a": torch.ones(2), "bc": torch.zeros(2)}, [], {})
    c = take_fingerprint({}, {}, [torch.ones(2), torch.zeros(2)], {})
    d = take_fingerprint({}, {}, [torch.zeros(2), torch.ones(2)], {})
    assert len({a.hex, b.hex, c.hex, d.hex}) == 4


def test_dtype_and_shape_of_a_tensor_count_and_its_strides_do_not():
    x = torch.arange(6.0).reshape(2, 3)
    digests = {tensor_digest(t) for t in (x, x.reshape(3, 2), x.view(torch.int32), x.double(), x.flatten())}
    assert len(digests) == 5
    assert tensor_digest(x.t().contiguous().t()) == tensor_digest(x)
    assert tensor_digest(x.conj()) == tensor_digest(x)
    assert tensor_digest(torch.zeros(0, 3)) != tensor_digest(torch.zeros(3, 0))
    assert tensor_digest(x.bfloat16()) != tensor_digest(x.half())
    assert tensor_digest(torch.ones(2, dtype=torch.bool)) != tensor_digest(torch.ones(2, dtype=torch.uint8))


def test_another_process_takes_the_same_fingerprint():
    code = (
        "import torch; from torch import nn; from torchrecycle.fingerprint import take_fingerprint\n"
        "m = nn.Sequential(nn.Linear(2, 2), nn.ReLU())\n"
        "[p.data.fill_(0.5) for p in m.parameters()]\n"
        "print(take_fingerprint({'0': m[0], '1': m[1]}, {}, [], {'cut': '1', 'inputs': ['x']}).hex)"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1


def test_the_two_efficientnet_lite_twins_have_different_fingerprints():
    twin = timm.create_model("efficientnet_lite0", num_classes=5)
    model = efficientnet()
    twin.load_state_dict(model.state_dict())
    with recycle(model, images(2), cut="blocks.2", store="memory://") as a:
        with recycle(twin, images(2), cut="blocks.2", store="memory://") as b:
            assert type(model) is type(twin)
            assert a.fingerprint != b.fingerprint


def test_many_heads_share_one_trunk_and_another_cut_does_not():
    model = bert()
    other = bert()
    other.load_state_dict(model.state_dict())
    other.classifier = nn.Linear(32, 9)
    example = {name: part[:2] for name, part in texts().items()}
    found = []
    for one, cut in ((model, "bert.encoder.layer.1"), (other, "bert.encoder.layer.1"), (other, "bert.encoder.layer.2")):
        with recycle(one, example, cut=cut, store="memory://") as recycling:
            found.append(recycling.fingerprint)
    assert found[0] == found[1] != found[2]


# -- while attached ----------------------------------------------------------------------------------------------------

MOVES: dict[str, Callable[[nn.Module], object]] = {
    "in place": lambda m: _nudge(m.layer1[0].conv2.weight),
    "a buffer in place": lambda m: m.bn1.running_var.add_(1),
    "replaced": lambda m: setattr(m.conv1, "weight", nn.Parameter(m.conv1.weight.detach().clone())),
    "a module replaced": lambda m: setattr(m.layer1[0], "conv1", copy.deepcopy(m.layer1[0].conv1)),
    "a module without tensors replaced": lambda m: setattr(m.layer1[0], "relu", nn.GELU()),
    "dtype": lambda m: m.half(),
    ".data replaced": lambda m: setattr(m.conv1.weight, "data", m.conv1.weight.data.clone()),
    "loaded": lambda m: m.load_state_dict(copy.deepcopy(m.state_dict())),
}


@pytest.mark.parametrize("name", MOVES)
def test_the_watch_sees_a_tensor_that_is_written_replaced_or_moved(model, name):
    watch = Watch({name: model.get_submodule(name) for name in PREFIX}, [])
    assert not watch.moved()
    MOVES[name](model)
    assert watch.moved()
    watch.renew()
    assert not watch.moved()


def test_the_watch_ignores_the_suffix_and_sees_loose_parameters(model):
    model.register_parameter("token", nn.Parameter(torch.zeros(3)))
    model.register_buffer("mean", torch.zeros(3))
    loose = [(model._parameters, "token"), (model._buffers, "mean")]
    watch = Watch({name: model.get_submodule(name) for name in PREFIX}, loose)
    _nudge(model.fc.weight)
    model.train()
    assert not watch.moved()
    _nudge(model.token)
    assert watch.moved()
    watch.renew()
    model.mean = torch.ones(3)
    assert watch.moved()


def test_a_remembered_description_is_used_only_while_the_attributes_are_the_same():
    module = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
    module[1].steps = [1, 2]  # may be written in place
    known: dict = {}

    def taken() -> str:
        return take_fingerprint({"0": module}, {}, [], {}, frozenset(), known).hex

    before = taken()
    assert taken() == before
    module[0].eps = 1e-6
    changed = taken()
    assert changed != before
    module[1].steps[0] = 5
    assert taken() not in (before, changed)
    module[1].steps[0] = 1
    module[0].eps = 1e-5
    assert taken() == before
