"""Labels: every spelling of a number is that number, and what is no class of the classifier raises or is mapped."""

import unicodedata
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from aha.data import ImageFolder, Part, Readable, Scenes, fit_labels
from aha.source import Source

WNIDS = ("n01440764", "n02102040", "n02979186")  # ImageNet's classes 0, 217, 482


def write(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), 90, np.uint8)).save(path)


def folders(root, *names):
    """A data set of class folders with one image each."""
    for name in names:
        write(root / name / "a.png")
    return ImageFolder(root, image_size=8)


def classifier(classes, names=None):
    return SimpleNamespace(num_classes=classes, class_names=names, name="net", source={}, module=None)


def labels(data):
    return [label for _, label in data.samples]


def quietly(data, clf):
    """Fitted without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return fit_labels(data, clf)


def table(root, content, encoding="utf-8", images=("a.png", "b.png")):
    for name in images:
        write(root / name)
    (root / "labels.csv").write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
    return root


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("a.png,7.0\nb.png,10.0", [7, 10]),
        ("a.png,07\nb.png,7.", [7, 7]),
        ("a.png, +3 \nb.png,-1.0", [3, -1]),
        ("a.png,1e2\nb.png,2", [100, 2]),
        ('"a.png","7"\n"b.png","cat"', None),
        ('a.png,"tench, Tinca"\nb.png,crane', [1, 0]),
        ("a.png,cat\nb.png,Ant", [1, 0]),
        ("a.png,1\n\n,\nb.png,2\na.png,1.0", [1, 2]),
        ("b.png,5\n./a.png,2\nsub/../a.png,2", [5, 2]),
        ("a.png,7.5", None),
        ("a.png,nan", None),
        ("a.png,inf", None),
        ("a.png,1e400", None),
        ("a.png,-2", None),
        ("a.png,", None),
        ("a.png,1\na.png,2", None),
        ("a.png,1\n./a.png,2", None),
        ("a.png,tench, Tinca", None),
        ('a.png,"tench', None),
        ("../a.png,1", None),
        ("sub/../../a.png,1", None),
        ("sub,1", None),
    ],
)
def test_labels_files(tmp_path, rows, expected):
    root = table(tmp_path / "in", f"file,label\n{rows}\n")
    (root / "sub").mkdir()
    write(tmp_path / "a.png")
    if expected is not None:
        assert labels(ImageFolder(root)) == expected
        return
    with pytest.raises(ValueError, match=r"labels\.csv, line \d: ") as caught:
        ImageFolder(root)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "encoding"),
    [
        ("file,label\na.png,7\n", "utf-8-sig"),
        ("file;label\na.png;7\n", "utf-8"),
        ("file;label\na.png;7,0\n", "utf-8"),
        ("file\tlabel\na.png\t7\n", "utf-8"),
        ("split; File ; LABEL \ntrain; a.png ; 7 \n", "utf-8"),
        ("label,file\r\n7,a.png\r\n", "utf-8"),
    ],
)
def test_other_tables(tmp_path, content, encoding):
    assert labels(ImageFolder(table(tmp_path, content, encoding))) == [7]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
def test_other_encodings_name_the_file(tmp_path, encoding):
    with pytest.raises(ValueError, match=r"labels\.csv cannot be read .*: save it as UTF-8$"):
        ImageFolder(table(tmp_path, "file,label\na.png,é\n", encoding))


def test_absolute_paths_are_meant(tmp_path):
    write(tmp_path / "out" / "x.png")
    root = table(tmp_path / "in", f"file,label\n{tmp_path}/out/x.png,1\nsub\\c.png,2\n", images=("sub/c.png",))
    data = ImageFolder(root, masks=None)
    assert data.samples == [(tmp_path / "out" / "x.png", 1), (root / "sub" / "c.png", 2)]


def test_accents_are_one_spelling(tmp_path):
    composed, apart = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    table(tmp_path, f"file,label\na.png,{composed}\nb.png,{apart}\n{composed}.png,x\n", images=("a.png", "b.png"))
    write(tmp_path / f"{apart}.png")
    assert labels(ImageFolder(tmp_path)) == [0, 0, 1]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ([str(i) for i in range(12)], sorted(range(12), key=str)),
        (["007", "10", "2"], [7, 10, 2]),
        (["7.0", "8"], [7, 8]),
        (["-1", "3"], [-1, 3]),
        (["7up", "cola"], [0, 1]),
    ],
)
def test_folders_named_by_numbers(tmp_path, names, expected):
    data = folders(tmp_path, *names)
    assert labels(data) == expected
    assert data.labelled_by == ("names" if "cola" in names else "numbers")
    assert data.class_names == (names if "cola" in names else None)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("7", "07"), "'07' and '7' are one class"),
        (("cat", "cat "), "'cat' and 'cat ' are one class"),
        (("1", "cat"), "both numbers and names ('1', 'cat')"),
        (("7.5", "1"), "label '7.5' is not an integer"),
        (("nan", "1"), "label 'nan' is not an integer"),
        (("-2", "1"), "label '-2' is not an integer"),
    ],
)
def test_folders_that_are_no_labels(tmp_path, names, says):
    with pytest.raises(ValueError, match=r"^.") as caught:
        folders(tmp_path, *names)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert labels(ImageFolder(tmp_path, labels=False)) == [-1, -1]


def test_class_names_that_are_given(tmp_path):
    folders(tmp_path, "cat", "dog")
    assert labels(ImageFolder(tmp_path, class_names=["Dog", "x", "CAT "])) == [2, 0]
    for names, says in (
        (["cat", "dog", "cat"], "'cat' is 2 of the class names"),
        (["cat"], "'dog' is not one of the 1 class names"),
        ("catdog", "give a list"),
    ):
        with pytest.raises(ValueError, match=says):
            ImageFolder(tmp_path, class_names=names)
    (tmp_path / "n" / "1").mkdir(parents=True)
    write(tmp_path / "n" / "1" / "a.png")
    assert labels(ImageFolder(tmp_path / "n", class_names=["a", "b"])) == [1]
    with pytest.raises(ValueError, match="'1' is not one of the 1 class names given or their numbers"):
        ImageFolder(tmp_path / "n", class_names=["a"])


def test_a_class_without_images_keeps_its_place(tmp_path):
    (tmp_path / "bear").mkdir(parents=True)
    data = folders(tmp_path, "ant", "cat")
    assert data.class_names == ["ant", "bear", "cat"]
    assert labels(data) == [0, 2]


def test_labels_left_out(tmp_path):
    root = table(tmp_path, "file,label\na.png,nonsense\nb.png,1\n")
    data = ImageFolder(root, labels=False)
    assert (labels(data), data.labelled_by, data.class_names) == ([-1, -1], None, None)
    assert fit_labels(data, classifier(1)) is data
    assert labels(Source(data=str(root), labels=False).images((8, 8), training=False).data) == [-1, -1]
    with pytest.raises(ValueError, match="both numbers and names"):
        Source(data=str(root)).images((8, 8), training=False)
    with pytest.raises(ValueError, match="scenes are labelled"):
        Source(labels=False).images((64, 64), training=False)


@pytest.mark.parametrize(("classes", "expected"), [(1000, [0, 217, 482]), (21843, [359, 2279, 5430])])
def test_wordnet_ids_are_mapped(tmp_path, classes, expected):
    data = folders(tmp_path, *WNIDS)
    says = f"^3 class folders, the classifier has {classes} classes: labels are mapped by wnid$"
    with pytest.warns(UserWarning, match=says) as warned:
        fitted = fit_labels(data, classifier(classes))
    assert len(warned) == 1
    assert labels(fitted) == expected
    assert labels(data) == [0, 1, 2]
    assert [item["label"] for item in fitted] == expected
    assert quietly(fitted, classifier(classes)) is fitted


def test_all_of_imagenet_needs_no_word(tmp_path):
    from timm.data import ImageNetInfo

    for wnid in ImageNetInfo("imagenet-1k").label_names():
        (tmp_path / wnid).mkdir()
        (tmp_path / wnid / "a.png").touch()
    data = ImageFolder(tmp_path)
    assert quietly(data, classifier(1000)) is data
    assert labels(data) == list(range(1000))


def test_wordnet_ids_that_are_not_in_imagenet(tmp_path):
    data = folders(tmp_path, *WNIDS, "n99999999")
    with pytest.raises(ValueError, match=r"^1 of 4 class folders \(n99999999\) is not a class of net \(1000 classes\)"):
        fit_labels(data, classifier(1000))
    with pytest.raises(ValueError, match=r"^4 class folders \(n01440764, n02102040, n02979186, …\) are not classes"):
        fit_labels(data, classifier(7))
    assert quietly(data, classifier(4)) is data


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["fox", "dog", "cat"], [2, 1, 0]),
        (["x", "FOX", "Dog", " c_at"], [3, 2, 1]),
        (["Cat", "cat", "dog", "fox"], [1, 2, 3]),
    ],
)
def test_names_are_mapped(tmp_path, names, expected):
    data = folders(tmp_path, "cat", "dog", "fox")
    with pytest.warns(UserWarning, match="labels are mapped by name"):
        fitted = fit_labels(data, classifier(len(names), names))
    assert labels(fitted) == expected
    assert fitted.class_names == names
    assert labels(data) == [0, 1, 2]


@pytest.mark.parametrize("names", [None, ["cat", "dog", "fox"], ["LABEL_0", "LABEL_1", "LABEL_2"]])
def test_as_many_names_as_classes(tmp_path, names):
    data = folders(tmp_path, "cat", "dog", "fox")
    assert quietly(data, classifier(3, names)) is data


@pytest.mark.parametrize(
    ("clf", "says"),
    [
        (classifier(1000), "3 class folders (cat, dog, fox) are not classes of net (1000 classes): give class_names"),
        (classifier(3, ["cat", "dog", "wolf"]), "1 of 3 class folders (fox) is not a class of net (3 classes)"),
        (classifier(4, ["cat", "cat", "dog", "fox"]), "(cat is the name of several)"),
        (classifier(2), "(2 classes)"),
    ],
)
def test_names_that_are_no_classes(tmp_path, clf, says):
    with pytest.raises(ValueError, match=r"labels=False\)$") as caught:
        fit_labels(folders(tmp_path, "cat", "dog", "fox"), clf)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_folders_of_one_class(tmp_path):
    data = folders(tmp_path, "hot dog", "hot_dog")
    with pytest.raises(ValueError, match="hot dog and hot_dog are both class 1 of net"):
        fit_labels(data, classifier(2, ["x", "Hotdog"]))


def test_numbers_are_classes(tmp_path):
    data = folders(tmp_path, "1", "2", "3")
    assert quietly(data, classifier(4)) is data
    with pytest.raises(
        ValueError, match=r"^label 3 is not among the classes of net, 0 … 2 \(they seem to count from 1"
    ):
        fit_labels(data, classifier(3))
    with pytest.raises(ValueError, match=r"^labels 2, 3 are not among .*/2/a.png has 2: correct them"):
        fit_labels(data, classifier(2))


def test_what_wraps_a_folder(tmp_path):
    data = folders(tmp_path, *WNIDS)
    clf = classifier(1000)
    with pytest.warns(UserWarning, match="by wnid"):
        part = fit_labels(Readable(Part(data, [2, 0])), clf)
    assert [item["label"] for item in part] == [482, 0]
    with pytest.warns(UserWarning, match="by wnid"):
        subset = fit_labels(torch.utils.data.Subset(data, [1]), clf)
    assert subset[0]["label"] == 217
    with pytest.warns(UserWarning, match="by wnid"):
        both = fit_labels(torch.utils.data.ConcatDataset([data, data]), clf)
    assert both[4]["label"] == 217
    assert labels(data) == [0, 1, 2]


def test_data_sets_without_classes_pass():
    class Own(torch.utils.data.Dataset):
        def __len__(self):
            return 1

        def __getitem__(self, index):
            return {"image": torch.zeros(3, 8, 8), "label": 99}

    for data in (Scenes("val", size=2), Part(Scenes("val", size=2), [1]), Own(), [{"label": 5}]):
        assert quietly(data, classifier(3)) is data
