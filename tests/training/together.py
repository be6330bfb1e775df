"""What test_processes.py starts in several processes: ``python -m tests.training.together FOLDER BEFORE``.

The same in one process and in several, so that what they write can be compared.
"""

import dataclasses
import json
import sys
from pathlib import Path

import torch
from torch import nn

import aha
from aha import processes

from ..toys import TINY_DECODER, tiny_classifier
from .test_training import CONFIG, Images

# shares of five images are uneven; noise, coalitions and roles are drawn; two parts
LONG = dataclasses.replace(CONFIG, steps=20, batch_size=5, accumulate=1, log_every=1, save_every=10, lr=1e-3)
SHORT = dataclasses.replace(LONG, steps=4)
TRAININGS = {
    "ranking": LONG,
    "free": dataclasses.replace(SHORT, scores="free", batch_size=10, accumulate=2, targets=1),
    "fastshap": dataclasses.replace(SHORT, objective="fastshap", coalitions=4, players=(4, 4), shared_map=True),
    "evidence": dataclasses.replace(SHORT, dropped_roles=0.3, references=("mean", "blur")),
}


def train(name, folder, resume=False, own_norms=False, output=None):
    clf = tiny_classifier()
    torch.manual_seed(3)
    if name == "evidence":
        explainer = aha.Explainer.build(clf)
    else:
        explainer = aha.Explainer.build(clf, evidence=False, decoder=TINY_DECODER)
    for module in explainer.decoder.modules() if own_norms else ():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = nn.BatchNorm2d
    config = dataclasses.replace(TRAININGS[name], output=str(folder / (output or name)))
    aha.Trainer(explainer, clf, Images(40), config).fit(resume=resume, progress=False)
    return explainer


def measure(folder):
    """Methods on images of which one is bad, and a method that fails on a batch."""
    clf = tiny_classifier()
    explainer = aha.Explainer.universal(clf)

    def moody(images, target):
        if (target == moody.hates).any():
            raise ValueError("this class I do not explain")
        return images.mean(dim=1, keepdim=True)

    moody.hates = int(clf(Images()[1]["image"][None]).argmax())
    methods = {
        "aha": aha.attributors.AHA(clf, explainer),
        "random": aha.attributors.create("random", clf, seed=0),
        "moody": moody,
    }
    result = aha.evaluation.evaluate(clf, methods, Images(13, bad=4), batch_size=2)
    rest = {"images": result.images, "failures": [dataclasses.asdict(failure) for failure in result.failures]}
    rest["curves"] = {
        f"{method} {reference} {name}": values.tolist()
        for method, of in result.curves.items()
        for reference, named in of.items()
        for name, values in named.items()
    }
    if processes.join().is_main_process:
        result.records.write(folder / "measured")
        (folder / "measured" / "rest.json").write_text(json.dumps(rest))
    return rest


def main(folder, before):
    two = processes.join().num_processes == 2
    for name in TRAININGS if two else ["ranking"]:
        explainer = train(name, folder)
        buffers = {key: value.tolist() for key, value in explainer.decoder.state_dict().items()}
        assert all(other == buffers for other in processes.gathered([buffers])), "processes have other weights"
    if two:
        train("ranking", folder, own_norms=True, output="own_norms")
    train("ranking", folder, resume=before / "ranking" / "checkpoints" / "step_00000010", output="resumed")
    rest = measure(folder)
    assert all(other == rest for other in processes.gathered([rest])), "processes have other results"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
