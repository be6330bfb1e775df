"""Nothing that a file holds is executed: a pickle in every file that is read, and no reader that would run one."""

import ast
import io
import json
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import aha
from aha import weights
from aha.cli import main
from aha.store import Packs
from aha.training import checkpoint

ROOT = Path(__file__).parents[1]


class Attack:
    """What makes a file ``marker`` where it is unpickled."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def _pickled(attack: Attack) -> bytes:
    return pickle.dumps({"state_dict": attack})


def _saved(attack: Attack) -> bytes:
    file = io.BytesIO()
    torch.save({"state_dict": {"weight": torch.zeros(2)}, "extra": attack}, file)
    return file.getvalue()


def _legacy(attack: Attack) -> bytes:
    file = io.BytesIO()
    torch.save({"weight": attack}, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def _array(attack: Attack) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([attack], dtype=object), allow_pickle=True)
    return file.getvalue()


def _arrays(attack: Attack) -> bytes:
    file = io.BytesIO()
    np.savez(file, maps=np.array([attack], dtype=object), scale=np.array([attack], dtype=object))
    return file.getvalue()


def _zipped(attack: Attack) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", _pickled(attack))
        archive.writestr("archive/version", "3")
    return file.getvalue()


def _text(attack: Attack) -> bytes:
    return f"!!python/object/apply:os.system ['touch {attack.marker}']\n".encode()


ATTACKS = {
    "pickle": _pickled,
    "torch.save": _saved,
    "torch.save before 1.6": _legacy,
    "npy": _array,
    "npz": _arrays,
    "zip": _zipped,
    "yaml": _text,
}


def _read_weights(content: bytes, folder: Path, suffix: str) -> None:
    (folder / f"weights{suffix}").write_bytes(content)
    weights.read_weights(folder / f"weights{suffix}")


def _from_timm(content: bytes, folder: Path) -> None:
    (folder / "weights.pth").write_bytes(content)
    aha.Classifier.from_timm("test_vit", weights=folder / "weights.pth", num_classes=3)


def _explainer(content: bytes, folder: Path, name: str, explainer: aha.Explainer) -> None:
    path = explainer.save_pretrained(folder / "explainer")
    (path / name).write_bytes(content)
    aha.Explainer.from_pretrained(path, explainer.classifier)


def _checkpoint(content: bytes, folder: Path, name: str) -> None:
    path = folder / "step_00000001"
    path.mkdir()
    (path / "run.json").write_text(json.dumps({"step": 1, "aha": "0", "config": {}}))
    torch.save({}, path / "state.pt")
    (path / name).write_bytes(content)
    checkpoint.load(path)


def _records(content: bytes, folder: Path, suffix: str) -> None:
    (folder / f"scores{suffix}").write_bytes(content)
    aha.evaluation.Records.read(folder)


def _labels(content: bytes, folder: Path) -> None:
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "a.png")
    (folder / "labels.csv").write_bytes(content)
    aha.data.ImageFolder(folder, 8)


def _image(content: bytes, folder: Path, suffix: str) -> None:
    (folder / f"a{suffix}").write_bytes(content)
    aha.data.load_image(folder / f"a{suffix}", 8)


LOADERS: dict[str, Callable] = {
    **{f"weights{s}": lambda c, f, e, s=s: _read_weights(c, f, s) for s in (".pth", ".pt", ".bin", ".safetensors")},
    "from_timm": lambda c, f, e: _from_timm(c, f),
    **{f"explainer/{n}": lambda c, f, e, n=n: _explainer(c, f, n, e) for n in ("config.json", "decoder.safetensors")},
    **{f"checkpoint/{n}": lambda c, f, e, n=n: _checkpoint(c, f, n) for n in ("state.pt", "run.json")},
    **{f"scores{s}": lambda c, f, e, s=s: _records(c, f, s) for s in (".parquet", ".csv")},
    "labels.csv": lambda c, f, e: _labels(c, f),
    **{f"image{s}": lambda c, f, e, s=s: _image(c, f, s) for s in (".png", ".jpg")},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ATTACKS)
@pytest.mark.parametrize("loader", LOADERS)
def test_a_pickle_in_a_file_is_not_run(loader, kind, tmp_path, explainer):
    marker = tmp_path / "ran"
    content = ATTACKS[kind](Attack(marker))
    with pytest.raises((ValueError, OSError)) as caught:
        LOADERS[loader](content, tmp_path, explainer)
    assert not marker.exists()
    text = str(caught.value)
    assert text.strip() and "\n" not in text


@pytest.mark.parametrize("kind", ATTACKS)
def test_a_pickle_in_a_sound_record_is_not_run(kind, tmp_path):
    """A pack of which every checksum is right, as whoever writes the attack would make it."""
    marker, key = tmp_path / "ran", ("row", "maps", "000000")
    packs = Packs(tmp_path / "packs")
    packs.put({key: {"maps": np.zeros(2)}})
    payload = ATTACKS[kind](Attack(marker))
    head, _ = packs._head("/".join(key), payload)
    (tmp_path / "packs" / "0000-0000.pack").write_bytes(head + payload)
    packs = Packs(tmp_path / "packs")
    assert packs._places["/".join(key)].length == len(payload)  # it is found
    assert packs.get(key) is None
    assert not marker.exists()


@pytest.mark.parametrize("kind", ["pickle", "torch.save", "torch.save before 1.6", "npy"])
def test_the_attacks_would_run(kind, tmp_path):
    marker = tmp_path / "ran"
    file = tmp_path / "file"
    file.write_bytes(ATTACKS[kind](Attack(marker)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "pickle":
            pickle.loads(file.read_bytes())
        elif kind == "npy":
            np.load(file, allow_pickle=True)
        else:
            torch.load(file, weights_only=False)
    assert marker.exists()


def _files() -> list[Path]:
    found = [*(ROOT / "aha").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    assert len(found) > 80
    return found


def _called(node: ast.Call) -> str:
    """The name of what is called, as it is written."""
    return ast.unparse(node.func)


def _literal(node: ast.Call, name: str) -> object:
    """The value of a keyword if it is a constant, None where it is missing, NotImplemented for anything else."""
    for keyword in node.keywords:
        if keyword.arg == name:
            return keyword.value.value if isinstance(keyword.value, ast.Constant) else NotImplemented
    return None


def faults(source: str) -> list[str]:
    """What a module has that would run what a file says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names]
            module = getattr(node, "module", None) or ""
            roots = {name.partition(".")[0] for name in ([module] if module and not node.level else names)}
            bad = roots & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
            found += [f"import {name}" for name in bad]
        if not isinstance(node, ast.Call):
            continue
        name = _called(node)
        last = name.rpartition(".")[2]
        if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"):
            found.append(name)
        if name.startswith(("pickle.", "yaml.")):
            found.append(name)
        if name == "torch.load" and _literal(node, "weights_only") is not True:
            found.append("torch.load without weights_only=True")
        if last == "load" and name.startswith(("np.", "numpy.")) and _literal(node, "allow_pickle") is not False:
            found.append("np.load without allow_pickle=False")
        if name in ("torch.hub.load", "torch.jit.load"):
            found.append(name)
        for keyword in ("shell", "trust_remote_code", "allow_pickle"):
            if _literal(node, keyword) not in (None, False):
                found.append(f"{keyword} in {name}")
    return found


@pytest.mark.parametrize("file", _files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_module_reads_what_it_would_run(file):
    assert not faults(file.read_text())


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=flag)",
        "np.load(f)",
        "np.load(f, allow_pickle=True)",
        "eval(text)",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "yaml.load(text)",
    ],
)
def test_what_would_be_found(source):
    assert faults(source)


@pytest.mark.parametrize(
    "source",
    [
        "import pickletools",
        "torch.load(f, weights_only=True)",
        "np.load(f, allow_pickle=False)",
        "net.eval()",
        "ast.literal_eval(text)",
        "re.compile(text)",
    ],
)
def test_what_is_harmless(source):
    assert not faults(source)


@pytest.mark.filterwarnings("ignore")
def test_pickles_in_kept_work_are_not_run(tmp_path, capsys):
    """Whatever a comparison keeps on disk is replaced, one kind of attack after the other, and it goes on."""
    data, output, marker = tmp_path / "data", tmp_path / "out", tmp_path / "ran"
    data.mkdir()
    for name in "ab":
        pixels = np.random.default_rng(ord(name)).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(data / f"{name}.png")
    (data / "labels.csv").write_text("file,label\na.png,1\nb.png,2\n")
    where = ["--data", str(data), "--output", str(output)]
    command = ["compare", "--classifier", "scenes", "--methods", "input_x_gradient", *where]
    assert main(command) == 0
    # text alone is no attack on what reads no YAML
    for kind in ("pickle", "torch.save", "torch.save before 1.6", "npy", "npz", "zip"):
        files = [path for path in output.rglob("*") if path.is_file()]
        assert files
        for file in files:
            file.write_bytes(ATTACKS[kind](Attack(marker)))
        main(command)
        assert not marker.exists()
        assert "Traceback" not in capsys.readouterr().err


def test_options_cannot_ask_for_remote_code(tmp_path):
    """A model of the hub that brings code is refused, whatever asks for it."""
    asked = {"AutoModelForImageClassification": "evil.Evil", "AutoConfig": "evil.C"}
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": asked, "model_type": "evil"}))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises((ValueError, OSError, ImportError)):
        aha.Classifier.from_hf(str(tmp_path))
    assert not (tmp_path / "ran").exists()
