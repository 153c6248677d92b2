"""Augmentation of activations: the formulas by hand, when it is called and when not, and what it is not allowed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from small import CUT, bert, labels, pictures, residual, texts, tokenizer
from torchrecycle import BatchError, recycle
from torchrecycle.augment import Brightness, Compose, Contrast, Mixup, Noise, TokenDrop, apply, channel_of

X, Y = pictures(24), labels(24)
DATA = TensorDataset(X, Y)


def made(tmp_path: Any, augment: Any = None, **arguments: Any) -> Any:
    return recycle(residual(), X[:2], cut=CUT, store=tmp_path / "store", augment=augment, **arguments)


def plus_one(rows: torch.Tensor) -> torch.Tensor:
    return rows + 1


def rows_of(model: Any, inputs: torch.Tensor) -> torch.Tensor:
    """What the cut gives, by hand."""
    with torch.no_grad():
        return model.stages[1](model.stages[0](model.stem(inputs)))


# -- formulas ----------------------------------------------------------------------------------------------------------

TOKENS = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(2))
MAPS = torch.randn(3, 6, 4, 4, generator=torch.Generator().manual_seed(3))


def drawn(seed: int, shape: tuple[int, ...], strength: float) -> torch.Tensor:
    torch.manual_seed(seed)
    return (torch.rand(shape) * 2 - 1) * strength


def test_brightness_adds_a_share_of_the_range_of_the_row():
    torch.manual_seed(0)
    got = Brightness(0.3)(TOKENS)
    b = drawn(0, (3, 1, 1), 0.3)
    for row in range(3):
        low, high = TOKENS[row].min(), TOKENS[row].max()
        as_picture = (TOKENS[row] - low) / (high - low)
        torch.testing.assert_close(got[row], (as_picture + b[row]) * (high - low) + low)


def test_brightness_per_channel_draws_for_each_and_takes_the_range_that_it_is_told():
    for augment, own in ((Brightness(0.3, per="channel"), False), (Brightness(0.3, per="channel range"), True)):
        torch.manual_seed(1)
        got = augment(MAPS)
        b = drawn(1, (3, 6, 1, 1), 0.3)
        for row in range(3):
            for channel in range(6):
                of = MAPS[row, channel] if own else MAPS[row]
                want = MAPS[row, channel] + b[row, channel] * (of.max() - of.min())
                torch.testing.assert_close(got[row, channel], want)


def test_contrast_stretches_about_the_mean():
    torch.manual_seed(0)
    row = Contrast(0.5)(TOKENS)
    c = drawn(0, (3, 1, 1), 0.5)
    torch.manual_seed(0)
    channel = Contrast(0.5, per="channel range")(MAPS)
    d = drawn(0, (3, 6, 1, 1), 0.5)
    for i in range(3):
        torch.testing.assert_close(row[i], TOKENS[i].mean() + (1 + c[i]) * (TOKENS[i] - TOKENS[i].mean()))
        means = MAPS[i].mean((1, 2), keepdim=True)
        torch.testing.assert_close(channel[i], means + (1 + d[i]) * (MAPS[i] - means))


def test_noise_has_the_deviation_that_was_asked_for():
    rows = torch.randn(4, 50, 200) * torch.tensor([0.1, 1.0, 10.0, 100.0])[:, None, None]
    added = Noise(0.2)(rows) - rows
    for row in range(4):
        assert added[row].std() / rows[row].std() == pytest.approx(0.2, rel=0.05)
        assert abs(added[row].mean() / rows[row].std()) < 0.01
    shared = Noise(0.2, per="channel")(rows) - rows
    torch.testing.assert_close(shared, shared[:, :1].expand_as(shared), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(shared[:, :, 0], shared[:, :, 1])


def test_mixup_is_a_weighted_mean_with_a_permutation():
    torch.manual_seed(0)
    mixup = Mixup(2.0)
    got = mixup(MAPS)
    assert mixup.index is not None
    assert sorted(mixup.index.tolist()) == [0, 1, 2]
    torch.testing.assert_close(got, mixup.lam * MAPS + (1 - mixup.lam) * MAPS[mixup.index])


def test_the_weights_of_mixup_are_of_a_beta_distribution():
    torch.manual_seed(0)
    mixup = Mixup(2.0)
    weights = []
    for _ in range(2000):
        mixup(torch.zeros(2, 1))
        weights.append(float(mixup.lam))
    found = torch.tensor(weights)
    assert found.mean() == pytest.approx(0.5, abs=0.02)
    assert found.var() == pytest.approx(1 / 20, rel=0.1)  # of Beta(a, a): 1 / (4 (2a + 1))


def test_tokens_are_dropped_as_often_as_asked_for_and_the_first_stay():
    torch.manual_seed(0)
    rows = torch.randn(200, 50, 4)
    got = TokenDrop(0.3, keep=1)(rows)
    dropped = (got == 0).all(-1)
    assert not dropped[:, 0].any()
    assert dropped[:, 1:].float().mean() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(got[~dropped], rows[~dropped])
    places = TokenDrop(0.3)(MAPS)
    gone = (places == 0).all(1)
    assert gone.any()
    assert torch.equal(places.movedim(1, -1)[~gone], MAPS.movedim(1, -1)[~gone])


def test_one_token_of_each_object_stays():
    rows = torch.randn(500, 3, 4)
    rows[:, 1:] = 0  # one token and padding
    assert torch.equal(TokenDrop(0.9)(rows), rows)
    assert (TokenDrop(0.9)(torch.randn(500, 3, 4)) != 0).any(-1).any(-1).all()


@pytest.mark.parametrize("augment", [Brightness(0.5), Contrast(0.5), Noise(0.5), TokenDrop(0.5)], ids=repr)
def test_padding_counts_for_nothing_and_stays_zero(augment):
    long = torch.cat([TOKENS, torch.zeros(3, 4, 8)], dim=1)
    torch.manual_seed(4)
    padded = augment(long)
    assert not padded[:, 5:].any()
    if not isinstance(augment, (Noise, TokenDrop)):  # these draw for each place
        torch.manual_seed(4)
        torch.testing.assert_close(padded[:, :5], augment(TOKENS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("augment", [Brightness(0.5), Contrast(0.5), Noise(0.5), Mixup(), TokenDrop(0.5)], ids=repr)
def test_the_dtype_stays_and_nothing_becomes_infinite(dtype, augment):
    rows = (TOKENS * 12_000).to(dtype)
    got = augment(rows)
    assert got.dtype is dtype
    if dtype is not torch.float16 or isinstance(augment, (Mixup, TokenDrop)):
        assert got.isfinite().all()


def test_where_channels_are_is_told_by_the_shape_or_by_the_user():
    assert channel_of(torch.empty(2, 7)) == 1
    assert channel_of(torch.empty(2, 5, 7)) == 2
    assert channel_of(torch.empty(2, 7, 4, 4)) == 1
    assert channel_of(torch.empty(2, 4, 4, 7)) == 3
    assert channel_of(torch.empty(2, 5, 7), 1) == 1
    with pytest.raises(BatchError, match="no dimension after the batch"):
        channel_of(torch.empty(2, 5), 0)


def test_compose_does_one_after_the_other():
    torch.manual_seed(0)
    both = Compose([Brightness(0.2), Mixup()])(TOKENS)
    torch.manual_seed(0)
    assert torch.equal(both, Mixup()(Brightness(0.2)(TOKENS)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Brightness(-1),
        lambda: Noise(0.1, per="pixel"),  # pyright: ignore
        lambda: TokenDrop(1.0),
        lambda: Mixup(-0.1),
        lambda: Contrast(float("nan")),
    ],
)
def test_wrong_numbers_are_refused(make):
    with pytest.raises(ValueError):
        make()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Brightness("0.2"), "strength='0.2' is no number from 0 on, such as 0.2"),  # type: ignore
        (lambda: Brightness(float("inf")), "strength=inf is no number"),
        (lambda: Noise(0.1, channels="last"), "channels='last' is no dimension of rows"),  # type: ignore
        (lambda: Noise(0.1, leaves=["a"]), r"leaves=\['a'\] is no list of numbers of tensors, such as \[0\]"),  # type: ignore
        (lambda: TokenDrop("0.1"), "probability='0.1' is no number from 0 to below 1, such as 0.1"),  # type: ignore
        (lambda: TokenDrop(0.1, keep=1.5), "keep=1.5 is no number of tokens, such as 1"),  # type: ignore
        (lambda: Mixup("2"), "alpha='2' is no number from 0 on, such as 2.0"),  # type: ignore
        (lambda: Mixup(True), "alpha=True is no number"),
        (lambda: Compose(Noise(0.1)), r"takes a list of functions.*such as \[Brightness.*, not Noise"),  # type: ignore
        (lambda: Compose([Noise]), r"takes a list of functions.*, not \[<class"),
    ],
    ids=range(10),
)
def test_what_an_augmentation_is_made_of_is_refused_when_it_is_made(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make()


def test_a_class_in_place_of_an_object_of_it_is_refused_before_it_is_called(tmp_path):
    with pytest.raises(
        TypeError, match=r"augment=Brightness is a class: give an object of it, such as Brightness\(0.2"
    ):
        made(tmp_path, Brightness)


def test_a_tensor_that_the_cut_does_not_give_is_refused_and_no_other_is_changed_for_it():
    with pytest.raises(BatchError, match=r"leaves=\[3\], but the cut gives 1 tensors"):
        Noise(0.1, leaves=[3])(TOKENS)
    assert not torch.equal(Noise(0.1, leaves=[0])(TOKENS), TOKENS)
    assert Noise(0.1, leaves=[])(TOKENS) is TOKENS


@pytest.mark.parametrize("end", ["taken away", "another", "detached"])
def test_after_mixup_has_ended_its_loss_mixes_nothing(end, tmp_path):
    mixup = Mixup(2.0)
    recycling = made(tmp_path, Compose([mixup]))
    recycling.model.train()
    recycling.model(X[:8])
    assert mixup.index is not None
    if end == "detached":
        recycling.detach()
    else:
        recycling.augment = None if end == "taken away" else Noise(0.1)
    output = recycling.model(X[:8])
    assert torch.equal(mixup.loss(F.cross_entropy, output, Y[:8]), F.cross_entropy(output, Y[:8]))


# -- in a model --------------------------------------------------------------------------------------------------------


def test_it_is_called_in_training_mode_only_and_never_kept(tmp_path):
    recycling = made(tmp_path, plus_one)
    model = recycling.model
    batch = next(iter(recycling.loader(DATA, batch_size=8)))[0]
    rows = rows_of(model, X[:8])

    def head(leaf: torch.Tensor) -> torch.Tensor:
        return model.head(model.stages[2](leaf).mean((2, 3)))

    model.eval()
    torch.testing.assert_close(model(batch), head(rows))
    torch.testing.assert_close(recycling.predict(DATA, batch_size=24)[:8], head(rows), rtol=1e-4, atol=1e-5)
    model.train()
    for given in (batch, X[:8], batch):
        fresh = copy.deepcopy(model.stages[2])
        torch.testing.assert_close(model(given), model.head(fresh(rows + 1).mean((2, 3))))
    assert recycling.check(X[:8]).difference < 1e-6


@pytest.mark.parametrize(
    "augment", [Brightness(0.3), Noise(0.3, per="channel"), Mixup(), Compose([TokenDrop(0.2), Contrast(0.4)])], ids=repr
)
@pytest.mark.parametrize("precision", [None, "int8"])
def test_raw_and_recycled_batches_get_the_same_under_the_same_seed(augment, precision, tmp_path):
    recycling = made(tmp_path, augment, precision=precision)
    batch = next(iter(recycling.loader(DATA, batch_size=8)))[0]
    recycling.model.train()
    outputs = []
    for given in (batch, X[:8], X[:8]):
        torch.manual_seed(5)
        fresh = {n: b.clone() for n, b in recycling.model.named_buffers()}
        outputs.append(recycling.model(given))
        recycling.model.load_state_dict(fresh, strict=False)
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[1], outputs[2])
    torch.manual_seed(6)
    assert not torch.equal(recycling.model(batch), outputs[0])


def test_without_recycling_it_is_called_as_well(tmp_path, monkeypatch):
    recycling = made(tmp_path, Brightness(0.3))
    batch = next(iter(recycling.loader(DATA, batch_size=8)))[0]
    recycling.model.train()
    torch.manual_seed(0)
    want = recycling.model(batch)
    for switch in ("paused", "off"):
        torch.manual_seed(0)
        if switch == "paused":
            with recycling.paused():
                got = recycling.model(X[:8])
        else:
            monkeypatch.setenv("TORCHRECYCLE", "off")
            got = recycling.model(X[:8])
        assert torch.equal(got, want)
    monkeypatch.delenv("TORCHRECYCLE")
    recycling.detach()
    recycling.model.train()
    assert not torch.allclose(recycling.model(X[:8]), want)


def test_the_attribute_can_be_set_and_taken_away(tmp_path):
    recycling = made(tmp_path)
    batch = next(iter(recycling.loader(DATA, batch_size=8)))[0]
    recycling.model.train()
    plain = recycling.model(batch)
    recycling.augment = plus_one
    assert not torch.equal(recycling.model(batch), plain)
    recycling.augment = None
    assert torch.equal(recycling.model(batch), plain)
    with pytest.raises(TypeError, match="no function"):
        recycling.augment = 0.2  # pyright: ignore
    with pytest.raises(TypeError, match="no function"):
        made(tmp_path, "brightness")


def test_a_gradient_goes_through_to_the_suffix_and_to_what_augments(tmp_path):
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.by = nn.Parameter(torch.zeros(16, 1, 1))

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            return rows + self.by

    shift = Shift()
    recycling = made(tmp_path, shift)
    batch, y = next(iter(recycling.loader(DATA, batch_size=8)))
    recycling.model.train()
    F.cross_entropy(recycling.model(batch), y).backward()
    assert shift.by.grad is not None
    assert shift.by.grad.abs().sum() > 0
    assert all(p.grad is not None for p in recycling.parameters())
    assert all(p.grad is None for p in recycling.model.stem.parameters())


def test_an_epoch_of_training_under_one_seed_is_the_same_twice_and_learns(tmp_path):
    def train() -> list[float]:
        recycling = made(tmp_path, Compose([Brightness(0.2, per="channel"), mixup := Mixup(1.0)]))
        torch.manual_seed(7)
        optimizer = torch.optim.SGD(recycling.parameters(), 0.05)
        losses = []
        recycling.model.train()
        for _ in range(8):
            for x, y in recycling.loader(DATA, batch_size=8, shuffle=True):
                loss = mixup.loss(F.cross_entropy, recycling.model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
        return losses

    first = train()
    assert first == train()
    assert sum(first[-3:]) < sum(first[:3])


# -- mixup's loss ------------------------------------------------------------------------------------------------------


def test_the_loss_of_mixup_is_that_of_both_targets_weighted(tmp_path):
    mixup = Mixup(1.0)
    recycling = made(tmp_path, mixup)
    x, y = next(iter(recycling.loader(DATA, batch_size=8)))
    recycling.model.train()
    output = recycling.model(x)
    lam, index = mixup.lam, mixup.index
    assert index is not None
    want = lam * F.cross_entropy(output, y) + (1 - lam) * F.cross_entropy(output, y[index])
    assert torch.equal(mixup.loss(F.cross_entropy, output, y), want)
    hot = F.one_hot(y, 4).float()
    soft = F.cross_entropy(output, lam * hot + (1 - lam) * hot[index])  # linear in the targets
    torch.testing.assert_close(want, soft)


def test_after_an_evaluation_nothing_is_mixed_into_the_loss(tmp_path):
    mixup = Mixup(1.0)
    for augment in (mixup, Compose([mixup])):
        recycling = made(tmp_path, augment)
        x, y = next(iter(recycling.loader(DATA, batch_size=8)))
        recycling.model.train()
        recycling.model(x)
        assert mixup.index is not None
        recycling.model.eval()
        for batch in (x, X[:8]):
            mixup.index = torch.zeros(8, dtype=torch.int64)
            output = recycling.model(batch)
            assert mixup.index is None
            assert torch.equal(mixup.loss(F.cross_entropy, output, y), F.cross_entropy(output, y))
        recycling.detach()


def test_targets_of_another_batch_are_refused():
    mixup = Mixup()
    mixup(TOKENS)
    with pytest.raises(BatchError, match="8 targets came for a batch of 3"):
        mixup.loss(F.cross_entropy, torch.randn(8, 4), labels(8))
    with pytest.raises(BatchError, match="not a str"):
        mixup.loss(lambda a, b: a.sum(), torch.randn(3, 4), ["a", "b", "c"])


# -- other cuts --------------------------------------------------------------------------------------------------------


def test_texts_of_several_lengths_are_changed_alike_however_they_are_padded(tmp_path):
    tokens = tokenizer()
    data = [{**tokens(text), "labels": i % 2} for i, text in enumerate(texts(12))]

    def collate(items: list[Any]) -> Any:
        return tokens.pad(items, return_tensors="pt")

    example = {n: v for n, v in collate(data[:2]).items() if n != "labels"}
    for augment in (Brightness(0.3), Contrast(0.3), TokenDrop(0.3), Mixup()):
        recycling = recycle(
            bert(),
            example,
            cut="bert.encoder.layer.1",
            store=tmp_path / "store",
            augment=augment,
            mask="attention_mask",
        )
        recycling.model.train()
        recycled = next(iter(recycling.loader(data, batch_size=6, collate_fn=collate)))
        raw = next(iter(DataLoader(data, batch_size=6, collate_fn=collate)))  # pyright: ignore
        found = []
        for batch in (recycled, raw):
            torch.manual_seed(3)
            found.append(recycling.model(**batch).logits)
        assert torch.equal(*found)
        recycling.augment = None
        assert not torch.allclose(recycling.model(**recycled).logits, found[0])
        recycling.detach()


class TimeFirst(nn.Module):
    """Layers that have tokens first and objects second."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x.transpose(0, 1))).mean(0)


def test_objects_come_first_wherever_the_model_has_them(tmp_path):
    x, seen = torch.randn(5, 3, 6), []

    def look(rows: torch.Tensor) -> torch.Tensor:
        seen.append(rows.shape)
        return rows.index_select(0, torch.tensor([1, 0, 2, 3, 4]))

    recycling = recycle(TimeFirst(), x[:2], cut="first", store=tmp_path, augment=look)
    recycling.model.train()
    swapped = recycling.model(x)
    assert seen[-1] == (5, 3, 6)
    recycling.augment = None
    torch.testing.assert_close(swapped, recycling.model(x)[[1, 0, 2, 3, 4]])


class TwoOutputs(nn.Module):
    """A cut that gives two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = TwoOutputs.Inner(), nn.Linear(9, 2)

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(6, 5)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.a(x), self.b(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat(self.first(x), dim=-1))


def test_of_several_tensors_it_must_be_said_which_to_change(tmp_path):
    x = torch.randn(8, 6)
    model = TwoOutputs()
    recycling = recycle(model, x[:2], cut="first", store=tmp_path, augment=Brightness(0.2))
    recycling.model.train()
    with pytest.raises(BatchError, match=r"gives 2 tensors.*leaves=\[0\]"):
        recycling.model(x)
    recycling.augment = lambda rows: [rows[0] + 1, rows[1]]
    with torch.no_grad():
        a, b = model.first(x)
        torch.testing.assert_close(recycling.model(x), model.head(torch.cat([a + 1, b], -1)))
        recycling.augment = Brightness(0.2, leaves=[1])
        assert recycling.model(x).shape == (8, 2)
        recycling.augment = mixup = Mixup()
        got = recycling.model(x)
        both = torch.cat([a, b], -1)
        torch.testing.assert_close(
            got,
            model.head(mixup.lam * both + (1 - mixup.lam) * both[mixup.index]),  # pyright: ignore
        )
    recycling.augment = Brightness(0.2, leaves=[2])
    with pytest.raises(BatchError, match="gives 2 tensors"):
        recycling.model(x)


# -- what it is not allowed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("augment", "words"),
    [
        (lambda rows: rows[:, :4], "gives.*where.*the same form"),
        (lambda rows: rows[:4], "the same form"),
        (lambda rows: rows.double(), "float64"),
        (lambda rows: [rows], "gives list"),
        (lambda rows: None, "gives NoneType"),
        (lambda rows: rows.add_(1), "written into the rows"),
        (lambda rows: rows.numpy(), "gives ndarray"),
    ],
)
def test_another_form_is_refused_in_words(augment, words, tmp_path):
    recycling = made(tmp_path, augment)
    batch = next(iter(recycling.loader(DATA, batch_size=8)))[0]
    recycling.model.train()
    for given in (batch, X[:8]):
        with pytest.raises(BatchError, match=words):
            recycling.model(given)


def test_too_few_tensors_are_refused():
    leaves, objects = [torch.zeros(2, 3), torch.zeros(2, 4)], [(0, 1), (0, 1)]
    with pytest.raises(BatchError, match="gives 1 tensors where a list of 2"):
        apply(lambda rows: rows[:1], leaves, objects)
    with pytest.raises(BatchError, match="gives a Tensor where a list of 2"):
        apply(lambda rows: rows[0], leaves, objects)


def test_vectors_have_no_tokens_and_whole_numbers_no_brightness():
    with pytest.raises(BatchError, match="have no tokens"):
        TokenDrop(0.5)(torch.zeros(4, 8))
    with pytest.raises(BatchError, match="int64"):
        Brightness(0.5)(torch.zeros(4, 8, dtype=torch.int64))


def test_what_comes_after_the_cut_may_be_compiled(tmp_path):
    recycling = made(tmp_path, plus_one)
    model = recycling.model
    batch = next(iter(recycling.loader(DATA, batch_size=8)))[0]
    model.train()
    want = model(batch)
    compiled = torch.compile(model, backend="eager")
    model.stages[2].compile(backend="eager")
    torch.testing.assert_close(compiled(batch), want)
    torch.testing.assert_close(compiled(X[:8]), want)
