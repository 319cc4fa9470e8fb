"""The `flagdit` command: help that works, errors as one paragraph, and arguments that reach their area."""

import errno
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

from flagdit import cli
from flagdit.config.load import load_recipe
from flagdit.errors import FlagDiTError
from flagdit.generate.draw import Way


def commands(group=None, path=()) -> list[tuple[tuple[str, ...], object]]:
    """Every command and group of commands with its path."""
    group = group or typer.main.get_command(cli.app)
    found = [(path, group)]
    for name, command in getattr(group, "commands", {}).items():
        found += commands(command, (*path, name))
    return found


@pytest.fixture
def flagdit(monkeypatch, capsys):
    """A function: command line → (exit code, stdout, stderr), in this process."""

    def run(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flagdit", *shlex.split(line)])
        try:
            cli.main()
            code = 0
        except SystemExit as done:
            code = done.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.mark.parametrize("path", [path for path, _ in commands()], ids=" ".join)
def test_every_help_has_an_example_that_the_command_understands(flagdit, path):
    code, out, _ = flagdit(" ".join([*path, "--help"]))
    examples = re.findall(r"Example:\n\s+flagdit (.*)\n", out)
    assert code == 0 and len(examples) == 1, "one example, on one line"
    # unknown commands and options are found before --help answers
    code, _, err = flagdit(examples[0] + " --help")
    assert code == 0, err


def test_help_is_quick_because_nothing_heavy_is_imported():
    script = "import sys; sys.argv = ['flagdit', '--help']\nfrom flagdit import cli\n"
    script += "try: cli.main()\nexcept SystemExit: pass\n"
    script += "print(sorted({'torch', 'numpy', 'transformers', 'omegaconf', 'PIL', 'matplotlib'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and "train" in done.stdout


def test_a_plan_does_not_wait_for_what_trains_and_compiles():
    heavy = "{'torch._dynamo', 'torch._inductor', 'deepspeed', 'megatron', 'transformers', 'matplotlib'}"
    script = f"import sys, flagdit.plan.report; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_version(flagdit):
    assert flagdit("--version")[:2] == (0, "flagdit 0.1.0\n")


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("train nowhere.yaml", "there is no recipe file nowhere.yaml"),
        ("train quickstrat", "Did you mean quickstart?"),
        ("train quickstart model.dims=3", "did you mean model.dim?"),
        ("train quickstart data.path=nowhere", "nowhere: there is no such folder"),
        ("sample nowhere --prompt x", "nowhere: there is no such folder"),
        ("sample . --prompt x", "there is no run here"),
        ("sample . --prompt-file empty.txt", "empty.txt: the prompt file is empty"),
        ("sample . --prompt x --label 1", "exclude each other"),
        ("sample . --prompt x --out x.txt", "not a picture file"),
        ("evaluate nowhere", "there is no such folder"),
        ("edit nowhere x.png", "there is no such folder"),
        ("edit . x.png --out x.txt", "not a picture file"),
        ("sample . --prompt x --wrap", "--wrap has no effect"),
        ("sample . --region 4x4 --prompt x", "is not a region"),
        ("compare nowhere@3", "there is no such folder"),
        ("serve nowhere", "there is no such folder"),
        ("checkpoint import nowhere run", "there is no folder nowhere"),
        ("checkpoint import . run", "neither a run, nor config.json, nor consolidated"),
        ("checkpoint import . run --weights both", "--weights both is not known"),
        ("checkpoint export nowhere out", "nowhere: there is no such folder"),
        ("checkpoint export nowhere out --format onnx", "--format onnx is not known"),
        ("checkpoint inspect nowhere", "there is no folder nowhere"),
        ("checkpoint diff nowhere .", "there is no folder nowhere"),
        ("report nowhere", "nowhere"),
        ("recipe show quickstart train.precision=fp16", "train.precision=fp16 is not one of fp32, bf16"),
        (
            "recipe show quickstart model.modalities={image:4}",
            "a mapping of names to whole numbers, not {'image:4': None}",
        ),
        ("data stats nowhere", "nowhere: there is no such folder"),
        ("data encode nowhere out --recipe quickstart", "nowhere: there is no such folder"),
        ("data build folder out --from nowhere", "nowhere: there is no such folder"),
        ("data build emoji out --styles scribble", "--styles scribble"),
        ("bench nowhere", "model_cpu"),
    ],
)
def test_a_mistake_is_one_paragraph_on_stderr(flagdit, tmp_path, monkeypatch, line, told):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n")
    code, out, err = flagdit(line)
    assert code == 2 and told in err and out == ""
    assert err.startswith("error: ") and "Traceback" not in err and "\n\n" not in err
    assert sorted(p.name for p in tmp_path.iterdir() if p.name not in ("runs",)) == ["empty.txt"], (
        "something was written"
    )


@pytest.mark.parametrize("line", ["nonsense", "train", "sample", "sample . --steps 0", "sample . --nonsense 1"])
def test_usage_errors_exit_with_2(flagdit, line):
    code, _, err = flagdit(line)
    assert code == 2 and "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (FlagDiTError("it is wrong", where="here", fix="Mend it."), 2, "error: here: it is wrong. Mend it.\n"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/b"), 2, "error: a/b cannot be written or read: No space"),
        (KeyboardInterrupt(), 130, ""),
        (SystemExit(143), 143, ""),
    ],
)
def test_exit_codes(flagdit, monkeypatch, error, code, told):
    def fails(*args):
        raise error

    monkeypatch.setattr("flagdit.config.load.load_recipe", fails)
    done, _, err = flagdit("recipe show quickstart")
    assert done == code and err.startswith(told)


def test_faults_of_the_program_keep_their_traceback(flagdit, monkeypatch):
    for fault in (AssertionError("ours"), FileNotFoundError(errno.ENOENT, "ours")):
        monkeypatch.setattr("flagdit.config.load.load_recipe", lambda *args, fault=fault: (_ for _ in ()).throw(fault))
        with pytest.raises(type(fault)):
            flagdit("recipe show quickstart")


def test_errors_are_red_on_a_terminal():
    script = "from flagdit import cli; cli.fail('no')"
    pty = "import pty, sys; sys.exit(pty.spawn([sys.executable, '-c', sys.argv[1]]) >> 8)"
    done = subprocess.run([sys.executable, "-c", pty, script], capture_output=True, stdin=subprocess.DEVNULL)
    assert b"\x1b[31merror: no" in done.stdout and done.returncode == 2


def test_train_gets_the_recipe_with_its_overrides(flagdit, monkeypatch):
    got = []
    monkeypatch.setattr("flagdit.train.loop.train", got.append)
    assert flagdit("train quickstart model.dim=64 name=x 'sample.prompts=[a dog, a cat]'")[0] == 0
    assert got == [load_recipe("quickstart", ["model.dim=64", "name=x", "sample.prompts=[a dog, a cat]"])]


def test_sample_passes_on_all_that_it_is_given(flagdit, monkeypatch, tmp_path):
    got = {}

    def fake(run, conditions, out, **rest):
        got.update(rest, run=run, conditions=conditions, out=out)
        return [out]

    monkeypatch.setattr("flagdit.generate.sample.sample_to_files", fake)
    monkeypatch.setattr("flagdit.checkpoint.weights.load_run_recipe", lambda run: load_recipe("quickstart"))
    (tmp_path / "p.txt").write_text("c\nd\n")
    line = f"sample runs/x --prompt a --prompt 'b, c' --prompt-file {tmp_path}/p.txt --size 48x32 --size 8x8 --steps 20"
    line += " --solver heun --guidance 4 --seed 3 --shift 2 --ema 1 --step 100 --out o/g.png --separate --captions"
    line += " --preset fast --schedule sigmoid --guidance-interval 0.1 0.8 --guidance-rescale 0.5 --guidance-reuse 3"
    line += " --train-size 24 --scaling ntk --modality audio --seconds 2.5 --window 24x16 --wrap"
    code, out, err = flagdit(line + " --repeat 2 --frames 5")
    assert code == 0 and out == "o/g.png\n", err
    assert got.pop("mesh").world == 1
    assert got == {
        "run": Path("runs/x"),
        "conditions": ["a", "b, c", "c", "d"],
        "out": Path("o/g.png"),
        "sizes": ["48x32", "8x8"],
        "repeat": 2,
        "step": 100,
        "ema": 1,
        "separate": True,
        "captions": True,
        "way": Way(window=(24, 16), wrap=True),
        "preset_name": "fast",
        "settings": {
            "steps": 20,
            "solver": "heun",
            "schedule": "sigmoid",
            "guidance": 4.0,
            "guidance_interval": [0.1, 0.8],
            "guidance_rescale": 0.5,
            "guidance_reuse": 3,
            "shift": 2.0,
            "seed": 3,
            "modality": "audio",
            "frames": 5,
            "seconds": 2.5,
            "train_size": "24",
            "scaling": "ntk",
        },
    }
    flagdit("sample runs/x --label 3 --label 0 --upscale 0.5")
    assert got["conditions"] == [3, 0] and got["sizes"] == [] and set(got["settings"].values()) == {None}
    assert got["way"] == Way(upscale=0.5)


def test_sample_into_a_folder(flagdit, monkeypatch):
    got = {}
    monkeypatch.setattr("flagdit.checkpoint.weights.load_run_recipe", lambda run: load_recipe("quickstart"))
    monkeypatch.setattr(
        "flagdit.generate.many.sample_many", lambda *args, **rest: got.update(rest, args=args) or "done"
    )
    assert flagdit("sample runs/x --prompt a --out-dir o --repeat 3 --preset draft")[:2] == (0, "done\n")
    assert got["args"] == (Path("runs/x"), ["a"], Path("o")) and (got["repeat"], got["preset_name"]) == (3, "draft")
    code, _, err = flagdit("sample runs/x --prompt a --out-dir o --share 0.5")
    assert code == 2 and "draws every prompt by itself" in err
    code, _, err = flagdit("sample runs/x --prompt a --context 2")
    assert code == 2 and "parallel.context=2" in err


def test_edit_passes_on_all_that_it_is_given(flagdit, monkeypatch):
    got = {}
    monkeypatch.setattr("flagdit.checkpoint.weights.load_run_recipe", lambda run: load_recipe("quickstart"))
    monkeypatch.setattr(
        "flagdit.generate.edit.edit_file", lambda *args, **rest: got.update(rest, args=args) or [args[3]]
    )
    line = "edit runs/x a.png --prompt dog --strength 0.3 --mask m.png --style s.png --size 8x8 --steps 3 --out b.png"
    code, out, err = flagdit(
        line + " --solver heun --seed 4 --repeat 2 --separate --preset fast --step 5 --ema 1"
        " --between 0.5 1 --modality video --frames 3"
    )
    assert code == 0 and out == "b.png\n", err
    assert got["args"] == (Path("runs/x"), Path("a.png"), "dog", Path("b.png"))
    assert (got["strength"], got["mask"], got["style"], got["size"]) == (0.3, Path("m.png"), Path("s.png"), "8x8")
    assert (got["repeat"], got["separate"], got["preset_name"], got["step"], got["ema"]) == (2, True, "fast", 5, 1)
    assert got["between"] == (0.5, 1.0) and got["mesh"].world == 1
    settings = {"steps": 3, "solver": "heun", "seed": 4, "modality": "video", "frames": 3}
    assert {k: v for k, v in got["settings"].items() if v is not None} == settings
    code, _, err = flagdit("edit runs/x a.png --tensor 2")
    assert code == 2 and "parallel.tensor=2" in err


def test_evaluate_compare_and_serve_pass_on_all_that_they_are_given(flagdit, monkeypatch):
    got, logged = {}, []
    monkeypatch.setattr(
        "flagdit.generate.evaluate.evaluate_run", lambda run, **rest: got.update(rest, run=run) or {"a": 1}
    )
    monkeypatch.setattr("flagdit.train.wandb_log.log_figures", lambda run, figures: logged.append((run, figures)))
    line = "evaluate runs/x --data d --limit 3 --scale 1 --scale 1.5 --preset fast --train-size 24 --scaling linear"
    code, out, err = flagdit(line + " --fid w.pth --clip c --step 7 --ema 0")
    assert code == 0 and json.loads(out) == {"a": 1}, err
    assert got == {
        "run": Path("runs/x"),
        "data": "d",
        "most": 3,
        "scales": [1.0, 1.5],
        "step": 7,
        "ema": 0,
        "fid": Path("w.pth"),
        "clip": Path("c"),
        "preset_name": "fast",
        "settings": {"train_size": "24", "scaling": "linear"},
    }
    assert logged == [(Path("runs/x"), {"a": 1})]
    compared = []
    monkeypatch.setattr(
        "flagdit.generate.comparison.write_comparison", lambda *args, **rest: compared.append((args, rest))
    )
    flagdit("compare a b@5 --prompt p --preset fast --steps 4 --seed 2 --out o.html")
    rest = {"prompts": ["p"], "preset_name": "fast", "settings": {"steps": 4, "seed": 2}}
    assert compared == [(([Path("a"), Path("b@5")], Path("o.html")), rest)]
    served = []
    monkeypatch.setattr("flagdit.generate.serve.serve_run", lambda *args, **rest: served.append((args, rest)))
    flagdit("serve runs/x --port 0 --step 3")
    flagdit("serve runs/x --host 0.0.0.0 --ema 1")
    assert served == [
        ((Path("runs/x"),), {"host": "127.0.0.1", "port": 0, "step": 3, "ema": None}),
        ((Path("runs/x"),), {"host": "0.0.0.0", "port": 8000, "step": None, "ema": 1}),
    ]


def test_recipe_show_prints_a_recipe(flagdit, tmp_path):
    code, out, _ = flagdit("recipe show quickstart model.dim=64 name=shown")
    assert code == 0
    (tmp_path / "shown.yaml").write_text(out)
    assert load_recipe(tmp_path / "shown.yaml") == load_recipe("quickstart", ["model.dim=64", "name=shown"])


def test_pictures_become_a_data_set(flagdit, tmp_path):
    (tmp_path / "src").mkdir()
    for i in range(4):
        picture = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / f"src/p{i}.png")
        (tmp_path / f"src/p{i}.txt").write_text(f"picture {i}")
    code, _, err = flagdit(f"data build folder {tmp_path}/raw --from {tmp_path}/src --size 8 --multiple 4")
    assert code == 0, err
    code, _, err = flagdit(
        f"data encode {tmp_path}/raw {tmp_path}/enc --recipe quickstart model.text_dim=0 --dtype fp16"
    )
    assert code == 0, err
    code, out, _ = flagdit(f"data stats {tmp_path}/enc")
    assert code == 0
    described = json.loads(out)
    assert (described["samples"], described["sizes"], described["dtype"]) == (4, {"8×8": 4}, "fp16")
    hub = "codec.kind=diffusers codec.path=stabilityai/sd-vae 'model.modalities={image: 4}'"
    code, _, err = flagdit(f"data encode {tmp_path}/raw {tmp_path}/enc2 --recipe quickstart {hub}")
    assert code == 2 and "looks like a hub name" in err and not (tmp_path / "enc2").exists()


def test_data_build_passes_on_all_that_it_is_given(flagdit, monkeypatch):
    got = []
    monkeypatch.setattr("flagdit.data_pipelines.build.build_dataset", lambda *args, **rest: got.append((args, rest)))
    line = "data build emoji out --size 24 --multiple 4 --styles twemoji,openmoji --limit 8 --holdout 0.1 --seed 5"
    code, _, err = flagdit(line + " --aspects 1:1,3:2 --shard-samples 7 --max-bad 0.5 --overwrite")
    assert code == 0, err
    ((kind, out), rest) = got[0]
    assert (kind, out) == ("emoji", "out")
    assert rest == {
        "size": 24,
        "multiple": 4,
        "styles": ("twemoji", "openmoji"),
        "limit": 8,
        "holdout": 0.1,
        "seed": 5,
        "aspects": ("1:1", "3:2"),
        "shard_samples": 7,
        "max_bad": 0.5,
        "overwrite": True,
    }


def test_bench_runs_a_script_with_its_arguments(flagdit, monkeypatch):
    got = []

    def run(command):
        got.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(cli.subprocess, "run", run)
    assert flagdit("bench model_cpu --threads 1 x")[0] == 3
    assert [(c[0], c[1].name, c[2:]) for c in got] == [(sys.executable, "model_cpu.py", ["--threads", "1", "x"])]
    for outside in ("../flagdit/cli", "/etc/hostname"):
        code, _, err = flagdit(f"bench {outside}")
        assert code == 2 and "there is no benchmark" in err
