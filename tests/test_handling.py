"""Whatever people do to a model with a recycling at work: each thing works, or is refused in words.

*Works* means: a recycled batch gives, to the bit where the same kernels run, what the same model frozen by hand gives
for the objects; two steps of training on rows and one on objects leave the same weights and statistics everywhere; and
no row is ever served for a prefix that computes something else: the next forward raises `StaleActivationError`, and a
new iterator fills anew. A ResNet, a BERT and a Llama of 32 channels are treated, most of the ways in their prefix
(``layer1``, the first block) and in their suffix (``layer3``, the last block), before attaching and after it.

| what is done | where, when | works or refused | test |
| --- | --- | --- | --- |
| parametrize, weight and spectral norm, pruning, LoRA, int8, channels last, fused or synchronised batch norm, \
`load_state_dict(assign=True)`, a layer replaced | suffix, before and after | works | `..._of_the_suffix_works` |
| the same but LoRA and int8 | prefix, before | works | `..._of_the_prefix_before_attaching_works` |
| the same but LoRA, int8 and channels last | prefix, after | old rows refused, then works | \
`..._of_the_prefix_after_attaching_...` |
| channels last | prefix, after | works within rounding | `test_channels_last_...` |
| int8 (torchao) | prefix | before: works; after: old rows refused, then works | `test_int8_weights_...` |
| LoRA (PEFT) | suffix, `get_peft_model` before and after, merged | works | `test_peft_...` |
| LoRA (PEFT) | prefix | refused: it would move | `test_lora_in_the_prefix_...` |
| `torch.compile(model)` | before | refused | test_recycling.py: `test_a_model_that_is_wrapped_...` |
| `torch.compile(model)` | after | works (its own call stays eager) | `test_compiling_the_whole_model_...` |
| `model.compile()` | before | refused | test_bypass.py: `test_a_model_that_was_compiled_in_place_is_refused_...` |
| `model.compile()` | after | refused by the next iterator (until then recycling is off) | \
`test_compiling_the_model_in_place_...` |
| a module compiled, in place or replaced | suffix, before and after | works | `test_a_compiled_suffix_...` |
| a module compiled in place | prefix, after | refused | `test_a_layer_of_the_prefix_...` |
| a module compiled in place | prefix, before | refused | `test_a_setting_of_a_layer_that_was_compiled_...` |
| inductor | suffix | works | `test_inductor_...` |
| gradient checkpointing | before | works; a region across the cut refused | `test_gradient_checkpointing_...`; \
test_bypass.py: `test_a_checkpoint_region_across_...` |
| gradient checkpointing | after | works | `test_gradient_checkpointing_...` |
| autocast | around the loop | undeclared: refused; declared: works | test_bypass.py: `test_autocast_...`; \
`test_training_under_autocast_...` |
| half, bfloat16, double | after | pictures: refused; ids: old rows refused, then works | \
`test_another_dtype_...`, here and in test_staleness.py |
| `.to("cuda")` | after | works | `test_a_model_that_moves_to_another_device_...` |
| `.to("meta")`, `accelerate.cpu_offload` | after | refused | `test_a_model_without_its_weights_...` |
| DDP | the model | before: refused; after: works | `test_two_processes_...` |
| FSDP2 | the model or the prefix, before or after | refused | `test_two_processes_...`, `test_sharding_...` |
| FSDP2 | all modules of the suffix, after | works | `test_two_processes_...` |
| EMA (`AveragedModel`, deepcopy) | after | works on objects; recycled pictures in a copy are refused | \
`test_an_average_...` |
| two recyclings of one model | | works | test_bypass.py, test_recycling.py, and training: `test_two_recyclings_...` |
| pickling, deepcopy, `state_dict` | of the model, after | works | test_bypass.py: `test_copies_pickles_...` |
| pickling, deepcopy | of the `Recycling` | refused | `test_a_recycling_itself_...` |
| `functional_call` | other weights after the cut | works | `test_functional_call_...` |
| `functional_call` | other weights before the cut | rows refused | `test_functional_call_...` |
| `requires_grad_(True)` | the model, after | works | `test_unfreezing_...` |
| hooks | on skipped modules | warned of once; refused if they change values | test_cut_kinds.py: \
`test_a_hook_on_a_skipped_module_...`; test_attacks.py: `test_a_setting_or_a_hook_...` |
| `inference_mode` | around the loop | works | test_bypass.py, test_attacks.py: `..._inference_mode...` |
| `model.train()`: batch norm, dropout, drop path | prefix | stays in eval mode | `test_batch_norm_dropout_...` |
| two threads | one model or two | works | test_bypass.py, and on rows: `test_two_threads_...` |
| `detach()` | after weights were replaced | they ask for a gradient again | `test_weights_that_replaced_...` |
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.resnet import BasicBlock as TimmBlock
from timm.models.resnet import ResNet as TimmResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval

import handling_models
from small_models import Sample, bert, images, sample
from torchrecycle import BatchError, CutError, RecycledTensor, RecycleError, StaleActivationError, recycle
from torchrecycle.bypass import noise, relative_difference
from torchrecycle.trace import SLOT

PREFIX = {"resnet": "layer1", "bert": "bert.encoder.layer.0", "llama": "model.layers.0"}
SUFFIX = {"resnet": "layer3", "bert": "bert.encoder.layer.3", "llama": "model.layers.3"}
TARGETS = torch.arange(8) % 5

Treatment = Callable[[nn.Module], Any]


def _rows(batch: Any) -> list[Any]:
    if isinstance(batch, dict):
        return [{name: part[i] for name, part in batch.items()} for i in range(8)]
    return list(batch)


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a tensor of any class."""
    return tensor.detach() if type(tensor) in (torch.Tensor, nn.Parameter) else tensor.detach().dequantize()


class Pair:
    """One model twice: one recycled, its twin frozen by hand. What is done to one is done to the other.

    Args:
        name: of a sample.
        before: done to both before attaching.
        **arguments: of `recycle`.
    """

    def __init__(self, name: str | Sample, before: Treatment | None = None, **arguments: Any) -> None:
        self.one = sample(name) if isinstance(name, str) else name
        self.model, self.twin = self.one.model().eval(), self.one.model().eval()
        self.batch = self.one.batch
        if before is not None:
            self.do(before)
        example = {n: t[:2] for n, t in self.batch.items()} if isinstance(self.batch, dict) else self.batch[:2]
        self.recycling = recycle(self.model, example, cut=self.one.cut, store="memory://", **arguments)
        self.loader = self.recycling.loader(_rows(self.batch), batch_size=8)
        self.called: nn.Module = self.model

    def do(self, treatment: Treatment) -> None:
        """Treat both in the same way."""
        for model in (self.model, self.twin):
            torch.manual_seed(3)
            treatment(model)

    def recycled(self) -> Any:
        """The batch with rows in place of objects, from a new iterator."""
        (batch,) = self.loader
        return batch

    def serves(self, batch: Any = None, *, exact: bool = True) -> None:
        """In eval mode, rows give what the twin gives for the objects, and the prefix does not run."""
        batch = self.recycled() if batch is None else batch
        before = replace(self.recycling.stats)
        self.called.eval()
        with torch.no_grad():
            got, want = self.one.call(self.called, batch), self.one.call(self.twin.eval(), self.batch)
        _compare(got, want, exact)
        assert self.recycling.stats.hits == before.hits + 8
        assert self.recycling.stats.misses == before.misses

    def refuses_old_rows(self, batch: Any, words: str = "has moved") -> None:
        """A batch from before is stale, each time that it comes, in either mode."""
        for training in (False, True, True):
            self.model.train(training)
            with pytest.raises(StaleActivationError, match=words):
                self.one.call(self.called, batch)

    def trains(self, *, exact: bool = True, around: Callable[[], Any] = contextlib.nullcontext) -> None:
        """Two steps on rows and one on objects leave both with the same weights and statistics."""
        optimizers = [self._optimizer(self.model), None]
        self._freeze_twin()
        optimizers[1] = self._optimizer(self.twin)
        recycled = self.recycled()
        for number, batch in enumerate((recycled, recycled, self.batch)):
            for model, optimizer, given in zip((self.called, self.twin), optimizers, (batch, self.batch), strict=True):
                assert optimizer is not None
                self._settle()
                torch.manual_seed(number)
                optimizer.zero_grad()
                with around():
                    loss = F.cross_entropy(self.one.call(model, given), TARGETS)
                loss.backward()
                optimizer.step()
        ours, theirs = self.model.state_dict(), self.twin.state_dict()
        assert list(ours) == list(theirs)
        for name, tensor in ours.items():
            _compare(_plain(tensor), _plain(theirs[name]), exact, name)

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.optim.SGD(asking, lr=0.05, momentum=0.9, weight_decay=0.1)

    def _freeze_twin(self) -> None:
        for name in self.one.prefix:
            self.twin.get_submodule(name).requires_grad_(False)
        for name in self.one.loose:
            self.twin.get_parameter(name).requires_grad_(False)

    def _settle(self) -> None:
        self.called.train()
        self.model.train()
        self.twin.train()
        for name in self.one.prefix:
            self.twin.get_submodule(name).eval()


def _compare(got: torch.Tensor, want: torch.Tensor, exact: bool, name: str = "output") -> None:
    if exact:
        assert torch.equal(got, want), name
    elif got.is_cuda:
        assert relative_difference(got, want) <= noise(got.dtype, got.device), name
    else:
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=name)


# -- what is done to one part of a model -------------------------------------------------------------------------------


def _weighted(part: nn.Module) -> nn.Module:
    return next(module for module in part.modules() if isinstance(module, (nn.Linear, nn.Conv2d)))


def _put(model: nn.Module, name: str, part: nn.Module) -> None:
    owner, _, own = name.rpartition(".")
    setattr(model.get_submodule(owner), own, part)


class Halved(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 0.5


def _parametrize(model: nn.Module, name: str) -> None:
    parametrize.register_parametrization(_weighted(model.get_submodule(name)), "weight", Halved())


def _weight_norm(model: nn.Module, name: str) -> None:
    parametrizations.weight_norm(_weighted(model.get_submodule(name)))
    with torch.no_grad():
        for parameter_name, parameter in model.get_submodule(name).named_parameters():
            if parameter_name.endswith("original0"):
                parameter.mul_(1.5)


def _spectral_norm(model: nn.Module, name: str) -> None:
    parametrizations.spectral_norm(_weighted(model.get_submodule(name)))


def _prune(model: nn.Module, name: str) -> None:
    prune.l1_unstructured(_weighted(model.get_submodule(name)), "weight", 0.5)


def _lora(model: nn.Module, name: str) -> None:
    peft = pytest.importorskip("peft")
    target = next(n for n, m in model.named_modules() if m is _weighted(model.get_submodule(name)))
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=[target], r=2, init_lora_weights=False), model)


def _int8(model: nn.Module, name: str) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    quantization.quantize_(model.get_submodule(name), quantization.Int8WeightOnlyConfig())


def _channels_last(model: nn.Module, name: str) -> None:
    model.get_submodule(name).to(memory_format=torch.channels_last)


def _fuse(model: nn.Module, name: str) -> None:
    block: Any = model.get_submodule(name)[0]
    block.conv1 = fuse_conv_bn_eval(block.conv1.eval(), block.bn1.eval())
    with torch.no_grad():
        block.conv1.bias.add_(0.1)
    block.bn1 = nn.Identity()


def _synchronise(model: nn.Module, name: str) -> None:
    _put(model, name, nn.SyncBatchNorm.convert_sync_batchnorm(model.get_submodule(name)))


def _assign(model: nn.Module, name: str) -> None:
    state = model.state_dict()
    other = {n: t * 1.2 if n.startswith(name) and t.is_floating_point() else t for n, t in state.items()}
    model.load_state_dict({n: t.detach().clone() for n, t in other.items()}, assign=True)


def _scale(model: nn.Module, name: str) -> None:
    part = copy.deepcopy(model.get_submodule(name))
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.mul_(1.3)
    _put(model, name, part)


@dataclass(frozen=True)
class Change:
    """Something done to one part of a model."""

    name: str
    apply: Callable[[nn.Module, str], None]
    samples: Sequence[str]
    moves: bool = True
    """Whether the part computes something else afterwards."""
    words: str = "has moved"
    """What a stale batch is refused with."""


CHANGES = [
    Change("parametrize", _parametrize, ["resnet", "bert", "llama"]),
    Change("weight_norm", _weight_norm, ["bert"]),
    Change("spectral_norm", _spectral_norm, ["resnet"]),
    Change("prune", _prune, ["resnet"]),
    Change("lora", _lora, ["resnet", "bert", "llama"]),
    Change("int8", _int8, ["bert", "llama"]),
    Change("channels_last", _channels_last, ["resnet"], moves=False),
    Change("fuse", _fuse, ["resnet"]),
    Change("synchronise", _synchronise, ["resnet"]),
    Change("assign", _assign, ["llama"]),
]


def _cases(leave_out: Sequence[str] = ()) -> list[Any]:
    return [
        pytest.param(change, name, id=f"{change.name}-{name}")
        for change in CHANGES
        if change.name not in leave_out
        for name in change.samples
    ]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("change", "name"), _cases())
def test_a_change_of_the_suffix_works(change, name, when):
    def treatment(model: nn.Module) -> None:
        change.apply(model, SUFFIX[name])

    pair = Pair(name, treatment if when == "before" else None)
    kept = pair.recycled()
    if when == "after":
        fingerprint = pair.recycling.fingerprint
        pair.do(treatment)
        assert pair.recycling.fingerprint == fingerprint
    pair.serves(kept)
    pair.trains()


@pytest.mark.parametrize(("change", "name"), _cases(["lora", "int8"]))
def test_a_change_of_the_prefix_before_attaching_works(change, name):
    pair = Pair(name, lambda model: change.apply(model, PREFIX[name]))
    pair.serves()
    pair.trains()


@pytest.mark.parametrize(("change", "name"), _cases(["lora", "int8", "channels_last"]))
def test_a_change_of_the_prefix_after_attaching_makes_old_rows_stale_and_a_new_iterator_fills_anew(change, name):
    pair = Pair(name)
    old, fingerprint = pair.recycled(), pair.recycling.fingerprint
    pair.do(lambda model: change.apply(model, PREFIX[name]))
    pair.refuses_old_rows(old)
    pair.serves()
    assert pair.recycling.fingerprint != fingerprint
    pair.refuses_old_rows(old, "holds rows of")
    pair.trains()
    pair.recycling.detach()
    assert not any(SLOT in part.__dict__ for part in pair.model.modules())


def test_a_whole_layer_of_the_prefix_that_was_replaced_is_refused_and_a_new_iterator_fills_anew():
    for name in (PREFIX["resnet"], "layer2"):  # a layer before the cut, and the cut itself
        pair = Pair("resnet")
        old = pair.recycled()
        pair.do(lambda model, name=name: _scale(model, name))
        for batch in (old, pair.batch):
            with torch.no_grad(), pytest.raises(StaleActivationError, match=rf"'{name}' was replaced"):
                pair.one.call(pair.model, batch)
        pair.serves()
        pair.trains()


def test_batch_norm_of_the_whole_model_may_be_made_synchronised_after_attaching():
    pair = Pair("resnet")
    old = pair.recycled()
    pair.do(nn.SyncBatchNorm.convert_sync_batchnorm)
    pair.refuses_old_rows(old)
    pair.serves()
    pair.trains()


def test_channels_last_after_attaching_works_within_rounding():
    pair = Pair("resnet")
    old = pair.recycled()
    pair.do(lambda model: model.to(memory_format=torch.channels_last))
    pair.serves(old, exact=False)
    pair.batch = pair.batch.to(memory_format=torch.channels_last)
    pair.serves(exact=False)
    pair.trains(exact=False)


# -- int8 and LoRA in the prefix ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_int8_weights_in_the_prefix_before_attaching_work(name):
    pair = Pair(name, lambda model: _int8(model, PREFIX[name]))
    pair.serves()
    pair.trains()


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_int8_weights_in_the_prefix_after_attaching_make_old_rows_stale_and_a_new_iterator_fills_anew(name):
    pair = Pair(name)
    old = pair.recycled()
    pair.do(lambda model: _int8(model, PREFIX[name]))
    pair.refuses_old_rows(old)
    pair.serves()
    pair.trains()


def test_lora_in_the_prefix_before_attaching_is_refused_in_words():
    with pytest.raises(CutError, match=r"(?i)lora"):
        Pair("bert", lambda model: _lora(model, PREFIX["bert"]))


def test_lora_in_the_prefix_after_attaching_is_refused_in_words_by_the_next_iterator():
    pair = Pair("bert")
    pair.do(lambda model: _lora(model, PREFIX["bert"]))
    with pytest.raises(RecycleError, match=r"(?i)lora"):
        pair.recycled()


def test_lora_in_the_prefix_after_attaching_serves_no_old_row_and_its_adapter_does_not_move():
    pair = Pair("bert")
    old = pair.recycled()
    pair.do(lambda model: _lora(model, PREFIX["bert"]))
    pair.refuses_old_rows(old)
    with contextlib.suppress(RecycleError):
        pair.serves()
    adapters = [p for n, p in pair.model.named_parameters() if "lora_" in n]
    before = [parameter.detach().clone() for parameter in adapters]
    optimizer = torch.optim.AdamW(adapters, weight_decay=0.5)
    with contextlib.suppress(RecycleError, RuntimeError):  # nothing in it asks for a gradient
        F.cross_entropy(pair.one.call(pair.model.train(), pair.batch), TARGETS).backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, adapters, strict=True))


def _peft_model(model: nn.Module, name: str) -> Any:
    peft = pytest.importorskip("peft")
    targets = [n for n, m in model.named_modules() if n.startswith(SUFFIX[name]) and isinstance(m, nn.Linear)]
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, about what PEFT calls
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_peft_around_a_recycled_model_trains_the_adapter_of_the_suffix_and_merges(name):
    pair = Pair(name)
    kept = pair.recycled()
    pair.called, twin = _peft_model(pair.model, name), _peft_model(pair.twin, name)
    pair.serves(kept)
    pair.trains()
    pair.called.merge_and_unload()
    twin.merge_and_unload()
    pair.called = pair.model
    pair.serves()


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_a_peft_model_with_its_adapter_in_the_suffix_can_be_recycled(name):
    plain = sample(name)
    pair = Pair(
        replace(
            plain,
            make=lambda: _peft_model(plain.make(), name),
            cut=f"base_model.model.{plain.cut}",
            prefix=[f"base_model.model.{part}" for part in plain.prefix],
        )
    )
    pair.serves()
    pair.trains()
    assert all("lora_" in n for n, p in pair.model.named_parameters() if p.requires_grad)


# -- compiling ---------------------------------------------------------------------------------------------------------

# What dynamo warns of, it warns of for the plain model too.
compiling = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _compile_in_place(model: nn.Module, name: str) -> None:
    model.get_submodule(name).compile(backend="eager")


def _compile_and_replace(model: nn.Module, name: str) -> None:
    _put(model, name, torch.compile(model.get_submodule(name), backend="eager"))


@compiling
@pytest.mark.parametrize(
    ("name", "way", "when"),
    [
        ("resnet", _compile_in_place, "before"),
        ("resnet", _compile_in_place, "after"),
        ("resnet", _compile_and_replace, "before"),
        ("resnet", _compile_and_replace, "after"),
        ("bert", _compile_in_place, "after"),
        ("bert", _compile_and_replace, "before"),
    ],
)
def test_a_compiled_suffix_works(name, way, when, dynamo):
    def treatment(model: nn.Module) -> None:
        way(model, SUFFIX[name])

    pair = Pair(name, treatment if when == "before" else None)
    kept = pair.recycled()
    if when == "after":
        pair.do(treatment)
    pair.serves(kept)
    pair.trains()


@compiling
@pytest.mark.parametrize("name", ["resnet", "bert", "llama"])
def test_compiling_the_whole_model_after_attaching_works_and_keeps_the_prefix_still(name, dynamo):
    pair = Pair(name)
    kept = pair.recycled()
    pair.called = torch.compile(pair.model, backend="eager")  # pyright: ignore
    pair.serves(kept)
    pair.trains()


@compiling
def test_a_layer_inside_of_a_block_of_the_prefix_may_be_compiled_after_attaching(dynamo):
    pair = Pair("bert")
    kept = pair.recycled()
    _weighted(pair.model.get_submodule(PREFIX["bert"])).compile(backend="eager")
    pair.serves(kept)
    pair.trains()


@compiling
@pytest.mark.parametrize("name", ["0", "2"])
def test_a_layer_of_the_prefix_that_is_compiled_after_attaching_is_refused(name, dynamo):
    pair = Pair("sequential")
    kept = pair.recycled()
    _compile_in_place(pair.model, name)
    for batch in (kept, pair.batch):
        with torch.no_grad(), pytest.raises(CutError):
            pair.one.call(pair.model, batch)


@compiling
def test_a_layer_of_the_prefix_that_is_compiled_after_attaching_is_refused_as_compiled(dynamo):
    pair = Pair("sequential")
    kept = pair.recycled()
    _compile_in_place(pair.model, "0")
    with torch.no_grad(), pytest.raises(CutError, match="compiled"):
        pair.one.call(pair.model, kept)


@compiling
def test_a_layer_of_the_prefix_that_was_compiled_before_attaching_is_refused_as_compiled(dynamo):
    with pytest.raises(CutError, match="compiled"):
        Pair("resnet", lambda model: _compile_in_place(model, "layer1"))


def _words() -> nn.Module:
    return nn.Sequential(nn.Embedding(60, 32), nn.Dropout(0.5), nn.Flatten(), nn.Linear(9 * 32, 5))


WORDS = Sample("words", _words, torch.arange(72).reshape(8, 9) % 60, "1", ["0", "1"])


@compiling
def test_a_setting_of_a_layer_that_was_compiled_before_attaching_is_noticed_or_the_layer_refused(dynamo):
    def plain() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 5))

    one = Sample("norm", plain, sample("sequential").batch, "2", ["0", "1", "2"])
    try:
        pair = Pair(one, lambda model: _compile_in_place(model, "1"))
    except CutError:
        return
    pair.serves()
    pair.do(lambda model: setattr(model.get_submodule("1"), "eps", 0.5))
    pair.serves()


@compiling
def test_compiling_the_model_in_place_after_attaching_is_refused_by_the_next_iterator_and_stays_after_detaching(dynamo):
    pair = Pair("resnet")
    pair.model.compile(backend="eager")
    compiled = pair.model._compiled_call_impl
    with pytest.raises(CutError, match=r"compiled in place after attaching .* torch\.compile\(model\)"):
        pair.recycled()
    pair.recycling.detach()
    assert pair.model._compiled_call_impl is compiled


@compiling
def test_compiling_the_model_in_place_after_attaching_uses_the_rows_or_is_refused(dynamo):
    pair = Pair(WORDS)
    kept = pair.recycled()
    pair.model.compile(backend="eager")
    with contextlib.suppress(RecycleError):
        pair.serves(kept)  # ids stay real beside their rows, so that the model runs in full


@compiling
@pytest.mark.skipif(not any(shutil.which(name) for name in ("g++", "c++", "clang++")), reason="no C++ compiler")
def test_inductor_compiles_the_suffix_and_takes_the_whole_model(dynamo):
    pair = Pair("sequential")
    kept = pair.recycled()
    pair.model.get_submodule("3").compile()
    pair.serves(kept, exact=False)
    pair.trains(exact=False)
    pair.called = torch.compile(pair.model)  # pyright: ignore
    pair.serves(exact=False)


# -- checkpointing, autocast, dtypes, devices --------------------------------------------------------------------------


def _checkpoint(model: Any) -> None:
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_gradient_checkpointing_of_the_whole_model_trains_the_same(name, when):
    pair = Pair(name, _checkpoint if when == "before" else None)
    if when == "after":
        old, fingerprint = pair.recycled(), pair.recycling.fingerprint
        pair.do(_checkpoint)
        pair.serves(old)  # it changes what is remembered for backward, and no value
        assert pair.recycling.fingerprint == fingerprint
    pair.serves()
    pair.trains()


@pytest.mark.parametrize("name", ["resnet", "bert", "llama"])
def test_training_under_autocast_as_declared_gives_the_same(name):
    def cast() -> Any:
        return torch.autocast("cpu", torch.bfloat16)

    pair = Pair(name, autocast=torch.bfloat16)
    with cast():
        pair.serves()
    pair.trains(around=cast)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_another_dtype_of_a_model_that_reads_ids_makes_old_rows_stale_and_a_new_iterator_fills_anew(name, dtype):
    pair = Pair(name)
    old, fingerprint = pair.recycled(), pair.recycling.fingerprint
    pair.do(lambda model: model.to(dtype))
    pair.refuses_old_rows(old)
    pair.serves()
    assert pair.recycling.fingerprint != fingerprint
    pair.trains()


def test_a_move_to_where_the_model_is_keeps_the_rows():
    pair = Pair("resnet")
    old = pair.recycled()
    pair.do(lambda model: model.cpu().to("cpu", torch.float32))
    pair.serves(old)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["resnet", "bert", "llama"])
def test_a_model_that_moves_to_another_device_works_there_and_back(name):
    pair = Pair(name)
    pair.serves()
    for device in ("cuda", "cpu"):
        pair.do(lambda model, device=device: model.to(device))
        pair.batch = (
            {n: t.to(device) for n, t in pair.batch.items()} if isinstance(pair.batch, dict) else pair.batch.to(device)
        )
        batch = pair.recycled()
        batch = {n: t.to(device) for n, t in batch.items()} if isinstance(batch, dict) else batch.to(device)
        pair.serves(batch, exact=False)


def _to_meta(model: nn.Module) -> None:
    model.to("meta")


def _offload(model: nn.Module) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(model, torch.device("cpu"))


@pytest.mark.parametrize("way", [_to_meta, _offload])
def test_a_model_without_its_weights_is_refused_in_words_or_works(way):
    pair = Pair("bert")
    old = pair.recycled()
    way(pair.model)
    with contextlib.suppress(RecycleError):
        pair.serves(old)
    with contextlib.suppress(RecycleError):
        pair.serves()


# -- two processes -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(handling_models.train_as_one_of_two, args=(str(folder),), nprocs=2)
    return torch.load(Path(folder) / "found.pt")


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_with_half_a_batch_each_train_as_one_with_all_of_it(two_processes, way):
    found = two_processes[way]
    want = handling_models.trained_by_hand(3)
    assert list(found["weights"]) == list(want)
    for name, tensor in want.items():
        torch.testing.assert_close(found["weights"][name], tensor, rtol=1e-5, atol=1e-6, msg=name)
    assert found["hits"] == 3 * 4


@pytest.mark.parametrize(("way", "name"), [("ddp before", "DistributedDataParallel"), ("fsdp2 before", "fully_shard")])
def test_two_processes_that_wrap_before_attaching_are_refused_in_words(two_processes, way, name):
    assert re.search(f"{name}.* already: attach first, wrap after", two_processes[way])


@pytest.mark.parametrize("part", ["the model", "the prefix"])
@pytest.mark.parametrize("batch", ["rows", "objects"])
def test_sharding_what_is_frozen_after_attaching_is_refused_in_words(two_processes, part, batch):
    kind, words = two_processes[f"fsdp2 after, {part}, {batch}"]
    assert kind in ("CutError", "StaleActivationError"), words
    assert re.search(r"fully_shard.*[Ss]hard each module after the cut by itself", words)


# -- copies and several ------------------------------------------------------------------------------------------------


def test_an_average_of_a_recycled_model_is_plain_and_averages_what_is_trained():
    pair = Pair("resnet")
    averages = [torch.optim.swa_utils.AveragedModel(model, use_buffers=True) for model in (pair.model, pair.twin)]
    for _ in range(2):
        pair.trains()
        for average, model in zip(averages, (pair.model, pair.twin), strict=True):
            average.update_parameters(model)
    recycled = pair.recycled()
    with torch.no_grad():
        got, want = (pair.one.call(average.eval(), pair.batch) for average in averages)
        assert torch.equal(got, want)
        with pytest.raises(BatchError, match="reads the values of a batch input that was not loaded"):
            averages[0](recycled)
    pair.model.load_state_dict(averages[0].module.state_dict())
    pair.twin.load_state_dict(averages[1].module.state_dict())
    pair.serves(recycled)  # the average of a frozen weight is this weight


def test_a_copy_of_a_recycled_model_that_is_recycled_itself_finds_the_rows(tmp_path):
    model = sample("resnet").model().eval()
    with recycle(model, images(2), cut="layer2", store=tmp_path / "store") as first:
        first.fill(list(images()))
        with recycle(copy.deepcopy(model), images(2), cut="layer2", store=tmp_path / "store") as second:
            assert second.fingerprint == first.fingerprint
            assert second.fill(list(images())).computed == 0


def test_two_recyclings_of_one_model_are_trained_in_turns_and_neither_serves_a_stale_row():
    model = sample("resnet").model().eval()
    recyclings = [recycle(model, images(2), cut=cut, store="memory://") for cut in ("layer1", "layer3")]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    for recycling in (*recyclings, *recyclings):
        (batch,) = recycling.loader(list(images()), batch_size=8)
        optimizer.zero_grad()
        F.cross_entropy(model.train()(batch), TARGETS).backward()
        optimizer.step()
        with torch.no_grad():
            want = copy.deepcopy(model).eval()(images())
            for other in recyclings:
                (rows,) = other.loader(list(images()), batch_size=8)
                assert torch.allclose(model.eval()(rows), want, atol=1e-5)
    assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in frozen.items())
    assert any(name.startswith("layer3") for name in frozen)


@pytest.mark.parametrize("way", [copy.deepcopy, pickle.dumps])
def test_a_recycling_itself_is_copied_or_refused_in_words(way):
    pair = Pair("resnet")
    with pytest.raises(TypeError, match="a Recycling cannot be copied or pickled"):
        way(pair.recycling)


def test_a_recycled_batch_that_was_pickled_still_trains():
    pair = Pair("resnet")
    pair.serves(pickle.loads(pickle.dumps(pair.recycled())))


# -- functional calls, unfreezing --------------------------------------------------------------------------------------


def test_functional_call_with_other_weights_of_the_suffix_works_and_of_the_prefix_is_stale():
    pair = Pair("resnet")
    kept = pair.recycled()
    suffix = {n: p.detach() * 1.1 for n, p in pair.model.named_parameters() if p.requires_grad}
    prefix = {n: p.detach() * 1.1 for n, p in pair.model.named_parameters() if not p.requires_grad}
    with torch.no_grad():
        got = torch.func.functional_call(pair.model, suffix, (kept,))
        assert torch.equal(got, torch.func.functional_call(pair.twin, suffix, (pair.batch,)))
        with pytest.raises(StaleActivationError, match="conv1"):
            torch.func.functional_call(pair.model, prefix, (kept,))
    pair.serves()


def test_unfreezing_everything_after_attaching_moves_nothing_in_the_prefix():
    pair = Pair("resnet")
    kept = pair.recycled()
    frozen = {n: p.detach().clone() for n, p in pair.model.named_parameters() if not p.requires_grad}
    pair.model.requires_grad_(True)
    optimizer = torch.optim.AdamW(pair.model.parameters(), lr=0.1, weight_decay=0.5)
    for batch in (kept, pair.batch):
        F.cross_entropy(pair.one.call(pair.model.train(), batch), TARGETS).backward()
        optimizer.step()
    assert all(torch.equal(pair.model.get_parameter(name), tensor) for name, tensor in frozen.items())


@pytest.mark.parametrize("again", [False, True], ids=["at once", "after a new iterator"])
@pytest.mark.parametrize(("change", "name"), [(_assign, "llama"), (_weight_norm, "bert"), (_scale, "resnet")])
def test_weights_that_replaced_frozen_ones_ask_for_a_gradient_after_detaching(change, name, again):
    pair = Pair(name)
    change(pair.model, PREFIX[name])
    if again:
        pair.recycled()
    pair.recycling.detach()
    assert all(parameter.requires_grad for parameter in pair.model.parameters())


# -- training mode -----------------------------------------------------------------------------------------------------


def _timm_resnet() -> nn.Module:
    return TimmResNet(TimmBlock, [1, 1, 1, 1], num_classes=5, drop_rate=0.3, drop_path_rate=0.5)


def _timm_vit() -> nn.Module:
    rates = dict(drop_rate=0.2, proj_drop_rate=0.2, attn_drop_rate=0.2, drop_path_rate=0.5, pos_drop_rate=0.2)
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=5, **rates)


def _noisy(name: str) -> Sample:
    if name == "resnet":
        return replace(
            sample("resnet"), make=_timm_resnet, prefix=["conv1", "bn1", "act1", "maxpool", "layer1", "layer2"]
        )
    if name == "bert":
        return replace(sample("bert"), make=lambda: bert(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3))
    vit = sample("vit")
    return replace(vit, make=_timm_vit, prefix=[*vit.prefix, "pos_drop", "patch_drop", "norm_pre"])


@pytest.mark.parametrize("name", ["resnet", "vit", "bert"])
def test_batch_norm_dropout_and_drop_path_of_the_prefix_stay_in_eval_mode_in_training(name):
    pair = Pair(_noisy(name))
    pair.serves()
    pair.trains()
    pair.model.train()
    with torch.no_grad():
        leaves = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            (leaf,) = pair.recycling._fresh_rows(pair.recycling._example)
            leaves.append(leaf)
        outputs = [pair.one.call(pair.model, pair.batch) for _ in range(2)]
    assert torch.equal(*leaves)
    assert not torch.equal(*outputs)  # the suffix does drop


def _training_of(pair: Pair) -> Callable[[], None]:
    return lambda: pair.trains()


def _in_threads(*tasks: Callable[[], None]) -> None:
    errors: list[BaseException] = []

    def guarded(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=[task]) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_two_threads_each_training_its_own_recycled_model_give_what_one_gives():
    # No dropout: its generator is one for all threads.
    quiet = replace(sample("bert"), make=lambda: bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    _in_threads(_training_of(Pair("resnet")), _training_of(Pair(quiet)), _training_of(Pair("resnet")))


def test_two_threads_running_one_recycled_model_on_rows_and_on_objects_give_what_one_gives():
    pair = Pair("resnet")
    recycled = pair.recycled()
    with torch.no_grad():
        want = pair.one.call(pair.twin, pair.batch)

    def run(batch: torch.Tensor) -> Callable[[], None]:
        def task() -> None:
            with torch.no_grad():
                for _ in range(15):
                    assert torch.equal(pair.model(batch), want)

        return task

    assert isinstance(recycled, RecycledTensor)
    _in_threads(run(recycled), run(pair.batch), run(recycled))
    assert pair.recycling.stats.hits == 2 * 15 * 8
