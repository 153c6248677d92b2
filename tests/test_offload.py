"""The prefix put away: memory really falls, everything goes on working, and it comes back where it is needed."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import torchrecycle.bypass.offload as room
from small import CUT, bert, labels, pictures, residual
from torchrecycle import CutError, RecycledTensor, StaleActivationError, StoreError, recycle
from torchrecycle.bypass import device_of

X, Y = pictures(24), labels(24)
DATA = TensorDataset(X, Y)
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU at hand")
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]


def made(tmp_path: Any, device: str = "cpu", model: Any = None, **arguments: Any) -> Any:
    model = residual() if model is None else model
    return recycle(model.to(device), X[:2], **{"cut": CUT, **arguments}, store=tmp_path / "store")


def outputs(recycling: Any, data: Any = DATA) -> torch.Tensor:
    loader = recycling.loader(data, batch_size=8)
    with torch.no_grad():
        return torch.cat([recycling.model(x.to(recycling.device)) for x, _ in loader])


def prefix_of(recycling: Any) -> list[nn.Parameter]:
    return [*recycling.model.stem.parameters(), *recycling.model.stages[:2].parameters()]


def away(recycling: Any) -> list[bool]:
    """Of each parameter of the prefix, whether it is elsewhere than it was."""
    offloaded = recycling._away.offloaded
    if offloaded is None:
        return [False for _ in prefix_of(recycling)]
    return [
        offloaded._in_file(p) if recycling.device.type == "cpu" else p.device.type == "cpu"
        for p in prefix_of(recycling)
    ]


# -- memory ------------------------------------------------------------------------------------------------------------

SCRIPT = """
import gc, re, sys, torch
from torch import nn
from torch.utils.data import TensorDataset
from torchrecycle import recycle

def megabytes():
    gc.collect()
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

torch.manual_seed(0)
layers = [nn.Sequential(nn.Linear(2048, 2048), nn.Tanh()) for _ in range(16)]  # 16 MB each
model = nn.Sequential(*layers, nn.Linear(2048, 3))
x, y = torch.randn(8, 2048), torch.arange(8) % 3
recycling = recycle(model, x[:2], cut="13", store=sys.argv[1])
loader = recycling.loader(TensorDataset(x, y), batch_size=4)
def run():
    with torch.no_grad():
        return torch.cat([model(rows) for rows, _ in loader])
before = run()
full = megabytes()
report = recycling.offload()
print("report", report.nbytes)
print("offloaded", full - megabytes())
after = run()
print("after an epoch", full - megabytes())
with torch.no_grad():
    raw = model(x)
print("after a raw batch", full - megabytes())
after = run()
print("same", torch.equal(before, after) and torch.allclose(raw, before, atol=1e-5))
recycling.detach()
print("detached", full - megabytes())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_memory_of_the_process_falls_by_what_was_moved(tmp_path):
    code = [sys.executable, "-c", SCRIPT, str(tmp_path / "store")]
    found = subprocess.run(code, capture_output=True, text=True, check=True).stdout
    told = dict(line.rsplit(" ", 1) for line in found.splitlines() if " " in line)
    moved = int(told["report"]) / 2**20
    assert moved == pytest.approx(14 * 16, rel=0.01)
    for when in ("offloaded", "after an epoch", "after a raw batch"):
        assert float(told[when]) > 0.9 * moved, found
    assert float(told["detached"]) < 0.1 * moved
    assert told["same"] == "True"


# -- what goes on working ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_it_says_what_it_moved_and_computes_the_same(device, tmp_path):
    recycling = made(tmp_path, device)
    want = outputs(recycling)
    report = recycling.offload()
    assert report.parameters == sum(p.numel() for p in prefix_of(recycling))
    assert report.nbytes == 4 * report.parameters
    assert torch.device(report.source).type == device
    assert report.place == ("a mapped file" if device == "cpu" else "the CPU")
    assert "MB) of the frozen layers from" in str(report)
    assert all(away(recycling))
    assert torch.equal(outputs(recycling), want)
    assert all(away(recycling))
    assert device_of(recycling.model).type == device


@pytest.mark.parametrize("device", DEVICES)
def test_only_the_prefix_is_moved_and_buffers_stay(device, tmp_path):
    recycling = made(tmp_path, device)
    tensors = {n: t.data_ptr() for n, t in (*recycling.model.named_parameters(), *recycling.model.named_buffers())}
    objects = [*map(id, recycling.model.parameters())]
    recycling.offload()
    now = {n: t.data_ptr() for n, t in (*recycling.model.named_parameters(), *recycling.model.named_buffers())}
    moved = {name for name in tensors if tensors[name] != now[name]}
    parameters = dict(recycling.model.named_parameters())
    assert moved == {n for n in parameters if n.startswith(("stem", "stages.0", "stages.1"))}
    assert [*map(id, recycling.model.parameters())] == objects


@pytest.mark.parametrize("device", DEVICES)
def test_misses_and_raw_batches_bring_it_back_until_the_next_iteration(device, tmp_path):
    recycling = made(tmp_path, device)
    loader = recycling.loader(DATA, batch_size=8)
    want = outputs(recycling)
    recycling.offload()
    with torch.no_grad():
        torch.testing.assert_close(recycling.model(X[:8].to(device)), want[:8], rtol=1e-4, atol=1e-5)
        if device == "cuda":
            assert not any(away(recycling))
        next(iter(loader))
        assert all(away(recycling))
        more = TensorDataset(pictures(8, seed=4), Y[:8])
        got = outputs(recycling, more)
        assert all(away(recycling))
        with recycling.paused():
            fresh = recycling.model(more.tensors[0].to(device))
    torch.testing.assert_close(got, fresh, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_a_batch_of_rows_and_objects_is_computed(device, tmp_path):
    recycling = made(tmp_path, device)
    want = outputs(recycling)
    recycling.offload()
    wrapped = recycling.dataset(DATA)
    wrapped.locations = wrapped.locations.clone()
    wrapped.locations[[2, 5]] = -1
    loader = torch.utils.data.DataLoader(wrapped, batch_size=8, collate_fn=recycling.collate())
    with torch.no_grad():
        got = torch.cat([recycling.model(x.to(device)) for x, _ in loader])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_a_change_of_what_is_away_is_found(device, tmp_path):
    recycling = made(tmp_path, device)
    loader = recycling.loader(DATA, batch_size=8)
    recycling.offload()
    batch = next(iter(loader))[0].to(device)
    before = outputs(recycling)
    with torch.no_grad():
        recycling.model.stem.weight.mul_(1.5)
        with pytest.raises(StaleActivationError, match=r"stem\.weight"):
            recycling.model(batch)
    after = outputs(recycling)  # divided anew
    assert not torch.allclose(after, before)
    assert all(away(recycling))
    recycling.model.stem.weight.data[0] = 0  # which no counter sees
    assert not torch.allclose(outputs(recycling), after)
    recycling.onload()
    assert not recycling.model.stem.weight[0].any()


@pytest.mark.parametrize("device", DEVICES)
def test_state_dicts_checkpoints_and_copies_have_the_weights(device, tmp_path):
    recycling = made(tmp_path, device)
    want = {n: t.cpu().clone() for n, t in recycling.model.state_dict().items()}
    recycling.offload()
    file = io.BytesIO()
    torch.save(recycling.model.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, map_location="cpu")
    assert list(loaded) == list(want)
    assert all(torch.equal(loaded[n], want[n]) for n in want)
    other = residual(seed=5)
    other.load_state_dict(recycling.model.state_dict())
    twin = copy.deepcopy(recycling.model).to(device).eval()
    with torch.no_grad():
        a, b = twin(X.to(device)), other.to(device)(X.to(device))
        torch.testing.assert_close(a, outputs(recycling), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    recycling.model.load_state_dict(want)
    assert all(torch.equal(t.cpu(), want[n]) for n, t in recycling.model.state_dict().items())
    outputs(recycling)


@pytest.mark.parametrize("device", DEVICES)
def test_training_is_the_same_with_an_optimiser_made_before(device, tmp_path):
    def train(offload: bool) -> list[float]:
        model = residual().to(device)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        recycling = made(tmp_path, device, model)
        if offload:
            recycling.offload()
        losses = []
        model.train()
        for _ in range(3):
            for x, y in recycling.loader(DATA, batch_size=8):
                loss = F.cross_entropy(model(x.to(device)), y.to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        recycling.detach()
        assert all(p.device.type == device for p in model.parameters())
        return losses

    assert train(True) == train(False)


@pytest.mark.parametrize("device", DEVICES)
def test_detaching_and_onload_leave_everything_where_it_was(device, tmp_path):
    recycling = made(tmp_path, device)
    want = {n: t.clone() for n, t in recycling.model.state_dict().items()}
    for end in (recycling.onload, recycling.onload, recycling.detach):
        recycling.offload()
        end()
        assert not any(away(recycling))
        assert all(torch.equal(t, want[n]) for n, t in recycling.model.state_dict().items())
        assert recycling.bypass.interceptor.offloaded is None
    assert all(p.requires_grad for p in recycling.model.parameters())
    with pytest.raises(CutError, match="detached"):
        recycling.offload()
    recycling.model(X.to(device)).sum().backward()
    assert all(p.grad is not None for p in recycling.model.parameters())


def test_recut_pauses_and_off_work(tmp_path, monkeypatch):
    recycling = made(tmp_path)
    recycling.offload()
    want = outputs(recycling)
    with recycling.paused():
        torch.testing.assert_close(outputs(recycling), want, rtol=1e-4, atol=1e-5)
    monkeypatch.setenv("TORCHRECYCLE", "off")
    torch.testing.assert_close(outputs(recycling), want, rtol=1e-4, atol=1e-5)
    monkeypatch.delenv("TORCHRECYCLE")
    recycling.recut("stages.0")
    torch.testing.assert_close(outputs(recycling), want, rtol=1e-4, atol=1e-5)
    assert away(recycling) == [True] * 2 + [
        p in set(recycling.model.stages[0].parameters()) for p in prefix_of(recycling)[2:]
    ]
    with pytest.raises(CutError):
        recycling.recut("no such place")
    torch.testing.assert_close(outputs(recycling), want, rtol=1e-4, atol=1e-5)
    assert recycling.check(X[:8]).ok


@pytest.mark.parametrize("how", ["and back", pytest.param("cuda", marks=GPU)])
def test_a_model_that_is_moved_afterwards_is_put_away_where_it_is_now(how, tmp_path):
    recycling = made(tmp_path)
    recycling.offload()
    want = outputs(recycling)
    if how == "cuda":
        recycling.model.to("cuda")
        got = outputs(recycling).cpu()
        assert {p.device.type for p in prefix_of(recycling)} == {"cpu"}
    else:
        recycling.model.double().float()
        assert not any(away(recycling))
        got = outputs(recycling)
        assert all(away(recycling))
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_inputs_on_the_device_of_the_first_parameter_are_taken_to_the_suffix(tmp_path, monkeypatch):
    recycling = made(tmp_path)
    recycling.offload()
    seen = []
    monkeypatch.setattr(
        type(recycling), "_where_the_rest_is", lambda self, args, kwargs: seen.append(args) or (args, kwargs)
    )
    outputs(recycling)
    assert all(isinstance(args[0], RecycledTensor) for args in seen)
    assert len(seen) == 3


@GPU
def test_on_a_gpu_a_loop_may_ask_the_first_parameter_for_the_device(tmp_path):
    recycling = made(tmp_path, "cuda")
    want = outputs(recycling)
    recycling.offload()
    first = next(recycling.model.parameters()).device
    assert first.type == "cpu"
    with torch.no_grad():
        got = torch.cat([recycling.model(x.to(first)) for x, _ in recycling.loader(DATA, batch_size=8)])
    assert torch.equal(got, want)


@GPU
def test_on_a_gpu_the_memory_is_free(tmp_path):
    model = nn.Sequential(*[nn.Linear(2048, 2048) for _ in range(8)], nn.Linear(2048, 3)).cuda()
    x = torch.randn(8, 2048)
    recycling = recycle(model, x[:2], cut="6", store=tmp_path)
    before = torch.cuda.memory_allocated()
    report = recycling.offload()
    assert before - torch.cuda.memory_allocated() >= 0.95 * report.nbytes
    assert report.nbytes >= 7 * 2048 * 2048 * 4


# -- what is shared ----------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """A model that reads its first weight at both ends, and whose second and third are one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.second = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = nn.Parameter(self.inner.weight.data)  # one memory, two parameters
        self.late, self.place = nn.Linear(8, 8), nn.Parameter(torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.second(self.inner(self.embed(x) + self.place).relu()).relu()
        return F.linear(self.late(hidden), self.embed.weight.t())


def test_what_both_halves_read_stays_and_what_shares_memory_moves_together(tmp_path):
    torch.manual_seed(0)
    model, x = Tied(), torch.randn(8, 6)
    recycling = recycle(model, x[:2], cut="second", store=tmp_path, share="freeze")
    data = TensorDataset(x)
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    with torch.no_grad():
        want = recycling.predict(data)
        recycling.offload()
        moved = {name for name, p in model.named_parameters() if p.data_ptr() != places[name]}
        assert moved == {"embed.bias", "inner.weight", "inner.bias", "second.weight", "second.bias"}
        assert model.inner.weight.data_ptr() == model.second.weight.data_ptr()
        assert torch.equal(recycling.predict(data), want)
        recycling.detach()
        assert model.inner.weight.data_ptr() == model.second.weight.data_ptr()
        torch.testing.assert_close(model(x), want)


def test_tied_embeddings_of_a_language_model_stay(tmp_path):
    ids = torch.randint(5, 100, (6, 9))
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=120, n_positions=16, n_embd=16, n_layer=3, n_head=2, use_cache=False)
    model: Any = GPT2LMHeadModel(config).eval()
    recycling = recycle(model, {"input_ids": ids[:2]}, cut="transformer.h.1", store=tmp_path, share="freeze")
    place = model.lm_head.weight.data_ptr()
    report = recycling.offload()
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr() == place
    assert report.parameters >= sum(p.numel() for p in model.transformer.h[:2].parameters())


def test_two_recyclings_of_one_model_leave_what_the_other_reads(tmp_path):
    model = residual()
    deep = made(tmp_path / "a", model=model)
    flat = made(tmp_path / "b", model=model, cut="stages.0")
    wanted = outputs(deep), outputs(flat)
    deep.offload()
    assert deep._away.offloaded is not None
    held = {id(p) for p in model.parameters() if deep._away.offloaded._in_file(p)}
    assert held == {id(p) for p in (*model.stem.parameters(), *model.stages[0].parameters())}
    assert torch.equal(outputs(deep), wanted[0])
    assert torch.equal(outputs(flat), wanted[1])
    flat.offload()  # the last that asks governs
    assert torch.equal(outputs(deep), wanted[0])
    assert torch.equal(outputs(flat), wanted[1])
    flat.detach()
    deep.detach()
    with torch.no_grad():
        torch.testing.assert_close(model(X), wanted[0], rtol=1e-4, atol=1e-5)


def test_an_lstm_whose_weights_are_one_memory_stays_whole(tmp_path):
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.head = nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.first(x)[0].mean(1))

    x = torch.randn(8, 7, 6)
    model = Tagger()
    flat = torch.cat([p.detach().reshape(-1) for p in model.first.parameters()])
    at = 0
    for parameter in model.first.parameters():  # as cuDNN lays them
        parameter.data = flat[at : at + parameter.numel()].view_as(parameter)
        at += parameter.numel()
    recycling = recycle(model, x[:2], cut="first", store=tmp_path)
    want = recycling.predict(TensorDataset(x))
    report = recycling.offload()
    assert report.nbytes == flat.numel() * 4
    assert len({p.untyped_storage().data_ptr() for p in model.first.parameters()}) == 1
    assert torch.equal(recycling.predict(TensorDataset(x)), want)
    torch.testing.assert_close(model(x), want, rtol=1e-4, atol=1e-5)


def test_a_text_model_with_padding_goes_on(tmp_path):
    ids = torch.randint(5, 100, (8, 9))
    mask = (torch.arange(9) < torch.arange(2, 10)[:, None]).long()
    data = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids, mask, strict=True)]
    recycling = recycle(
        bert(), {"input_ids": ids[:2], "attention_mask": mask[:2]}, cut="bert.encoder.layer.2", store=tmp_path
    )
    want = recycling.predict(data, batch_size=4).logits
    report = recycling.offload()
    assert report.parameters > 0.9 * sum(p.numel() for p in recycling.bypass.prefix_parameters.values())
    assert torch.equal(recycling.predict(data, batch_size=4).logits, want)


# -- no room -----------------------------------------------------------------------------------------------------------


def test_where_there_is_no_room_everything_stays(tmp_path, monkeypatch):
    recycling = made(tmp_path)
    want = outputs(recycling)

    def full(descriptor: int, nbytes: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room, "_take_space", full)
    with pytest.raises(StoreError, match=r"no .* MB for the frozen layers in .*: No space left.*offload\(folder"):
        recycling.offload()
    assert recycling.bypass.interceptor.offloaded is None
    assert torch.equal(outputs(recycling), want)


def test_a_folder_in_memory_is_no_place(tmp_path, monkeypatch):
    recycling = made(tmp_path)
    with pytest.raises(StoreError, match="is a folder on a disk"):
        recycling.offload(tmp_path / "nowhere")
    if Path("/dev/shm").is_dir():
        with pytest.raises(StoreError, match="would take memory, too"):
            recycling.offload("/dev/shm")
    recycling.offload(tmp_path)
    assert all(away(recycling))


def test_nothing_to_move_is_said(tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 4))
    recycling = recycle(model, X[:2], cut="0", store=tmp_path)
    report = recycling.offload()
    assert report.parameters == report.nbytes == 0
    assert "nothing to move" in str(report)
    outputs(recycling)
    recycling.detach()
