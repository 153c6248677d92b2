"""Cross-batch memory: a ring with the last embeddings, and losses between a batch and what is in it, against loops."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses as library_losses
from pytorch_metric_learning import miners as library_miners
from torch import Tensor, nn

from torchrecycle.errors import RecycleError
from torchrecycle.similarity.losses import (
    ArcFaceLoss,
    CenterLoss,
    CircleLoss,
    CosFaceLoss,
    FastAPLoss,
    GroupLoss,
    LossError,
    OnlineContrastiveLoss,
    PytorchMetricLearningWrapper,
    SoftmaxLoss,
    TripletLoss,
    XbmError,
)
from torchrecycle.similarity.xbm import XbmBuffer, XbmConfig, XbmDevice


def _random(rows: int, dim: int, seed: int) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _buffer(size: int, dim: int = 3, **config: Any) -> XbmBuffer:
    return XbmBuffer(XbmConfig(buffer_size=size, **config), dim)


# -- the ring ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sizes", [[2, 2, 2], [3, 3, 3], [5, 5, 5], [1, 4, 2, 3, 5, 1, 1], [7, 2], [2, 12, 3], [0, 3, 0]]
)
def test_the_memory_holds_the_last_objects_oldest_first(sizes: list[int]):
    buffer, expected = _buffer(5), deque[tuple[list[float], int]](maxlen=5)
    numbers = itertools.count()
    for size in sizes:
        groups = torch.tensor([next(numbers) for _ in range(size)], dtype=torch.int64)
        embeddings = groups[:, None] + torch.tensor([0.0, 0.25, 0.5])
        buffer.queue(embeddings, groups)
        expected.extend(zip(embeddings.tolist(), groups.tolist(), strict=True))
        kept, kept_groups = buffer.get()
        assert kept.tolist() == [embedding for embedding, _ in expected]
        assert kept_groups.tolist() == [group for _, group in expected]
        assert len(buffer) == len(expected)
        assert buffer.is_full == (len(expected) == 5)


def test_an_empty_memory_gives_nothing_and_no_stand_ins():
    embeddings, groups = _buffer(5).get()
    assert embeddings.shape == (0, 3)
    assert groups.shape == (0,)


def test_what_was_got_stays_as_it_is_and_what_was_queued_may_change():
    buffer = _buffer(2)
    mine, groups = torch.ones(2, 3), torch.tensor([1, 2])
    buffer.queue(mine, groups)
    mine.zero_()
    groups.zero_()
    kept, kept_groups = buffer.get()
    buffer.queue(5 * torch.ones(2, 3), torch.tensor([3, 4]))
    assert torch.equal(kept, torch.ones(2, 3))
    assert kept_groups.tolist() == [1, 2]


def test_no_gradient_flows_into_the_memory():
    buffer, weight = _buffer(4).double(), torch.ones(3, dtype=torch.float64, requires_grad=True)
    groups = torch.tensor([0, 0, 1, 1])
    first = _random(4, 3, seed=1) * weight
    buffer.queue(first, groups)
    kept, kept_groups = buffer.get()
    assert not kept.requires_grad
    second = _random(4, 3, seed=2).requires_grad_()
    TripletLoss().xbm_loss(second, groups, kept, kept_groups).backward()
    assert second.grad is not None
    assert second.grad.any()
    assert weight.grad is None
    memory = _random(4, 3, seed=3).requires_grad_()  # nor if somebody gives one that has a gradient
    for loss in (TripletLoss(), TripletLoss(mining="all"), OnlineContrastiveLoss(), CircleLoss()):
        loss.xbm_loss(second, groups, memory, groups).backward()
    assert memory.grad is None


@pytest.mark.parametrize("loss", [TripletLoss(), TripletLoss(mining="all"), OnlineContrastiveLoss(), CircleLoss()])
def test_queueing_between_loss_and_backward_changes_no_gradient(loss: GroupLoss):
    groups, gradients = torch.tensor([0, 0, 1, 1]), []
    for queued in (False, True):
        buffer = _buffer(4)
        buffer.queue(_random(4, 3, seed=1), groups)
        embeddings = _random(4, 3, seed=3).float().requires_grad_()
        value = loss.xbm_loss(embeddings, groups, *buffer.get())
        if queued:
            buffer.queue(_random(4, 3, seed=2), groups)
        value.backward()
        gradients.append(embeddings.grad)
    assert torch.equal(*gradients)
    assert gradients[0].any()


def test_the_memory_moves_with_its_module():
    class Trained(nn.Module):
        def __init__(self, config: XbmConfig) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)
            self.memory = XbmBuffer(config, 3)

    moving = Trained(XbmConfig(buffer_size=4))
    moving.memory.queue(torch.ones(2, 3), torch.tensor([1, 2]))
    assert moving.double().memory.get()[0].dtype == torch.float64
    assert moving.memory.get()[1].dtype == torch.int64
    assert moving.memory.get()[1].tolist() == [1, 2]
    meta = moving.to("meta").memory.get()
    assert [tensor.device.type for tensor in meta] == ["meta", "meta"]
    staying = Trained(XbmConfig(buffer_size=4, device=XbmDevice.CPU))
    staying.memory.queue(torch.ones(2, 3), torch.tensor([1, 2]))
    with pytest.raises(NotImplementedError, match="meta"):  # torch's own word: what is on meta cannot come back
        staying.to("meta")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_memory_is_where_the_config_says_and_losses_fetch_it():
    groups = torch.tensor([0, 0, 1, 1], device="cuda")
    for device, expected in (("cpu", "cpu"), ("cuda", "cuda"), ("auto", "cuda")):
        buffer = _buffer(4, device=device).cuda()
        buffer.queue(torch.randn(4, 3, device="cuda"), groups)
        assert [tensor.device.type for tensor in buffer.get()] == [expected, expected]
        for loss in (TripletLoss(), TripletLoss(mining="all"), OnlineContrastiveLoss(), CircleLoss()):
            value = loss.xbm_loss(torch.randn(4, 3, device="cuda"), groups, *buffer.get())
            assert value.device.type == "cuda"


def test_the_memory_is_no_buffer_that_ddp_would_send_around():
    assert not list(_buffer(4).buffers())
    assert not list(_buffer(4).parameters())


# -- state -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queued", [0, 3, 5, 13])
@pytest.mark.parametrize("size", [2, 5, 20])
def test_a_saved_memory_is_restored_and_goes_on_as_before(queued: int, size: int):
    buffer = _buffer(5)
    for i in range(queued):
        buffer.queue(torch.full((1, 3), float(i)), torch.tensor([i]))
    file = io.BytesIO()
    torch.save(buffer.state_dict(), file)
    file.seek(0)
    again = _buffer(size)
    again.queue(torch.full((1, 3), 99.0), torch.tensor([99]))
    again.load_state_dict(torch.load(file, weights_only=True))
    kept = min(queued, 5, size)
    assert again.get()[1].tolist() == list(range(queued - kept, queued))
    for memory in (buffer, again):
        memory.queue(torch.full((1, 3), 50.0), torch.tensor([50]))
    assert again.get()[1].tolist()[-2:] == buffer.get()[1].tolist()[-2:]
    assert torch.equal(again.get()[0][:, 0], again.get()[1].float())


def test_a_memory_travels_in_the_state_of_its_module_and_by_pickle():
    module: Any = nn.ModuleDict({"memory": _buffer(5)})
    module["memory"].queue(torch.ones(2, 3), torch.tensor([7, 8]))
    again: Any = nn.ModuleDict({"memory": _buffer(5)})
    again.load_state_dict(module.state_dict())
    assert again["memory"].get()[1].tolist() == [7, 8]
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert copied["memory"].get()[1].tolist() == [7, 8]
    module["memory"].queue(torch.ones(1, 3), torch.tensor([9]))
    assert len(again["memory"]) == 2


def test_a_saved_memory_of_other_embeddings_is_refused_in_words():
    buffer = _buffer(5)
    buffer.queue(torch.ones(2, 3), torch.tensor([7, 8]))
    with pytest.raises(LossError, match=r"\[batch, 4\] .*\[2, 3\]"):
        _buffer(5, dim=4).load_state_dict(buffer.state_dict())


# -- the losses --------------------------------------------------------------------------------------------------------


def _cosine_distance(a: Tensor, b: Tensor) -> Tensor:
    return (1 - F.cosine_similarity(a, b, dim=0)) / 2


def _sides(e: Tensor, groups: Tensor, memory: Tensor, kept: Tensor) -> list[tuple[list[Tensor], list[Tensor]]]:
    """For each anchor, the distances to its positives and to its negatives in the memory."""
    sides = []
    for row, own in zip(e, groups, strict=True):
        ours = [_cosine_distance(row, m) for m, g in zip(memory, kept, strict=True) if g == own]
        theirs = [_cosine_distance(row, m) for m, g in zip(memory, kept, strict=True) if g != own]
        sides.append((ours, theirs))
    return sides


def _hard_triplets(sides: list[tuple[list[Tensor], list[Tensor]]]) -> Tensor:
    hard = [(max(ours, key=Tensor.item), min(theirs, key=Tensor.item)) for ours, theirs in sides if ours and theirs]
    size = torch.stack([near for _, near in hard]).mean()
    return torch.stack([F.relu((far - near) / size + 0.5) for far, near in hard]).mean()


def _all_triplets(sides: list[tuple[list[Tensor], list[Tensor]]]) -> Tensor:
    every = [F.relu(p - n + 0.5) for ours, theirs in sides for p in ours for n in theirs]
    return torch.stack([one for one in every if one.item() > 0]).mean()


def _semi_hard_triplets(sides: list[tuple[list[Tensor], list[Tensor]]]) -> Tensor:
    each = []
    for ours, theirs in sides:
        for p in ours if theirs else []:
            farther = [n for n in theirs if n.item() > p.item()]
            chosen = min(farther, key=Tensor.item) if farther else max(theirs, key=Tensor.item)
            each.append(F.relu(p - chosen + 0.5))
    return torch.stack(each).mean()


def _online(sides: list[tuple[list[Tensor], list[Tensor]]]) -> Tensor:
    together = torch.stack([max(ours, key=Tensor.item) for ours, _ in sides if ours]).mean()
    away = torch.stack([F.relu(0.5 - min(theirs, key=Tensor.item)) for _, theirs in sides if theirs]).mean()
    return (together + away) / 2


def _online_all(sides: list[tuple[list[Tensor], list[Tensor]]]) -> Tensor:
    together = torch.stack([p for ours, _ in sides for p in ours]).mean()
    return (together + torch.stack([F.relu(0.5 - n) for _, theirs in sides for n in theirs]).mean()) / 2


def _circle(sides: list[tuple[list[Tensor], list[Tensor]]]) -> Tensor:
    each = []
    for ours, theirs in sides:
        if not ours or not theirs:
            continue
        positives, negatives = 1 - 2 * torch.stack(ours), 1 - 2 * torch.stack(theirs)
        up = -256 * (1.25 - positives.detach()).clamp_min(0) * (positives - 0.75)
        down = 256 * (negatives.detach() + 0.25).clamp_min(0) * (negatives - 0.25)
        each.append(F.softplus(up.logsumexp(0) + down.logsumexp(0)))
    return torch.stack([one for one in each if one.item() > 0]).mean()


LOOPS: dict[str, tuple[Callable[[], GroupLoss], Callable[[list[tuple[list[Tensor], list[Tensor]]]], Tensor]]] = {
    "hard triplets": (TripletLoss, _hard_triplets),
    "all triplets": (lambda: TripletLoss(mining="all"), _all_triplets),
    "semi-hard triplets": (lambda: TripletLoss(mining="semi_hard"), _semi_hard_triplets),
    "online contrastive": (OnlineContrastiveLoss, _online),
    "online contrastive, all": (lambda: OnlineContrastiveLoss(mining="all"), _online_all),
    "circle": (CircleLoss, _circle),
}


@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("seed", range(3))
def test_the_loss_with_a_memory_equals_a_loop_with_its_gradient(name: str, seed: int):
    make, oracle = LOOPS[name]
    loss = make()
    groups = torch.tensor([0, 0, 1, 2, 5])  # there is no 5 in the memory
    kept = torch.randint(0, 5, (11,), generator=torch.Generator().manual_seed(seed))
    kept[:3] = torch.tensor([0, 1, 2])
    memory = _random(11, 4, seed + 10)
    found = _random(5, 4, seed).requires_grad_()
    again = found.detach().clone().requires_grad_()
    value, expected = loss.xbm_loss(found, groups, memory, kept), oracle(_sides(again, groups, memory, kept))
    value.backward()
    expected.backward()
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(found.grad, again.grad, rtol=1e-7, atol=1e-9)


def test_the_loss_with_a_memory_is_what_quaterion_gave():
    def waves(rows: int) -> Tensor:
        return torch.sin(torch.arange(rows * 5, dtype=torch.float64) ** 1.5).view(rows, 5)

    groups = torch.arange(12) // 3
    # where the memory's groups are those of the batch, in its order, Quaterion takes it for the batch itself
    value = TripletLoss().xbm_loss(waves(12), groups, 0.7 * waves(20)[8:], groups.flip(0))
    assert value.item() == pytest.approx(2.5600812149400483, abs=1e-6)


def test_the_librarys_losses_take_a_memory_as_its_own_cross_batch_memory_gives_it():
    embeddings, groups = _random(6, 5, seed=1), torch.arange(6) // 2
    memory, kept = _random(9, 5, seed=2), torch.arange(9) // 3
    for loss, miner in (
        (library_losses.SupConLoss(), None),
        (library_losses.MultiSimilarityLoss(), library_miners.MultiSimilarityMiner()),
        (library_losses.TripletMarginLoss(), library_miners.BatchHardMiner()),
    ):
        wrapped = PytorchMetricLearningWrapper(loss, miner)
        assert wrapped.supports_xbm
        theirs = library_losses.CrossBatchMemory(loss, 5, memory_size=9, miner=miner).double()
        theirs.add_to_memory(memory, kept, 9)
        # all of the batch asks, and none of it is put into the memory
        inside = torch.cat([embeddings, torch.empty(0, 5, dtype=torch.float64)])
        expected = theirs(inside, groups, enqueue_mask=torch.zeros(6, dtype=torch.bool))
        torch.testing.assert_close(wrapped.xbm_loss(embeddings, groups, memory, kept), expected)


def test_an_empty_memory_adds_nothing():
    for name, (make, _) in LOOPS.items():
        embeddings = _random(4, 3, seed=1).requires_grad_()
        value = make().xbm_loss(embeddings, torch.arange(4) // 2, *_buffer(5).get())
        value.backward()
        assert value == 0, name
        assert embeddings.grad is not None
        assert not embeddings.grad.any()


def test_a_memory_without_positives_or_of_equal_embeddings_gives_no_nan():
    groups = torch.tensor([0, 0, 1, 1])
    for make, _ in LOOPS.values():
        for memory, kept in (
            (_random(3, 3, seed=2), torch.tensor([7, 8, 9])),
            (_random(3, 3, seed=2), torch.tensor([0, 0, 0])),
            (torch.ones(4, 3).double(), groups),
            (torch.zeros(4, 3).double(), groups),
        ):
            for start in (_random(4, 3, seed=1), torch.ones(4, 3).double(), torch.zeros(4, 3).double()):
                embeddings = start.clone().requires_grad_()
                value = make().xbm_loss(embeddings, groups, memory, kept)
                value.backward()
                assert value.isfinite()
                assert embeddings.grad is not None
                assert embeddings.grad.isfinite().all()


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_a_loss_without_such_a_form_says_so_also_while_the_memory_is_empty():
    embeddings, groups = torch.randn(4, 3), torch.arange(4) // 2
    for loss, name in (
        (ArcFaceLoss(3, 2), "ArcFaceLoss"),
        (CosFaceLoss(3, 2), "CosFaceLoss"),
        (SoftmaxLoss(3, 2), "SoftmaxLoss"),
        (CenterLoss(3, 2), "CenterLoss"),
        (FastAPLoss(), "FastAPLoss"),
        (PytorchMetricLearningWrapper(library_losses.ProxyAnchorLoss(2, 3)), "ProxyAnchorLoss"),
        (PytorchMetricLearningWrapper(library_losses.FastAPLoss()), "FastAPLoss"),
    ):
        assert not loss.supports_xbm
        with pytest.raises(
            NotImplementedError, match=f"{name} cannot be used with cross-batch memory.*TripletLoss"
        ) as e:
            loss.xbm_loss(embeddings, groups, *_buffer(5).get())
        assert type(e.value) is XbmError
        assert isinstance(e.value, RecycleError)


def test_a_loss_of_a_users_own_with_quaterions_method_is_called():
    class Mine(GroupLoss):
        def forward(self, embeddings: Tensor, groups: Tensor) -> Tensor:
            return embeddings.sum()

        def xbm_loss(
            self, embeddings: Tensor, groups: Tensor, memory_embeddings: Tensor, memory_groups: Tensor
        ) -> Tensor:
            return memory_embeddings.sum()

    assert Mine().supports_xbm
    buffer = _buffer(5)
    buffer.queue(torch.ones(2, 3), torch.tensor([1, 2]))
    assert Mine().xbm_loss(torch.ones(2, 3), torch.tensor([1, 2]), *buffer.get()) == 6


def test_what_does_not_fit_is_refused_in_words():
    groups, loss = torch.arange(4) // 2, TripletLoss()
    with pytest.raises(LossError, match="of 3 numbers came, and a memory of embeddings of 5"):
        loss.xbm_loss(torch.randn(4, 3), groups, torch.randn(4, 5), groups)
    with pytest.raises(LossError, match=r"groups of the memory as one whole number for each of the 6"):
        loss.xbm_loss(torch.randn(4, 3), groups, torch.randn(6, 3), groups)
    with pytest.raises(LossError, match=r"embeddings of the memory .*\[batch, dim\]"):
        loss.xbm_loss(torch.randn(4, 3), groups, torch.randn(6), groups)
    with pytest.raises(LossError, match=r"\[batch, 3\] with groups \[batch\]: \[4, 5\] and \[4\] came"):
        _buffer(5).queue(torch.randn(4, 5), groups)
    with pytest.raises(LossError, match=r"\[4, 3\] and \[3\] came"):
        _buffer(5).queue(torch.randn(4, 3), groups[:3])
    with pytest.raises(LossError, match="embedding_size=0"):
        _buffer(5, dim=0)


def test_a_config_has_quaterions_defaults_and_refuses_what_cannot_be():
    config = XbmConfig()
    assert (config.weight, config.buffer_size, config.start_iteration, config.device) == (1.0, 10_000, 1_000, "auto")
    assert XbmConfig(device="cpu").device is XbmDevice.CPU
    wrong: Any
    for wrong, words in (
        ({"buffer_size": 0}, "buffer_size=0"),
        ({"start_iteration": -1}, "start_iteration=-1"),
        ({"weight": -0.5}, "weight=-0.5"),
        ({"device": "tpu"}, "no device 'tpu'.*'cpu', 'cuda' or 'auto'"),
    ):
        with pytest.raises(LossError, match=words):
            XbmConfig(**wrong)


def test_the_loop_of_the_modules_docstring_learns():
    torch.manual_seed(0)
    groups = torch.arange(60) // 6
    objects = torch.randn(60, 12) + 1.5 * torch.randn(10, 12)[groups]
    head, loss = nn.Linear(12, 6), TripletLoss()
    config = XbmConfig(buffer_size=40, start_iteration=5)
    buffer = XbmBuffer(config, embedding_size=6)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.02)
    values = []
    for step in range(120):
        chosen = torch.randperm(60)[:10]
        embeddings = head(objects[chosen])
        value = loss(embeddings, groups[chosen])
        if step >= config.start_iteration:
            memory = loss.xbm_loss(embeddings, groups[chosen], *buffer.get())
            values.append(memory.item())
            value = value + config.weight * memory
        buffer.queue(embeddings, groups[chosen])
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert buffer.is_full
    assert sum(values[-10:]) < 0.5 * sum(values[:10])
