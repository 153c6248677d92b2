"""The order in which a model runs, and that nobody can tell that it was watched."""

from __future__ import annotations

import copy
import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from small_models import SAMPLES, images, resnet, sequential, state_of
from torchrecycle import CutError
from torchrecycle.trace import SLOT, clear_slot, random_state, set_random_state, set_slot, slot_of, trace, undisturbed

# -- the private slot of torch.nn.Module, a contract that PyTorch does not promise -------------------------------------


class Doubling(nn.Module):
    def forward(self, x: int) -> int:
        return 2 * x


def test_contract_the_slot_is_consulted_before_hooks_and_forward():
    module = Doubling()
    seen: list[str] = []
    module.register_forward_pre_hook(lambda *_: seen.append("pre"))
    module.register_forward_hook(lambda *_: seen.append("post"))
    set_slot(module, lambda x: -x)
    assert module(3) == -3
    assert not seen
    assert module._call_impl(3) == 6
    assert seen == ["pre", "post"]
    clear_slot(module)
    assert module(3) == 6


def test_contract_copies_and_pickles_drop_the_slot():
    module = nn.Sequential(Doubling())
    set_slot(module[0], lambda x: -x)
    for other in (copy.deepcopy(module), copy.copy(module[0]), pickle.loads(pickle.dumps(module))):
        assert all(slot_of(part) is None for part in other.modules())
        assert other(3) == 6
    assert module(3) == -3


def test_contract_an_untouched_module_has_no_slot_of_its_own_and_clearing_leaves_none():
    module = Doubling()
    before = dict(module.__dict__)
    assert SLOT not in before
    assert getattr(module, SLOT) is None
    set_slot(module, lambda x: -x)
    clear_slot(module)
    clear_slot(module)
    assert module.__dict__ == before


def test_contract_state_dict_moves_and_flags_do_not_touch_the_slot():
    module = sequential()
    slot = module.__class__.__call__
    set_slot(module[0], lambda x: x)
    kept = slot_of(module[0])
    module.eval().train().double().float().requires_grad_(True).zero_grad()
    module.load_state_dict(module.state_dict())
    assert slot_of(module[0]) is kept
    assert all(SLOT not in name for name in module.state_dict())
    assert module.__class__.__call__ is slot


# -- the trace ---------------------------------------------------------------------------------------------------------


def test_calls_come_in_the_order_of_beginning_with_parents_and_ends():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU(), nn.Tanh()), nn.Linear(2, 2))
    run = trace(model, [torch.zeros(1, 2)], {})
    assert [call.name for call in run.calls] == ["", "0", "1", "1.0", "1.1", "2"]
    assert [call.parent for call in run.calls] == [-1, 0, 0, 2, 2, 0]
    assert [call.name for call in sorted(run.calls, key=lambda call: call.end)] == ["0", "1.0", "1.1", "1", "2", ""]
    assert [call.name for call in run.outermost_until(run.of("1.1")[0])] == ["0", "1.0", "1.1"]
    assert [call.name for call in run.outermost_until(run.of("2")[0])] == ["0", "1", "2"]
    assert [call.name for call in run.ancestors(run.of("1.1")[0])] == ["1", ""]


def test_a_module_called_again_has_a_call_for_each_time():
    relu = nn.ReLU()
    model = nn.Sequential(relu, nn.Linear(2, 2), relu)
    run = trace(model, [torch.zeros(1, 2)], {})
    assert [(call.name, call.occurrence) for call in run.calls[1:]] == [("0", 0), ("1", 0), ("0", 1)] or [
        (call.name, call.occurrence) for call in run.calls[1:]
    ] == [("2", 0), ("1", 0), ("2", 1)]


def test_times_and_operations_grow_along_the_run():
    run = trace(resnet().eval(), [images(2)], {})
    ends = [call.seconds[1] for call in sorted(run.calls, key=lambda call: call.end)]
    assert ends == sorted(ends)
    counted = trace(resnet().eval(), [images(2)], {}, count_flops=True, keep_outputs=False)
    first, whole = counted.of("conv1")[0], counted.calls[0]
    assert first.flops[0] == 0
    assert first.flops[1] == 2 * 2 * 64 * 3 * 49 * 16 * 16
    assert whole.flops[1] > first.flops[1]


def test_attributes_that_the_forward_sets_are_named():
    class Counting(nn.Module):
        calls, table = 0, None

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            self.table = x.clone()
            return x

    assert trace(nn.Sequential(Counting()), [torch.zeros(2)], {}).written == {("0", "calls"), ("0", "table")}
    assert not trace(resnet(), [images(2)], {}).written


def test_outputs_are_held_or_only_their_form():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    x = torch.randn(4, 2)
    assert torch.equal(trace(model, [x], {}).of("0")[0].output, model[0](x))
    form = trace(model, [x], {}, keep_outputs=False).of("0")[0].output
    assert form.shape == (4, 3)
    assert form.untyped_storage().nbytes() <= 4


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("one", SAMPLES, ids=lambda one: one.name)
def test_a_trace_leaves_the_model_and_the_generators_as_they_were(one, training):
    model = one.model().train(training)
    before, state = state_of(model), random_state()
    batch = one.batch
    trace(model, *((), batch) if isinstance(batch, dict) else ((batch,), {}))
    assert state_of(model) == before
    assert torch.equal(state[2], random_state()[2])


def test_a_compiled_module_is_seen_as_a_whole_and_a_compiled_model_is_refused():
    model = resnet().eval()
    model.layer2.compile(backend="eager")
    names = {call.name for call in trace(model, [images(2)], {}).calls}
    assert "layer1.0.conv1" in names
    assert not any(name.startswith("layer2.") for name in names)
    model.compile(backend="eager")
    with pytest.raises(CutError, match="compiled"):
        trace(model, [images(2)], {})
    torch._dynamo.reset()


# -- leaving no trace --------------------------------------------------------------------------------------------------


class Restless(nn.Module):
    """Changes everything that a forward can change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("count", torch.zeros(1))
        self.calls, self.seen, self.cache, self.names = 0, [1], {"a": 1}, {"b"}
        self.gone: int = 3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.seen.append(2)
        self.cache["new"] = x
        self.cache["a"] = 5
        self.names.add("c")
        self.count += 1
        self.fresh = x
        self.register_buffer("late", x)
        del self.gone
        self.norm.eval()
        self.norm.train()
        self.norm.weight.requires_grad_(True)
        random.random()
        np.random.rand()
        return self.norm(x) * torch.rand(3)


def _content(model: Restless) -> Any:
    return (
        dict(model.__dict__),
        list(model.seen),
        dict(model.cache),
        set(model.names),
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
    )


def _assert_same(a: Any, b: Any) -> None:
    assert a[:-1] == b[:-1]
    assert a[-1].keys() == b[-1].keys()
    assert all(torch.equal(tensor, b[-1][name]) for name, tensor in a[-1].items())


@pytest.mark.parametrize("fails", [False, True])
def test_attributes_buffers_gradients_and_generators_are_put_back(fails):
    model = Restless().train()
    x = torch.randn(4, 3)
    gradient = torch.ones(3)
    model.norm.weight.grad = gradient
    before, state = _content(model), random_state()
    try:
        with undisturbed(model):
            assert model.norm.weight.grad is None
            model(x).sum().backward()
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    _assert_same(_content(model), before)
    assert model.norm.weight.grad is gradient
    assert torch.equal(gradient, torch.ones(3))
    after = random_state()
    assert state[0] == after[0]
    assert repr(state[1]) == repr(after[1])
    assert torch.equal(state[2], after[2])


def test_the_state_of_the_generators_is_put_back_to_the_draw():
    state = random_state()
    want = random.random(), np.random.rand(), torch.rand(3)
    set_random_state(state)
    got = random.random(), np.random.rand(), torch.rand(3)
    assert want[:2] == got[:2]
    assert torch.equal(want[2], got[2])
