"""Runs from beginning to end, on real files."""

import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from run_files import lines, same, tensors

from flagdit.checkpoint import store
from flagdit.config.load import load_recipe
from flagdit.data_pipelines.encode import encode_dataset
from flagdit.data_pipelines.index import Dataset
from flagdit.data_pipelines.loader import build_loader, validation_batches
from flagdit.errors import RecipeError
from flagdit.flow.noise import draw_noise
from flagdit.flow.objective import FlowMatching
from flagdit.generate.images import grid, to_image
from flagdit.generate.pipeline import load_pipeline
from flagdit.model.flag_dit import FlagDiT
from flagdit.parallel.mesh import ParallelContext
from flagdit.train import step as step_module
from flagdit.train.display import PlainDisplay
from flagdit.train.folder import RunFolder
from flagdit.train.loop import train
from flagdit.train.run import build


def test_a_run_leaves_everything_in_its_folder(tiny, capsys):
    recipe = tiny(validation__every=3, sample__every=4, sample__prompts="[one,two,three]")
    folder = train(recipe)
    out = capsys.readouterr().out

    assert folder == Path(recipe.run_dir) / "tiny" and load_recipe(folder / "recipe.yaml") == recipe
    logged = lines(folder / "metrics.jsonl")
    training = [line for line in logged if "loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in logged if "val_loss" in line] == [3, 6]
    assert training[0]["lr"] == 0.005 and training[-1]["lr"] == 0.01
    assert training[-1]["samples"] == 48 and training[-1]["tokens"] == sum(
        batch.layout.num_tokens for k in range(6) for batch in next(build_loader(recipe, k))
    )
    assert all(math.isfinite(line[k]) for line in training for k in ("loss", "grad_norm", "tokens_per_s", "seconds"))
    assert training[0]["mfu"] is None  # nobody knows this processor's peak
    assert [step for step, _ in store.complete(folder)] == [2, 4, 6]
    assert sorted(tensors(folder, 6)) == sorted(
        {f"{group}/{name}" for group in ("model", "ema_0.99", "ema_0.5") for name in model_names(recipe)}
        | {f"optimizer/{name}.{m}" for name in model_names(recipe) for m in ("exp_avg", "exp_avg_sq")}
        | {"optimizer/step"}
    )
    with Image.open(folder / "samples" / "step_00000004.png") as sheet:
        assert sheet.size == (3 * 8 * 16 + 2 * 2, 8 * 16)  # enlarged to 128 pixels a side
    assert sorted(p.name for p in (folder / "samples").iterdir()) == [
        f"step_0000000{n}.{kind}" for n in (4, 6) for kind in ("json", "png")
    ]
    page = (folder / "report.html").read_text()
    assert "finished" in page and "one" in page
    assert "step 6/6" in out and "held-out loss" in out and "checkpoint saved" in out and "report.html" in out
    (start,) = lines(folder / "environment.jsonl")
    assert start["step"] == 0 and start["versions"]["torch"] == torch.__version__
    assert start["parameters"] == sum(p.numel() for p in FlagDiT(recipe.model).parameters())


def model_names(recipe) -> list[str]:
    return [name for name, _ in FlagDiT(recipe.model).named_parameters()]


def test_known_peak_gives_mfu(tiny):
    folder = train(tiny(train__steps=2, log__peak_tflops=0.001))
    first, second = lines(folder / "metrics.jsonl")
    assert first["mfu"] > 0
    # 6·parameters FLOPs per token is the usual estimate; a tiny model is dominated by its embedders, hence the slack.
    recipe = tiny()
    rough = 6 * sum(p.numel() for p in FlagDiT(recipe.model).parameters()) * second["tokens_per_s"] / 1e9
    assert 0.1 < second["mfu"] / rough < 3


@pytest.mark.parametrize("weighting", ["sample", "token"])
def test_numbers_do_not_depend_on_micro_batches(tiny, weighting):
    runs = {}
    for parts in (1, 2, 4):
        folder = train(tiny(name=f"split{parts}", train__accumulation=parts, train__steps=3, checkpoint__every=3,
                            flow__token_weighting=weighting, flow__caption_dropout=0.3))  # fmt: skip
        runs[parts] = ([line["loss"] for line in lines(folder / "metrics.jsonl")], tensors(folder, 3))
    for parts in (2, 4):
        assert runs[parts][0] == pytest.approx(runs[1][0], rel=1e-6)
        for name, t in runs[1][1].items():
            # The second moments are squares of gradients and reach far below the weights.
            torch.testing.assert_close(runs[parts][1][name], t, rtol=1e-3, atol=1e-5)


def test_watching_changes_nothing(tiny):
    quiet = train(tiny(name="quiet"))
    watched = train(tiny(name="watched", validation__every=1, sample__every=1, sample__prompts="[a]", sample__ema=1))
    assert same(tensors(quiet, 6), tensors(watched, 6))


def test_validation_is_the_loss_of_the_first_average(tiny):
    recipe = tiny(validation__every=4, train__steps=4, checkpoint__every=4)
    folder = train(recipe)
    line = [line for line in lines(folder / "metrics.jsonl") if "val_loss" in line][-1]
    model = FlagDiT(recipe.model)
    model.load_state_dict(store.load(store.find(folder)).tensors["ema_0.99"])
    found = {}
    with torch.no_grad():
        for t in (0.3, 0.7):
            errors = []
            for batch in validation_batches(recipe):
                noise = draw_noise(batch, recipe.seed)
                mixed = {m: t * x + (1 - t) * noise[m] for m, x in batch.patches.items()}
                velocity = model(mixed, torch.full((len(batch.segments),), t), batch)
                error = (velocity["image"] - (batch.patches["image"] - noise["image"])).square().mean(1)
                owner = batch.layout.patch_segment["image"]
                errors += [error[owner == s].mean().item() for s in range(len(batch.segments))]
            assert len(errors) == 4
            found[str(t)] = sum(errors) / 4
    assert line["val_loss_at"] == pytest.approx(found, rel=1e-5) and line["val_weights"] == "ema_0.99"
    assert line["val_loss"] == pytest.approx(sum(found.values()) / 2, rel=1e-5)


def test_grids_are_drawn_from_the_average_that_the_recipe_names(tiny):
    recipe = tiny(sample__every=6, sample__prompts="[a,b]", sample__ema=1, train__ema_warmup=False)
    folder = train(recipe)
    with Image.open(folder / "samples" / "step_00000006.png") as sheet:
        drawn = sheet.tobytes()
    found = {}
    for ema in (0, 1, -1):
        pixels = load_pipeline(folder, ema=ema).generate(["a", "b"], recipe.sample)
        found[ema] = grid([to_image(x) for x in pixels], columns=8, zoom=16).tobytes()
    assert drawn == found[1] and found[1] not in (found[0], found[-1])
    assert json.loads((folder / "samples" / "step_00000006.json").read_text())["weights"] == "ema_0.5"


def test_one_batch_is_learnt_by_heart(tiny):
    """The whole chain of model, objective and optimizer: one batch with its noise and times to below 5% of its loss."""
    recipe = tiny(model__dim=64, model__ffn_dim=192, model__cond_dim=64, model__num_heads=4, optimizer__lr=0.003)
    run = build(recipe, RunFolder(Path(recipe.run_dir) / "tiny"), PlainDisplay(), ParallelContext())
    batch, path = step_module.draw(run, next(build_loader(recipe, 0))[0])
    losses = []
    for _ in range(400):
        loss = run.objective.loss(run.engine.model, batch, path)
        run.engine.backward(loss.total, last=True)
        run.engine.grad_norm()
        run.engine.step(recipe.optimizer.lr)
        losses.append(loss.total.item())
        if losses[-1] < 0.05 * losses[0]:
            break
    assert losses[-1] < 0.05 * losses[0]


def test_bf16_trains_close_to_fp32_and_saves_fp32(tiny):
    runs = {}
    for precision in ("fp32", "bf16"):
        folder = train(tiny(name=precision, train__precision=precision, validation__every=6, sample__every=6,
                            sample__prompts="[x]"))  # fmt: skip
        runs[precision] = lines(folder / "metrics.jsonl")
    assert {t.dtype for t in tensors(folder, 6).values()} == {torch.float32}
    pairs = list(zip(runs["fp32"], runs["bf16"], strict=True))
    assert all(b["loss"] == pytest.approx(a["loss"], rel=0.03) for a, b in pairs if "loss" in a)
    assert pairs[-1][1]["val_loss"] == pytest.approx(pairs[-1][0]["val_loss"], rel=0.03)


def test_prompts_reach_the_model(pictures, tiny, tmp_path):
    """Text: features in training, dropped captions, prompts in the grids."""
    recipe = tiny(model__text_dim=384, data__path=tmp_path / "text", flow__caption_dropout=0.5, sample__guidance=2,
                  sample__every=6, sample__prompts="[picture 1,picture 2]", validation__every=6)  # fmt: skip
    encode_dataset(pictures, tmp_path / "text", recipe)
    folder = train(recipe)
    with Image.open(folder / "samples" / "step_00000006.png") as sheet:
        one, two = (sheet.crop((x, 0, x + 128, 128)).tobytes() for x in (0, 130))
    assert one != two


def test_classes_reach_the_model(tiny):
    recipe = tiny(model__num_classes=3, flow__caption_dropout=0.5, sample__guidance=2, sample__every=6,
                  sample__prompts="['0','2']")  # fmt: skip
    folder = train(recipe)
    assert (folder / "samples" / "step_00000006.png").exists()
    # Dropped labels train the row of "no class".
    model = FlagDiT(recipe.model)
    before = build(recipe, RunFolder(folder), PlainDisplay(), ParallelContext()).engine.weights()[
        "y_embedder.table.weight"
    ]
    after = store.load(store.find(folder)).tensors["model"]["y_embedder.table.weight"]
    assert len(after) == 4 == len(model.y_embedder.table.weight) and not torch.equal(before[3], after[3])


def test_deterministic_mode_holds_for_the_run_only(tiny, monkeypatch):
    seen = []
    honest = step_module.draw_timesteps
    monkeypatch.setattr(step_module, "draw_timesteps",
                        lambda *a: seen.append(torch.are_deterministic_algorithms_enabled()) or honest(*a))  # fmt: skip
    train(tiny(train__steps=2, train__deterministic=True))
    assert seen == [True, True] and not torch.are_deterministic_algorithms_enabled()


def test_cuda_is_refused_where_there_is_none(tiny):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(RecipeError, match=r"train\.device=cuda.*no CUDA device"):
        train(tiny(train__device="cuda"))


def test_unreadable_samples_are_left_out_and_written_down(data, tiny, tmp_path, capsys):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(data, broken)
    dataset = Dataset.open(broken)
    victim = next(build_loader(tiny(), 1))[0].segments[3]
    shard = broken / "shards" / f"{dataset.shard_names[dataset.columns['shard'][victim.sample_id]]}.tar"
    content = bytearray(shard.read_bytes())
    content[int(dataset.columns["offset"][victim.sample_id]) + 600] ^= 255
    shard.write_bytes(content)
    folder = train(tiny(data__path=broken, data__max_bad_samples=0.1))
    (entry,) = lines(folder / "ledger.jsonl")
    assert entry["kind"] == "sample" and entry["step"] == 2 and entry["samples"][0]["key"] == victim.key
    assert lines(folder / "metrics.jsonl")[1]["samples"] == 15
    assert f"sample {victim.key} left out" in capsys.readouterr().out
    assert victim.key in (folder / "report.html").read_text()


def test_wandb_offline_keeps_one_run_over_restarts(tiny, monkeypatch):
    import socket

    def refuse(self, address):
        assert self.family == socket.AF_UNIX, f"a connection to {address}"
        return honest(self, address)

    honest = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", refuse)
    keys = {"log__wandb_project": "tiny-project", "validation__every": 2, "sample__every": 2, "sample__prompts": "[a]"}
    folder = train(tiny(train__steps=2, **keys))
    train(tiny(train__steps=4, **keys))
    run_id = (folder / "wandb" / "run_id").read_text()
    starts = sorted((folder / "wandb").glob("offline-run-*"))
    assert len(starts) == 2 and all(run_id in start.name for start in starts)
    for start in starts:
        record = (start / f"run-{run_id}.wandb").read_bytes()
        assert all(word in record for word in (b"tiny-project", b"grad_norm", b"val_loss", b"optimizer.lr"))
        assert list((start / "files").rglob("samples*.png"))


def test_objective_is_told_the_global_count(tiny, monkeypatch):
    """A batch of uneven packs: the mean over all samples, not the mean of the packs' means."""
    recipe = tiny(train__accumulation=2)
    folder = RunFolder(Path(recipe.run_dir) / "tiny")
    folder.path.mkdir(parents=True)
    run = build(recipe, folder, PlainDisplay(), ParallelContext())
    packs = next(build_loader(recipe, 0))
    uneven = [next(build_loader(tiny(train__accumulation=8), 0))[i] for i in range(3)]
    batches = [packs[0], uneven[0], uneven[1], uneven[2]]
    losses = []
    objective = FlowMatching(recipe.flow)
    for batch in batches:
        drawn = step_module.draw(run, batch)
        losses += objective.loss(run.engine.model, *drawn).per_sample_S.tolist()
    result = step_module.take_step(run, batches, 0.0)
    assert result.loss == pytest.approx(sum(losses) / 7, rel=1e-6) and result.samples == 7


@pytest.mark.filterwarnings("ignore:Dynamo detected a call:UserWarning")
def test_compiled_blocks_give_the_same_losses(tiny, monkeypatch):
    """Traced as for a GPU, without the minutes that generating code takes here."""
    import functools

    traced = []

    def trace(function, **keys):
        traced.append(function)
        return compile_(function, backend="eager")

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", functools.wraps(compile_)(trace))
    runs = {}
    for on in (False, True):
        torch.compiler.reset()
        recipe = tiny(name=f"compile_{on}", train__compile=on, train__steps=1, optimizer__warmup_steps=1,
                      sample__every=1, sample__prompts="[a]")  # fmt: skip
        folder = train(recipe)
        runs[on] = ([line["loss"] for line in lines(folder / "metrics.jsonl")], tensors(folder, 1))
    assert len(traced) == 2  # one per block
    assert runs[True][0] == pytest.approx(runs[False][0], rel=1e-6)
    for name, t in runs[False][1].items():
        torch.testing.assert_close(runs[True][1][name], t, rtol=1e-3, atol=1e-5)
