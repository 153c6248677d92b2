"""What a user has on disk becomes objects for a sweep, and each mistake in it one readable line."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import pickle
import sys
import tarfile
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from torchrecycle import RecycleError
from torchrecycle.files import (
    DataError,
    Pictures,
    find_pairs,
    find_pictures,
    find_texts,
    read_table,
)
from torchrecycle.files.decoding import decode, quiet

# ----------------------------------------------------------------------------------------------------- to make


def photo(number: int = 0, size: tuple[int, int] = (24, 16)) -> Image.Image:
    """A picture with some structure, so that its JPEG has bytes to cut off."""
    values = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def packed(image: Image.Image, format_: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def jpeg(number: int = 0) -> bytes:
    return packed(photo(number), "JPEG")


def put(root: Path, files: dict[str, bytes | str]) -> Path:
    """Write files below a folder."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def zoo(classes: str = "cat dog", each: int = 3, ending: str = ".jpg") -> dict[str, bytes | str]:
    return {f"{c}/{i}{ending}": jpeg(10 * n + i) for n, c in enumerate(classes.split()) for i in range(each)}


def tar_of(path: Path, files: Sequence[tuple[str, bytes | str]], mode: Any = "w") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in files:
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def zip_of(path: Path, files: dict[str, bytes | str], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def classes(pictures: Pictures) -> dict[str, str]:
    return {picture.name: picture.label for picture in pictures.items}


def refused(run: Callable[[], Any]) -> str:
    """The message of the error that comes, which must be one line."""
    with pytest.raises(DataError) as caught:
        run()
    message = str(caught.value)
    assert message
    assert message.isprintable(), repr(message)
    assert caught.value.__cause__ is None
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, RecycleError)
    return message


@contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """As another user for whom the file is closed: root may read anything."""
    mode = path.stat().st_mode
    path.chmod(0)
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        path.chmod(mode)


# ------------------------------------------------------------------------------------------- classes by folder


def test_the_class_of_a_picture_is_its_folder_at_any_depth(tmp_path):
    put(tmp_path, {**zoo(), "dog/old/brown/9.JPEG": jpeg(9)})
    pictures = find_pictures(tmp_path)
    assert classes(pictures) == {
        **{f"cat/{i}.jpg": "cat" for i in range(3)},
        **{f"dog/{i}.jpg": "dog" for i in range(3)},
        "dog/old/brown/9.JPEG": "dog",
    }
    assert [picture.name for picture in pictures.items] == sorted(classes(pictures))
    assert pictures.left_out == ()
    assert pictures.items[1].read() == jpeg(1)
    assert pictures.where == f"{tmp_path.parent.name}/{tmp_path.name}, 7 pictures of 2 classes"


def test_hidden_files_and_what_systems_add_are_passed_over_without_a_word(tmp_path):
    added = ["cat/._0.jpg", "__MACOSX/cat/0.jpg", ".git/config", "cat/Thumbs.db", ".cache/0.jpg", ".DS_Store"]
    put(tmp_path, {**zoo(), **dict.fromkeys(added, b"x")})
    pictures = find_pictures(tmp_path)
    assert set(classes(pictures)) == set(zoo())
    assert pictures.left_out == ()


def test_folders_that_are_to_be_left_out_are_no_classes(tmp_path):
    put(
        tmp_path,
        {
            **zoo(),
            "out/plots/0.png": jpeg(7),
            "around/ours/0.png": jpeg(6),
            "cat/kept/0.png": jpeg(8),
            "elsewhere/9.jpg": jpeg(9),
        },
    )
    (tmp_path / "cat" / "link").symlink_to(tmp_path / "elsewhere")
    ours = [
        tmp_path / "around" / "ours",
        tmp_path / "cat" / ".." / "out",
        tmp_path / "cat" / "kept",
        tmp_path / "elsewhere",
        tmp_path / "to come",
    ]
    pictures = find_pictures(tmp_path, leave_out=ours)
    assert set(classes(pictures)) == set(zoo())
    assert pictures.left_out == ()
    assert pictures.identity == find_pictures(put(tmp_path / "plain", zoo())).identity


@pytest.mark.parametrize("held", [["journal/a.json", "results.json"], ["sweep.json"]])
def test_the_results_of_an_earlier_sweep_are_no_class_and_said(tmp_path, held):
    put(tmp_path, {**zoo(), "sweep-a/plots/0.png": jpeg(7), "sweep-a/plots/1.png": jpeg(8)})
    assert find_pictures(tmp_path).where.endswith("8 pictures of 3 classes")
    put(tmp_path / "sweep-a", dict.fromkeys(held, '{"made_by": "torchrecycle sweep", "format": 1}'))
    pictures = find_pictures(tmp_path)
    assert set(classes(pictures)) == set(zoo())
    assert pictures.left_out == ("1 folder with the results of a sweep: sweep-a",)


def test_a_file_of_the_same_name_as_a_sweeps_makes_no_results(tmp_path):
    put(tmp_path, {**zoo(), "cat/sweep.json": '{"made_by": "me"}', "dog/sweep.json": "[no json"})
    assert set(classes(find_pictures(tmp_path))) == set(zoo())


def test_other_files_and_pictures_in_no_class_folder_are_left_out_and_said(tmp_path):
    put(tmp_path, {**zoo(), "cover.png": jpeg(), "cat/a.heic": b"x", "cat/notes.txt": "x", "read.me": "x"})
    pictures = find_pictures(tmp_path)
    assert set(classes(pictures)) == set(zoo())
    assert pictures.left_out == (
        "1 picture in no class folder: cover.png",
        "3 files without an extension of a picture: cat/a.heic, cat/notes.txt and read.me",
    )


@pytest.mark.parametrize("around", ["", "animals/", "./", "./animals/", "a/b/"])
def test_a_tar_is_read_like_the_folder_that_it_packs(tmp_path, around):
    path = tar_of(tmp_path / "animals.tar", [(around + name, data) for name, data in zoo().items()])
    pictures = find_pictures(path)
    clear = around.removeprefix("./")
    assert classes(pictures) == {clear + name: name[:3] for name in zoo()}
    assert [picture.read() for picture in pictures.items] == [zoo()[name] for name in sorted(zoo())]


def test_a_tar_made_by_tar_with_folders_and_links_is_read(tmp_path):
    put(tmp_path / "animals", zoo())
    os.link(tmp_path / "animals/cat/0.jpg", tmp_path / "animals/dog/hard.jpg")
    (tmp_path / "animals/dog/soft.jpg").symlink_to("../cat/1.jpg")
    with tarfile.open(tmp_path / "animals.tar", "w") as tar:
        tar.add(tmp_path / "animals", "animals")
    by_name = {picture.name: picture for picture in find_pictures(tmp_path / "animals.tar").items}
    assert len(by_name) == 8
    assert by_name["animals/dog/hard.jpg"].read() == jpeg(0)
    assert by_name["animals/dog/soft.jpg"].read() == jpeg(1)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_is_read_like_a_tar(tmp_path, method):
    path = zip_of(tmp_path / "animals.ZIP", {f"animals/{n}": d for n, d in zoo().items()}, method)
    pictures = find_pictures(path)
    assert classes(pictures) == {f"animals/{name}": name[:3] for name in zoo()}
    assert [picture.read() for picture in pictures.items] == [zoo()[name] for name in sorted(zoo())]


def test_a_folder_around_the_class_folders_is_seen_through_even_beside_a_cover(tmp_path):
    put(tmp_path, {f"animals/{name}": data for name, data in zoo().items()} | {"animals/cover.jpg": jpeg()})
    pictures = find_pictures(tmp_path)
    assert set(classes(pictures).values()) == {"cat", "dog"}
    assert pictures.left_out == ("1 picture in no class folder: animals/cover.jpg",)


def test_links_are_followed_and_loops_are_not(tmp_path):
    put(tmp_path / "data", zoo())
    put(tmp_path / "more", {"4.jpg": jpeg(4)})
    (tmp_path / "data/cat/more").symlink_to(tmp_path / "more")
    (tmp_path / "data/cat/up").symlink_to(tmp_path / "data")
    (tmp_path / "data/dog/home").symlink_to(tmp_path)
    (tmp_path / "data/dog/self").symlink_to(tmp_path / "data/dog")
    pictures = find_pictures(tmp_path / "data")
    assert set(classes(pictures)) == {*zoo(), "cat/more/4.jpg"}
    assert pictures.left_out == ("3 links to a folder around itself: cat/up, dog/home and dog/self",)


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    put(tmp_path, zoo())
    (tmp_path / "cat/lost.jpg").symlink_to(tmp_path / "gone.jpg")
    message = refused(lambda: find_pictures(tmp_path))
    assert "cannot decode 1 of 7 pictures: cat/lost.jpg (no such file or directory)" in message


# ----------------------------------------------------------------------------------------------- in any process


def _pixel(picture: Any) -> tuple[str, Any]:
    return picture.name, picture.image().getpixel((0, 0))


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_pictures_can_be_pickled_and_read_in_a_spawned_process(tmp_path, kind):
    made = {
        "folder": lambda: put(tmp_path / "f", zoo()),
        "tar": lambda: tar_of(tmp_path / "a.tar", list(zoo().items())),
        "zip": lambda: zip_of(tmp_path / "a.zip", zoo()),
    }
    pictures = find_pictures(made[kind]())
    assert pickle.loads(pickle.dumps(pictures)) == pictures
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(_pixel, pictures.items[:2]) == [_pixel(picture) for picture in pictures.items[:2]]


def test_a_picture_that_is_gone_or_changed_since_is_named(tmp_path):
    pictures = find_pictures(put(tmp_path, zoo()))
    (tmp_path / "cat/0.jpg").unlink()
    (tmp_path / "cat/1.jpg").write_bytes(b"")
    assert refused(pictures.items[0].image) == "cannot read cat/0.jpg: no such file or directory"
    assert (
        refused(pictures.items[1].image)
        == "cat/1.jpg was changed while it was in use. Start again: what is new is computed"
    )


# ------------------------------------------------------------------------------------------------------ identity


def test_the_identity_is_the_same_for_the_same_files_and_another_after_any_change(tmp_path):
    put(tmp_path, zoo())
    labels = tmp_path / "labels.csv"
    seen = [find_pictures(tmp_path).identity]
    assert find_pictures(tmp_path).identity == seen[0]
    os.utime(tmp_path / "cat/0.jpg", ns=(1, 1))
    assert find_pictures(tmp_path).identity == seen[0]
    (tmp_path / "cat/0.jpg").rename(tmp_path / "cat/9.jpg")
    seen.append(find_pictures(tmp_path).identity)
    put(tmp_path, {"dog/8.jpg": jpeg(8)})
    seen.append(find_pictures(tmp_path).identity)
    labels.write_text("file,label\ncat/1.jpg,a\ncat/2.jpg,a\ndog/1.jpg,b\ndog/2.jpg,b\n")
    seen.append(find_pictures(tmp_path, labels=labels).identity)
    labels.write_text("file,label\ncat/1.jpg,a\ncat/2.jpg,a\ndog/1.jpg,c\ndog/2.jpg,c\n")
    seen.append(find_pictures(tmp_path, labels=labels).identity)
    assert len(set(seen)) == len(seen)
    assert all(len(bytes.fromhex(identity)) == 16 for identity in seen)


def test_the_identity_does_not_depend_on_the_order_of_the_table(tmp_path):
    put(tmp_path, zoo())
    rows = [f"{name},{name[:3]}\n" for name in zoo()]
    (tmp_path / "a.csv").write_text("file,label\n" + "".join(rows))
    (tmp_path / "b.csv").write_text("file,label\n" + "".join(reversed(rows)))
    one, two = (find_pictures(tmp_path, labels=tmp_path / name) for name in ("a.csv", "b.csv"))
    assert one.identity == two.identity
    assert one.items == two.items


def test_the_identity_of_a_tar_changes_with_it(tmp_path):
    path = tar_of(tmp_path / "a.tar", list(zoo().items()))
    before = find_pictures(path).identity
    os.utime(path, ns=(1, 1))
    assert find_pictures(path).identity == before
    contents = zoo()
    contents[next(iter(contents))] = jpeg(99)
    assert find_pictures(tar_of(tmp_path / "a.tar", list(contents.items()))).identity != before


def test_another_picture_of_the_same_size_and_time_is_another_identity(tmp_path):
    put(tmp_path, zoo())
    path = tmp_path / "cat/0.jpg"
    before, stamp, data = find_pictures(tmp_path), path.stat(), bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(bytes(data))
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert path.stat().st_size == stamp.st_size
    assert find_pictures(tmp_path).identity != before.identity
    with pytest.raises(DataError, match=r"cat/0.jpg was changed while it was in use"):
        next(picture for picture in before.items if picture.name == "cat/0.jpg").image()


# -------------------------------------------------------------------------------------------- classes by table


def flat(count: int = 6) -> dict[str, bytes | str]:
    return {f"images/{i:05}.jpg": jpeg(i) for i in range(count)}


CARS = "file,class_id,class_name\n" + "".join(f"images/{i:05}.jpg,{i % 2 + 13},Audi TTS\n" for i in range(6))


def find_cars(root: Path, where: str = ".", **more: Any) -> Pictures:
    return find_pictures(root / where, labels=root / "labels.csv", label_column="class_id", **more)


def test_a_table_gives_the_classes_of_the_pictures_in_a_folder_or_a_tar(tmp_path):
    put(tmp_path, {**flat(), "labels.csv": CARS})
    tar_of(tmp_path / "images.tar", list(flat().items()))
    expected = {f"images/{i:05}.jpg": str(i % 2 + 13) for i in range(6)}
    assert classes(find_cars(tmp_path)) == expected
    assert classes(find_cars(tmp_path, "images.tar")) == expected
    where = f"{tmp_path.name}/images.tar, 6 pictures of 2 classes, labels from labels.csv"
    assert find_cars(tmp_path, "images.tar").where == where


@pytest.mark.parametrize(
    ("spelling", "where"),
    [
        ("./images/{}.jpg", "."),
        ("images\\{}.jpg", "."),
        (" images/{}.jpg ", "."),
        ("images/{}.jpg", "images"),
        ("{}.jpg", "."),
        ("{}", "."),
        ("images/{}", "."),
        ("data/images/{}.jpg", "."),
        ("/somewhere/else/images/{}.jpg", "."),
    ],
)
def test_a_table_may_name_files_in_many_ways(tmp_path, spelling, where):
    rows = "".join(f"{spelling.format(f'{i:05}')},{i % 2}\n" for i in range(6))
    put(tmp_path, {**flat(), "labels.csv": "file,class_id\n" + rows})
    pictures = find_cars(tmp_path, where)
    below = "" if where == "images" else "images/"
    assert classes(pictures) == {f"{below}{i:05}.jpg": str(i % 2) for i in range(6)}
    assert pictures.left_out == ()


def test_a_table_may_name_files_by_their_whole_path(tmp_path):
    rows = "".join(f"{tmp_path}/images/{i:05}.jpg,{i % 2}\n" for i in range(6))
    put(tmp_path, {**flat(), "labels.csv": "file,class_id\n" + rows})
    assert len(find_cars(tmp_path, "images").items) == 6


def test_a_picture_found_in_another_folder_than_the_table_says_is_told(tmp_path):
    rows = "".join(f"photos/{i:05}.jpg,{i % 2}\n" for i in range(6))
    put(tmp_path, {**flat(), "labels.csv": "file,class_id\n" + rows})
    pictures = find_cars(tmp_path)
    assert len(pictures.items) == 6
    assert "photos/00000.jpg is images/00000.jpg" in pictures.left_out[0]
    assert "and 3 more" in pictures.left_out[0]


def test_a_name_in_another_folder_never_takes_a_file_that_is_named_itself(tmp_path):
    rows = "test/0.jpg,z\n" + "".join(f"train/{i}.jpg,{'ab'[i % 2]}\n" for i in range(4))
    put(tmp_path, {**{f"train/{i}.jpg": jpeg(i) for i in range(4)}, "labels.csv": "file,class_id\n" + rows})
    message = refused(lambda: find_cars(tmp_path))
    assert "labels.csv names 1 of 5 files" in message
    assert ": test/0.jpg (it holds, for example, train/0.jpg)" in message
    assert classes(find_cars(tmp_path, skip_bad=True))["train/0.jpg"] == "a"


def test_a_file_with_an_extension_that_is_no_pictures_is_read_if_the_table_names_it(tmp_path):
    rows = "".join(f"{i}.jfif,{i % 2}\n" for i in range(4))
    put(tmp_path, {**{f"{i}.jfif": jpeg(i) for i in range(4)}, "labels.csv": "file,class_id\n" + rows})
    assert len(find_cars(tmp_path).items) == 4


def test_pictures_that_the_table_does_not_name_are_left_out_and_counted(tmp_path):
    put(tmp_path, {**flat(11), "labels.csv": CARS})
    pictures = find_cars(tmp_path)
    assert len(pictures.items) == 6
    assert pictures.left_out == (
        "5 pictures that labels.csv does not name: images/00006.jpg, images/00007.jpg, images/00008.jpg and 2 more",
    )


def test_files_that_are_not_there_are_named_and_counted(tmp_path):
    rows = "".join(f"images/{i:05}.jpg,{i % 2}\n" for i in range(10))
    put(tmp_path, {**flat(), "labels.csv": "file,class_id\n" + rows})
    message = refused(lambda: find_cars(tmp_path))
    assert "labels.csv names 4 of 10 files" in message
    assert "images/00006.jpg, images/00007.jpg, images/00008.jpg and 1 more" in message
    assert "--skip-bad" in message
    assert "--file-column" in message
    pictures = find_cars(tmp_path, skip_bad=True)
    assert len(pictures.items) == 6
    assert "names 4 of 10 files" in pictures.left_out[0]


def test_where_no_file_is_there_skip_bad_is_an_error_too(tmp_path):
    put(tmp_path, {**flat(), "labels.csv": CARS.replace(".jpg", ".tiff")})
    message = refused(lambda: find_cars(tmp_path, skip_bad=True))
    assert "no picture is left" in message
    assert "images/00000.tiff" in message


def test_a_name_that_two_files_have_is_an_error_that_names_both(tmp_path):
    put(tmp_path, {**flat(), "other/00003.jpg": jpeg(), "labels.csv": CARS.replace("images/", "")})
    message = refused(lambda: find_cars(tmp_path))
    assert "labels.csv line 5: 00003.jpg may be any of images/00003.jpg and other/00003.jpg" in message
    assert len(find_cars(tmp_path, skip_bad=True).items) == 5


def test_a_file_named_twice_with_one_class_is_dropped_once_and_said(tmp_path):
    put(tmp_path, {**flat(), "labels.csv": CARS + "images/00002.jpg,13,x\n./images/00003.jpg,14,x\n"})
    pictures = find_cars(tmp_path)
    assert len(pictures.items) == 6
    assert pictures.left_out == ("2 rows that name a file again, with the same class: labels.csv lines 8 and 9",)


def test_a_file_named_twice_with_two_classes_is_an_error_that_names_both_lines(tmp_path):
    put(tmp_path, {**flat(), "labels.csv": CARS + "images/00002.jpg,14,x\n"})
    message = refused(lambda: find_cars(tmp_path))
    assert "labels.csv gives images/00002.jpg two classes, '13' in line 4 and '14' in line 8" in message
    assert "images/00002.jpg" not in classes(find_cars(tmp_path, skip_bad=True))


def test_a_tar_with_two_members_of_one_name_is_named(tmp_path):
    path = tar_of(tmp_path / "a.tar", [*zoo().items(), ("./cat/1.jpg", jpeg(77))])
    message = refused(lambda: find_pictures(path))
    assert "holds two files of one name: cat/1.jpg" in message
    pictures = find_pictures(path, skip_bad=True)
    assert {p.name: p for p in pictures.items}["cat/1.jpg"].read() == jpeg(77)
    assert "the last was taken" in pictures.left_out[0]


def test_whole_numbers_are_classes_without_a_point_in_every_kind_of_table(tmp_path):
    put(tmp_path, flat())
    names = [f"images/{i:05}.jpg" for i in range(6)]
    numbers: list[list[float | int | None]] = [[13, 2, 13, 2, 13, 2], [13.0, 2.0, 13.0, 2.0, 13.0, 2.0]]
    for column in numbers:
        table = pyarrow.table({"file": names, "class_id": column})
        pyarrow.parquet.write_table(table, tmp_path / "labels.parquet")
        pictures = find_pictures(tmp_path, labels=tmp_path / "labels.parquet", label_column="class_id")
        assert [picture.label for picture in pictures.items] == ["13", "2"] * 3


# ------------------------------------------------------------------------------------------------ what is wrong


def test_a_folder_that_does_not_exist_is_named_with_what_was_meant(tmp_path):
    put(tmp_path / "cars", zoo())
    assert refused(lambda: find_pictures(tmp_path / "car")) == f"{tmp_path}/car does not exist. Did you mean cars?"
    assert f"{tmp_path}/x/y does not exist" in refused(lambda: find_pictures(tmp_path / "x/y"))


def test_a_folder_without_pictures_is_named_with_what_it_holds(tmp_path):
    put(tmp_path, {f"{name}.txt": "x" for name in "abcde"})
    message = refused(lambda: find_pictures(tmp_path))
    assert message.startswith(f"{tmp_path} holds no pictures (.jpg, .jpeg, ")
    assert message.endswith("it holds 5 files: a.txt, b.txt, c.txt and 2 more")
    (tmp_path / "empty").mkdir()
    assert refused(lambda: find_pictures(tmp_path / "empty")).endswith("it holds no files")


def test_a_folder_with_a_tar_in_it_leads_to_the_tar(tmp_path):
    tar_of(tmp_path / "images.tar", list(zoo().items()))
    assert f"give the file itself: {tmp_path}/images.tar" in refused(lambda: find_pictures(tmp_path))


def test_pictures_without_class_folders_lead_to_folders_or_labels(tmp_path):
    put(tmp_path, {f"{i}.jpg": jpeg(i) for i in range(5)})
    message = refused(lambda: find_pictures(tmp_path))
    assert message.startswith(f"{tmp_path} holds 5 pictures and no class folders.")
    assert message.endswith("--labels TABLE")
    put(tmp_path, {"labels.csv": CARS})
    assert refused(lambda: find_pictures(tmp_path)).endswith(f"--labels {tmp_path}/labels.csv")


def test_one_class_only_is_named(tmp_path):
    message = refused(lambda: find_pictures(put(tmp_path, zoo("cat"))))
    assert f"{tmp_path} has one class only, 'cat', with 3 pictures" in message
    assert "--labels" in message


def test_an_empty_class_folder_is_named_or_left_out(tmp_path):
    put(tmp_path, zoo())
    (tmp_path / "horse").mkdir()
    message = refused(lambda: find_pictures(tmp_path))
    assert f"{tmp_path}: no pictures in the class folder horse (it holds no files)" in message
    assert "--skip-bad" in message
    put(tmp_path, {"horse/a.txt": "x", "ant/b.txt": "x"})
    assert "in 2 class folders ant and horse" in refused(lambda: find_pictures(tmp_path))
    pictures = find_pictures(tmp_path, skip_bad=True)
    assert set(classes(pictures).values()) == {"cat", "dog"}
    assert any("horse" in line for line in pictures.left_out)


def test_an_empty_class_folder_in_a_tar_is_named(tmp_path):
    put(tmp_path / "animals", zoo())
    (tmp_path / "animals/horse").mkdir()
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "animals", "animals")
    assert "the class folder horse" in refused(lambda: find_pictures(tmp_path / "a.tar"))


def test_classes_with_one_member_are_named_or_left_out(tmp_path):
    put(tmp_path, {**zoo(), **{f"{name}/0.jpg": jpeg(3) for name in ("ant", "bee", "cow", "eel")}})
    message = refused(lambda: find_pictures(tmp_path))
    assert "4 of 6 classes have one picture only, and two are needed: 'ant', 'bee', 'cow' and 1 more" in message
    assert "--skip-bad" in message
    pictures = find_pictures(tmp_path, skip_bad=True)
    assert set(classes(pictures)) == set(zoo())
    assert "'ant'" in pictures.left_out[0]


def test_if_only_one_class_has_two_members_skip_bad_is_an_error_too(tmp_path):
    put(tmp_path, {**zoo("cat"), "dog/0.jpg": jpeg(5)})
    assert "fewer than two classes with two pictures are left" in refused(
        lambda: find_pictures(tmp_path, skip_bad=True)
    )


def test_folders_for_training_and_test_are_no_classes(tmp_path):
    put(tmp_path, {f"{part}/{name}": data for part in ("train", "test") for name, data in zoo().items()})
    message = refused(lambda: find_pictures(tmp_path))
    assert "the folders test and train look like parts of a data set" in message
    assert f"{tmp_path}/train" in message
    assert len(find_pictures(tmp_path / "train").items) == 6


def test_folders_named_train_and_test_that_hold_pictures_are_classes(tmp_path):
    assert len(find_pictures(put(tmp_path, zoo("train test"))).items) == 6


def test_pictures_that_cannot_be_decoded_are_named_or_left_out(tmp_path):
    bad = {"cat/cut.jpg": jpeg(4)[:-50], "cat/zero.png": b"", "dog/page.jpg": b"<!doctype html>"}
    bad |= {"dog/junk.gif": b"nothing that is a picture", "dog/lfs.jpg": b"version https://git-lfs.github.com/spec/v1"}
    put(tmp_path, {**zoo(each=40), **bad})
    message = refused(lambda: find_pictures(tmp_path))
    assert message.startswith("cannot decode 5 of 85 pictures: cat/cut.jpg (image file is truncated")
    assert "cat/zero.png (it is empty), dog/junk.gif (it is of no format that PIL knows) and 2 more" in message
    assert "--skip-bad" in message
    pictures = find_pictures(tmp_path, skip_bad=True)
    assert set(classes(pictures)) == set(zoo(each=40))
    assert pictures.left_out[0].startswith("cannot decode 5 of 85 pictures: cat/cut.jpg")


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
def test_a_cut_off_picture_of_any_format_is_found(tmp_path, format_):
    whole = packed(photo(1, (64, 64)), format_)
    put(tmp_path, {**zoo(), "cat/cut.jpg": whole[: len(whole) * 2 // 3], "cat/whole.jpg": whole})
    assert "cannot decode 1 of 8 pictures: cat/cut.jpg (" in refused(lambda: find_pictures(tmp_path))


def test_a_class_that_broken_pictures_leave_with_one_member_is_found_too(tmp_path):
    put(tmp_path, {**zoo("ant cat dog"), "bee/0.jpg": jpeg(), "bee/1.jpg": b""})
    pictures = find_pictures(tmp_path, skip_bad=True)
    assert set(classes(pictures)) == set(zoo("ant cat dog"))
    assert len(pictures.left_out) == 2
    assert "'bee'" in pictures.left_out[1]


def test_a_picture_too_large_to_be_safe_is_named(tmp_path, monkeypatch):
    put(tmp_path, {**zoo(), "cat/large.png": packed(Image.new("1", (3000, 3000)), "PNG")})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000_000)
    message = refused(lambda: find_pictures(tmp_path))
    assert "cat/large.png (it has 3,000 x 3,000 pixels, more than the 5,000,000 that PIL takes for safe)" in message
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1_000_000)
    message = refused(lambda: find_pictures(tmp_path))
    assert "cat/large.png (it has 9,000,000 pixels, more than the 1,000,000 that PIL takes for safe)" in message


@pytest.mark.parametrize(("kind", "tool"), [("gz", "gunzip"), ("bz2", "bunzip2"), ("xz", "unxz")])
def test_a_compressed_tar_is_refused_with_what_unpacks_it(tmp_path, kind, tool):
    for name in (f"a.tar.{kind}", f"a.{kind}.tar"):
        path = tar_of(tmp_path / name, list(zoo().items()), f"w:{kind}")
        assert f"`{tool} {name}`" in refused(lambda path=path: find_pictures(path))


def test_a_tar_that_is_none_or_not_whole_is_refused(tmp_path):
    put(tmp_path, {"a.tar": b"x" * 2048, "a.zip": b"PK\3\4" + b"x" * 99, "a.jpg": jpeg(), "empty.tar": b""})
    assert "cannot be read as a tar" in refused(lambda: find_pictures(tmp_path / "a.tar"))
    assert "cannot be read as a tar" in refused(lambda: find_pictures(tmp_path / "empty.tar"))
    assert "cannot be read as a zip" in refused(lambda: find_pictures(tmp_path / "a.zip"))
    assert "neither a folder nor a tar nor a zip" in refused(lambda: find_pictures(tmp_path / "a.jpg"))


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
def test_a_tar_that_is_cut_off_anywhere_is_refused(tmp_path, share):
    path = tar_of(tmp_path / "a.tar", list(zoo(each=20).items()))
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data.rstrip(b"\0")) * share) // 512 * 512 + 100])
    message = refused(lambda: find_pictures(path))
    assert "a.tar" in message
    assert "cut off" in message or "is it whole?" in message


def test_an_encrypted_zip_is_refused_and_a_damaged_member_named(tmp_path):
    path = zip_of(tmp_path / "a.zip", zoo(), zipfile.ZIP_STORED)
    data = path.read_bytes()
    at = data.index(jpeg(1)) + len(jpeg(1)) // 2
    path.write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])
    assert "cat/1.jpg (its checksum in the zip is another)" in refused(lambda: find_pictures(path))
    central = data.index(b"PK\1\2")
    path.write_bytes(data[: central + 8] + b"\1" + data[central + 9 :])
    assert "is encrypted (cat/0.jpg)" in refused(lambda: find_pictures(path))


def test_what_may_not_be_read_is_named(tmp_path):
    put(tmp_path, {**zoo(), "labels.csv": CARS})
    with unreadable(tmp_path / "cat"):
        assert "permission denied" in refused(lambda: find_pictures(tmp_path))
    with unreadable(tmp_path / "labels.csv"):
        assert "labels.csv: permission denied" in refused(lambda: read_table(tmp_path / "labels.csv", ["file"]))


def test_a_name_that_breaks_lines_stays_in_one_line(tmp_path):
    put(tmp_path, {**zoo(), "cat/a\nb.jpg": b"x", os.fsdecode(b"cat/\xe9.jpg"): b""})
    message = refused(lambda: find_pictures(tmp_path))
    assert "'cat/a\\nb.jpg' (" in message
    assert "\\udce9" in message


# --------------------------------------------------------------------------------------------------- decoding


RED = (200, 30, 30)


def plain_picture(size: tuple[int, int] = (40, 20)) -> Image.Image:
    return Image.new("RGB", size, RED)


def two_colours() -> Image.Image:
    """All of the second colour of a palette of two."""
    image = Image.new("P", (9, 9), 1)
    image.putpalette([0, 0, 0, *RED])
    return image


def close(image: Image.Image, colour: tuple[int, int, int], at: tuple[int, int] = (1, 1)) -> bool:
    assert image.mode == "RGB"
    return bool(np.abs(np.asarray(image)[at[1], at[0]].astype(int) - colour).max() <= 6)


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        (packed(plain_picture(), "JPEG"), RED),
        (packed(plain_picture(), "WEBP", lossless=True), RED),
        (packed(plain_picture(), "GIF"), RED),
        (packed(plain_picture(), "BMP"), RED),
        (packed(plain_picture(), "TIFF", compression="tiff_lzw"), RED),
        (packed(plain_picture().convert("CMYK"), "JPEG"), RED),
        (packed(plain_picture().convert("CMYK"), "TIFF"), RED),
        (packed(plain_picture().quantize(8), "PNG"), RED),
        (packed(Image.new("L", (9, 9), 77), "PNG"), (77, 77, 77)),
        (packed(Image.new("1", (9, 9), 1), "PNG"), (255, 255, 255)),
        (packed(Image.new("RGBA", (9, 9), (0, 0, 0, 0)), "PNG"), (255, 255, 255)),
        (packed(Image.new("RGBA", (9, 9), (0, 0, 0, 51)), "PNG"), (204, 204, 204)),
        (packed(Image.new("LA", (9, 9), (0, 51)), "PNG"), (204, 204, 204)),
        (packed(Image.new("RGBA", (9, 9), (0, 0, 0, 0)), "WEBP"), (255, 255, 255)),
        (packed(two_colours(), "PNG"), RED),
        (packed(two_colours(), "PNG", transparency=1), (255, 255, 255)),
        (packed(two_colours(), "PNG", transparency=bytes([255, 0])), (255, 255, 255)),
        (packed(two_colours(), "GIF", transparency=1), (255, 255, 255)),
        (packed(Image.new("RGB", (9, 9), (1, 2, 3)), "PNG", transparency=(1, 2, 3)), (255, 255, 255)),
        (packed(Image.fromarray(np.full((9, 9), 40000, np.uint16)), "PNG"), (156, 156, 156)),
        (packed(Image.fromarray(np.full((9, 9), 40000, np.uint16)), "TIFF"), (156, 156, 156)),
        (packed(Image.fromarray(np.full((9, 9), 40000, np.int32)), "TIFF"), (156, 156, 156)),
        (packed(Image.fromarray(np.full((9, 9), 0.5, np.float32)), "TIFF"), (128, 128, 128)),
        (packed(Image.fromarray(np.full((9, 9), 100.0, np.float32)), "TIFF"), (100, 100, 100)),
    ],
)
def test_every_kind_of_picture_comes_out_in_rgb(data, colour):
    assert close(decode(data), colour)


def test_dark_pictures_of_16_bits_stay_dark():
    values = np.full((9, 9), 2570, np.uint16)
    assert close(decode(packed(Image.fromarray(values), "PNG")), (10, 10, 10))


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_picture_that_exif_turns_is_turned(format_):
    image = photo(0, (40, 20)).resize((40, 20))
    image.paste((255, 0, 0), (0, 0, 20, 20))
    image.paste((0, 0, 255), (20, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = decode(packed(image, format_, exif=exif))
    assert turned.size == (20, 40)
    top, bottom = np.asarray(turned)[5, 10].astype(int), np.asarray(turned)[35, 10].astype(int)
    assert top[0] > 200 > bottom[0]
    assert bottom[2] > 200 > top[2]


def test_of_a_moving_picture_the_first_frame_counts():
    frames = [Image.new("RGB", (9, 9), colour) for colour in (RED, (0, 200, 0))]
    data = packed(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert close(decode(data), RED)


def test_broken_exif_is_no_reason_to_refuse_a_picture_and_shows_no_warning():
    data = packed(
        plain_picture(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x03\0\xff\xff\xff\xff" * 3
    )
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert close(decode(data), RED)
    assert seen == []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with Image.open(io.BytesIO(data)) as image:
            image.getexif()
    assert seen, "PIL does not warn of this picture, so that the test above shows nothing"


def test_filters_of_warnings_are_as_before_after_many_threads():
    before = list(warnings.filters)
    data = jpeg()
    threads = [threading.Thread(target=lambda: [decode(data) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(warnings.filters) == before


def test_other_warnings_are_heard_while_pictures_are_decoded():
    with quiet(), pytest.warns(UserWarning, match="mine"):
        warnings.warn("mine", stacklevel=1)


# ------------------------------------------------------------------------------------------------------ tables


ROWS: list[dict[str, Any]] = [
    {"text": "first; with, all\tmarks", "label": "a"},
    {"text": 'sec"ond\nline', "label": "b"},
]


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    kind = path.suffix.lower()
    if kind in (".csv", ".tsv"):
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    elif kind in (".jsonl", ".ndjson"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


KINDS = [".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet"]


@pytest.mark.parametrize("kind", [*KINDS, ".CSV", ".JsonL"])
def test_every_kind_of_table_gives_the_same_rows(tmp_path, kind):
    rows = read_table(write_table(tmp_path / f"t{kind}", ROWS), ["label", "text"])
    assert [row.values for row in rows] == ROWS
    lined = kind.lower() in (".csv", ".tsv", ".jsonl", ".ndjson")
    first = 2 if kind.lower() in (".csv", ".tsv") else 1
    assert [row.place for row in rows] == [f"t{kind} {'line' if lined else 'row'} {first + i}" for i in range(2)]


def test_the_line_of_a_row_counts_texts_over_two_lines_and_blank_lines(tmp_path):
    (tmp_path / "t.csv").write_text('text,label\n"one\ntwo",a\n\nthree,b\n')
    assert [row.number for row in read_table(tmp_path / "t.csv", ["text"])] == [2, 5]


@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_separators_byte_order_marks_and_line_ends_are_recognised(tmp_path, mark, encoding, end):
    lines = [f"text{mark} label ", f"Käse{mark}a", f"Öl{mark}b", ""]
    (tmp_path / "t.csv").write_bytes(end.join(lines).encode(encoding))
    rows = read_table(tmp_path / "t.csv", ["text", "label"])
    assert [row.values for row in rows] == [{"text": "Käse", "label": "a"}, {"text": "Öl", "label": "b"}]


def test_a_table_of_one_column_and_a_header_with_another_separator_in_quotes_are_read(tmp_path):
    (tmp_path / "one.csv").write_text("text\na\nb\n")
    assert len(read_table(tmp_path / "one.csv", ["text"])) == 2
    (tmp_path / "two.csv").write_text('"text, long";label\na;b\n')
    assert read_table(tmp_path / "two.csv", ["text, long", "label"])[0].values == {"text, long": "a", "label": "b"}


def test_a_tsv_with_quotes_that_do_not_pair_is_read_as_it_is(tmp_path):
    (tmp_path / "t.tsv").write_text('text\tlabel\n"Wow", she said\ta\n5" nails\tb\n"\tc\n')
    assert [row.values["text"] for row in read_table(tmp_path / "t.tsv", ["text"])] == [
        '"Wow", she said',
        '5" nails',
        '"',
    ]


def test_a_cell_longer_than_pythons_limit_is_read_and_the_limit_restored(tmp_path):
    import csv

    before = csv.field_size_limit()
    (tmp_path / "t.csv").write_text("text,label\n" + "x" * 200_000 + ",a\n")
    assert len(read_table(tmp_path / "t.csv", ["text"])[0].values["text"]) == 200_000
    assert csv.field_size_limit() == before


def test_a_text_with_another_line_end_in_json_lines_is_one_text(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a\u2028b\x85c"}\r\n', encoding="utf-8")
    assert read_table(tmp_path / "t.jsonl", ["text"])[0].values == {"text": "a\u2028b\x85c"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_column_is_named_with_those_that_there_are(tmp_path, kind):
    path = write_table(tmp_path / f"t{kind}", ROWS)
    message = refused(lambda: find_texts(path, text="text", label="labels"))
    assert message == (
        f"t{kind} has no column 'labels': its columns are 'text' and 'label'. Did you mean 'label'? "
        "Name it with --label"
    )


@pytest.mark.parametrize(("asked", "option"), [("file", "--file-column"), ("class", "--label-column")])
def test_the_option_that_names_the_missing_column_is_told(tmp_path, asked, option):
    put(tmp_path, {**flat(), "labels.csv": CARS.replace(asked, "thing", 1)})
    assert option in refused(lambda: find_pictures(tmp_path, labels=tmp_path / "labels.csv", label_column="class_id"))


def test_of_many_columns_eight_are_named(tmp_path):
    write_table(tmp_path / "t.csv", [{f"c{i}": "x" for i in range(20)}])
    message = refused(lambda: read_table(tmp_path / "t.csv", ["text"]))
    assert "'c7' and 12 more" in message
    assert "'c8'" not in message


def test_two_columns_of_one_name_are_refused_if_they_are_asked_for(tmp_path):
    (tmp_path / "t.csv").write_text("text,label,text,x,x\na,b,c,d,e\n")
    assert "has 2 columns named 'text'" in refused(lambda: read_table(tmp_path / "t.csv", ["text"]))
    assert len(read_table(tmp_path / "t.csv", ["label"])) == 1


@pytest.mark.parametrize(
    ("name", "step"), [("t.xlsx", "Save it as CSV"), ("t.csv.gz", "gunzip"), ("t.txt", ".tsv"), ("t", "no extension")]
)
def test_a_table_of_an_unknown_kind_is_refused_with_the_known_ones(tmp_path, name, step):
    put(tmp_path, {name: "text\nx\n"})
    message = refused(lambda: read_table(tmp_path / name, ["text"]))
    assert "known are .csv, .tsv, .jsonl, .ndjson, .json and .parquet" in message
    assert step in message


def test_a_table_that_is_not_there_or_a_folder_is_named(tmp_path):
    put(tmp_path, {"labels.csv": CARS})
    assert "Did you mean labels.csv?" in refused(lambda: read_table(tmp_path / "label.csv", ["x"]))
    (tmp_path / "d.csv").mkdir()
    assert "d.csv is a folder" in refused(lambda: read_table(tmp_path / "d.csv", ["x"]))


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_table_is_named(tmp_path, kind):
    path = tmp_path / f"t{kind}"
    if kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    else:
        path.write_bytes(b"\xef\xbb\xbf\n")
    message = refused(lambda: read_table(path, ["text"]))
    assert f"t{kind} is empty" in message or f"t{kind} has no rows" in message


def test_a_table_with_a_header_and_no_rows_is_named(tmp_path):
    put(tmp_path, {"t.csv": "text,label\n", "t.json": "[]"})
    assert "t.csv has no rows" in refused(lambda: read_table(tmp_path / "t.csv", ["text"]))
    assert "t.json has no rows" in refused(lambda: read_table(tmp_path / "t.json", ["text"]))


def test_bytes_that_are_no_utf_8_are_named_by_their_line(tmp_path):
    put(tmp_path, {"t.csv": b"text,label\nok,a\nK\xe4se,b\n", "t.jsonl": b'{"text": "ok"}\n{"text": "K\xe4se"}\n'})
    assert "t.csv line 3 is not UTF-8 (byte 0xe4)" in refused(lambda: read_table(tmp_path / "t.csv", ["text"]))
    assert "t.jsonl line 2 is not UTF-8 (byte 0xe4)" in refused(lambda: read_table(tmp_path / "t.jsonl", ["text"]))


def test_broken_lines_of_json_are_named_or_left_out(tmp_path):
    good = "".join(json.dumps({"text": f"t{i}", "label": "ab"[i % 2]}) + "\n" for i in range(4))
    put(tmp_path, {"t.jsonl": good + '{"text": \n[1, 2]\n{"text": "x", "label": "a"}\n"x"\n'})
    message = refused(lambda: find_texts(tmp_path / "t.jsonl", text="text", label="label"))
    assert "t.jsonl lines 5, 6 and 8: no JSON object (Expecting value at column 10)" in message
    assert "--skip-bad" in message
    texts = find_texts(tmp_path / "t.jsonl", text="text", label="label", skip_bad=True)
    assert texts.texts == ("t0", "t1", "t2", "t3", "x")
    assert "lines 5, 6 and 8" in texts.left_out[0]


def test_json_nested_without_end_is_a_broken_line(tmp_path):
    put(tmp_path, {"t.jsonl": "[" * 200_000 + "\n"})
    assert "t.jsonl line 1: no JSON object" in refused(lambda: read_table(tmp_path / "t.jsonl", ["text"]))


def test_json_that_is_no_list_of_objects_is_named_and_json_lines_are_recognised(tmp_path):
    put(
        tmp_path, {"a.json": '{"text": 1}', "b.json": "[1", "c.json": '[{"text": 1}, 2]', "d.json": '{"text": 1}\n' * 2}
    )
    assert "a.json holds a dict" in refused(lambda: read_table(tmp_path / "a.json", ["text"]))
    assert "b.json is no JSON" in refused(lambda: read_table(tmp_path / "b.json", ["text"]))
    assert "c.json row 2: no JSON object" in refused(lambda: read_table(tmp_path / "c.json", ["text"]))
    assert len(read_table(tmp_path / "d.json", ["text"])) == 2


def test_rows_with_too_many_or_too_few_cells_are_named_or_left_out(tmp_path):
    put(tmp_path, {"t.csv": "text,label\na,x\nb, c,y\nd,x\ne\nf,y\ng,y\n"})
    message = refused(lambda: find_texts(tmp_path / "t.csv", text="text", label="label"))
    assert "t.csv lines 3 and 5: not as many cells as columns (3 cells under a header of 2)" in message
    assert find_texts(tmp_path / "t.csv", text="text", label="label", skip_bad=True).texts == ("a", "d", "f", "g")


def test_a_quote_that_does_not_end_is_named_by_the_line_where_it_begins(tmp_path):
    put(tmp_path, {"t.csv": 'text,label\na,x\n"b,x\nc,y\n'})
    assert "t.csv line 3 cannot be split into cells" in refused(lambda: read_table(tmp_path / "t.csv", ["text"]))


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    put(tmp_path, {"t.parquet": b"x" * 100, "z.parquet": b""})
    whole = write_table(tmp_path / "whole.parquet", reviews(40)).read_bytes()
    half = len(whole) // 2
    put(tmp_path, {"c.parquet": whole[:half] + b"\xff" * 9 + whole[half + 9 :]})
    put(tmp_path, {"u.parquet": whole.replace(b"text 3", b"tex\xff 3")})
    assert "c.parquet is no Parquet" in refused(lambda: find_texts(tmp_path / "c.parquet", text="text", label="label"))
    assert "u.parquet is no Parquet" in refused(lambda: find_texts(tmp_path / "u.parquet", text="text", label="label"))
    assert "t.parquet is no Parquet" in refused(lambda: read_table(tmp_path / "t.parquet", ["text"]))
    assert "z.parquet is no Parquet" in refused(lambda: read_table(tmp_path / "z.parquet", ["text"]))


def test_without_pyarrow_the_command_that_installs_it_is_told(tmp_path, monkeypatch):
    path = write_table(tmp_path / "t.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert "pip install pyarrow" in refused(lambda: read_table(path, ["text"]))


# ------------------------------------------------------------------------------------------------------ labels


def reviews(count: int = 6, **more: Any) -> list[dict[str, Any]]:
    return [{"text": f"text {i}", "label": "ab"[i % 2], **more} for i in range(count)]


@pytest.mark.parametrize(
    ("value", "why"),
    [(None, "null"), (float("nan"), "NaN"), ("", "empty"), ("  ", "empty"), ("NaN", "'NaN'"), ("null", "'null'"),
     ([1], "a list"), ({"a": 1}, "a dict")],
)  # fmt: skip
def test_a_label_that_is_no_class_is_named_by_its_line(tmp_path, value, why):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*reviews(), {"text": "x", "label": value}]))
    message = refused(lambda: find_texts(path, text="text", label="label"))
    assert f"t.jsonl line 7: no class in column 'label' (it is {why})" in message
    assert "--label" in message
    assert "--skip-bad" in message
    texts = find_texts(path, text="text", label="label", skip_bad=True)
    assert len(texts.texts) == 6
    assert "line 7" in texts.left_out[0]


def test_a_null_among_whole_numbers_of_parquet_does_not_give_them_a_point(tmp_path):
    rows = [{"text": f"t{i}", "label": float(i % 2)} for i in range(6)] + [{"text": "x", "label": float("nan")}]
    texts = find_texts(write_table(tmp_path / "t.parquet", rows), text="text", label="label", skip_bad=True)
    assert set(texts.labels) == {"0", "1"}
    assert "t.parquet row 7" in texts.left_out[0]


def test_a_column_in_which_nearly_every_row_has_its_own_value_is_no_class_even_if_bad_rows_are_skipped(tmp_path):
    rows = [{"text": f"t{i}", "price": i if i < 950 else 5000 + i // 2} for i in range(1000)]
    path = write_table(tmp_path / "t.csv", rows)
    for skip in (False, True):
        message = refused(lambda skip=skip: find_texts(path, text="text", label="price", skip_bad=skip))
        assert "column 'price' looks like no class: 950 of 1,000 rows have a value of their own" in message
        assert message.endswith("--label")


def test_a_column_of_ids_is_no_class_of_pictures(tmp_path):
    rows = "".join(f"images/{i:05}.jpg,{i}\n" for i in range(6))
    put(tmp_path, {**flat(), "labels.csv": "file,class_id\n" + rows})
    message = refused(lambda: find_cars(tmp_path))
    assert "column 'class_id' looks like no class: 6 of 6 rows" in message
    assert "--label-column" in message


def test_a_class_with_one_text_and_a_single_class_are_named(tmp_path):
    path = write_table(tmp_path / "t.csv", [*reviews(), {"text": "x", "label": "rare"}])
    message = refused(lambda: find_texts(path, text="text", label="label"))
    assert "t.csv: a class has one text only, and two are needed: 'rare'" in message
    assert len(find_texts(path, text="text", label="label", skip_bad=True).texts) == 6
    path = write_table(tmp_path / "t.csv", [{"text": f"t{i}", "label": "a"} for i in range(4)])
    message = refused(lambda: find_texts(path, text="text", label="label"))
    assert "t.csv has one class only, 'a', with 4 texts" in message


def test_true_and_false_are_two_classes(tmp_path):
    rows = [{"text": f"t{i}", "label": i % 2 == 0} for i in range(4)]
    texts = find_texts(write_table(tmp_path / "t.parquet", rows), text="text", label="label")
    assert texts.labels == ("True", "False") * 2


# -------------------------------------------------------------------------------------------- texts and pairs


@pytest.mark.parametrize("kind", KINDS)
def test_texts_come_with_their_labels_and_one_identity_from_every_kind_of_table(tmp_path, kind):
    texts = find_texts(write_table(tmp_path / f"t{kind}", reviews()), text="text", label="label")
    assert texts.texts == tuple(f"text {i}" for i in range(6))
    assert texts.labels == ("a", "b") * 3
    assert texts.left_out == ()
    assert texts.where == f"t{kind}, 6 texts of 2 classes"
    other = find_texts(write_table(tmp_path / "other.csv", reviews()), text="text", label="label")
    assert texts.identity == other.identity
    longer = find_texts(write_table(tmp_path / "longer.csv", reviews(7)), text="text", label="label")
    assert texts.identity != longer.identity


def test_a_text_is_kept_with_its_spaces(tmp_path):
    path = write_table(tmp_path / "t.csv", [*reviews(), {"text": " x\n", "label": " a "}])
    texts = find_texts(path, text="text", label="label")
    assert (texts.texts[-1], texts.labels[-1]) == (" x\n", "a")


@pytest.mark.parametrize("value", ["", " \n", None, ["x"], {"x": 1}, "\ud800"])
def test_a_cell_that_is_no_text_is_named_or_left_out(tmp_path, value):
    rows = reviews()
    rows[2]["text"] = value
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = refused(lambda: find_texts(tmp_path / "t.jsonl", text="text", label="label"))
    assert "t.jsonl line 3: no text in column 'text' (it is " in message
    assert "--skip-bad" in message
    assert len(find_texts(tmp_path / "t.jsonl", text="text", label="label", skip_bad=True).texts) == 5


def test_if_no_text_is_left_skip_bad_is_an_error_too(tmp_path):
    path = write_table(tmp_path / "t.jsonl", [{"text": "", "label": "a"}] * 5)
    message = refused(lambda: find_texts(path, text="text", label="label", skip_bad=True))
    assert message.startswith("nothing is left of t.jsonl: t.jsonl lines 1, 2, 3 and 2 more: no text")


def faq(count: int = 4) -> list[dict[str, Any]]:
    return [{"question": f"what is {i}?", "answer": f"it is {i}"} for i in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_come_from_every_kind_of_table(tmp_path, kind):
    pairs = find_pairs(write_table(tmp_path / f"faq{kind}", faq()), left="question", right="answer")
    assert pairs.left == tuple(f"what is {i}?" for i in range(4))
    assert pairs.right == tuple(f"it is {i}" for i in range(4))
    assert pairs.where == f"faq{kind}, 4 pairs"
    other = find_pairs(write_table(tmp_path / "x.csv", faq(5)), left="question", right="answer")
    assert pairs.identity != other.identity


def test_a_pair_that_occurs_again_is_dropped_and_said_and_one_text_may_have_many(tmp_path):
    rows = [*faq(), faq()[1], {"question": "what is 1?", "answer": "another"}, {"question": "same", "answer": "same"}]
    pairs = find_pairs(write_table(tmp_path / "faq.csv", rows), left="question", right="answer")
    assert len(pairs.left) == 6
    assert (pairs.left[-1], pairs.right[-1]) == ("same", "same")
    assert pairs.left_out == ("1 pair that occurs again: faq.csv line 6",)


def test_pairs_without_one_text_are_named_by_line_and_column(tmp_path):
    rows = [*faq(), {"question": "and?", "answer": " "}]
    path = write_table(tmp_path / "faq.csv", rows)
    message = refused(lambda: find_pairs(path, left="question", right="answer"))
    assert "faq.csv line 6: no text in column 'answer' (it is empty)" in message
    assert len(find_pairs(path, left="question", right="answer", skip_bad=True).left) == 4


def test_columns_of_pairs_are_named_by_their_options(tmp_path):
    path = write_table(tmp_path / "faq.csv", faq())
    assert "Name it with --left" in refused(lambda: find_pairs(path, left="q", right="answer"))
    assert "Name it with --right" in refused(lambda: find_pairs(path, left="question", right="a"))
    assert "--left and --right both" in refused(lambda: find_pairs(path, left="answer", right="answer"))


def test_one_pair_is_too_few(tmp_path):
    path = write_table(tmp_path / "faq.csv", faq(1))
    assert "faq.csv has one pair" in refused(lambda: find_pairs(path, left="question", right="answer"))
