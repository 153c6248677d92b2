"""Any module as JSON and safetensors: the same to the bit in another process, and no code from the file is run."""

from __future__ import annotations

import copy
import doctest
import importlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import saved_models
import small  # noqa: F401  (one thread)
from torchrecycle.errors import RecycleError, RecycleWarning
from torchrecycle.similarity.description import DescriptionError
from torchrecycle.similarity.heads import EmptyHead, GatedHead, SequentialHead, SkipConnectionHead
from torchrecycle.similarity.names import NameRefusedError, find, name_of
from torchrecycle.similarity.saving import ModelFolderError, load_module, save_module

HERE = Path(__file__).parent


def about_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "module.json").read_text(encoding="utf-8"))


def rewrite(folder: Path, change: Any) -> None:
    """Let a stranger change the description of a saved model."""
    about = about_of(folder)
    change(about)
    (folder / "module.json").write_text(json.dumps(about), encoding="utf-8")


def siblings(folder: Path) -> list[str]:
    """What lies beside a folder, and was not there before it was saved."""
    return sorted(path.name for path in folder.parent.iterdir() if path != folder)


# -- the same in another process ---------------------------------------------------------------------------------------


def loaded_elsewhere(place: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(HERE), "TRANSFORMERS_VERBOSITY": "error"}
    program = [sys.executable, "-W", "error::torchrecycle.errors.RecycleWarning", str(HERE / "saved_models.py")]
    ran = subprocess.run([*program, str(place)], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-3000:]


def must_be_equal(folder: Path) -> None:
    """
    Raises:
        AssertionError: what was loaded is another model than what was saved.
    """
    before, after = (json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in ("before", "after"))
    assert after == before
    first, second = (load_file(folder / f"{name}.tensors") for name in ("before", "after"))
    assert first.keys() == second.keys()
    assert any(name.startswith("output") for name in first)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), f"{name} of {folder.name} differs"


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """All quick models, saved here and loaded in another process."""
    place = tmp_path_factory.mktemp("models")
    for name, model, inputs in saved_models.quick_models():
        (place / name).mkdir()
        saved_models.save_with_facts(place / name, "before", model, inputs)
    loaded_elsewhere(place)
    return place


def test_models_of_torch_torchvision_timm_and_transformers_come_back_to_the_bit_in_another_process(quick):
    folders = sorted(quick.iterdir())
    assert len(folders) >= 30
    for folder in folders:
        must_be_equal(folder)


def test_nothing_is_pickled(quick):
    for folder in quick.iterdir():
        names = {path.name for path in (folder / "model").iterdir()}
        assert names == {"module.json", "weights.safetensors"}
        # a pickle would be no JSON, and safetensors know no other objects than tensors
        assert about_of(folder / "model")["format"] == 1
        load_file(folder / "model" / "weights.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_model_of_each_family_comes_back_to_the_bit(library, tmp_path):
    tried = 0
    for name, model, inputs in saved_models.zoo(library):
        folder = tmp_path / name
        folder.mkdir()
        saved_models.save_with_facts(folder, "before", model, inputs)
        loaded = load_module(folder / "model")
        saved_models.write_facts(folder, "after", loaded, inputs)
        must_be_equal(folder)
        shutil.rmtree(folder)
        tried += 1
    assert tried >= {"torchvision": 18, "timm": 50}[library]


# -- what comes back ---------------------------------------------------------------------------------------------------


@pytest.fixture
def everything(tmp_path):
    torch.manual_seed(0)
    model = saved_models.Everything(8, sys.stdin)
    save_module(model, tmp_path / "model")
    return model, load_module(tmp_path / "model", expected=saved_models.Everything)


def test_each_kind_of_value_comes_back_as_it_was(everything):
    model, loaded = everything
    for name in vars(model).keys() - vars(nn.Module()).keys():
        before, after = getattr(model, name), getattr(loaded, name)
        assert type(after) is type(before), name
        if name in (
            "numbers",
            "number",
            "words",
            "frozen",
            "by_number",
            "ordered",
            "counts",
            "shape",
            "types",
            "slices",
        ):
            assert repr(after) == repr(before) or after == before
        if name in ("settings", "size", "place", "square", "act", "erf", "kind"):
            assert after == before
    assert math.isnan(loaded.not_a_number)
    assert math.copysign(1, loaded.numbers[-2]) == -1
    assert [type(each) for each in loaded.numbers] == [type(each) for each in model.numbers]
    assert loaded.make.keywords == {"eps": 1e-3}
    assert loaded.counts["new"] == []
    assert loaded.vocabulary.numbers == {"a": 0, "b": 1}
    assert torch.equal(loaded.constant, model.constant)


def test_what_is_one_object_in_several_places_is_one_again(everything):
    _, loaded = everything
    assert loaded.tied.weight is loaded.first.weight
    assert loaded.again is loaded.first
    assert loaded.by_name["first"] is loaded.first
    assert loaded.view.weight is not loaded.first.weight
    assert loaded.view.weight.data_ptr() == loaded.first.weight.data_ptr()
    assert loaded.log is loaded.same_log
    assert loaded.circle[1] is loaded.circle
    assert loaded.method.__self__ is loaded
    assert len(loaded.outside[1]["deeper"]) == 2
    assert loaded.left_out is None
    assert loaded.absent is None


def test_a_hook_that_is_a_method_translates_old_checkpoints_in_the_loaded_model_too(everything):
    model, loaded = everything
    state = {name.replace("first.", "old."): tensor for name, tensor in model.state_dict().items()}
    state["old.bias"] = state["again.bias"] = state["old.bias"] + 1
    loaded.load_state_dict(state)
    assert torch.equal(loaded.first.bias, model.first.bias + 1)


def test_a_loaded_model_trains_copies_and_saves_like_the_first(everything, tmp_path):
    _, loaded = everything
    loaded(torch.randn(4, 8)).sum().backward()
    assert loaded.first.weight.grad is not None
    again = copy.deepcopy(loaded)
    save_module(again, tmp_path / "again")
    torch.testing.assert_close(load_module(tmp_path / "again").state_dict(), again.state_dict(), rtol=0, atol=0)


def test_loading_draws_no_random_number_and_maps_no_file(tmp_path):
    save_module(SequentialHead(nn.Linear(8, 8), SkipConnectionHead(8)), tmp_path / "model")
    state = torch.get_rng_state()
    loaded = load_module(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), state)
    before = [parameter.clone() for parameter in loaded.parameters()]
    weights = tmp_path / "model" / "weights.safetensors"
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    assert all(torch.equal(p, q) for p, q in zip(loaded.parameters(), before, strict=True))
    assert all(parameter.data_ptr() % 16 == 0 for parameter in loaded.parameters())


def test_saving_leaves_the_module_as_it_was(tmp_path):
    torch.manual_seed(0)
    model = saved_models.Everything(8, sys.stdin)
    before = {name: dict(vars(each)) for name, each in model.named_modules()}
    values = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_module(model, tmp_path / "model")
    for name, each in model.named_modules():
        assert vars(each).keys() == before[name].keys()
        assert all(vars(each)[key] is value for key, value in before[name].items())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, values[name])


def test_a_tokenizer_and_a_processor_are_kept_in_their_own_files(tmp_path):
    from transformers import ViTImageProcessor

    from torchrecycle.demo.weights import text_tokenizer

    class Holder(nn.Module):
        pass

    model: Any = Holder()
    model.tokenizer, model.again = (tokenizer := text_tokenizer()), tokenizer
    model.processor = ViTImageProcessor(size={"height": 20, "width": 30})
    with pytest.warns(RecycleWarning, match="in this process only.*Holder is defined in a function"):
        save_module(model, tmp_path / "model")
    rewrite(tmp_path / "model", lambda about: about["modules"][""].update({"class": "torch.nn:Module"}))
    loaded: Any = load_module(tmp_path / "model")
    assert loaded.tokenizer is loaded.again
    assert loaded.tokenizer("a text of words")["input_ids"] == tokenizer("a text of words")["input_ids"]
    assert dict(loaded.processor.size) == {"height": 20, "width": 30}


def test_a_class_that_says_how_it_is_made_is_made_that_way(tmp_path):
    save_module(saved_models.WithConfig(8, 3.0), tmp_path / "model")
    entry = about_of(tmp_path / "model")["modules"][""]
    assert entry["config"] == {"dim": 8, "power": 3.0}
    assert load_module(tmp_path / "model", expected=saved_models.WithConfig).power == 3.0


def test_a_config_that_forgets_an_argument_is_not_believed(tmp_path):
    model = saved_models.ForgetfulConfig(8, scale=5.0)
    save_module(model, tmp_path / "model")
    loaded = load_module(tmp_path / "model", expected=saved_models.ForgetfulConfig)
    assert loaded.scale == 5.0
    x = torch.randn(2, 8)
    assert torch.equal(loaded(x), model(x))

    class Wrong(saved_models.WithConfig):
        def get_config_dict(self) -> dict[str, Any]:
            return {"dim": self.layer.in_features + 1}

    with pytest.raises(DescriptionError, match=r"does not give the module again \(it has other layers.*act.*lambda"):
        save_module(Wrong(8), tmp_path / "wrong")


def test_what_was_changed_after_the_constructor_is_kept_or_refused(tmp_path):
    x = torch.randn(2, 8)
    changed: Any = SkipConnectionHead(8)
    changed.dropout.p = changed.note = 0.5
    changed.fc_0 = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8))
    save_module(changed, tmp_path / "changed")
    loaded: Any = load_module(tmp_path / "changed")
    assert loaded.dropout.p == loaded.note == 0.5
    assert torch.equal(loaded(x), changed(x))
    for name, value in (("act", lambda x: x * 3), ("power", 5.0), ("more", iter([]))):
        model = saved_models.WithConfig(8, 3.0)
        vars(model)[name] = value
        with pytest.raises(DescriptionError, match=r"does not give the module again \(its (act|more) is another\)"):
            save_module(model, tmp_path / "model")
    model = saved_models.WithConfig(8, 3.0)
    model.act = saved_models.WithConfig(8, 2.0).act  # the same lambda, of another power
    with pytest.raises(DescriptionError, match="its act is another"):
        save_module(model, tmp_path / "model")


def test_weights_tied_across_a_head_that_is_made_by_its_constructor_stay_tied(tmp_path):
    first, second = SkipConnectionHead(8), SkipConnectionHead(8)
    second.fc_0.weight = first.fc_0.weight  # pyright: ignore
    linear = nn.Linear(8, 8)
    linear.weight = first.fc_0.weight  # pyright: ignore
    save_module(nn.Sequential(linear, first, second), tmp_path / "model")
    loaded: Any = load_module(tmp_path / "model")
    assert loaded[0].weight is loaded[1].fc_0.weight
    assert loaded[2].fc_0.weight is loaded[1].fc_0.weight


@pytest.mark.parametrize("shape", [(), (0,), (1, 1), (3, 0, 2)])
def test_tensors_of_any_shape_and_type_come_back(shape, tmp_path):
    types = [torch.float64, torch.bool, torch.int8, torch.complex128, torch.uint16, torch.float8_e5m2, torch.bfloat16]
    model = nn.Module()
    for i, dtype in enumerate(types):
        model.register_buffer(f"t{i}", torch.ones(shape).to(dtype))
    save_module(model, tmp_path / "model")
    loaded = load_module(tmp_path / "model")
    for name, tensor in model.named_buffers():
        other = loaded.get_buffer(name)
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
        assert other.reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


def test_views_of_one_memory_are_written_once_or_in_part(tmp_path):
    whole = torch.randn(1000, 8)
    model = nn.Module()
    model.register_buffer("part", whole[:2])
    model.register_buffer("column", whole[:, 1])
    model.register_buffer("wide", torch.randn(1, 8).expand(50, 8))
    save_module(model, tmp_path / "model")
    loaded = load_module(tmp_path / "model")
    for name, tensor in model.named_buffers():
        assert torch.equal(loaded.get_buffer(name), tensor)
    assert (tmp_path / "model" / "weights.safetensors").stat().st_size < 10_000


# -- what cannot be saved is said --------------------------------------------------------------------------------------


def local(x: Any, *rest: Any) -> Any:
    return x


class Holds(nn.Module):
    """Holds one thing."""

    def __init__(self, thing: Any) -> None:
        super().__init__()
        self.inner: Any = nn.Module()
        self.inner.things = {"a": [1, thing]}


@pytest.mark.parametrize(
    ("thing", "words"),
    [
        (lambda x: x, r"the function test_similarity_saving\..*<lambda>: no name leads to it"),
        (iter([]), "a list_iterator, without pickle"),
        (threading.Lock(), "a _thread.lock, without pickle"),
        (os.system, r"the function posix.system: it comes from posix"),
        (torch.load, r"the function torch.serialization.load: of torch only functions of tensors are named by a file"),
        (nn.Linear(1, 1).register_forward_hook(local), r"a torch\.utils\.hooks\.RemovableHandle: it takes a hook off"),
        (subprocess.Popen, r"the class subprocess.Popen: it is no class of modules"),
        (torch.Generator(), r"a torch\.?.*Generator, without pickle"),
        ("text".upper, "the function None.str.upper"),
    ],
)
def test_what_cannot_be_written_is_named_with_its_place_and_the_way_out(thing, words, tmp_path):
    with pytest.raises(
        DescriptionError,
        match=rf"cannot save inner\.things\['a'\]\[1\] of a Module, {words}.*get_config_dict.*save\(path\)",
    ):
        save_module(Holds(thing), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_partial_of_anything_but_layers_and_arithmetic_is_refused(tmp_path):
    import functools

    with pytest.raises(DescriptionError, match=r"a partial of the function .*local: only layers of torch"):
        save_module(Holds(functools.partial(local, 1)), tmp_path / "model")
    save_module(Holds(functools.partial(F.leaky_relu, negative_slope=0.1)), tmp_path / "model")
    loaded: Any = load_module(tmp_path / "model")
    assert loaded.inner.things["a"][1](torch.tensor(-1.0)).item() == pytest.approx(-0.1)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.utils.weight_norm(nn.Linear(2, 2)), r"has a forward pre hook.*parametrizations"),
        (lambda: torch.jit.script(nn.Linear(2, 2)), "whose code was made from another module"),
        (lambda: torch.fx.symbolic_trace(nn.Linear(2, 2)), "whose code was made from another module"),
        (lambda: torch.compile(nn.Linear(2, 2)), "made for this process: save what it wraps, `_orig_mod`"),
        (lambda: nn.Linear(2, 2, device="meta"), "weight: it is on the meta device"),
        (lambda: nn.LazyLinear(2), "weight: it has no shape yet: run the model once"),
        (lambda: nn.ParameterList([torch.eye(2).to_sparse()]), "0: it is a tensor of layout torch.sparse_coo"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated", "ignore:.*torch.jit.script", "ignore:Lazy modules")
def test_wrappers_hooks_and_tensors_without_numbers_are_refused_in_words(make, words, tmp_path):
    with pytest.raises(DescriptionError, match=words):
        save_module(nn.Sequential(nn.ReLU(), make()), tmp_path / "model")


def doubled(module: nn.Module, args: Any, output: Any) -> Any:
    return output * 2


def test_hooks_are_refused_or_left_out_with_a_warning(tmp_path):
    model = nn.Linear(2, 2)
    handle = model.register_forward_hook(doubled)
    with pytest.raises(DescriptionError, match="hooks are not saved: the loaded model would give other outputs"):
        save_module(model, tmp_path / "model")
    handle.remove()
    handle = model.register_state_dict_post_hook(lambda *args: None)
    with pytest.raises(DescriptionError, match="changes its state dict"):
        save_module(model, tmp_path / "model")
    handle.remove()
    model.register_load_state_dict_pre_hook(lambda *args: None)
    with pytest.warns(RecycleWarning, match="may not know old checkpoints"):
        save_module(model, tmp_path / "model")
    handle = GatedHead(4)
    handle.register_forward_hook(doubled)
    with pytest.raises(DescriptionError, match="hooks are not saved"):
        save_module(handle, tmp_path / "head")


def test_the_result_of_a_computation_is_refused_and_what_is_detached_is_kept(tmp_path):
    model: Any = nn.Linear(2, 2)
    model.last = model(torch.ones(1, 2))
    with pytest.raises(DescriptionError, match="last: it is the result of a computation"):
        save_module(model, tmp_path / "model")
    model.last = model.last.detach()
    save_module(model, tmp_path / "model")
    loaded: Any = load_module(tmp_path / "model")
    assert torch.equal(loaded.last, model.last)


def test_a_class_that_another_process_would_not_find_is_said_when_saving_and_when_loading(tmp_path):
    class Local(nn.Linear):
        pass

    with pytest.warns(RecycleWarning, match=r"this process only: .*Local is defined in a function. Move it to the top"):
        save_module(nn.Sequential(Local(2, 2)), tmp_path / "model")
    with pytest.raises(ModelFolderError, match=r"cannot load .*Local .* was defined in a function.*top of a module"):
        load_module(tmp_path / "model")
    Local.__qualname__ = "ReLU"
    Local.__module__ = "torch.nn"
    with pytest.raises(DescriptionError, match=r"cannot save '0'.*no name leads to it: define it at the top"):
        save_module(nn.Sequential(Local(2, 2)), tmp_path / "other")


# -- nothing from the file is run --------------------------------------------------------------------------------------

SPY = "test_similarity_saving:spy"
CALLED: list[Any] = []


def spy(*args: Any, **kwargs: Any) -> Any:
    CALLED.append((args, kwargs))
    return torch.zeros(1)


def refused(folder: Path, change: Any, words: str) -> None:
    before = os.listdir(folder.parent)
    rewrite(folder, change)
    with pytest.raises(ModelFolderError, match=words):
        load_module(folder)
    assert not CALLED
    assert os.listdir(folder.parent) == before


@pytest.mark.parametrize("name", ["os:system", "builtins:eval", SPY, "subprocess:Popen", "torch:Tensor", "math:pi"])
def test_a_module_of_a_class_that_is_none_is_refused_without_a_call(name, tmp_path):
    save_module(nn.Linear(2, 2), tmp_path / "model")
    refused(tmp_path / "model", lambda about: about["modules"][""].update({"class": name}), "is no class of modules")


@pytest.mark.parametrize("name", ["forward", "_apply", "__call__", "_get_name", "__class__"])
def test_an_attribute_that_stands_before_a_method_is_refused(name, tmp_path):
    save_module(Turns(), tmp_path / "model")

    def change(about: dict[str, Any]) -> None:
        about["modules"][""].setdefault("attributes", {})[name] = {"$function": SPY}

    refused(tmp_path / "model", change, f"{name} of .* is no attribute that a file may set")


class Turns(nn.Module):
    """Its package is that of the tests, whose functions its attributes may name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    @property
    def calls(self) -> Any:
        return spy(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def test_an_attribute_of_a_tensor_that_loading_would_call_is_refused(tmp_path):
    save_module(Turns(), tmp_path / "model")

    def change(about: dict[str, Any]) -> None:
        about["tensors"]["weight"]["attributes"] = {"to": {"$function": SPY}}

    refused(tmp_path / "model", change, "to of .*Parameter is no attribute that a file may set")


def test_a_property_that_a_file_names_as_a_method_is_not_called(tmp_path):
    save_module(Turns(), tmp_path / "model")
    refused(tmp_path / "model", attribute({"$method": ["", "calls"]}), "calls is no method of the module")


class HasAStateOfItsOwn(nn.Linear):
    def __setstate__(self, state: dict[str, Any]) -> None:
        spy(state)
        super().__setstate__(state)


def test_a_class_with_a_setstate_of_its_own_is_refused_in_saving_and_in_loading(tmp_path):
    words = "HasAStateOfItsOwn has a __setstate__ of its own, which is not called"
    with pytest.raises(DescriptionError, match=words):
        save_module(HasAStateOfItsOwn(2, 2), tmp_path / "model")
    save_module(nn.Linear(2, 2), tmp_path / "model")
    name = f"{__name__}:HasAStateOfItsOwn"
    refused(tmp_path / "model", lambda about: about["modules"][""].update({"class": name}), words)


class Chooses(nn.Module):
    """As timm's FasterNet: the forward is one of its methods."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.doubled

    def doubled(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * x


def test_a_forward_that_is_another_method_of_the_module_is_kept_and_another_function_is_refused(tmp_path):
    model: Any = nn.Sequential(Chooses())
    save_module(model, tmp_path / "model")
    assert load_module(tmp_path / "model")(torch.ones(1)).item() == 2
    model[0].forward = torch.relu
    with pytest.raises(
        DescriptionError, match=r"cannot save 0\.forward of a Chooses, .* stands before Chooses\.forward"
    ):
        save_module(model, tmp_path / "other")


def attribute(value: Any) -> Any:
    def change(about: dict[str, Any]) -> None:
        about["modules"][""].setdefault("attributes", {})["thing"] = value

    return change


MARK = "touched"


@pytest.mark.parametrize(
    "value",
    [
        {"$function": "os:system"},
        {"$function": SPY},
        {"$function": "torch:load"},
        {"$function": "torch:from_file"},
        {"$function": "torch.hub:load"},
        {"$function": "torch.nn.functional:has_torch_function"},
        {"$function": "torch.nn.functional:os.system"},
        {"$function": "torch:hub.load"},
        {"$function": "timm:create_model"},
        {"$function": "transformers:pipeline"},
        {"$function": "builtins:exec"},
        {"$partial": [{"$function": "os:system"}, [f"touch {MARK}"], {}]},
        {"$partial": [{"$function": SPY}, [], {}]},
        {"$partial": [{"$function": "torch.hub:load"}, ["somebody/theirs"], {"trust_repo": True}]},
        {"$partial": [{"$class": "sentence_transformers:SentenceTransformer"}, ["x"], {"trust_remote_code": True}]},
        {"$partial": [{"$method": ["", "load_state_dict"]}, [], {}]},
        {"$partial": [{"$function": "torch.utils.checkpoint:checkpoint"}, [{"$function": SPY}], {}]},
        {"$partial": [{"$function": "torch.nn.functional:relu"}, [{"$module": ""}], {}]},
        {"$partial": [{"$function": "builtins:max"}, [["x"]], {"key": {"$class": "saved_models:ConfigOfAnother"}}]},
        {"$partial": [{"$class": "timm.layers.mlp:Mlp"}, [{"$class": "saved_models:ConfigOfAnother"}], {}]},
        {"$class": "subprocess:Popen"},
        {"$object": ["subprocess:Popen", {"args": "x"}]},
        {"$object": ["tempfile:TemporaryDirectory", {"name": "/"}]},
        {"$object": ["torch.nn:Linear", {}]},
        {"$from_dict": ["transformers:BertConfig", {}]},
        {"$pretrained": 0},
        {"$enum": ["os:environ", "PATH"]},
        {"$namedtuple": ["subprocess:Popen", ["ls"]]},
        {"$method": ["", "__reduce__"]},
        {"$method": ["", "training"]},
        {"$dtype": "load"},
        {"$defaultdict": [{"$function": SPY}, []]},
        {"$number": ["object", {"$function": "os:system"}]},
        {"$pickle": "gASVHwAAAAAAAACMBXBvc2l4lIwGc3lzdGVtlJOUjARscyAtlIWUUpQu"},
        {"$function": "torch.nn.functional:gelu", "$class": "torch.nn:ReLU"},
        {"$device": 5.5},
        {"$shared": 7},
    ],
    ids=lambda value: json.dumps(value)[:60],
)
def test_a_value_that_a_file_may_not_name_is_refused_without_a_call(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_module(nn.Linear(2, 2), tmp_path / "model")

    def change(about: dict[str, Any]) -> None:
        attribute(value)(about)
        about["pretrained"] = [SPY]

    refused(tmp_path / "model", change, r"cannot load|is damaged, or does not fit")


def test_hooks_internals_and_constructors_cannot_be_given_by_a_file(tmp_path):
    save_module(nn.Linear(2, 2), tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "other")
    shutil.copytree(tmp_path / "model", tmp_path / "third")

    def hook(about: dict[str, Any]) -> None:
        about["modules"][""]["hooks"] = {"_forward_hooks": [{"method": ["", "extra_repr"], "with module": False}]}

    refused(tmp_path / "model", hook, "_forward_hooks is no hook on a state dict")

    def internals(about: dict[str, Any]) -> None:
        about["modules"][""]["attributes"]["_compiled_call_impl"] = {"$function": "torch:relu"}

    refused(tmp_path / "other", internals, "_compiled_call_impl .* is no attribute that a file may set")

    def constructed(about: dict[str, Any]) -> None:
        about["modules"][""] |= {"config": {"in_features": 2, "out_features": 2}, "training": {"": True}}

    refused(tmp_path / "third", constructed, "is no class whose constructor a file may call")


def test_a_constructor_is_called_only_of_classes_that_derive_from_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = saved_models.ConfigOfAnother("made.txt")
    save_module(model, tmp_path / "model")
    assert "config" not in about_of(tmp_path / "model")["modules"][""]
    x = torch.randn(2, 8)
    assert torch.equal(load_module(tmp_path / "model")(x), model(x))

    def constructed(about: dict[str, Any]) -> None:
        about["modules"][""] |= {"config": {"path": "called.txt"}, "training": {"": True}}

    refused(tmp_path / "model", constructed, "is no class whose constructor a file may call")
    assert not (tmp_path / "called.txt").exists()


def test_a_deep_description_and_one_that_is_no_description_are_errors_in_words(tmp_path):
    save_module(nn.Linear(2, 2), tmp_path / "model")
    file = tmp_path / "model" / "module.json"
    whole = file.read_text(encoding="utf-8")
    for text in ("[" * 100_000, "{}", "[1]", "null", whole[: len(whole) // 2], "", "\x00"):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ModelFolderError, match=r"is damaged or cut off|is that of something else"):
            load_module(tmp_path / "model")
    for key in ("modules", "tensors", "shared", "pretrained", "weights"):
        file.write_text(json.dumps({**json.loads(whole), key: 5}), encoding="utf-8")
        with pytest.raises(ModelFolderError):
            load_module(tmp_path / "model")
        file.write_text(json.dumps({k: v for k, v in json.loads(whole).items() if k != key}), encoding="utf-8")
        with pytest.raises(ModelFolderError):
            load_module(tmp_path / "model")


def test_functions_are_found_by_the_name_that_they_have_for_users():
    for function in (F.gelu, F.relu, F.max_pool2d, torch.relu, torch.special.erf, torch.einsum, torch.linalg.norm):
        assert find(name_of(function)) is function
    assert name_of(F.gelu) == "torch.nn.functional:gelu"
    assert name_of(nn.Linear) == "torch.nn.modules.linear:Linear"
    for name in ("torch", "", ":x", "torch:", "torch:nothing", "no_such_package:x", "torch.nn:functional.relu.x"):
        with pytest.raises(NameRefusedError):
            find(name)


# -- formats and damage ------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = SequentialHead(nn.Linear(4, 8), GatedHead(8))
    save_module(model, tmp_path / "model")
    return model, tmp_path / "model"


def test_another_format_says_what_came_what_is_read_and_what_to_do(saved):
    _, folder = saved
    rewrite(folder, lambda about: about.update({"format": 2, "torchrecycle": "9.1"}))
    with pytest.raises(
        ModelFolderError, match=r"format 2, written by torchrecycle 9\.1, and .* reads format 1: install"
    ):
        load_module(folder)
    rewrite(folder, lambda about: about.update({"format": 0}))
    with pytest.raises(ModelFolderError, match="save it again with this version"):
        load_module(folder)


def test_another_kind_no_folder_and_a_folder_of_quaterion_are_told_apart(saved, tmp_path):
    _, folder = saved
    with pytest.raises(ModelFolderError, match="there is no folder"):
        load_module(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelFolderError, match="is a file, and a module is saved as a folder"):
        load_module(tmp_path / "file")
    theirs = tmp_path / "quaterion"
    theirs.mkdir()
    (theirs / "config.json").write_text("{}")
    (theirs / "weights.bin").write_bytes(b"\x80")
    with pytest.raises(ModelFolderError, match=r"holds no module\.json.*Quaterion.*pickles"):
        load_module(theirs)
    rewrite(folder, lambda about: about.update({"kind": "switch encoder"}))
    with pytest.raises(ModelFolderError, match="is that of a switch encoder, and not of a module"):
        load_module(folder)


def test_damaged_missing_and_exchanged_weights_are_refused(saved, tmp_path):
    model, folder = saved
    weights = folder / "weights.safetensors"
    whole = weights.read_bytes()
    for damaged, words in (
        (whole[:-1], "is damaged or cut off"),
        (whole[:10], "is damaged or cut off"),
        (b"", "is damaged or cut off"),
        (whole[:-1] + bytes([whole[-1] ^ 1]), r"is not what was saved with the module\.json beside it"),
    ):
        weights.write_bytes(damaged)
        with pytest.raises(ModelFolderError, match=words):
            load_module(folder)
    weights.unlink()
    with pytest.raises(ModelFolderError, match=r"has lost its weights\.safetensors"):
        load_module(folder)
    others: list[tuple[nn.Module, str]] = [
        (SequentialHead(nn.Linear(5, 8), GatedHead(8)), r"_sequential\.0\.weight .* \[8, 5\] .* \[8, 4\]"),
        (SequentialHead(nn.Linear(4, 8), GatedHead(8)).half(), "of float16, and the model was saved with"),
        (SequentialHead(nn.Linear(4, 8)), r"lacks _sequential\.1\.gates"),
        (SequentialHead(nn.Linear(4, 8), GatedHead(8), nn.Linear(8, 8)), r"holds _sequential\.2\.bias.* has not"),
        (SequentialHead(nn.Linear(4, 8), GatedHead(8)), r"is not what was saved with the module\.json beside it"),
    ]
    for i, (other, words) in enumerate(others):
        save_module(other, tmp_path / f"other {i}")
        shutil.copy(tmp_path / f"other {i}" / "weights.safetensors", weights)
        with pytest.raises(ModelFolderError, match=words):
            load_module(folder)
    weights.write_bytes(whole)
    assert torch.equal(load_module(folder)(torch.ones(1, 4)), model(torch.ones(1, 4)))


def test_a_class_that_has_changed_since_is_said_with_the_versions(tmp_path, monkeypatch):

    class Wider(saved_models.WithConfig):
        def __init__(self, dim: int, power: float = 2.0) -> None:
            super().__init__(dim + len(extra), power)
            for name in extra:
                self.add_module(name, nn.Linear(1, 1))

    folder, extra = tmp_path / "model", []
    save_module(saved_models.WithConfig(8), folder)
    monkeypatch.setattr(saved_models, "WithConfig", Wider)
    assert type(load_module(folder)) is Wider
    extra.append("more")
    with pytest.raises(
        ModelFolderError, match=r"has more\.bias, more\.weight, which was not saved.*changed.*written with"
    ):
        load_module(folder)
    extra[0] = "layer"
    with pytest.raises(ModelFolderError, match=r"makes layer\.weight of shape \[1, 1\].*\[8, 8\].*class has changed"):
        load_module(folder)


def test_a_class_that_is_gone_is_said_with_the_versions(saved):
    _, folder = saved
    rewrite(folder, lambda about: about["modules"]["_sequential.0"].update({"class": "timm.layers:GoneNorm"}))
    with pytest.raises(
        ModelFolderError, match=r"timm.layers has no 'GoneNorm'. It was written with torchrecycle .*torch"
    ):
        load_module(folder)


def test_another_version_of_the_library_that_a_layer_comes_from_is_a_warning(tmp_path):
    import timm

    save_module(timm.create_model("test_resnet"), tmp_path / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_module(tmp_path / "model")
    rewrite(tmp_path / "model", lambda about: about["versions"].update({"timm": "0.1", "torch": "1.0"}))
    with pytest.warns(RecycleWarning, match=rf"saved with timm 0\.1, and here is {timm.__version__}: should a layer"):
        load_module(tmp_path / "model")


def test_a_module_of_another_class_than_expected_is_refused(saved):
    _, folder = saved
    with pytest.raises(ModelFolderError, match="holds a SequentialHead, and is loaded as a EmptyHead"):
        EmptyHead.load(folder)
    assert isinstance(load_module(folder), SequentialHead)


@pytest.mark.parametrize("room", ["names", "description", "model", "heads.encoder_head"])
def test_the_examples_of_the_rooms_run(room):
    done = doctest.testmod(importlib.import_module(f"torchrecycle.similarity.{room}"))
    assert done.attempted
    assert not done.failed


def test_errors_are_builtins_too():
    assert issubclass(ModelFolderError, OSError)
    assert issubclass(DescriptionError, TypeError)
    assert issubclass(ModelFolderError, RecycleError)


# -- folders -----------------------------------------------------------------------------------------------------------


def test_an_empty_folder_and_a_saved_model_are_replaced_and_nothing_else_is(saved, tmp_path):
    _, folder = saved
    (tmp_path / "empty").mkdir()
    save_module(nn.Linear(2, 2), tmp_path / "empty")
    save_module(nn.Linear(2, 2), folder)
    assert isinstance(load_module(folder), nn.Linear)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ModelFolderError, match=r"holds notes\.txt beside a saved module, which saving would delete"):
        save_module(nn.ReLU(), folder)
    assert isinstance(load_module(folder), nn.Linear)
    other = tmp_path / "photos"
    other.mkdir()
    (other / "module.json").write_text('{"kind": "something"}')
    with pytest.raises(ModelFolderError, match="and no saved module"):
        save_module(nn.ReLU(), other)
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelFolderError, match="is a file"):
        save_module(nn.ReLU(), tmp_path / "file")
    assert siblings(folder) == ["empty", "file", "photos"]


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (".", "", tmp_path, tmp_path.parent):
        with pytest.raises(ModelFolderError, match=r"is or holds the current folder.*give one inside of it"):
            save_module(nn.ReLU(), folder)
    save_module(nn.ReLU(), "model")
    assert isinstance(load_module("model"), nn.ReLU)


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    save_module(nn.Linear(2, 2), tmp_path / "there")
    (tmp_path / "here").symlink_to(tmp_path / "there")
    save_module(nn.Linear(3, 3), tmp_path / "here")
    assert (tmp_path / "here").is_symlink()
    assert load_module(tmp_path / "there").get_parameter("weight").shape == (3, 3)


def test_a_full_disk_leaves_the_old_model_and_nothing_else(tmp_path):
    folder = tmp_path / "model"
    save_module(nn.Linear(2, 2), folder)
    child = os.fork()
    if child == 0:  # a limit on the size of files is one for the whole process
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            save_module(nn.Linear(1000, 1000), folder)
        except ModelFolderError as error:
            os._exit(0 if "cannot save in" in str(error) else 1)
        except BaseException:
            os._exit(2)
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert load_module(folder).get_parameter("weight").shape == (2, 2)
    assert siblings(folder) == []


def why_not(folder: Path) -> str:
    """Why a model cannot be loaded; nothing if it can."""
    try:
        load_module(folder)
    except ModelFolderError as error:
        return str(error)
    return ""


def test_a_killed_save_leaves_a_whole_model(tmp_path):
    folder = tmp_path / "model"
    models = [nn.Linear(2, 2), nn.Sequential(nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 300))]
    save_module(models[0], folder)
    missing = 0
    for attempt in range(25):
        child = os.fork()
        if child == 0:
            while True:
                for model in models:
                    save_module(model, folder)
        time.sleep(0.01 + 0.003 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        left = why_not(folder)
        if left:  # between two renames
            missing += 1
            path = left.partition("the model from before is ")[2].partition(";")[0]
            load_module(path)
            Path(path).rename(folder)
    assert missing < 25
    save_module(models[0], folder)
    assert load_module(folder).get_parameter("weight").shape == (2, 2)


def test_saving_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            (folder.parent.parent / "half").write_text("half")
            raise KeyboardInterrupt

    from transformers import PreTrainedTokenizerBase

    kind = type("Tokens", (Broken, PreTrainedTokenizerBase), {"__module__": __name__})
    monkeypatch.setitem(globals(), "Tokens", kind)
    model: Any = nn.Module()
    model.tokens = object.__new__(kind)
    (tmp_path / "new").mkdir()
    with pytest.raises(KeyboardInterrupt):
        save_module(model, tmp_path / "new" / "model")
    assert list((tmp_path / "new").iterdir()) == []


def test_extra_numbers_of_a_description_are_not_read(saved):
    """A stride or a dtype from a stranger makes no more memory than the file's."""
    _, folder = saved

    def stride(about: dict[str, Any]) -> None:
        about["tensors"]["_sequential.0.weight"]["stride"] = [10**12, 10**15]

    rewrite(folder, stride)
    assert load_module(folder).get_parameter("_sequential.0.weight").is_contiguous()

    def dtype(about: dict[str, Any]) -> None:
        about["tensors"]["_sequential.0.weight"]["dtype"] = "load"

    rewrite(folder, dtype)
    with pytest.raises(ModelFolderError, match="numbers of load, which this torch does not know"):
        load_module(folder)


def test_safetensors_itself_reads_the_weights(saved, tmp_path):
    """So that the weights outlive this library."""
    model, folder = saved
    state = load_file(folder / "weights.safetensors")
    torch.testing.assert_close(state, model.state_dict(), rtol=0, atol=0)
    save_file(state, tmp_path / "copy")


def test_a_model_is_saved_and_loaded_where_something_was_compiled_before(tmp_path):
    # Dynamo puts a function of its own in the place of `nn.Module.__setstate__`, for the rest of the process.
    code = (
        "import sys, torch; from torch import nn\n"
        "torch.compile(nn.Linear(2, 2), backend='eager')(torch.ones(1, 2))\n"
        "assert nn.Module.__setstate__.__module__ == 'torch._dynamo.mutation_guard'\n"
        "from torchrecycle.similarity import SkipConnectionHead\n"
        "from torchrecycle.similarity.saving import load_module, save_module\n"
        "module = nn.Sequential(nn.BatchNorm1d(2), SkipConnectionHead(2)).eval(); save_module(module, sys.argv[1])\n"
        "rows = torch.randn(3, 2); print(torch.equal(module(rows), load_module(sys.argv[1])(rows)))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "module")]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.stdout.strip() == "True", ran.stderr[-800:]
