"""finetune and eval, end to end on small real inputs, each task; what is written opens without lpsparse."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from support.cli import LISTENING, cli_environment
from support.files import tree_hash
from support.models import BUNDLED, ROWS, SMALL
from torch import nn

import lpsparse
from lpsparse import ExitCode, LpsparseError
from lpsparse.checkpoint.open import open_checkpoint
from lpsparse.commands.finetune import finetune_step, preview
from lpsparse.errors import InputError
from lpsparse.pruning.plan import plan_prune
from lpsparse.pruning.targets import choose
from lpsparse.steps.finetune import FinetuneStep
from lpsparse.steps.prune import PruneStep
from lpsparse.steps.resolve import resolve


def test_finetune_meets_the_target_exactly_and_writes_the_inputs_keys_shapes_and_dtypes(
    tmp_path: Path,
) -> None:
    report = lpsparse.finetune("bundled:stories260k", tmp_path / "out", target_sparsity="0.71", **SMALL)
    source = BUNDLED / "model.safetensors"
    before, after = (
        safetensors.torch.load_file(source),
        safetensors.torch.load_file(tmp_path / "out/model.safetensors"),
    )
    assert {k: (v.shape, v.dtype) for k, v in after.items()} == {
        k: (v.shape, v.dtype) for k, v in before.items()
    }
    prunable = [row.name for row in report.tensors if row.prunable]
    size = sum(after[name].numel() for name in prunable)
    assert (
        sum(int((after[name] == 0).sum()) for name in prunable)
        == int(size * 71 // 100)
        == report.prunable.zeros
    )
    assert not any(torch.signbit(value[value == 0]).any() for value in after.values())
    assert lpsparse.verify(tmp_path / "out")["ok"]


def test_the_output_opens_with_transformers_and_gives_the_recorded_quality(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    report = lpsparse.finetune("bundled:stories260k", tmp_path / "out", target_sparsity="0.5", **SMALL)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    text = (Path(lpsparse.__file__).parent / "bundled/shakespeare/validation.txt").read_text()[:4000]
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(text, add_special_tokens=False, return_tensors="pt")
    blocks = ids["input_ids"][0, : len(ids["input_ids"][0]) // 32 * 32].view(-1, 32)
    with torch.no_grad():
        loss = float(model(input_ids=blocks, labels=blocks).loss)
    assert loss == pytest.approx(report.quality[0].after, rel=1e-5)
    assert report.quality[0].before is not None


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        lpsparse.finetune("bundled:stories260k", tmp_path / name, seed=seed, target_sparsity="0.5", **SMALL)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_metrics_have_a_line_an_interval_with_what_the_bar_shows(tmp_path: Path) -> None:
    lpsparse.finetune("bundled:stories260k", tmp_path / "out", target_sparsity="0.5", **SMALL)
    lines = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert {"loss", "lr", "lambda_p", "sparsity", "epoch", "target"} <= set(lines[0])
    assert lines[-1]["sparsity"] == pytest.approx(0.5, abs=1e-5) and lines[-1]["lambda_p"] == 0


def test_p_below_one_leaves_a_band_that_gap_cuts_in_and_the_checkpoint_has_none(tmp_path: Path) -> None:
    options = {**SMALL, "steps": 60, "p": 0.5, "lr": 2e-3, "condition": "none"}
    lpsparse.finetune("bundled:stories260k", tmp_path / "out", **options)
    pruned = lpsparse.prune(tmp_path / "out", tmp_path / "cut", gap=True)
    source = open_checkpoint(tmp_path / "out")
    band = plan_prune(source, PruneStep(model="m", out=tmp_path, gap=True), choose(source)).band
    assert band is not None and band.decades >= 2
    assert pruned.prunable.zeros == band.below >= 0.01 * band.total
    cut = safetensors.torch.load_file(tmp_path / "cut/model.safetensors")
    left = [cut[row.name] for row in pruned.tensors if row.prunable]
    assert min(float(value[value != 0].abs().min()) for value in left) == band.high
    dense = {
        "task": "causal-lm",
        "data": "bundled:shakespeare",
        "split": "validation[:4000]",
        "max_length": 32,
    }
    before, after = (lpsparse.evaluate(tmp_path / name, **dense)["loss"] for name in ("out", "cut"))
    assert after == pytest.approx(before, abs=0.01)  # what lies under the band carries nothing
    with pytest.raises(LpsparseError, match="empty band") as caught:
        lpsparse.prune("bundled:stories260k", tmp_path / "no", gap=True)
    assert caught.value.exit_code == ExitCode.VERDICT and not (tmp_path / "no").exists()


def test_text_classification_adds_a_head_that_transformers_opens(
    tiny_bert: Path, table: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    # Frozen row norms would hold randomly made rows at their random size, so this model is not conditioned.
    options = {"data": str(table), "task": "text-classification", "steps": 60, "lr": 2e-2, "batch_size": 8}
    report = lpsparse.finetune(
        tiny_bert, tmp_path / "out", target_sparsity="0.5", condition="none", **options
    )
    assert report.quality[0].before is None and report.quality[0].after == 1.0
    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")(ROWS[0][0], return_tensors="pt")
    assert model.config.id2label[int(model(**ids).logits.argmax())] == "good"
    found = lpsparse.evaluate(tmp_path / "out", data=str(table), task="text-classification")
    assert (found["accuracy"], found["rows"]) == (1.0, 40)


def test_a_second_finetune_keeps_every_key_and_distils(tiny_bert: Path, table: Path, tmp_path: Path) -> None:
    options = {"data": str(table), "task": "text-classification", "steps": 5, "batch_size": 8}
    lpsparse.finetune(tiny_bert, tmp_path / "one", method="dense", condition="none", **options)
    report = lpsparse.finetune(
        tmp_path / "one", tmp_path / "two", distill=0.5, target_sparsity="0.5", **options
    )
    keys = [sorted(safetensors.torch.load_file(tmp_path / n / "model.safetensors")) for n in ("one", "two")]
    assert keys[0] == keys[1] and report.quality[0].before is not None
    with pytest.raises(LpsparseError, match="no head yet"):
        lpsparse.finetune(tiny_bert, tmp_path / "three", distill=0.5, **options)


def test_image_classification_trains_a_bare_state_dict_and_keeps_its_names(net: dict, tmp_path: Path) -> None:
    report = lpsparse.finetune(out=tmp_path / "out", steps=60, lr=2e-2, target_sparsity="0.5", **net)
    written = safetensors.torch.load_file(tmp_path / "out/model.safetensors")
    saved = torch.load(net["model"], weights_only=True)["state_dict"]
    assert {k: (v.shape, v.dtype) for k, v in written.items()} == {
        k: (v.shape, v.dtype) for k, v in saved.items()
    }
    assert report.prunable.zeros == (6 * 27 + 216 * 4) // 2
    assert written["module.1.num_batches_tracked"] > 0
    options = {k: v for k, v in net.items() if k not in ("model", "batch_size", "augment")}
    assert lpsparse.evaluate(tmp_path / "out", split="train", **options)["accuracy"] > 0.5


def test_half_precision_checkpoints_train_in_float32_and_come_back_in_their_dtype(tmp_path: Path) -> None:
    folder = tmp_path / "bf16"
    shutil.copytree(BUNDLED, folder)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    half = {name: value.bfloat16() for name, value in state.items()}
    safetensors.torch.save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    report = lpsparse.finetune(
        folder, tmp_path / "out", target_sparsity="0.5", mixed_precision="bf16", **SMALL
    )
    written = safetensors.torch.load_file(tmp_path / "out/model.safetensors")
    assert {value.dtype for value in written.values()} == {torch.bfloat16}
    assert report.prunable.zeros == report.prunable.weights // 2


def test_a_loss_that_is_not_finite_stops_with_exit_5_and_leaves_nothing(net: dict, tmp_path: Path) -> None:
    with pytest.raises(LpsparseError, match=r"step \d+ of 30: loss") as caught:
        lpsparse.finetune(out=tmp_path / "out", steps=30, lr=1e30, optimizer="sgd", condition="none", **net)
    assert caught.value.exit_code == ExitCode.NUMERIC
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_missing_weights_and_code_in_config_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(BUNDLED, folder)
    state = safetensors.torch.load_file(folder / "model.safetensors")
    lost = state.pop("model.layers.1.mlp.up_proj.weight")
    safetensors.torch.save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LpsparseError, match=r"layers\.1\.mlp\.up_proj"):
        lpsparse.finetune(folder, tmp_path / "out", **SMALL)
    safetensors.torch.save_file(
        {**state, "model.layers.1.mlp.up_proj.weight": lost}, folder / "model.safetensors"
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))
    with pytest.raises(LpsparseError, match="code of its own"):
        lpsparse.finetune(folder, tmp_path / "out", **SMALL)


def test_a_source_that_changes_during_the_training_is_refused(net: dict, tmp_path: Path) -> None:
    def change(_: Any) -> None:
        with net["model"].open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x3f")

    given = {**net, "model": str(net["model"]), "out": tmp_path / "out", "steps": 2}
    with pytest.raises(InputError, match="was changed during the training"):
        finetune_step(resolve(FinetuneStep, given), on_step=change)
    assert not list(tmp_path.glob("out*"))


def test_dry_run_says_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    plan = lpsparse.finetune("bundled:stories260k", tmp_path / "out", dry_run=True, **SMALL)
    assert (plan["steps"], plan["prunable_weights"], plan["zeros"]) == (12, 226_560, None)
    assert list(tmp_path.iterdir()) == []


def test_dry_run_says_zeros_disk_and_memory_in_words(tmp_path: Path, cli: Any) -> None:
    options = [f"--{key.replace('_', '-')}={value}" for key, value in SMALL.items()]
    words = ["finetune", "bundled:stories260k", tmp_path / "out", *options, "--dry-run"]
    shown = cli(*words, "--target-sparsity", "0.7").stdout
    assert "158,592 of 226,560 prunable weights would be zero (70.00 %)" in shown
    assert "12 steps of lp" in shown and "1 embedding, 11 norms" in shown
    assert re.search(
        r"would take +1\.\d\d MB of disk \(.+ are free\)\n +5\.29 MB of memory, 8\.01 MB at", shown
    )
    assert "only training tells how many become zero" in cli(*words).stdout
    assert "at the peak of a step in each of 2 processes" in cli(*words, "--processes", "2").stdout


def test_ctrl_c_in_training_exits_130_and_keeps_the_state(tmp_path: Path) -> None:
    words = ["finetune", "bundled:stories260k", "out", "--data", "bundled:shakespeare", "--task", "causal-lm"]
    words += [
        "--eval-split",
        "validation[:4000]",
        "--steps",
        "100000",
        "--log-every",
        "1",
        "--max-length",
        "32",
    ]
    run = subprocess.Popen(
        [sys.executable, "-c", LISTENING, *words],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    metrics = tmp_path / "out.partial" / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size) and run.poll() is None:
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    _, stderr = run.communicate(timeout=60)
    assert (run.returncode, "Traceback" in stderr) == (130, False), stderr
    assert "stopped by SIGINT after step" in stderr and "run the same command again" in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


def test_a_recipe_trains_again_when_its_data_changed_and_not_otherwise(tmp_path: Path) -> None:
    text = (Path(lpsparse.__file__).parent / "bundled/shakespeare/train.txt").read_text()
    data, recipe = tmp_path / "text.txt", tmp_path / "recipe.yaml"
    settings = "{task: causal-lm, max_length: 16, batch_size: 4, steps: 2, target_sparsity: 0.5}"
    recipe.write_text(f"model: bundled:stories260k\nsteps:\n  - finetune: {settings}\n  - report: {{}}\n")
    skipped = []
    for part in (text[:3000], text[:3000], text[3000:6000]):
        data.write_text(part)
        if len(skipped) == 2:  # OUT is another model now: it is not overwritten unasked
            with pytest.raises(LpsparseError, match="other settings, data"):
                lpsparse.run(recipe, {"data": str(data), "out": str(tmp_path / "out")})
        else:
            done = lpsparse.run(recipe, {"data": str(data), "out": str(tmp_path / "out")})
            skipped.append(done[0].skipped)
    assert skipped == [False, True]


def test_noise_masks_or_exchanges_words_only_and_follows_its_generator(tiny_bert: Path, table: Path) -> None:
    from lpsparse.steps.finetune import FinetuneStep
    from lpsparse.steps.resolve import resolve
    from lpsparse.training.build import prepare
    from lpsparse.training.tasks.base import Task

    def prepared(augment: str) -> Task:
        given = {"model": str(tiny_bert), "out": "o", "data": str(table), "task": "text-classification"}
        step = resolve(FinetuneStep, {**given, "augment": augment})
        return prepare(step, open_checkpoint(tiny_bert))

    task = prepared("noise")
    assert task.augment is not None
    batch = task.collate(list(task.train) * 20)
    noisy, again = (task.augment(batch, list(range(len(batch["labels"])))) for _ in range(2))
    assert torch.equal(noisy["input_ids"], again["input_ids"])
    changed = noisy["input_ids"] != batch["input_ids"]
    words = (batch["input_ids"] > 103) & batch["attention_mask"].bool()  # 0 to 103 are special or unused
    assert not (changed & ~words).any()
    assert 0.09 < float(changed[words].float().mean()) < 0.15  # some are exchanged for themselves
    masked = (noisy["input_ids"] == 103) & words
    assert 0.06 < float(masked[words].float().mean()) < 0.09
    assert torch.equal(noisy["labels"], batch["labels"])
    with pytest.raises(LpsparseError, match="crop-flip is not for --task text-classification"):
        prepared("crop-flip")


WAYS = [
    *({"condition": name} for name in ("none", "rows", "weight-norm", "l1-rows", "spectral", "denoise")),
    {"condition": "modular", "lr": 3e-3},  # of which lr is the size of each update
    *({"method": name} for name in ("gradual", "one-shot", "l1", "rigl")),
    # so few steps do not give factors back what decay takes; a held norm does
    *({"method": "dwf", "factors": factors, "condition": "rows"} for factors in (2, 3)),
    {"score": "magnitude"},
    {"masked_forward": False},
    {"condition": "l1-rows", "path_penalty": 0.1},
    {"condition": "weight-norm", "gain_lr_ratio": 0.1},
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(f"{key}-{way[key]}" for key in way))
def test_every_method_and_conditioning_trains_a_real_model_to_the_target(
    way: dict[str, object], tmp_path: Path
) -> None:
    settings = {**SMALL, "steps": 30, "lr": 4e-3, "target_sparsity": "0.5", "threads": 1, "max_length": 16}
    settings["eval_split"] = "validation[:3000]"
    report = lpsparse.finetune("bundled:stories260k", tmp_path / "out", **settings | way)
    assert report.prunable.zeros == 226_560 // 2
    quality = report.quality[0]
    assert quality.before is not None and quality.after < quality.before - 0.05  # nats a token
    tensors = lpsparse.load(tmp_path / "out")
    assert all(bool(value.isfinite().all()) for value in tensors.values())


def test_auto_takes_the_fisher_score_where_no_batch_norm_is_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lpsparse.steps.finetune import FinetuneStep
    from lpsparse.steps.resolve import resolve
    from lpsparse.training.settings import resolve_auto

    given = {"model": "m", "out": "o", "data": "d", "task": "causal-lm", "target_sparsity": "0.5"}
    plain, normed = nn.Linear(2, 2), nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1))
    for options, model, wanted in (
        ({}, plain, "fisher none end"),
        ({}, normed, "magnitude none gradual"),
        ({"optimizer": "sgd"}, plain, "magnitude none end"),
        ({"method": "gradual"}, plain, "magnitude none end"),
        ({"method": "gradual"}, normed, "magnitude none end"),
        ({"score": "fisher"}, normed, "fisher none gradual"),
        ({"target_sparsity": None}, plain, "fisher rows end"),
        ({"selective": False}, plain, "fisher rows end"),
        ({"method": "dwf"}, plain, "magnitude none end"),
        ({"target_sparsity": None}, normed, "magnitude none end"),
        ({"target_sparsity": None, "method": "dense"}, plain, "magnitude none end"),
    ):
        given_here = {key: value for key, value in {**given, **options}.items() if value is not None}
        resolved = resolve_auto(resolve(FinetuneStep, given_here), model, 60)
        assert f"{resolved.score} {resolved.condition} {resolved.cut}" == wanted
    short = resolve(FinetuneStep, {**given, "condition": "spectral"})
    assert resolve_auto(short, normed, 25).score == resolve_auto(short, plain, 25).score == "magnitude"
    assert resolve_auto(short, plain, 60).condition == resolve_auto(short, normed, 60).condition == "spectral"
    with pytest.raises(LpsparseError, match="the cut comes within 20 steps"):
        resolve_auto(resolve(FinetuneStep, {**given, "score": "fisher"}), plain, 25)
    from lpsparse.cli import main

    words = ["finetune", "bundled:stories260k", str(tmp_path / "out"), "--data", "bundled:shakespeare"]
    words += ["--task", "causal-lm", "--target-sparsity", "0.5", "--steps", "50", "--max-length", "16"]
    with pytest.raises(SystemExit) as left:
        main([*words, "--eval-split", "validation[:3000]"])
    assert not left.value.code
    assert "Fisher score" in capsys.readouterr().err


def test_a_norm_or_bias_that_is_included_is_cut_and_decays_with_the_rest(tmp_path: Path) -> None:
    report = lpsparse.finetune(
        "bundled:stories260k", tmp_path / "out", include="*", target_sparsity="0.5", **SMALL
    )
    file = safetensors.torch.load_file(tmp_path / "out/model.safetensors")
    assert {row.name for row in report.tensors if row.prunable} == set(file)
    size = sum(value.numel() for value in file.values())
    assert sum(int((value == 0).sum()) for value in file.values()) == size // 2


def test_a_run_says_which_options_it_has(tmp_path: Path) -> None:
    """Two logs of different runs can be told apart; w_kill is said where its formula holds."""

    def said_of(name: str, model: object = "bundled:stories260k", **options: object) -> str:
        lpsparse.finetune(model, tmp_path / name, **SMALL, **options)
        return json.loads((tmp_path / name / "lpsparse.json").read_text())["notes"][-1]

    plain = said_of("plain")
    assert re.search(r"w_kill \d", plain) and "--" not in plain
    annealed = said_of("annealed", p_start=1)
    assert not re.search(r"w_kill \d", annealed) and "--p-start 1.0" in annealed
    said_of("sparse", method="gradual", target_sparsity="0.7")
    options = {"target_sparsity": "0.5", "keep_zeros": True, "distill": 0.5, "cautious": True}
    options["selective"] = False
    kept = said_of("kept", tmp_path / "sparse", **options)
    for part in ("--cautious --distill 0.5", "chosen by magnitude", "zeros of MODEL, more than the target"):
        assert part in kept


def test_training_goes_on_when_the_reader_of_its_progress_has_gone(tmp_path: Path) -> None:
    words = ["finetune", "bundled:stories260k", "out", "--data", "bundled:shakespeare", "--task", "causal-lm"]
    words += ["--steps", "3", "--max-length", "16", "--eval-split", "validation[:3000]"]
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "lpsparse", *words],
        cwd=tmp_path,
        env=cli_environment(),
        stderr=writing,
        stdout=subprocess.DEVNULL,
        timeout=120,
    )
    os.close(writing)
    assert done.returncode == 0
    assert lpsparse.verify(tmp_path / "out")["ok"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"score": "fisher", "optimizer": "sgd"}, "fisher reads AdamW"),
        ({"score": "fisher", "method": "one-shot"}, "no averages to score by"),
        ({"score": "fisher", "method": "dwf"}, "no averages to score by"),
        ({"method": "rigl", "keep_zeros": True}, "revives zeros"),
        ({"condition": "denoise", "target_sparsity": None}, "needs --target-sparsity"),
        ({"method": "gradual", "cautious": True}, "--cautious is for --method lp or l1, not gradual"),
        ({"method": "one-shot", "p_start": 2.0}, "--p-start is for --method lp"),
        ({"method": "l1", "prox": "irl1"}, "--prox is for --method lp"),
        ({"method": "gradual", "cut": "gradual"}, "--cut is for --method lp"),
        ({"method": "gradual", "p": 0.8}, "--p is for --method lp"),
        ({"method": "dense", "lambda_p": 5.0, "target_sparsity": None}, "--lambda is for --method lp"),
        ({"decay_share": 0.2, "target_sparsity": None}, "--decay-share needs --target-sparsity"),
        ({"score": "magnitude", "target_sparsity": None}, "--score needs --target-sparsity"),
        ({"factors": 3}, "--factors is for --method dwf"),
        ({"gain_lr_ratio": 0.1}, "--gain-lr-ratio is for --condition weight-norm"),
        ({"condition": "rows", "path_penalty": 0.1}, "--path-penalty is for --condition l1-rows"),
    ],
)
def test_an_option_of_another_method_is_refused(options: dict[str, object], says: str) -> None:
    from lpsparse.steps.finetune import FinetuneStep
    from lpsparse.steps.resolve import resolve

    given = {"model": "m", "out": "o", "data": "d", "task": "causal-lm", "target_sparsity": "0.5", **options}
    with pytest.raises(LpsparseError, match=says):
        resolve(FinetuneStep, {key: value for key, value in given.items() if value is not None})
    whole = resolve(FinetuneStep, {"model": "m", "out": "o", "data": "d", "task": "causal-lm"}).model_dump()
    FinetuneStep.model_validate(whole)  # what a manifest records can be run again


def test_a_prunable_tensor_that_no_gradient_reaches_is_named(net: dict, tmp_path: Path) -> None:
    """The fisher score knows nothing of it; nothing is written."""
    source = (tmp_path / "net.py").read_text()
    built = "made[0].spare = nn.Linear(8, 8)"
    (tmp_path / "net.py").write_text(
        f"{source}\ninner = build\ndef build():\n    made = inner()\n    {built}\n    return made\n"
    )
    file = torch.load(net["model"], weights_only=True)
    torch.manual_seed(0)
    spare = {f"module.0.spare.{key}": value for key, value in nn.Linear(8, 8).state_dict().items()}
    torch.save({"state_dict": file["state_dict"] | spare}, net["model"])
    with pytest.raises(LpsparseError, match=r"no gradient has reached .*spare\.weight"):
        lpsparse.finetune(out=tmp_path / "out", steps=60, score="fisher", target_sparsity="0.5", **net)
    assert not (tmp_path / "out").exists()


def test_outputs_of_blocks_are_learnt_from_at_every_step(tmp_path: Path) -> None:
    given = {**SMALL, "target_sparsity": "0.5", "distill": 0.5}
    plain = lpsparse.finetune(BUNDLED, tmp_path / "plain", **given)
    taught = lpsparse.finetune(BUNDLED, tmp_path / "taught", **given, distill_blocks=1.0)
    assert taught.prunable.zeros == plain.prunable.zeros
    assert taught.quality[0].before == plain.quality[0].before
    assert tree_hash(tmp_path / "taught") != tree_hash(tmp_path / "plain")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a GPU can do it")
def test_fp16_without_a_gpu_and_an_optimizer_of_no_name_are_refused(tmp_path: Path) -> None:
    for options, what in (
        ({"mixed_precision": "fp16"}, "fp16: needs a GPU"),
        ({"optimizer": "mun"}, "did you mean muon"),
    ):
        with pytest.raises(LpsparseError, match=what) as caught:
            lpsparse.finetune(BUNDLED, tmp_path / "out", **SMALL, **options)
        assert caught.value.exit_code == ExitCode.USAGE and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("steps", "few"), [(8, True), (49, True), (50, False)])
def test_too_few_steps_are_said_before_the_first(steps: int, few: bool, net: dict, tmp_path: Path) -> None:
    said: list[str] = []
    planned = {**net, "out": tmp_path / "out", "target_sparsity": "0.5", "steps": steps}
    warning = preview(resolve(FinetuneStep, {**planned, "dry_run": True}), said.append).warning
    assert (warning is not None) == few
    if warning is not None:
        assert f"{steps} steps" in warning and "--steps 50" in warning
        finetune_step(resolve(FinetuneStep, planned), said.append)
        warned = [text.startswith("warning: ") for text in said].index(True)
        assert any("zero" in text or "target" in text for text in said[warned:])


def test_a_run_without_a_cut_is_never_too_short(net: dict, tmp_path: Path) -> None:
    for given in ({}, {"method": "dense"}, {"method": "one-shot", "target_sparsity": "0.5"}):
        plan = lpsparse.finetune(out=tmp_path / "out", **net, **given, steps=2, dry_run=True)
        assert plan["warning"] is None
