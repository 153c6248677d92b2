"""Several processes train one recycled model: torchrun with DDP, FSDP2, Accelerate.

The scripts that the launchers start lie in ``loops/``. Each process writes down what it has seen, and the tests compare
that with one process that has batches as large as those of both together, and the prefix frozen by hand.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from loops import accelerated, interrupted, shared
from small import CUT, bert, labels, pictures, residual
from torchrecycle import CutError, recycle
from torchrecycle.fill.ranks import Ranks, ReadingOrder

HERE = Path(__file__).parent


def launched(script: str, folder: Path, *arguments: str, restarts: int = 0) -> None:
    """Two processes that torchrun starts, to their end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), "--monitor-interval", "0.1"]
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(HERE / "loops" / script), str(folder), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-6000:]


def seen(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def assert_same(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert list(got) == list(want)
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, **{"rtol": 1e-4, "atol": 2e-5, **tolerance}, msg=name)


# -- which rank reads what ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 7, 40])
@pytest.mark.parametrize("count", [1, 7, 30])
def test_each_rank_reads_every_item_once_and_its_own_first(world, count):
    first = []
    for rank in range(world):
        order = ReadingOrder(count, 4, Ranks(rank, world))
        batches = list(order)
        read = [index for batch in batches for index in batch]
        assert len(batches) == len(order)
        assert sorted(read) == list(range(count))
        own = [index for batch in batches[: order.own] for index in batch]
        assert own == list(range(rank, count, world))
        first += own
        places = order.places()
        assert read == list(range(count)) if places is None else places.tolist() == read
    assert sorted(first) == list(range(count))


def test_the_rest_is_read_from_its_end_so_that_ranks_meet_in_what_is_left():
    assert list(ReadingOrder(10, 2, Ranks(0, 2))) == [[0, 2], [4, 6], [8], [9, 7], [5, 3], [1]]


@pytest.mark.parametrize(
    ("rank", "world", "found"),
    [("1", "2", Ranks(1, 2)), ("2", "2", Ranks()), ("", "2", Ranks()), ("0", "x", Ranks()), (None, None, Ranks())],
)
def test_a_rank_is_what_the_launcher_says_and_else_the_process_is_alone(rank, world, found, monkeypatch):
    for name, value in (("RANK", rank), ("WORLD_SIZE", world)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert Ranks.present() == found


# -- torchrun: filling -------------------------------------------------------------------------------------------------


QUICK = (
    "filled_at_once",
    "filled_alone",
    "other_data_in_each_rank",
    "ddp",
    "ddp_statistics",
    "evaluated",
    "fsdp2",
    "sent_to_another_rank",
)
"""What two processes do in every run of the tests."""

SLOW = (
    "folders_of_their_own",
    "ddp_accumulated",
    "ddp_with_options",
    "ddp_checkpointed",
    "ddp_from_other_weights",
    "ddp_of_uneven_ranks",
    "fsdp2_accumulated",
    "fsdp2_refused",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    launched("together.py", folder, *QUICK)
    return folder


@pytest.fixture(scope="module")
def together(folder: Path) -> list[dict[str, Any]]:
    return seen(folder)


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("more")
    launched("together.py", folder, *SLOW)
    return seen(folder)


@pytest.fixture(scope="module")
def alone() -> dict[str, torch.Tensor]:
    return shared.train_alone()


def test_two_ranks_that_fill_at_once_compute_about_half_each_and_no_row_twice(together):
    found = [rank["filled_at_once"] for rank in together]
    computed = [one["report"][1] for one in found]
    print(f"\nof 48 rows the ranks computed {computed}")
    assert sum(computed) == 48
    assert min(computed) >= 12
    assert [one["misses"] for one in found] == computed
    for one, own in zip(found, computed, strict=True):
        assert one["report"] == (48, own, 48 - own, 0)


def test_each_rank_read_its_own_part_first(together):
    for rank, one in enumerate(found["filled_at_once"] for found in together):
        # A few items are read twice before, to see whether they are the same.
        assert one["read"][16:40] == list(range(rank, 48, 2))
        assert sorted(one["read"][16:]) == list(range(48))


def test_every_rank_ends_with_the_manifest_of_the_data_set_in_its_order(together):
    one, other = (found["filled_at_once"] for found in together)
    data = shared.pictures(48)
    example = torch.stack([picture for picture, _ in data[:2]])
    with recycle(shared.resnet(), example, cut=shared.CUT, store="memory://") as recycling:
        want = recycling.dataset(data).manifest
    assert want is not None
    for found in (one, other):
        assert torch.equal(found["keys"], torch.from_numpy(want.keys))
        assert all(map(torch.equal, found["columns"], shared.columns(want)))


def test_a_rank_fills_alone_while_the_other_has_not_come(together):
    assert [found["filled_alone"]["computed"] for found in together] == [24, 0]


@pytest.mark.slow
def test_ranks_without_a_common_disk_fill_each_its_own(more):
    assert [found["folders_of_their_own"]["computed"] for found in more] == [24, 24]


def test_ranks_with_different_data_get_each_its_own_rows_and_targets(together):
    found = [one["other_data_in_each_rank"] for one in together]
    assert [one["objects"] for one in found] == [11, 15]
    assert sum(one["computed"] for one in found) == 6 + 5 + 9  # the first six are the same
    for one in found:
        assert one["difference"] < 1e-5
        assert one["targets"]
        assert one["misses"] == 0


# -- torchrun: DistributedDataParallel ---------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_ranks_train_what_one_process_trains_with_the_whole_batch(way, together, alone):
    for found in together:
        assert_same(found[way]["weights"], alone)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp_with_options", "ddp_checkpointed", "ddp_from_other_weights"])
def test_so_they_do_with_other_options_checkpoints_within_or_weights_that_are_sent_around(way, more, alone):
    for found in more:
        assert_same(found[way]["weights"], alone)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp_accumulated", "fsdp2_accumulated"])
def test_gradients_are_accumulated_without_sending_them_around(way, more):
    want = shared.train_alone(accumulate=2)
    for found in more:
        assert_same(found[way]["weights"], want)


def test_an_epoch_of_a_rank_is_served_from_the_store(together):
    found = [one["ddp"] for one in together]
    assert [one["hits"] for one in found] == [24, 24]
    assert sum(one["misses"] for one in found) == 24


@pytest.mark.parametrize("way", ["ddp", "ddp_statistics", "fsdp2"])
def test_buffers_and_parameters_that_are_sent_around_raise_no_false_alarm(way, together):
    # Once at each of two iterations, and maybe once more as time passes; not at each of the six forwards.
    assert all(2 <= one[way]["looks"] <= 4 for one in together)


def test_statistics_behind_the_cut_move_as_without_us_and_those_before_it_not_at_all(together):
    start = shared.resnet().state_dict()
    for found in (one["ddp_statistics"] for one in together):
        assert_same(found["weights"], found["by hand"], rtol=1e-3, atol=1e-4)
        assert found["again"] == 0
        for name, tensor in start.items():
            moved = not torch.equal(found["weights"][name], tensor)
            assert moved == (not name.startswith(shared.PREFIX)), name


@pytest.mark.slow
def test_a_rank_whose_weights_ddp_replaces_takes_the_rows_of_these(more):
    found = [one["ddp_from_other_weights"] for one in more]
    assert found[0]["before"] != found[1]["before"]
    assert {one["after"] for one in found} == {found[0]["before"]}
    assert [one["hits"] for one in found] == [24, 24]


@pytest.mark.slow
def test_ranks_may_have_different_numbers_of_batches_under_join(more):
    found = [one["ddp_of_uneven_ranks"] for one in more]
    assert [one["batches"] for one in found] == [2, 3]
    assert all(bool(one["gradient"].isfinite().all()) for one in found)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_wrapped_model_evaluates_rows_and_raw_batches_in_all_ranks_or_in_one(rank, together):
    found = together[rank]["evaluated"]
    assert len(found) == (5 if rank == 0 else 3)
    assert all(difference < 1e-5 for difference in found.values()), found


def test_a_recycled_batch_is_not_sent_to_another_rank(together):
    for found in (one["sent_to_another_rank"] for one in together):
        for operation in ("broadcast", "all_gather", "all_reduce"):
            kind, words = found[operation]
            assert kind == "BatchError"
            assert "each process finds the rows of its own batches" in words
            assert "dispatch_batches=False" in words


@pytest.fixture
def _one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
def test_what_trains_since_a_recut_and_ddp_does_not_average_is_refused_until_it_is_put_around_anew(tmp_path):
    model, data = residual(), list(zip(pictures(8), labels(8), strict=True))
    recycling = recycle(model, pictures(2), cut=CUT, store=tmp_path / "store")
    loader, wrapped = recycling.loader(data, batch_size=4), DistributedDataParallel(model)

    def train(wrapped: Any) -> None:
        for x, y in loader:
            cross_entropy(wrapped.train()(x), y).backward()

    train(wrapped)
    recycling.recut("stem")
    with pytest.raises(
        CutError, match=r"'stages.0.conv.weight' and \d+ more train since recut\(\).*Wrap the model anew"
    ):
        train(wrapped)
    with torch.no_grad():
        assert len([wrapped.eval()(x) for x, _ in loader]) == 2, "nothing is trained"
    train(DistributedDataParallel(model))
    assert model.get_parameter("stages.0.conv.weight").grad is not None


@pytest.mark.usefixtures("_one_process")
def test_the_fsdp2_plugin_of_accelerate_shards_the_model_itself_and_is_refused_in_words(tmp_path):
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    accelerator = Accelerator(cpu=True)
    # On CPUs, Accelerate itself takes DDP in its place.
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    model = bert()
    recycling = recycle(model, accelerated.example(), cut=accelerated.CUT, store=tmp_path / "store")
    loader = recycling.loader(accelerated.texts(), **accelerated.shuffled(4))
    batch = next(iter(loader))
    sharded = fsdp2_prepare_model(accelerator, model)
    for call in (lambda: sharded(**batch), lambda: next(iter(loader))):
        with pytest.raises(CutError, match=r"the model was sharded with fully_shard .*each module after the cut"):
            call()


# -- torchrun: FSDP2 ---------------------------------------------------------------------------------------------------


def test_of_a_model_whose_suffix_is_sharded_the_prefix_is_whole_in_each_rank(together):
    for found in (one["fsdp2"] for one in together):
        assert found["kinds"] == ["DTensor", "Tensor"]
        assert found["hits"] == 24


def test_a_call_that_was_not_made_before_sharding_is_proven_on_the_sharded_model(together):
    assert all(one["fsdp2"]["finite"] for one in together)


@pytest.mark.slow
def test_so_it_is_where_parameters_are_given_back_after_each_forward(more):
    assert all(one["fsdp2_accumulated"]["finite"] for one in more)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_checkpoint_of_a_sharded_suffix_loads_into_a_plain_model_and_through_its_files(together, folder, alone):
    from torch.distributed.checkpoint import FileSystemReader, load

    plain = shared.resnet(seed=5)
    plain.load_state_dict(together[0]["fsdp2"]["whole"])
    assert_same(plain.state_dict(), alone)
    again = shared.resnet(seed=6).state_dict()
    load({"model": again}, storage_reader=FileSystemReader(folder / "fsdp2" / "checkpoint"), no_dist=True)
    assert_same(again, alone)


@pytest.mark.slow  # test_handling.py has the root and the prefix in each run
@pytest.mark.parametrize("part", ["the root", "the root but the prefix", "the prefix"])
@pytest.mark.parametrize("way", ["a batch of rows", "a raw batch", "an epoch", "fill"])
def test_sharding_what_holds_the_prefix_is_refused_in_words(part, way, more):
    for found in (one["fsdp2_refused"] for one in more):
        kind, words = found[f"{part}: {way}"]
        assert kind == "CutError"
        assert re.search(r"sharded with fully_shard after attaching.*Shard each module after the cut by itself", words)


# -- torchrun: ranks that die ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def after_two_deaths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted")
    launched("interrupted.py", folder, restarts=2)
    return folder


def test_a_run_whose_rank_was_killed_amid_filling_fills_only_the_rest(after_two_deaths):
    assert not list(after_two_deaths.glob("filled0-*.pt"))
    found = [torch.load(after_two_deaths / f"filled1-{rank}.pt") for rank in range(2)]
    there = found[0]["there"]
    print(f"\n{there} of {interrupted.OBJECTS} rows were there after the first death; then computed {found}")
    # Of the killed rank's items all but those of its last batches, and something of the other's.
    assert interrupted.KILLED_AT_ITEM - 2 <= there < interrupted.OBJECTS
    assert [one["there"] for one in found] == [there, there]
    assert sum(one["computed"] for one in found) == interrupted.OBJECTS - there


def test_a_run_whose_rank_was_killed_amid_training_resumes_and_fills_nothing(after_two_deaths):
    for rank in range(2):
        filled = torch.load(after_two_deaths / f"filled2-{rank}.pt")
        assert filled == {"there": interrupted.OBJECTS, "computed": 0}
        found = torch.load(after_two_deaths / f"rank{rank}.pt")
        assert found["first"] == 1
        assert (found["hits"], found["misses"]) == (2 * interrupted.OBJECTS // 2, 0)
        assert found["rows"] == interrupted.OBJECTS


def test_after_two_deaths_the_weights_are_those_of_one_process_that_nobody_interrupted(after_two_deaths):
    want = interrupted.trained_alone()
    for rank in range(2):
        assert_same(torch.load(after_two_deaths / f"rank{rank}.pt")["weights"], want)


def test_what_killed_ranks_had_claimed_is_cleared_away(after_two_deaths):
    assert list((after_two_deaths / "store").glob("*/about.json"))
    assert not list((after_two_deaths / "store").glob("*/claims"))


# -- Accelerate --------------------------------------------------------------------------------------------------------
# ``accelerate launch`` starts several processes on CPUs through MPI only; torchrun starts the same script.


@pytest.fixture(scope="module")
def accelerate(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("accelerated")
    launched("accelerated.py", folder)
    return seen(folder)


@pytest.mark.parametrize("way", ["in_shards", "split"])
def test_accelerate_trains_what_one_process_trains_with_the_whole_batch(way, accelerate):
    want = accelerated.trained_alone()
    for found in (one[way] for one in accelerate):
        assert found["kind"] == "DistributedDataParallel"
        assert found["hits"] == accelerated.TEXTS
        assert_same(found["weights"], want)
    assert sum(one[way]["misses"] for one in accelerate) == accelerated.TEXTS


def test_accelerate_accumulates_gradients(accelerate):
    want = accelerated.trained_alone(accumulate=2)
    for found in accelerate:
        assert_same(found["accumulated"]["weights"], want)


def test_accelerate_gathers_the_predictions_of_rows_and_of_raw_batches(accelerate):
    want = accelerated.predicted_alone(21)
    for rank, found in enumerate(one["evaluated"] for one in accelerate):
        torch.testing.assert_close(found["rows"], want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["raw"], want, rtol=1e-4, atol=1e-5)
        # Without even batches the last is rank 1's alone: batches 0, 2 and 4, or 1, 3 and 5.
        own = [n for n in range(21) if n // accelerated.BATCH % 2 == rank]
        torch.testing.assert_close(found["own rows"], want[own], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["own raw"], want[own], rtol=1e-4, atol=1e-5)
        assert found["hits"] == len(own)


def test_a_state_that_accelerate_saved_is_loaded_and_trains_on_as_before(accelerate):
    for found in (one["resumed"] for one in accelerate):
        assert_same(found["got"], found["want"], rtol=0, atol=1e-6)
        assert found["hits"] == 3 * accelerated.TEXTS // 2
    assert sum(one["resumed"]["misses"] for one in accelerate) == accelerated.TEXTS


def test_a_loader_that_accelerate_has_made_anew_fills_anew_when_the_prefix_has_moved(accelerate):
    for found in (one["other_weights_loaded"] for one in accelerate):
        assert found == {"moved": True, "hits": accelerated.TEXTS // 2}


def test_of_a_stream_each_rank_of_accelerate_keeps_and_finds_its_share(accelerate):
    want = accelerated.trained_alone(shuffle=False)
    for found in (one["stream"] for one in accelerate):
        assert_same(found["weights"], want)
        assert found["hits"][0] == 0
        assert found["hits"][1] >= accelerated.BATCH


def test_batches_that_rank_0_would_read_for_all_are_refused_in_words(accelerate):
    kind, words = accelerate[0]["dispatched"]["refused"]
    assert kind == "BatchError"
    assert "give it dispatch_batches=False" in words
    assert accelerate[1]["dispatched"]["refused"][0] != "nothing"


class Turning(Dataset[Any]):
    """Other pictures in each epoch, of which it is told."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return pictures(8, seed=self.epoch)[index], int(labels(8)[index])


def test_a_data_set_that_is_told_of_epochs_is_told_through_us_and_read_anew():
    model, data = residual(), Turning()
    with recycle(model, pictures(2), cut=CUT, store="memory://") as recycling, torch.no_grad():
        loader = DataLoader(recycling.dataset(data), 8, collate_fn=recycling.collate())
        for epoch in (0, 3, 0):
            loader.dataset.set_epoch(epoch)  # pyright: ignore
            assert data.epoch == epoch
            (got,) = [model(x) for x, _ in loader]
            assert torch.equal(got, model(pictures(8, seed=epoch)))
        assert recycling.stats.hits == 24
