"""The bypass: it leaves no trace, refuses what it cannot do, and never computes something else in silence."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from transformers import GPT2LMHeadModel, LlamaForCausalLM

from small_models import (
    SAMPLES,
    bert,
    efficientnet,
    gpt2_config,
    images,
    llama,
    llama_config,
    resnet,
    sample,
    sequential,
    state_of,
    texts,
    vit,
    wav2vec2,
)
from torchrecycle import (
    AutocastError,
    BatchError,
    CutError,
    RecycleError,
    RecycleWarning,
    StaleActivationError,
    recycle,
)
from torchrecycle.bypass import first_difference, noise
from torchrecycle.trace import SLOT, random_state


def _attach(model: nn.Module, example: Any, cut: str, **arguments: Any):
    return recycle(model, example, cut=cut, store="memory://", **arguments)


def _two(batch: Any) -> Any:
    return {name: part[:2] for name, part in batch.items()} if isinstance(batch, dict) else batch[:2]


def _same_state(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return a[0] == b[0] and repr(a[1]) == repr(b[1]) and torch.equal(a[2], b[2])


def _frozen(model: nn.Module, prefix: list[str]) -> nn.Module:
    """A copy as it would be trained by hand."""
    by_hand = copy.deepcopy(model)
    for name in prefix:
        by_hand.get_submodule(name).requires_grad_(False).eval()
    return by_hand


# -- it leaves no trace ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", SAMPLES, ids=lambda one: one.name)
def test_detaching_leaves_the_model_and_the_generators_as_they_were(one):
    model = one.model().train()
    model.get_submodule(one.leaf).eval()
    next(model.parameters()).requires_grad_(False)
    before, state = state_of(model), random_state()
    recycling = _attach(model, _two(one.batch), one.cut)
    assert _same_state(state, random_state())
    assert [part.training for part in model.modules()] == [entry[2] for entry in before if len(entry) == 4]
    recycling.detach()
    assert state_of(model) == before
    recycling.detach()
    assert state_of(model) == before


@pytest.mark.parametrize("cut", ["layer2.0.conv9", "layer1.0.relu", ""])
def test_a_refused_cut_leaves_the_model_as_it_was(cut):
    model = resnet().train()
    before, state = state_of(model), random_state()
    with pytest.raises(CutError):
        _attach(model, images(2), cut)
    assert state_of(model) == before
    assert _same_state(state, random_state())


class Failing(nn.Module):
    """Raises when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.fail = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fail:
            raise RuntimeError("it failed")
        return x


@pytest.mark.parametrize("where", ["prefix", "suffix"])
@pytest.mark.parametrize("training", [True, False])
def test_an_exception_in_a_half_leaves_flags_and_generators_as_they_were_and_the_next_call_is_right(where, training):
    model = nn.Sequential(nn.Linear(4, 8), Failing(), nn.Dropout(0.5), nn.Linear(8, 8), Failing(), nn.Linear(8, 2))
    model.train(training)
    before = state_of(model)
    with _attach(model, torch.randn(2, 4), "3"):
        x = torch.randn(4, 4)
        torch.manual_seed(0)
        want = model(x)
        failing = model[1 if where == "prefix" else 4]
        failing.fail = True
        with pytest.raises(RuntimeError, match="it failed"):
            model(x)
        failing.fail = False
        assert all(part.training is training for part in model.modules())
        torch.manual_seed(0)
        assert torch.equal(model(x), want)
    assert state_of(model) == before


def test_an_error_of_the_model_on_the_example_is_explained_and_leaves_no_trace():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    before = state_of(model)
    with pytest.raises(BatchError, match="does not run on the example"):
        _attach(model, torch.randn(2, 5), "1")
    assert state_of(model) == before


def test_an_interrupt_while_attaching_leaves_no_trace():
    class Interrupting(nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Interrupting.calls += 1
            if Interrupting.calls == stop:
                raise KeyboardInterrupt
            return x * 2

    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(), Interrupting(), nn.Linear(8, 2)).train()
    before, state = state_of(model), random_state()
    for stop in range(1, 60):  # noqa: B007 (read by forward)
        Interrupting.calls = 0
        with contextlib.suppress(KeyboardInterrupt):
            _attach(model, torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), "1").detach()
        assert state_of(model) == before
        assert _same_state(state, random_state())
    assert Interrupting.calls < stop  # the last time it was not interrupted


@pytest.mark.parametrize("one", SAMPLES, ids=lambda one: one.name)
def test_copies_pickles_and_state_dicts_of_an_attached_model_are_plain_and_run_their_own_weights(one):
    model = one.model().eval()
    keys, want = list(model.state_dict()), one.call(model)
    with _attach(model, _two(one.batch), one.cut):
        assert list(model.state_dict()) == keys
        copies = [copy.deepcopy(model)]
        if one.name != "wav2vec2":  # parametrised modules do not pickle, with us or without
            saved = io.BytesIO()
            torch.save(model, saved)
            saved.seek(0)
            copies += [pickle.loads(pickle.dumps(model)), torch.load(saved, weights_only=False)]
        for other in copies:
            assert all(SLOT not in part.__dict__ for part in other.modules())
            assert torch.equal(one.call(other), want)
            with torch.no_grad():
                for parameter in other.parameters():
                    parameter.mul_(1.5)
            assert not torch.equal(one.call(other), want)
        with torch.no_grad():
            assert torch.equal(one.call(model), want)


def test_class_forward_and_hooks_of_every_module_stay_the_users():
    model = resnet().eval()
    seen: list[str] = []
    model.layer1.register_forward_hook(lambda *_: seen.append("layer1"))
    model.layer4.register_forward_hook(lambda *_: seen.append("layer4"))
    model.register_forward_hook(lambda *_: seen.append("model"))
    classes = [type(part) for part in model.modules()]
    with pytest.warns(RecycleWarning, match="a hook on 'layer1' does not fire"):
        recycling = _attach(model, images(2), "layer2")
    with recycling:
        seen.clear()
        assert [type(part) for part in model.modules()] == classes
        assert all("forward" not in part.__dict__ for part in model.modules())
        with torch.no_grad():
            model(images())
    assert seen[-2:] == ["layer4", "model"]
    assert seen.count("model") == 1 or seen.count("model") == seen.count("layer4")


# -- an old optimiser --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_attaching_amid_a_training_with_an_old_optimiser_moves_nothing_in_the_prefix(kind):
    one = sample("resnet")
    model = one.model().train()
    more = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind(model.parameters(), lr=0.05, weight_decay=0.1, **more)

    def step() -> None:
        F.cross_entropy(one.call(model), torch.arange(8) % 5).backward()
        optimizer.step()

    step()  # momentum, and gradients left in place
    recycling = _attach(model, images(2), one.cut)
    prefix = {n: t.clone() for n, t in model.state_dict().items() if n.startswith(tuple(one.prefix))}
    rest = {n: t.clone() for n, t in model.named_parameters() if n not in prefix}
    for _ in range(3):
        step()
    recycling.detach()
    now = model.state_dict()
    assert all(torch.equal(now[name], tensor) for name, tensor in prefix.items())
    assert not any(torch.equal(now[name], tensor) for name, tensor in rest.items())


def test_training_mode_moves_no_statistics_of_the_prefix_also_outside_of_the_models_own_call():
    model = efficientnet().eval()
    with _attach(model, images(2), "blocks.2"):
        model.train()
        before = {n: t.clone() for n, t in model.named_buffers()}
        with torch.no_grad():
            model.forward_features(images())
        moved = {n for n, t in model.named_buffers() if not torch.equal(t, before[n])}
        assert moved
        assert not any(n.startswith(("bn1", "blocks.0", "blocks.1", "blocks.2")) for n in moved)
        assert {n for n in before if n.startswith(("blocks.3", "blocks.6", "bn2"))} <= moved
        assert all(part.training for part in model.modules())


# -- traps -------------------------------------------------------------------------------------------------------------


def test_a_llama_classifier_that_reads_the_ids_after_the_cut_gets_the_real_ones():
    model = llama().eval()
    batch = texts()
    want = model(**batch).logits
    items = [{name: part[i] for name, part in batch.items()} for i in range(8)]
    with _attach(model, _two(batch), "model.layers.1") as recycling, torch.no_grad():
        assert "input_ids" in recycling.bypass.plan.read_after
        (recycled,) = list(recycling.loader(items, batch_size=8))
        assert torch.equal(model(**recycled).logits, want)
        assert recycling.stats.hits == 8


def test_the_rotary_embedding_of_a_llama_runs_after_all():
    with _attach(llama(), _two(texts()), "model.layers.1") as recycling:
        assert {s.name: s.action for s in recycling.bypass.plan.steps} == {
            "model.embed_tokens": "skip",
            "model.rotary_emb": "run",
            "model.layers.0": "skip",
            "model.layers.1": "keep",
        }


@pytest.mark.parametrize("flag", ["output_hidden_states", "output_attentions"])
def test_states_of_skipped_layers_in_the_output_are_kept_or_refused_but_never_wrong(flag):
    model = bert(attn_implementation="eager").eval()
    batch = texts()
    setattr(model.config, flag, True)
    want = model(**batch)
    try:
        recycling = _attach(model, _two(batch), "bert.encoder.layer.1")
    except CutError:
        return
    with recycling, torch.no_grad():
        got = model(**batch)
        for a, b in zip(
            getattr(want, flag.removeprefix("output_")), getattr(got, flag.removeprefix("output_")), strict=True
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize("way", ["config", "argument"])
def test_a_flag_switched_on_after_attaching_is_refused_by_name(way):
    model = bert().eval()
    batch = texts()
    with _attach(model, _two(batch), "bert.encoder.layer.1"), torch.no_grad():
        want = model(**batch).logits
        more = {"output_hidden_states": True} if way == "argument" else {}
        model.config.output_hidden_states = way == "config"
        with pytest.raises(CutError, match="output_hidden_states"):
            model(**batch, **more)
        model.config.output_hidden_states = False
        assert torch.equal(model(**batch).logits, want)


def test_a_cache_of_keys_and_values_is_refused_with_the_flag_to_switch_off():
    model = LlamaForCausalLM(llama_config(use_cache=True)).eval()
    with pytest.raises(CutError, match="use_cache"):
        _attach(model, _two(texts()), "model.layers.1")


def test_layerdrop_around_the_cut_drops_layers_of_the_suffix_alone():
    one = sample("wav2vec2")
    torch.manual_seed(0)
    model = wav2vec2(layerdrop=0.5).train()
    seen: list[int] = []
    for number in (2, 3):
        model.wav2vec2.encoder.layers[number].register_forward_hook(lambda *_, number=number: seen.append(number))
    runs: dict[str, set[tuple[int, ...]]] = {"hit": set(), "raw": set()}
    outputs: dict[int, list[torch.Tensor]] = {}
    with _attach(model, one.batch[:2], one.cut) as recycling:
        (batch,) = recycling.loader(list(one.batch), batch_size=8)
        for seed in range(12):
            for kind, given in (("hit", batch), ("raw", one.batch)):
                seen.clear()
                torch.manual_seed(seed)
                outputs.setdefault(seed, []).append(model(given).logits)
                runs[kind].add(tuple(seen))
    assert runs["hit"] == runs["raw"] == {(), (2,), (3,), (2, 3)}
    assert all(torch.equal(hit, raw) for hit, raw in outputs.values())


class Regions(nn.Module):
    """Four layers, of which each two are computed again in backward: in training mode, or always."""

    def __init__(self, reentrant: bool, sizes: tuple[int, ...], always: bool = True) -> None:
        super().__init__()
        self.always = always
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))
        self.reentrant, self.sizes = reentrant, sizes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        at = 0
        for size in self.sizes:
            part = self.layers[at : at + size]

            def region(y: torch.Tensor, part: nn.ModuleList = part) -> torch.Tensor:
                for layer in part:
                    y = layer(y)
                return y

            checkpointed = self.training or self.always
            x = checkpoint(region, x, use_reentrant=self.reentrant) if checkpointed else region(x)
            at += size
        return x


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_region_across_the_cut_is_refused(reentrant):
    model = Regions(reentrant, (1, 2, 1)).train()
    before = state_of(model)
    with pytest.raises(CutError):
        _attach(model, torch.randn(4, 8), "layers.1")
    assert state_of(model) == before


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_region_across_the_cut_that_is_one_in_training_mode_only_is_computed_once(reentrant):
    model = Regions(reentrant, (1, 2, 1), always=False).train()
    by_hand = _frozen(model, ["layers.0", "layers.1"])
    by_hand.training = False
    x = torch.randn(4, 8)
    if reentrant:  # the last region is one by itself, and gets no gradient: not ours
        model.sizes = by_hand.sizes = (1, 3)
    with _attach(model, x, "layers.1"):
        model(x).sum().backward()
    by_hand(x).sum().backward()
    for (name, p), q in zip(model.named_parameters(), by_hand.named_parameters(), strict=True):
        assert (p.grad is None) == (q[1].grad is None), name
        assert p.grad is None or torch.allclose(p.grad, q[1].grad), name


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_reentrant_region_after_the_cut_that_would_get_no_gradient_is_refused():
    with pytest.raises(CutError, match="use_reentrant=False"):
        _attach(Regions(True, (2, 1, 1)).train(), torch.randn(4, 8), "layers.1")


def test_checkpoint_regions_on_either_side_of_the_cut_give_the_same_gradients():
    model = Regions(False, (2, 1, 1)).train()
    by_hand = _frozen(model, ["layers.0", "layers.1"])
    x = torch.randn(4, 8)
    with _attach(model, x, "layers.1"):
        model(x).sum().backward()
    by_hand(x).sum().backward()
    for (name, p), q in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        assert p.grad is None or torch.equal(p.grad, q.grad), name


def test_checkpoint_sequential_across_the_cut_is_refused():
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint_sequential(self.body, 2, x, use_reentrant=False)

    with pytest.raises(CutError):
        _attach(Whole().train(), torch.randn(2, 8), "body.0")


def test_gradient_checkpointing_of_single_layers_is_fine():
    model = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    batch = {**texts(), "labels": torch.arange(8) % 5}
    plain = copy.deepcopy(model)
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    with _attach(model, _two(batch), "bert.encoder.layer.1"):
        model(**batch).loss.backward()
    with _attach(plain, _two(batch), "bert.encoder.layer.1"):
        plain(**batch).loss.backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad)


def _kept_against_fresh(model: nn.Module, cut: str, batch: dict[str, torch.Tensor], batch_size: int = 3):
    """Logits from rows that were filled in other batches, and of the plain model."""
    with torch.no_grad():
        want = model.eval()(**batch).logits
        items = [{n: t[i] for n, t in batch.items()} for i in range(len(batch["attention_mask"]))]
        with _attach(model, _two(batch), cut) as recycling:
            recycling.fill(items, batch_size=batch_size)
            (recycled,) = list(recycling.loader(items, batch_size=len(items)))
            return want, model(**recycled).logits, recycling


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_gpt2_padded_on_either_side_gives_the_right_logits_from_rows(side):
    model = GPT2LMHeadModel(gpt2_config(tie_word_embeddings=False))
    batch = texts(side=side)
    want, got, recycling = _kept_against_fresh(model, "transformer.h.1", batch)
    places = batch["attention_mask"].bool()
    assert torch.allclose(want[places], got[places], atol=1e-5)
    assert not recycling.source.padding.left  # without position ids, its positions count the padding


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_llama_padded_on_either_side_gives_the_right_logits_from_rows(side):
    model = LlamaForCausalLM(llama_config())
    batch = texts(side=side)
    want, got, _recycling = _kept_against_fresh(model, "model.layers.1", batch)
    places = batch["attention_mask"].bool()
    assert torch.allclose(want[places], got[places], atol=1e-5)


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_wav2vec2_with_a_padding_mask_gives_the_right_logits_or_is_refused(norm):
    model = wav2vec2(feat_extract_norm=norm, do_stable_layer_norm=False)
    mask = torch.ones(4, 400, dtype=torch.long)
    mask[1, 250:] = 0
    mask[3, 300:] = 0
    sound = torch.randn(4, 400, generator=torch.Generator().manual_seed(1)) * mask
    batch = {"input_values": sound, "attention_mask": mask}
    try:
        want, got, _ = _kept_against_fresh(model, "wav2vec2.encoder.layers.1", batch, 2)
    except CutError:
        return
    assert torch.allclose(want, got, atol=1e-5)


def test_rows_that_follow_a_mask_over_raw_audio_by_no_simple_law_are_kept_whole_and_found_at_their_length():
    def batch(length: int, seed: int, objects: int = 2) -> dict[str, torch.Tensor]:
        values = torch.randn(objects, length, generator=torch.Generator().manual_seed(seed))
        return {"input_values": values, "attention_mask": torch.ones(objects, length, dtype=torch.long)}

    model = wav2vec2().eval()
    want = {length: model(**batch(length, length, 4))[0] for length in (400, 520)}
    with _attach(model, batch(400, 0), "wav2vec2.encoder.layers.1") as recycling:
        assert recycling.source.layouts[0].free
        for length, logits in want.items():
            raw = batch(length, length, 4)
            items = [{name: tensor[i] for name, tensor in raw.items()} for i in range(4)]
            hit = next(iter(recycling.loader(items, batch_size=4)))
            with torch.no_grad():
                assert torch.equal(model(**hit)[0], logits)
                assert torch.equal(model(**raw)[0], logits)
        assert recycling.stats.hits == 8


# -- parameters --------------------------------------------------------------------------------------------------------


def test_class_token_and_position_embedding_of_a_vit_are_frozen_with_the_prefix():
    with _attach(vit(), images(2), "blocks.1") as recycling:
        frozen = set(recycling.bypass.prefix_parameters)
        assert {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.1.mlp.fc2.bias"} <= frozen
        assert not any(name.startswith(("blocks.2", "norm", "head")) for name in frozen)


def test_tied_embeddings_are_refused_with_share_named_and_frozen_if_asked():
    model = LlamaForCausalLM(llama_config(tie_word_embeddings=True)).train()
    batch = texts()
    with pytest.raises(CutError, match="share='freeze'"):
        _attach(model, _two(batch), "model.layers.1")
    by_hand = _frozen(model, ["model.embed_tokens", "model.layers.0", "model.layers.1"])
    want = by_hand(**batch).logits
    with _attach(model, _two(batch), "model.layers.1", share="freeze"):
        got = model(**batch).logits
        assert torch.equal(got, want)
        got.sum().backward()
        want.sum().backward()
    for p, q in zip(model.parameters(), by_hand.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(p.grad, q.grad)
    assert model.lm_head.weight.grad is None


def test_parameters_that_nobody_reads_are_reported_and_left_alone():
    class WithSpare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.spare = nn.Linear(4, 8), nn.Linear(8, 2), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    model = WithSpare()
    with _attach(model, torch.randn(2, 4), "first") as recycling:
        assert recycling.bypass.untouched == ["spare.weight", "spare.bias"]
        assert model.spare.weight.requires_grad


# -- signatures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["resnet", "vit", "bert"])
def test_every_mode_of_gradient_and_training_gives_what_the_model_frozen_by_hand_gives(name, mode, training):
    one = sample(name)
    model, by_hand = one.model(), one.model()
    by_hand.train(training)
    one.freeze_by_hand(by_hand)
    with _attach(model, _two(one.batch), one.cut), mode():
        model.train(training)
        torch.manual_seed(5)
        want = one.call(by_hand)
        for _ in range(2):
            torch.manual_seed(5)
            got = one.call(model)
            assert torch.equal(got, want) or (training and name == "resnet")
            assert got.requires_grad == want.requires_grad


def test_autocast_that_was_not_declared_is_an_error_and_declared_gives_the_same():
    model = resnet().eval()
    with _attach(model, images(2), "layer2"), torch.no_grad():
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(AutocastError, match=r"autocast=torch\.bfloat16"),
        ):
            model(images())
        model(images())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want = model(images())
    with _attach(model, images(2), "layer2", autocast=torch.bfloat16) as recycling, torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model(images()), want)
            (batch,) = list(recycling.loader(list(images()), batch_size=8))
            assert torch.equal(model(batch), want)
        with pytest.raises(AutocastError):
            model(images())
        with torch.autocast("cpu", torch.float16), pytest.raises(AutocastError):
            model(images())


class Switched(nn.Module):
    """Does something else when a flag of its own is set."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.double = False
        self.calls = 0

    def forward(self, x: torch.Tensor, scale: float = 1.0, shift: torch.Tensor | None = None) -> torch.Tensor:
        self.calls += 1
        x = x * 2 if self.double else x
        x = self.first(x * scale)
        return self.second(x if shift is None else x + shift)


def test_a_forward_that_counts_its_calls_is_proven_once_per_signature():
    model = Switched()
    with _attach(model, torch.randn(2, 4), "first") as recycling:
        for _ in range(3):
            model(torch.randn(3, 4))
            proven = len(recycling.bypass.proven)
        model(torch.randn(3, 4))
        assert len(recycling.bypass.proven) == proven
        assert model.calls == 4


def test_a_flag_or_an_argument_that_changes_what_the_prefix_computes_is_refused():
    model = Switched().eval()
    x = torch.randn(4, 4)
    with _attach(model, x, "first"), torch.no_grad():
        model(x)
        with pytest.raises(StaleActivationError, match="argument or a flag"):
            model(x, scale=2.0)
        model.double = True
        with pytest.raises(StaleActivationError, match="argument or a flag"):
            model(x)
        model.double = False
        shift = torch.randn(4, 4)
        assert torch.equal(model(x, shift=shift), model.second(model.first(x) + shift))


def test_an_argument_that_the_prefix_reads_and_the_example_lacks_is_refused_by_name():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            return self.second(self.first(x if mask is None else x * mask))

    model = Masked()
    x = torch.randn(4, 4)
    with _attach(model, x, "first"), pytest.raises(RecycleError, match="mask"):
        model(x, mask=torch.zeros(4, 4))


# -- a suffix that writes in place -------------------------------------------------------------------------------------


class WritesInPlace(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.first, self.second, self.relu, self.how = (
            nn.Linear(4, 4),
            nn.Linear(4, 4),
            nn.ReLU(inplace=True),
            how,
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if self.how == "relu":
            x = self.relu(x)
        elif self.how == "view":
            x[:, :2].mul_(2)
        elif self.how == "data":
            x.data.add_(1)
        elif self.how == "numpy":
            x.detach().numpy()[:] += 1
        elif self.how == "transposed":
            x.t().relu_()
        return self.second(x)


@pytest.mark.parametrize("how", ["relu", "view", "data", "numpy", "transposed"])
def test_a_suffix_that_writes_into_the_kept_rows_gives_the_same_the_second_time(how):
    model = WritesInPlace(how).eval()
    x = torch.randn(8, 4)
    with torch.no_grad():
        want = model(x)
        with _attach(model, x[:2], "first") as recycling:
            (batch,) = list(recycling.loader(list(x), batch_size=8))
            kept = batch.leaves[0].clone()
            for _ in range(3):
                assert torch.equal(model(batch), want)
                assert torch.equal(batch.leaves[0], kept)
            assert torch.equal(model(x), want)


# -- can it be wrong in silence? ---------------------------------------------------------------------------------------


class Attack(nn.Module):
    """One way in which the halves of a model could have more to do with each other than their tensors say."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.relu, self.same, self.norm = nn.ReLU(), nn.Identity(), nn.BatchNorm1d(6)
        self.way = way
        self.leaving, self.hooking = Leaving(), nn.Identity()
        self.hooking.log = []
        self.hooking.register_forward_hook(lambda module, args, output: module.log.append(output))
        self.stash: list[torch.Tensor] = []
        self.seen: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self, f"_{self.way}")(x)

    def _branch_on_value(self, x):
        x = self.first(x)
        return self.last(self.middle(x) if bool(x.sum() > 0) else -self.middle(x))

    def _branch_on_kept_value(self, x):
        x = self.middle(self.first(x))
        return self.last(x if bool(x.sum() > 0) else -x)

    def _branch_on_input(self, x):
        y = self.middle(self.first(x))
        return self.last(y if bool(x.sum() > 0) else -y)

    def _stash(self, x):
        self.seen = self.first(x)
        x = self.middle(self.seen)
        return self.last(x) + self.seen

    def _stash_list(self, x):
        self.stash.clear()
        for layer in (self.first, self.middle):
            x = layer(x)
            self.stash.append(x)
        return self.last(x) + self.stash[0]

    def _identity(self, x):
        x = self.first(x)
        y = self.same(x)
        y = self.middle(y)
        return self.last(y)

    def _input_itself(self, x):
        y = self.same(x)
        y = self.middle(y)
        return self.last(y) + x

    def _cut_changed_in_place_later(self, x):
        x = self.middle(self.first(x))
        y = x * 2
        x.add_(1)
        return self.last(y + x)

    def _skipped_changed_in_place_later(self, x):
        y = self.first(x)
        z = self.middle(y)
        y.add_(1)
        return self.last(z) + y

    def _changed_in_place_between(self, x):
        y = self.first(x)
        y.relu_()
        return self.last(self.middle(y))

    def _shared_activation(self, x):
        x = self.relu(self.first(x))
        x = self.middle(x)
        return self.last(self.relu(x))

    def _twice(self, x):
        return self.last(self.middle(self.first(self.first(x))))

    def _real_buffer_filled(self, x):
        x = self.middle(self.first(x))
        space = torch.zeros(x.shape[0], 12)
        space[:, :6] = x
        space[:, 6:] = 1
        return self.last(space[:, :6] * space[:, 6:])

    def _skip_connection(self, x):
        a = self.first(x)
        return self.last(self.middle(a) + a)

    def _statistics_of_the_skipped(self, x):
        a = self.first(x)
        scale = a.abs().amax(dim=1, keepdim=True)
        return self.last(self.middle(a) / scale)

    def _scale_of_input(self, x):
        scale = x.abs().amax(dim=1, keepdim=True)
        return self.last(self.middle(self.first(x / scale))) * scale

    def _number_of_rows(self, x):
        return self.last(self.middle(self.first(x)) * x.shape[0])

    def _sorted(self, x):
        y = self.middle(self.first(x))
        order = x[:, 0].argsort()
        return self.last(y[order])

    def _made_from_shape(self, x):
        a = self.first(x)
        return self.last(self.middle(a) + torch.ones_like(a))

    def _caught(self, x):
        y = self.middle(self.first(x))
        try:
            scale = x.sum().item()
        except Exception:
            scale = 0.0
        return self.last(y) * scale

    def _norm_after(self, x):
        return self.last(self.norm(self.middle(self.first(x))))

    def _norm_before(self, x):
        return self.last(self.middle(self.norm(self.first(x))))

    def _left_in_a_layer(self, x):
        y = self.middle(self.leaving(self.first(x)))
        return self.last(y) + self.leaving.seen

    def _length_left_in_a_layer(self, x):
        y = self.middle(self.leaving(self.first(x)))
        return self.last(y) * self.leaving.count

    def _hook_of_a_layer(self, x):
        self.hooking.log.clear()
        y = self.middle(self.hooking(self.first(x)))
        return self.last(y) + self.hooking.log[0]

    def _output_in_an_object(self, x):
        a = self.first(x)
        return Output(self.last(self.middle(a)), a)


class Leaving(nn.Module):
    """Leaves what it saw in an attribute."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen, self.count = x, len(x)
        return x


class Output:
    """Nothing that PyTorch knows how to look into."""

    def __init__(self, value: torch.Tensor, extra: torch.Tensor) -> None:
        self.value, self.extra = value, extra

    def sum(self) -> torch.Tensor:
        return self.value.sum()


WAYS = [name[1:] for name in vars(Attack) if name.startswith("_") and not name.startswith("__")]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_an_odd_forward_is_right_or_refused(way, training):
    torch.manual_seed(2)
    model = Attack(way)
    x = torch.randn(8, 6)
    by_hand = _frozen(model.train(training), ["first", "middle"])
    for part in (by_hand.norm,) if way == "norm_before" else ():
        part.requires_grad_(False).eval()
    want = by_hand(x)
    want.sum().backward()
    model.eval()(x[:2])  # what its layers leave behind is that of the example
    model.train(training)
    before = state_of(model)
    try:
        recycling = _attach(model, x[:2], "middle")
    except CutError:
        assert state_of(model) == before
        return
    with recycling:
        items = list(x)
        recycling.fill(items, batch_size=8)
        try:
            for _ in range(2):
                for batch in (x, next(iter(recycling.loader(items, batch_size=8)))):
                    model.norm.load_state_dict(Attack(way).norm.state_dict())
                    model.zero_grad()
                    got = model(batch)
                    got.sum().backward()
                    assert first_difference(want, got) is None
                    for (name, p), q in zip(model.named_parameters(), by_hand.parameters(), strict=True):
                        assert (p.grad is None) == (q.grad is None), name
                        assert p.grad is None or torch.equal(p.grad, q.grad), name
        except RecycleError:
            assert way in ("branch_on_value",)


def test_the_only_ways_that_are_refused_are_those_that_leave_something_behind_a_skipped_layer():
    refused = set()
    for way in WAYS:
        model = Attack(way)
        x = torch.randn(2, 6)
        try:
            _attach(model, x, "middle").detach()
        except CutError:
            refused.add(way)
    assert refused == {"left_in_a_layer", "length_left_in_a_layer", "hook_of_a_layer"}


class ByRows(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.way == "mean":
            return x - x.mean(0)
        if self.way == "max":
            return x / x.abs().max()
        if self.way == "norm":
            return F.batch_norm(x, None, None, training=True)
        if self.way == "random":
            return x + torch.rand(1)
        if self.way == "dropout":
            return F.dropout(x, 0.5, training=True)
        if self.way == "sort":
            return x.sort(dim=0).values
        return x - x[-1:]


@pytest.mark.parametrize("way", ["mean", "max", "norm", "random", "dropout", "sort", "last"])
def test_rows_that_depend_on_other_rows_or_on_chance_are_refused(way):
    model = nn.Sequential(nn.Linear(6, 6), ByRows(way), nn.Linear(6, 6), nn.Linear(6, 2))
    with pytest.raises(CutError, match=r"other objects|other values each time"):
        _attach(model, torch.randn(4, 6), "2")


class Glue(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.first, self.second, self.third, self.way = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2), way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if self.way == "dropout":
            x = F.dropout(x, 0.5, self.training)
        elif self.way == "noise" and self.training:
            x = x + torch.randn_like(x)
        elif self.way == "mean":
            x = x - x.mean(0)
        elif self.way == "layerdrop" and self.training and torch.rand(()) < 0.05:
            return self.third(x)
        return self.third(self.second(x))


def test_glue_before_the_cut_that_mixes_objects_is_refused():
    model = Glue("mean")
    before = state_of(model)
    with pytest.raises(CutError):
        _attach(model, torch.randn(4, 6), "second")
    assert state_of(model) == before


@pytest.mark.parametrize("way", ["dropout", "noise", "layerdrop"])
def test_what_glue_before_the_cut_draws_in_training_mode_it_does_not_draw_since_the_prefix_is_in_eval_mode(way):
    model = Glue(way)
    want = _frozen(model, ["first", "second"]).eval()
    x = torch.randn(4, 6)
    with _attach(model.train(), x, "second") as recycling:
        assert model.training
        (batch,) = recycling.loader(list(x), batch_size=4)
        for given in (batch, x):
            for seed in range(40):
                torch.manual_seed(seed)
                assert torch.equal(model(given), want(x))
                assert model.training
        assert recycling.stats.hits == 160


class Deciding(nn.Module):
    """Decides at its beginning, by its flag, what it does at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rate = 0.5 if self.training else 0.0
        x = self.second(F.dropout(self.first(x), rate, True))
        return self.third(F.dropout(x, rate, True))


def test_a_forward_that_decides_at_its_beginning_about_both_halves_is_refused():
    with pytest.raises(CutError, match="In training mode"):
        _attach(Deciding().train(), torch.randn(4, 6), "second")


def test_dropout_in_the_models_own_forward_after_the_cut_stays_on():
    model = Glue("dropout")
    with _attach(model.train(), torch.randn(4, 6), "first") as recycling:
        (batch,) = recycling.loader(list(torch.randn(4, 6)), batch_size=4)
        outputs = {model(batch)[0, 0].item() for _ in range(8)}
    assert len(outputs) > 1


# -- forms of inputs and activations -----------------------------------------------------------------------------------


class Nest(nn.Module):
    """Gives a nest, and takes one."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.last, self.kind = nn.Linear(6, 8), nn.Linear(8, 2), kind

    class Cutting(nn.Module):
        def __init__(self, kind: str) -> None:
            super().__init__()
            self.kind = kind

        def forward(self, x: torch.Tensor) -> Any:
            y = x * 2
            if self.kind == "tuple":
                return x, y, 3
            if self.kind == "dict":
                return {"a": x, "b": {"c": y, "same": x}, "n": None}
            from transformers.modeling_outputs import BaseModelOutput

            return BaseModelOutput(last_hidden_state=x, hidden_states=(y, x))


def _nested(kind: str) -> nn.Module:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.cutting, self.last = nn.Linear(6, 8), Nest.Cutting(kind), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = self.cutting(self.first(x))
            if kind == "tuple":
                a, b, n = out
                return self.last(a + b * n)
            if kind == "dict":
                assert out["b"]["same"] is out["a"]
                return self.last(out["a"] + out["b"]["c"])
            return self.last(out.last_hidden_state + out.hidden_states[0])

    return Whole().eval()


@pytest.mark.parametrize("kind", ["tuple", "dict", "ModelOutput"])
def test_an_activation_may_be_a_nest_of_tensors(kind):
    model = _nested(kind)
    x = torch.randn(8, 6)
    with torch.no_grad():
        want = model(x)
        with _attach(model, x[:2], "cutting") as recycling:
            assert len(recycling.bypass.plan.layouts) == 2
            (batch,) = list(recycling.loader(list(x), batch_size=8))
            assert torch.equal(model(batch), want)
            assert torch.equal(model(x), want)


def test_inputs_may_be_nested_in_dicts_and_lists_and_come_by_args_and_kwargs():
    class Any_(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
            views = args[0]["views"]
            return self.last(self.first(views[0] + views[1])) + kwargs["shift"]

    model = Any_().eval()
    a, b, shift = torch.randn(4, 6), torch.randn(4, 6), torch.randn(4, 2)

    def inputs(batch: Any) -> Any:
        return ({"views": [batch[0], batch[1]]},), {"shift": batch[2]}

    with torch.no_grad():
        want = model({"views": [a, b]}, shift=shift)
        with _attach(model, (a, b, shift), "first", inputs=inputs) as recycling:
            assert torch.equal(model({"views": [a, b]}, shift=shift), want)
            items = [(a[i], b[i], shift[i]) for i in range(4)]
            (batch,) = list(recycling.loader(items, batch_size=4))
            args, kwargs = inputs(batch)
            assert torch.equal(model(*args, **kwargs), want)
            assert recycling.stats.hits == 4


def test_a_batch_dimension_that_is_not_the_first_inside_the_model_is_kept_by_object():
    class TimeFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 8)
            self.mixed, self.last = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.mixed(self.first(x.transpose(0, 1))).mean(0))

    model = TimeFirst().eval()
    x = torch.randn(6, 5, 6)
    want = _frozen(model, ["first"])(x)
    with _attach(model, x[:2], "first") as recycling:
        assert recycling.bypass.plan.layouts[0].batch_dim == 1
        items = list(x)
        recycling.fill(items, batch_size=2)
        (batch,) = list(recycling.loader(items, batch_size=6))
        assert torch.allclose(model(batch), want, atol=1e-6)
        assert torch.equal(model(x), want)


def test_a_channels_last_and_a_bfloat16_model_are_equal_to_the_bit():
    for model, x in [
        (resnet().to(memory_format=torch.channels_last), images().to(memory_format=torch.channels_last)),
        (resnet().bfloat16(), images().bfloat16()),
    ]:
        model.eval()
        with torch.no_grad():
            want = model(x)
            with _attach(model, x[:2], "layer2") as recycling:
                assert torch.equal(model(x), want)
                (batch,) = list(recycling.loader(list(x), batch_size=8))
                assert torch.equal(model(batch), want)


def test_densenet_keeps_the_further_leaves_that_later_layers_concatenate():
    model = torchvision.models.DenseNet(8, (2, 3), 8, num_classes=3).eval()
    with torch.no_grad():
        want = model(images())
        with _attach(model, images(2), "features.denseblock2.denselayer1") as recycling:
            assert len(recycling.bypass.plan.layouts) >= 2
            (batch,) = list(recycling.loader(list(images()), batch_size=8))
            assert torch.equal(model(batch), want)


# -- cuts in words -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "cut", "words"),
    [
        (resnet, "layer22", "no module of that name. Nearest: 'layer2'"),
        (resnet, "", "the model itself"),
        (resnet, "layer1.0.relu", "calls it 2 times"),
        (lambda: bert(2), "bert.encoder.layer", "never calls it .*container.*'bert.encoder.layer.0'"),
    ],
)
def test_a_cut_that_is_none_is_refused_in_words(make, cut, words):
    model = make()
    example = images(2) if make is resnet else _two(texts())
    with pytest.raises(CutError, match=words):
        _attach(model, example, cut)


# -- threads, several recyclings, compiling ----------------------------------------------------------------------------


def _in_threads(*work: Any) -> None:
    errors: list[BaseException] = []

    def guarded(task: Any) -> None:
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=[task]) for task in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.mark.parametrize("count", [1, 2])
def test_two_threads_may_run_one_recycled_model_or_two(count):
    models = [resnet().eval() for _ in range(count)]
    batches = [images(8), images(6)]
    with torch.no_grad():
        wants = [models[i % count](batches[i]) for i in range(2)]
    recyclings = [_attach(model, images(2), "layer2") for model in models]

    def work(i: int) -> Any:
        def run() -> None:
            with torch.no_grad():
                for _ in range(15):
                    assert torch.equal(models[i % count](batches[i]), wants[i])

        return run

    _in_threads(work(0), work(1))
    for recycling in recyclings:
        recycling.detach()


@pytest.mark.filterwarnings("ignore:10 training batches came with their objects")
def test_two_threads_may_train_through_one_recycled_model_without_losing_dropout_or_statistics():
    model = nn.Sequential(nn.Linear(6, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64), nn.Dropout(0.5))
    model.train()
    x = torch.randn(64, 6)
    with _attach(model, x[:2], "2"):
        mean = model[1].running_mean.clone()

        def run() -> None:
            for _ in range(60):
                assert 0.3 < (model(x) == 0).float().mean() < 0.7

        _in_threads(run, run, run)
        assert all(part.training for part in model.modules())
        assert torch.equal(model[1].running_mean, mean)


def test_two_recyclings_of_one_model_share_it_and_leave_it_one_after_the_other():
    model = resnet().eval()
    before = state_of(model)
    with torch.no_grad():
        want = model(images())
        first = _attach(model, images(2), "layer1")
        second = _attach(model, images(2), "layer3")
        (a,) = list(first.loader(list(images()), batch_size=8))
        (b,) = list(second.loader(list(images()), batch_size=8))
        assert torch.equal(model(a), want)
        assert torch.equal(model(b), want)
        assert torch.equal(model(images()), want)
        first.detach()
        assert not model.layer1[0].conv1.weight.requires_grad
        assert torch.equal(model(b), want)
        second.detach()
    assert state_of(model) == before


def test_a_recycled_model_inside_of_another_is_refused_in_words_and_neither_is_harmed():
    backbone = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh())
    model = nn.Sequential(backbone, nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    x = torch.randn(5, 6)
    with torch.no_grad():
        want, inner = model(x), backbone(x)
        for outer_cut in ("1", "0.2"):
            with _attach(backbone, x[:2], "1"):
                with pytest.raises(CutError, match="recycled by itself"):
                    _attach(model, x[:2], outer_cut)
                assert torch.equal(model(x), want)
                assert torch.equal(backbone(x), inner)
        for outer_cut in ("1", "0.2"):
            with _attach(model, x[:2], outer_cut):
                with pytest.raises(CutError):
                    _attach(backbone, x[:2], "1")
                assert torch.equal(model(x), want)
                assert torch.equal(backbone(x), inner)


def test_a_recycled_model_after_the_cut_of_another_works():
    head = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), head).eval()
    x, y = torch.randn(5, 6), torch.randn(5, 8)
    with torch.no_grad():
        want, inner = model(x), head(y)
        with _attach(head, y[:2], "1"), _attach(model, x[:2], "0"):
            assert torch.equal(model(x), want)
            assert torch.equal(head(y), inner)
        assert torch.equal(model(x), want)


def test_a_model_that_was_compiled_in_place_is_refused_before_and_its_suffix_may_be_compiled_after():
    model = sequential().eval()
    model.compile(backend="eager")
    with pytest.raises(CutError, match="compiled"):
        _attach(model, torch.randn(2, 6), "2")
    model = resnet().eval()
    with torch.no_grad():
        want = model(images())
        with _attach(model, images(2), "layer2") as recycling:
            model.layer4.compile(backend="eager")
            got = model(images())
            assert torch.allclose(got, want, atol=1e-5)
            (batch,) = list(recycling.loader(list(images()), batch_size=8))
            assert torch.allclose(model(batch), want, atol=1e-5)
    torch._dynamo.reset()


# -- what a batch carries ----------------------------------------------------------------------------------------------


class Pair(nn.Module):
    """Two large inputs that only the prefix reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(40, 8), nn.Linear(8, 2)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(a - 2 * b))


def test_two_inputs_of_one_batch_that_were_ordered_differently_are_not_taken_for_a_pair():
    model = Pair().eval()
    a, b = torch.randn(6, 40), torch.randn(6, 40)
    with torch.no_grad(), _attach(model, (a[:2], b[:2]), "first") as recycling:
        (batch,) = list(recycling.loader(list(zip(a, b, strict=True)), batch_size=6))
        assert torch.equal(model(*batch), model(a, b))
        turned = [5, 4, 3, 2, 1, 0]
        assert torch.equal(model(batch[0][turned], batch[1][turned]), model(a[turned], b[turned]))
        with pytest.raises(RecycleError):
            model(batch[0], batch[1][turned])
        with pytest.raises(RecycleError):
            model(batch[1], batch[0])
        with pytest.raises(RecycleError):
            model(batch[0], b)


def test_rows_are_not_used_beside_another_mask():
    model = bert().eval()
    batch = texts()
    items = [{name: part[i] for name, part in batch.items()} for i in range(8)]
    with torch.no_grad(), _attach(model, _two(batch), "bert.encoder.layer.1") as recycling:
        (recycled,) = list(recycling.loader(items, batch_size=8))
        want = model(**recycled).logits
        with pytest.raises(RecycleError):
            model(**{**recycled, "attention_mask": recycled["attention_mask"].flip(0)})
        part = {name: tensor[2:5] for name, tensor in recycled.items()}
        assert torch.allclose(model(**part).logits, want[2:5], atol=1e-5)


def test_rows_of_another_model_are_refused():
    one, other = resnet().eval(), resnet().eval()
    with _attach(one, images(2), "layer2") as a, _attach(other, images(2), "layer2") as b:
        (batch,) = list(a.loader(list(images()), batch_size=8))
        with pytest.raises(StaleActivationError):
            other(batch)
        with b.paused(), pytest.raises(BatchError):
            other(batch)
    with pytest.raises(BatchError):
        one(batch)


# -- on a graphics card ------------------------------------------------------------------------------------------------


def test_rounding_is_that_of_ten_bits_where_a_graphics_card_multiplies_with_ten():
    assert noise(torch.float32) == noise(torch.float32, torch.device("cpu")) == 1e-3
    assert noise(torch.float64, torch.device("cuda")) == noise(torch.float64)
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        assert noise(torch.float32, torch.device("cuda")) == noise(torch.float32)
        torch.backends.cudnn.allow_tf32 = True
        assert noise(torch.float32, torch.device("cuda")) == noise(torch.float16)
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_graphics_card_whose_kernels_sum_in_any_order_is_no_reason_to_refuse_a_cut(name):
    torch.manual_seed(0)
    pictures = torch.randn(8, 3, 224, 224, device="cuda")
    for cut in ("layer1", "layer2", "layer3", "layer4"):
        model = getattr(torchvision.models, name)(num_classes=10).cuda()
        with _attach(model, pictures[:2], cut):
            want = torch.backends.cudnn.deterministic
            model.train()
            model(pictures).sum().backward()
            assert torch.backends.cudnn.deterministic is want
            assert model.fc.weight.grad is not None
