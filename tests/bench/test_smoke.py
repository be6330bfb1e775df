"""The short report, and what runs the stages of both: lines as they come, limits, kills, going on, no dependencies."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from aha.kernels import native
from bench import smoke, stages, timing
from bench.smoke import counters, fast, right
from bench.stages import Results, Stage

from ..kernels.emulator import COMPILER

ROOT = Path(__file__).parents[2]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel to end processes with their parent")
COMPILED = pytest.mark.skipif(native.load("_C") is not None, reason=f"aha._C: {native.load('_C')}")
HEAD = {"device": "test"}

# what a plain CUDA image need not have; and this checkout is not installed in it
BARE = """
import sys
MISSING = {"tyro", "rich", "matplotlib", "timm", "transformers", "torchvision", "scipy", "sklearn", "PIL",
           "safetensors", "accelerate", "torchmetrics", "tensorboard", "huggingface_hub", "pandas",
           "pyarrow", "captum", "jinja2"}
class Missing:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path = [Missing, *(finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", ""))]
"""


def python(script: str) -> list[str]:
    return [sys.executable, "-c", "import json, os, subprocess, sys, time\nfrom bench.stages import tell\n" + script]


def read(path: Path) -> dict[str, dict]:
    return {stage["stage"]: stage for stage in json.loads(path.read_text())["stages"]}


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def soon(condition, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


@pytest.fixture
def bare(tmp_path) -> dict[str, str]:
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BARE)
    return {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_one_line_where_there_is_no_gpu(tmp_path):
    command = [sys.executable, "-m", "bench.report", "--device", "cuda", "--profile", "smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == smoke.NOTHING_HERE and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"no cuda device here: torch {torch.__version__} sees no GPU")
    assert line.endswith("nothing was measured")
    assert not list(tmp_path.iterdir())


@COMPILED
@pytest.mark.slow
def test_the_way_needs_nothing_but_torch_triton_and_numpy(bare, tmp_path):
    for missing in ("tyro", "aha.kernels"):
        done = subprocess.run([sys.executable, "-c", f"import {missing}"], cwd=ROOT, env=bare, capture_output=True)
        assert b"ModuleNotFoundError" in done.stderr
    modules = ("here", "right", "once", "fast", "counters")
    script = f"import bench.sweep, bench.toolkit, {', '.join(f'bench.smoke.{name}' for name in modules)}"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=bare, check=True)
    command = [sys.executable, "-m", "bench.report", "--profile", "smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=bare, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = read(tmp_path / "smoke_cpu.json")
    assert list(found) == ["here", *(stage.name for stage in smoke.planned("cpu"))]
    assert {stage["status"] for stage in found.values()} == {"ok"} and all(s["records"] for s in found.values())
    assert str(ROOT) not in (tmp_path / "smoke_cpu.json").read_text()
    dense = found["right dense"]["records"]
    assert [record["status"] for record in dense] == ["ok"] * 5
    assert all(float(record["outputs"]) <= float(record["allowed"]) for record in dense)


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="there is no g++")
@COMPILED
def test_the_way_with_the_cuda_kernels_in_the_emulator(tmp_path, monkeypatch, capsys):
    script = str(Path(__file__).parent / "emulated.py")
    # all layouts; then a kernel that does not come to its end
    emulated = [sys.executable, script, str(tmp_path)]
    hanging = python("tell('K=784'); os.system('sleep 60')")
    planned = [Stage("right dense", emulated, 120, {smoke.PLAN: "dense"}), Stage("hangs", hanging, 2.0)]
    planned.append(Stage("right blocks", emulated, 120, {smoke.PLAN: "blocks"}))
    monkeypatch.setattr(smoke, "planned", lambda device: planned)
    assert smoke.run("cpu", tmp_path) == 1
    found = read(tmp_path / "smoke_cpu.json")
    dense = found["right dense"]["records"]
    assert found["right dense"]["status"] == "ok" and [r["status"] for r in dense] == ["ok"] * len(dense)
    assert len({r["case"] for r in dense if "noise=0.0" in r["case"]}) >= 4
    assert found["hangs"]["status"].startswith("failed: took longer than 2 s") and found["hangs"]["records"]
    # these kernels have no such plan, and so it is said
    assert {r["status"].partition(":")[0] for r in found["right blocks"]["records"]} <= {"not available", "ok"}
    assert "right dense: soft_topk_masks B=2 K=9 T=8 noise=0.0: ok (outputs " in capsys.readouterr().out


def test_a_record_is_on_disk_before_the_next_line(tmp_path):
    path = tmp_path / "report.json"
    script = f"""
tell("first", figure=1)
while not [r for stage in json.load(open({str(path)!r}))["stages"] for r in stage["records"]]:
    time.sleep(0.01)
tell("second", "wrong: by far")
print("not a record")
print('{{"nor": "this"}}')
sys.exit(3)"""
    found = Results(path, HEAD).run(Stage("waits", python(script), 30))
    assert found["status"] == "failed: exit status 3"
    first, second = read(path)["waits"]["records"]
    assert first == {"case": "first", "status": "ok", "figure": 1} and second["status"] == "wrong: by far"
    assert found["output"] == ["not a record", '{"nor": "this"}']


@LINUX
def test_a_hanging_stage_is_killed_with_all_that_belongs_to_it(tmp_path):
    script = """
import signal
signal.signal(15, signal.SIG_IGN)
tell("started", pid=subprocess.Popen(["sleep", "99"]).pid)  # which ignores it too
time.sleep(99)"""
    results, start = Results(tmp_path / "report.json", HEAD), time.monotonic()
    found = results.run(Stage("hangs", python(script), 3))
    assert found["status"] == "failed: took longer than 3 s" and time.monotonic() - start < 20
    assert soon(lambda: not is_running(found["records"][0]["pid"]))
    assert results.run(Stage("next", python("tell('fine')"), 30))["status"] == "ok"
    assert list(read(results.path)) == ["hangs", "next"]


def test_what_a_stage_leaves_behind_does_not_hold_the_report_up(tmp_path):
    script = 'subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"], start_new_session=True)'
    start = time.monotonic()
    assert Results(tmp_path / "report.json", HEAD).run(Stage("leaves", python(script), 60))["status"] == "ok"
    assert time.monotonic() - start < 30


@LINUX
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_results_survive_the_end_of_the_report_and_no_stage_outlives_it(tmp_path, how):
    path = tmp_path / "report.json"
    stage = python("tell('found', pid=os.getpid())\ntime.sleep(99)")
    script = f"""
from pathlib import Path
from bench.stages import Results, Stage, ending_on_request
with ending_on_request():
    Results(Path({str(path)!r}), {HEAD}).run(Stage("long", {stage!r}, 90))"""
    report = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.DEVNULL)
    assert soon(lambda: path.exists() and read(path)["long"]["records"])
    report.send_signal(how)
    report.wait(20)
    found = read(path)["long"]
    assert found["status"] == ("running" if how == signal.SIGKILL else "interrupted")
    assert soon(lambda: not is_running(found["records"][0]["pid"]))
    assert not list(tmp_path.glob(".*"))  # nothing half written


def test_a_report_goes_on_where_it_was_cut_short(tmp_path, monkeypatch):
    path, log = tmp_path / "report.json", tmp_path / "log"

    def ran(**settings) -> list[str]:
        log.write_text("")
        results = Results(path, settings.pop("head", HEAD), **settings)
        for name, code in (("good", 0), ("bad", 1), ("build", 0)):
            script = f"open({str(log)!r}, 'a').write('{name} '); sys.exit({code})"
            results.run(Stage(name, python(script), 30, lasting=name != "build"))
        assert list(read(path)) == ["good", "bad", "build"]
        return log.read_text().split()

    assert ran() == ["good", "bad", "build"]
    assert ran() == ["bad", "build"]  # what failed, and what a machine that begins bare lacks
    assert ran(again=True) == ["good", "bad", "build"]
    assert ran() == ["bad", "build"]
    assert ran(head={"device": "another"}) == ["good", "bad", "build"]
    monkeypatch.setattr(stages, "sources", lambda: "changed")
    assert ran(head={"device": "another"}) == ["good", "bad", "build"]
    path.write_text("cut off {")
    assert ran(head={"device": "another"}) == ["good", "bad", "build"]


def test_what_there_is_no_time_for_or_no_program_is_said(tmp_path, monkeypatch):
    planned = [Stage("watched", [str(tmp_path / "compute-sanitizer")], 60), Stage("good", python("tell('fine')"), 30)]
    monkeypatch.setattr(smoke, "planned", lambda device: planned)
    assert smoke.run("cpu", tmp_path) == 1
    found = read(tmp_path / "smoke_cpu.json")
    assert found["watched"]["status"] == "not run: there is no compute-sanitizer here"
    assert found["good"]["status"] == "ok"
    monkeypatch.setattr(smoke, "SECONDS", 0)
    assert smoke.run("cpu", tmp_path, again=True) == 1
    assert read(tmp_path / "smoke_cpu.json")["good"]["status"] == "not run: no time was left"


def test_the_stages_of_a_gpu_fit_their_limits_and_the_most_valuable_come_first():
    found = smoke.planned("cuda")
    names = [stage.name for stage in found]
    assert names[:5] == ["build", "right dense", "right blocks", "fast dense", "fast blocks"]
    assert {"memcheck dense", "memcheck blocks", "racecheck dense", "racecheck blocks"} < set(names)
    assert all(60 <= stage.limit <= 120 for stage in found) and smoke.SECONDS < 9 * 60
    assert {stage.environment.get(smoke.PLAN) for stage in found if "dense" in stage.name} == {"dense"}
    assert not found[0].lasting


def test_a_plan_that_the_operator_lacks_is_not_called_right(monkeypatch, capsys):
    monkeypatch.setenv(smoke.PLAN, "blocks")
    monkeypatch.setattr(right, "plan_of", lambda inputs: "dense")
    assert right.check("soft_topk_masks", right.TINY, "cpu", "reference")
    assert "not available: the operator has no blocks plan" in capsys.readouterr().out


def test_a_wrong_operator_is_called_wrong(monkeypatch, capsys):
    real = right.CASES["perturb_by_rank"].call
    monkeypatch.setattr(
        type(right.CASES["perturb_by_rank"]),
        "call",
        lambda case, given, backend: (
            real(given, "reference")
            if backend == "reference"
            else tuple(1.001 * out for out in real(given, "reference"))
        ),
    )
    assert not right.check("perturb_by_rank", right.TINY, "cpu", "cpu")
    assert json.loads(capsys.readouterr().out)["status"] == "wrong"


NCU = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Grid Size","Section Name","Metric Name","Metric Unit","Metric Value"
"0","7","void aha::resident_forward<1, 25>(Ranking)","(16, 1, 1)","Launch Statistics","Cluster Size","","16"
"0","7","void aha::resident_forward<1, 25>(Ranking)","(16, 1, 1)","Occupancy","Max Active Clusters","cluster","8"
"1","7","void aha::resident_backward<1, 25>(Ranking)","(16, 1, 1)","Launch Statistics","Cluster Size","","16"
==PROF== Disconnected
"""


@pytest.mark.parametrize(
    ("says", "status"),
    [
        (NCU, "ok"),
        ("==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", "not available: ==ERROR== ERR_NVGPUCTRPERM"),
        (None, "not available: it is not on this machine"),
    ],
)
def test_counters_are_read_where_they_are_allowed(tmp_path, monkeypatch, capsys, says, status):
    program = tmp_path / "ncu"
    if says is not None:
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{says}\nEND\n")
        program.chmod(0o755)
    monkeypatch.setattr(counters, "tool", lambda name: str(program))
    assert counters.main() == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert records[0]["status"].startswith(status)
    if says == NCU:
        assert [r["case"] for r in records] == [f"void aha::resident_{way}<1, 25>" for way in ("forward", "backward")]
        assert records[0]["Cluster Size"] == "16" and records[0]["Max Active Clusters"] == "8 cluster"
    assert "--clock-control" in counters.command()


class Event:
    """A CUDA event, by the clock of the CPU."""

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


def test_headlines_are_timed_in_both_ways_after_a_sleep(monkeypatch, capsys):
    done = []

    class Graph:
        def replay(self):
            done.append("replay")

    @contextmanager
    def nothing(*_):
        yield

    class Stream:
        def wait_stream(self, other):
            pass

    def sleep(cycles):
        done.append("sleep")
        time.sleep(cycles / 2e9)

    for name, fake in {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": nothing,
        "stream": nothing,
        "Stream": Stream,
        "current_stream": Stream,
        "synchronize": lambda: None,
        "_sleep": sleep,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(timing, "flush", lambda: done.append("flush"))
    monkeypatch.setattr(fast, "call_of", lambda *_: lambda: done.append("call"))
    monkeypatch.setattr(fast, "launches", lambda call: iter([("resident_forward<true, 25>", {"grid": [512, 1, 1]})]))
    assert fast.on_gpu("soft_topk_masks")
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    cases = [record["case"].split("S=16 ")[-1] for record in records]
    assert cases == ["graph", "events", "resident_forward<true, 25>", "eager, events"]
    assert all(record["status"] == "ok" for record in records)
    assert 1000 < records[0]["sm_mhz"] <= 2000  # two a nanosecond, less what waking takes
    rounds = " ".join(done)
    assert rounds.count("sleep replay") == fast.ROUNDS and rounds.count("flush sleep call") >= fast.ROUNDS


def test_options_of_the_other_profile_are_refused(tmp_path):
    command = [sys.executable, "-m", "bench.report", "--profile", "smoke", "--sweep", "all", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith("--sweep belongs to the full profile")
