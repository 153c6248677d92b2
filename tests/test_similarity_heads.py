"""Heads: the formulas of Quaterion's, what they are at the start, which sizes fit, and that they come back."""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import small  # noqa: F401  (one thread)
from torchrecycle.errors import RecycleError
from torchrecycle.similarity.heads import (
    EmptyHead,
    EncoderHead,
    GatedHead,
    HeadError,
    ResidualHead,
    ResidualMlpHead,
    SequentialHead,
    SkipConnectionHead,
    SoftmaxEmbeddingsHead,
    SoftmaxHead,
    StackedProjectionHead,
    SwitchHead,
    WideningHead,
)
from torchrecycle.similarity.saving import load_module

HEADS: dict[str, Any] = {
    "empty": lambda: EmptyHead(8),
    "empty with dropout": lambda: EmptyHead(8, dropout=0.5),
    "gated": lambda: GatedHead(8, dropout=0.1),
    "skip connection": lambda: SkipConnectionHead(8, dropout=0.3, skip_dropout=0.2, n_layers=3),
    "stacked": lambda: StackedProjectionHead(8, [5, 7, 3], activation_fn="gelu", dropout=0.1),
    "widening": lambda: WideningHead(8, expansion_factor=1.5, activation_fn="silu"),
    "softmax": lambda: SoftmaxEmbeddingsHead(3, 4, 8, dropout=0.1),
    "residual": lambda: ResidualHead(8),
    "residual mlp": lambda: ResidualMlpHead(8),
    "sequential": lambda: SequentialHead(nn.Linear(8, 6), nn.ReLU(), SkipConnectionHead(6)),
    "switch": lambda: SwitchHead({"a": SkipConnectionHead(8), "b": GatedHead(8)}, 8),
}
META = [{"encoder": "b"}, {"encoder": "a"}, {"encoder": "b"}]


@pytest.fixture(params=HEADS)
def head(request):
    torch.manual_seed(0)
    return HEADS[request.param]()


def vectors(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moved(head: nn.Module) -> nn.Module:
    """The same head, after a training that has left no parameter where it was."""
    with torch.no_grad():
        for i, parameter in enumerate(head.parameters()):
            parameter += vectors(*parameter.shape, seed=i)
    return head


# -- names and arguments -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (EncoderHead, {"input_embedding_size": None, "dropout": 0.0}),
        (EmptyHead, {"input_embedding_size": None, "dropout": 0.0}),
        (GatedHead, {"input_embedding_size": None, "dropout": 0.0}),
        (SkipConnectionHead, {"input_embedding_size": None, "dropout": 0.0, "skip_dropout": 0.0, "n_layers": 1}),
        (
            StackedProjectionHead,
            {"input_embedding_size": None, "output_sizes": None, "activation_fn": "relu", "dropout": 0.0},
        ),
        (
            WideningHead,
            {"input_embedding_size": None, "expansion_factor": 4.0, "activation_fn": "relu", "dropout": 0.0},
        ),
        (
            SoftmaxEmbeddingsHead,
            {"output_groups": None, "output_size_per_group": None, "input_embedding_size": None, "dropout": 0.0},
        ),
        (SwitchHead, {"options": None, "input_embedding_size": None}),
        (SequentialHead, {"output_size": None}),
    ],
)
def test_the_arguments_and_defaults_are_those_of_quaterion(kind, arguments):
    found = {
        name: None if each.default is inspect.Parameter.empty else each.default
        for name, each in inspect.signature(kind).parameters.items()
        if each.kind not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    }
    assert found == arguments
    assert list(found) == list(arguments)


def test_modules_have_the_names_that_imports_from_quaterion_have():
    import importlib

    for module, name in (
        ("encoder_head", "EncoderHead"),
        ("empty_head", "EmptyHead"),
        ("gated_head", "GatedHead"),
        ("sequential_head", "SequentialHead"),
        ("skip_connection_head", "SkipConnectionHead"),
        ("softmax_head", "SoftmaxEmbeddingsHead"),
        ("stacked_projection_head", "StackedProjectionHead"),
        ("switch_head", "SwitchHead"),
        ("widening_head", "WideningHead"),
    ):
        assert hasattr(importlib.import_module(f"torchrecycle.similarity.heads.{module}"), name)
    assert SoftmaxHead is SoftmaxEmbeddingsHead


def test_a_head_written_for_quaterion_runs():
    class Theirs(EncoderHead):
        def __init__(self, input_embedding_size: int, out: int, **kwargs: Any) -> None:
            super().__init__(input_embedding_size, dropout=0.5, other="ignored", **kwargs)
            self.layer = nn.Linear(input_embedding_size, out)

        @property
        def output_size(self) -> int:
            return self.layer.out_features

        def transform(self, input_vectors: Tensor) -> Tensor:
            return self.layer(input_vectors)

        def get_config_dict(self) -> dict[str, Any]:
            config = super().get_config_dict()
            config.pop("dropout")
            config.update({"out": self.output_size})
            return config

    head = Theirs(8, 3)
    x = vectors(4, 8)
    assert torch.equal(head.eval()(x), head.layer(x))
    assert (head.train()(torch.ones(1000, 8)) == head.layer.bias).all(1).float().mean() < 0.1
    assert head.input_embedding_size == 8
    assert head.get_config_dict() == {"input_embedding_size": 8, "out": 3}


def test_a_head_without_its_two_methods_says_which():
    head = EncoderHead(3)
    with pytest.raises(NotImplementedError, match="EncoderHead has no output_size"):
        print(head.output_size)
    with pytest.raises(NotImplementedError, match="EncoderHead has no transform"):
        head(vectors(2, 3))


# -- what they compute -------------------------------------------------------------------------------------------------

sizes = st.integers(1, 9)


@settings(deadline=None, max_examples=30)
@given(dim=sizes, rows=sizes, layers=st.integers(1, 3), seed=st.integers(0, 99))
def test_a_skip_connection_is_the_embedding_and_a_gated_layer_number_by_number(dim, rows, layers, seed):
    torch.manual_seed(seed)
    head: Any = moved(SkipConnectionHead(dim, n_layers=layers)).double()
    x = vectors(rows, dim, seed=seed).double()
    expected = x.tolist()
    for i in range(layers):
        weight, bias = (getattr(getattr(head, f"fc_{i}"), name).tolist() for name in ("weight", "bias"))
        gates = [1 / (1 + math.exp(-gate)) for gate in getattr(head, f"gates_{i}").tolist()]
        expected = [
            [
                (sum(w * v for w, v in zip(weight[d], row, strict=True)) + bias[d]) * gates[d] + row[d]
                for d in range(dim)
            ]
            for row in expected
        ]
    torch.testing.assert_close(head(x), torch.tensor(expected, dtype=torch.float64))


@settings(deadline=None, max_examples=30)
@given(dim=st.integers(1, 512), seed=st.integers(0, 99))
def test_at_the_start_skip_connection_and_gates_are_those_of_quaterion(dim, seed):
    torch.manual_seed(seed)
    skip, gated = SkipConnectionHead(dim, n_layers=2), GatedHead(dim)
    for i in range(2):
        assert torch.equal(skip.get_parameter(f"gates_{i}"), torch.full((dim,), -4.0))
    assert torch.equal(gated.gates, torch.full((dim,), 2.0))
    x = vectors(5, dim, seed=seed)
    torch.testing.assert_close(gated(x), x * math.tanh(2.0))
    # the linear layer may say what it likes: 1.8 % of it is let in
    once = SkipConnectionHead(dim)
    torch.testing.assert_close(once(x) - x, once.fc_0(x) / (1 + math.exp(4.0)), atol=1e-5, rtol=1e-4)  # pyright: ignore
    assert F.cosine_similarity(once(x), x).min() > 0.99


def test_reset_parameters_shuts_and_opens_the_gates_again():
    for head in (SkipConnectionHead(6, n_layers=2), GatedHead(6)):
        before = {name: p.clone() for name, p in head.named_parameters() if "gates" in name}
        moved(head)
        head.reset_parameters()
        assert all(torch.equal(head.get_parameter(name), value) for name, value in before.items())


def test_dropout_is_of_the_input_and_skip_dropout_of_the_branch_only():
    torch.manual_seed(0)
    x = torch.ones(2000, 4)
    head: Any = SkipConnectionHead(4, skip_dropout=0.5)
    nn.init.eye_(head.fc_0.weight)
    nn.init.zeros_(head.fc_0.bias)
    branch = (head.train()(x) - x) * (1 + math.exp(4.0))
    assert sorted(branch.round(decimals=3).unique().tolist()) == pytest.approx([0.0, 2.0], abs=2e-3)
    dropped = EmptyHead(4, dropout=0.25).train()(x)
    assert (dropped == 0).float().mean() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(EmptyHead(4, dropout=0.25).eval()(x), x)


@settings(deadline=None, max_examples=30)
@given(dim=sizes, outs=st.lists(sizes, min_size=1, max_size=4), name=st.sampled_from(["relu", "gelu", "tanh", "silu"]))
def test_a_stack_has_an_activation_between_its_layers_and_not_after_the_last(dim, outs, name):
    torch.manual_seed(0)
    head = StackedProjectionHead(dim, outs, activation_fn=name)
    layers = [module for module in head.modules() if isinstance(module, nn.Linear)]
    x = expected = vectors(5, dim)
    for i, layer in enumerate(layers):
        expected = layer(expected if i == 0 else getattr(F, name)(expected))
    assert [layer.out_features for layer in layers] == outs
    assert head.output_size == outs[-1]
    torch.testing.assert_close(head(x), expected)


def test_a_widening_head_goes_through_four_times_the_width():
    head = WideningHead(8)
    assert [layer.out_features for layer in head.modules() if isinstance(layer, nn.Linear)] == [32, 8]
    assert WideningHead(10, 2.55).get_config_dict()["expansion_factor"] == 2.55


@settings(deadline=None, max_examples=30)
@given(groups=sizes, size=sizes, dim=sizes)
def test_each_group_of_a_softmax_head_is_a_distribution_of_its_own(groups, size, dim):
    torch.manual_seed(0)
    head = SoftmaxEmbeddingsHead(groups, size, dim)
    x = vectors(3, dim)
    out = head(x)
    assert out.shape == (3, groups * size)
    scores = head.projection_layer(x)
    for g in range(groups):
        part = slice(g * size, (g + 1) * size)
        torch.testing.assert_close(out[:, part], torch.softmax(scores[:, part], 1))
    assert head(vectors(2, 5, dim)).shape == (2, 5, groups * size)


@pytest.mark.parametrize("kind", [ResidualHead, ResidualMlpHead])
def test_a_residual_head_is_the_identity_under_the_names_that_saved_sweeps_have(kind):
    head = kind(5)
    x = vectors(3, 5)
    assert torch.equal(head(x), x)
    names = {ResidualHead: ["linear.weight", "linear.bias"]}.get(
        kind, ["layers.0.weight", "layers.0.bias", "layers.2.weight", "layers.2.bias"]
    )
    assert list(head.state_dict()) == names
    assert not torch.equal(moved(head)(x), x)


# -- all alike ---------------------------------------------------------------------------------------------------------


def test_every_head_gives_its_output_size_and_comes_back_to_the_bit(head, tmp_path):
    moved(head).eval()
    x = vectors(3, 8)
    out = head(x, meta=META)
    assert out.shape == (3, head.output_size)
    head.save(tmp_path / "head")
    loaded = type(head).load(tmp_path / "head")
    assert torch.equal(loaded(x, meta=META), out)
    assert list(loaded.state_dict()) == list(head.state_dict())
    assert loaded.get_config_dict() == head.get_config_dict()
    assert loaded.output_size == head.output_size
    assert torch.equal(load_module(tmp_path / "head")(x, meta=META), out)


def test_every_config_is_json_and_the_constructors_arguments(head):
    import json

    config = head.get_config_dict()
    assert json.loads(json.dumps(config)) == config
    if not isinstance(head, (SequentialHead, SwitchHead)):
        assert type(head)(**config).get_config_dict() == config


def test_every_head_takes_a_batch_of_nothing(head):
    assert head.eval()(vectors(0, 8), meta=[]).shape == (0, head.output_size)


def test_every_head_says_in_words_that_vectors_are_too_wide(head):
    with pytest.raises(HeadError, match=r"made for (inputs|vectors) of width 8,? and got \[3, 9\]|of width 8, and got"):
        head(vectors(3, 9), meta=META)


def test_vector_heads_say_that_maps_are_to_be_pooled_and_nests_to_be_joined():
    for head in (SkipConnectionHead(8), GatedHead(8), EmptyHead(8), ResidualHead(8), WideningHead(8)):
        with pytest.raises(
            HeadError, match=r"feature maps\. Put nn\.AdaptiveAvgPool2d\(1\) and nn\.Flatten\(\) before"
        ):
            head(vectors(2, 8, 3, 3))
        with pytest.raises(HeadError, match=r"takes a tensor, and got a tuple of 2"):
            head((vectors(2, 8), vectors(2, 8)))
        assert head(vectors(2, 5, 8)).shape == (2, 5, 8)


@pytest.mark.parametrize("size", [0, -1, 2.5, "8", True])
def test_an_input_size_that_is_none_is_refused(size):
    with pytest.raises(HeadError, match=r"input_embedding_size is .*whole number from 1"):
        EmptyHead(size)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: StackedProjectionHead(8, []), r"output_sizes is \[\]: give one width"),
        (lambda: StackedProjectionHead(8, [3, 0]), r"output_sizes is \[3, 0\]"),
        (lambda: StackedProjectionHead(8, [3], activation_fn="rellu"), "has no function of that name"),
        (lambda: SoftmaxEmbeddingsHead(0, 3, 8), "0 groups of 3 numbers"),
        (lambda: SkipConnectionHead(8, n_layers=0), "n_layers is 0"),
        (lambda: SwitchHead({}, 8), "needs one head or more"),
        (lambda: SwitchHead({"a.b": EmptyHead(8)}, 8), "'a.b' cannot be the name of a head"),
        (lambda: SwitchHead({"training": EmptyHead(8)}, 8), "'training' cannot be the name of a head"),
        (lambda: SwitchHead({"a": EmptyHead(8), "b": EmptyHead(9)}, 8), "given, 8 numbers, and 'b' takes 9"),
        (
            lambda: SwitchHead({"a": EmptyHead(8), "b": StackedProjectionHead(8, [4])}, 8),
            "vectors of one width, to be compared: 'a' gives 8, 'b' gives 4",
        ),
    ],
)
def test_arguments_that_make_no_head_are_refused_in_words(make, words):
    with pytest.raises(HeadError, match=words):
        make()
    assert issubclass(HeadError, RecycleError)
    assert issubclass(HeadError, ValueError)


# -- sequential --------------------------------------------------------------------------------------------------------


class Pool(nn.Module):
    """A nest of two tensors to their sum."""

    def forward(self, nest: Any) -> Tensor:
        return nest["a"] + nest["b"][0]


def test_a_sequence_takes_maps_tokens_and_nests():
    maps = SequentialHead(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), SkipConnectionHead(8))
    assert maps(vectors(2, 3, 9, 9)).shape == (2, 8)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    tokens = SequentialHead(layer, nn.Flatten(), nn.Linear(40, 4))
    assert tokens(vectors(2, 5, 8)).shape == (2, 4)
    nest = SequentialHead(Pool(), EmptyHead(8))
    x = vectors(2, 8)
    assert torch.equal(nest({"a": x, "b": (x,)}), 2 * x)


def test_the_output_size_is_told_by_the_last_module_or_asked_for():
    assert SequentialHead(nn.Linear(8, 6), nn.ReLU(), nn.Dropout(0.1), nn.LayerNorm(6)).output_size == 6
    assert SequentialHead(nn.Flatten(), SkipConnectionHead(5)).output_size == 5
    assert SequentialHead(nn.Sequential(nn.Linear(8, 6), nn.Sequential(nn.Linear(6, 3))), nn.Tanh()).output_size == 3
    assert SequentialHead(nn.Conv2d(3, 4, 1), output_size=4).output_size == 4
    assert SequentialHead(OrderedDict(a=nn.Linear(8, 6))).output_size == 6
    with pytest.raises(HeadError, match=r"the last module, Flatten, does not tell.*output_size=512"):
        SequentialHead(nn.Linear(8, 6), nn.Flatten())
    with pytest.raises(HeadError, match="an empty SequentialHead does not tell"):
        SequentialHead()
    with pytest.raises(HeadError, match=r"output_size is 7, and Linear \(number 0\) gives vectors of width 6: leave"):
        SequentialHead(nn.Linear(8, 6), nn.ReLU(), output_size=7)


def test_neighbours_that_do_not_fit_are_refused_when_the_head_is_made():
    with pytest.raises(
        HeadError, match=r"Linear \(number 0\) gives vectors of width 6, and SkipConnectionHead \(number 2\).*takes 5"
    ):
        SequentialHead(nn.Linear(8, 6), nn.ReLU(), SkipConnectionHead(5))
    with pytest.raises(
        HeadError, match=r"GatedHead \(number 0\.1\) gives .* width 6, and Linear \(number 1\).*takes 7"
    ):
        SequentialHead(nn.Sequential(nn.Linear(8, 6), GatedHead(6)), nn.Linear(7, 2))
    # what flattening, pooling and layers of one's own make of a width is not known
    SequentialHead(nn.Linear(8, 6), nn.Flatten(), nn.Linear(30, 2))
    SequentialHead(nn.Linear(8, 6), nn.GLU(), nn.Linear(3, 2))
    SequentialHead(nn.Linear(8, 6), nn.LazyLinear(3))


def test_what_is_not_known_then_is_refused_at_the_first_forward():
    head = SequentialHead(nn.Flatten(), nn.Linear(12, 4))
    assert head(vectors(2, 3, 4)).shape == (2, 4)
    with pytest.raises(HeadError, match=r"Linear \(number 1\) was made for vectors of width 12, and got \[2, 15\]"):
        head(vectors(2, 3, 5))
    with pytest.raises(HeadError, match=r"\[2, 3, 5, 5\]\. Feature maps are to be pooled and flattened before"):
        SequentialHead(nn.ReLU(), nn.Linear(3, 4))(vectors(2, 3, 5, 5))
    with pytest.raises(HeadError, match="number 1 is a function"):
        SequentialHead(nn.ReLU(), F.relu, output_size=3)


def test_the_input_size_is_known_where_the_first_module_tells_it():
    assert SequentialHead(nn.Linear(8, 6)).input_embedding_size == 8
    assert SequentialHead(nn.Sequential(nn.Sequential(GatedHead(5)))).input_embedding_size == 5
    assert SequentialHead(nn.Flatten(), nn.Linear(8, 6)).input_embedding_size is None
    assert SequentialHead(nn.ReLU(), nn.Linear(8, 6)).input_embedding_size is None


def test_a_sequence_is_changed_like_one_of_torch_and_stays_in_order():
    head = SequentialHead(nn.Linear(8, 6), nn.ReLU())
    assert head.append(nn.Linear(6, 3)) is head
    assert (len(head), head.output_size) == (3, 3)
    head[2] = nn.Linear(6, 4)
    assert (head.output_size, list(head)[2]) == (4, head[2])
    with pytest.raises(HeadError, match="takes 9"):
        head[2] = nn.Linear(9, 4)
    with pytest.raises(HeadError, match="takes 9"):
        head.append(nn.Linear(9, 4))
    assert (len(head), head.output_size) == (3, 4)
    assert head(vectors(2, 8)).shape == (2, 4)
    del head[2]
    assert (len(head), head.output_size) == (2, 6)
    assert isinstance(head[0:1], nn.Sequential)
    with pytest.raises(HeadError, match="does not tell"):
        del head[0]
    assert len(head) == 2


def test_heads_in_a_sequence_get_the_meta_too():
    torch.manual_seed(0)
    switch = SwitchHead({"a": GatedHead(6), "b": EmptyHead(6)}, 6)
    head = SequentialHead(nn.Linear(8, 6), switch)
    x = vectors(3, 8)
    expected = head[0](x)
    torch.testing.assert_close(head(x, meta=META)[[0, 2]], expected[[0, 2]])
    torch.testing.assert_close(head(x, meta=META)[1], expected[1] * math.tanh(2.0))


def test_the_state_dict_has_the_names_of_quaterion():
    head = SequentialHead(nn.Linear(8, 6), SkipConnectionHead(6))
    assert set(head.state_dict()) == {
        "_sequential.0.weight",
        "_sequential.0.bias",
        "_sequential.1.gates_0",
        "_sequential.1.fc_0.weight",
        "_sequential.1.fc_0.bias",
    }


# -- switch ------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(names=st.lists(st.sampled_from("abc"), min_size=1, max_size=12))
def test_each_object_goes_through_its_own_head_and_keeps_its_place(names):
    torch.manual_seed(0)
    options = {name: StackedProjectionHead(4, [3]) for name in "abc"}
    head = SwitchHead(options, 4)
    x = vectors(len(names), 4)
    out = head(x, meta=[{"encoder": name, "more": 1} for name in names])
    expected = torch.stack([options[name](row[None])[0] for name, row in zip(names, x, strict=True)])
    torch.testing.assert_close(out, expected)


def test_a_switch_without_meta_or_with_another_is_refused_in_words():
    head = SwitchHead({"a": EmptyHead(4), "b": EmptyHead(4)}, 4)
    with pytest.raises(HeadError, match=r"meta of each of the 2 objects, and got none: use it behind a SwitchEncoder"):
        head(vectors(2, 4))
    with pytest.raises(HeadError, match="and got that of 1"):
        head(vectors(2, 4), meta=[{"encoder": "a"}])
    with pytest.raises(HeadError, match=r"meta of object 1 is \{'encoder': 'c'\}.*names none.*a, b"):
        head(vectors(2, 4), meta=[{"encoder": "a"}, {"encoder": "c"}])
    with pytest.raises(HeadError, match="names none"):
        head(vectors(1, 4), meta=[{}])


def test_the_dropout_of_a_switchs_heads_is_not_forgotten():
    head = SwitchHead({"a": EmptyHead(4, dropout=0.9), "b": EmptyHead(4)}, 4)
    out = head.train()(torch.ones(200, 4), meta=[{"encoder": "ab"[i % 2]} for i in range(200)])
    assert (out[::2] == 0).float().mean() > 0.7
    assert torch.equal(out[1::2], torch.ones(100, 4))
