"""The model card: metadata that the hub's own library takes, a copied licence, no stranger's word."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors.numpy import save_file
from support.cli import Ran
from support.files import tiny_arrays, tree_hash
from support.models import BUNDLED, SMALL

from lpsparse import finetune, pack, prune, report, unpack, verify
from lpsparse.reporting.card import escape, read_base_card
from lpsparse.reporting.html.page import render

Cli = Callable[..., Ran]
TAGS = ["lpsparse", "sparse", "pruned"]


def card_of(folder: Path) -> dict[str, Any]:
    """The metadata as the hub's library reads it."""
    text = (folder / "README.md").read_text()
    assert ModelCard(text).data.to_dict() == yaml.safe_load(text.split("---\n")[1])
    return ModelCard(text).data.to_dict()


def base_card(folder: Path, text: str | bytes) -> dict[str, Any]:
    path = folder / "README.base.md"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_base_card(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card")
    shutil.copytree(BUNDLED, folder / "model")
    (folder / "model" / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n")
    finetune(folder / "model", folder / "out", target_sparsity="0.5", **SMALL)
    return folder / "out"


def test_the_licence_is_copied_from_the_base_card(tiny: Path, tmp_path: Path) -> None:
    prune(tiny, tmp_path / "out", sparsity=0.5)
    assert card_of(tmp_path / "out") == {"library_name": "lpsparse", "license": "mit", "tags": TAGS}
    prune(tmp_path / "out", tmp_path / "twice", sparsity=0.8)
    assert card_of(tmp_path / "twice")["license"] == "mit"


def test_no_licence_is_invented(tiny: Path, tmp_path: Path) -> None:
    (tiny / "README.md").write_text("# a model\n")
    prune(tiny, tmp_path / "out", sparsity=0.5)
    assert card_of(tmp_path / "out") == {"library_name": "lpsparse", "tags": TAGS}
    assert (
        "The licence is that of the base model (see README.base.md)."
        in (tmp_path / "out/README.md").read_text()
    )


def test_a_new_head_gives_the_card_its_own_task(tiny_bert: Path, table: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bert, tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("---\npipeline_tag: sentence-similarity\n---\n")
    prune(tmp_path / "base", tmp_path / "cut", sparsity=0.5)
    assert card_of(tmp_path / "cut")["pipeline_tag"] == "sentence-similarity"
    finetune(tmp_path / "base", tmp_path / "out", data=str(table), task="text-classification", steps=2)
    pack(tmp_path / "out", tmp_path / "packed")  # and so in the steps after it
    tags = [card_of(tmp_path / name)["pipeline_tag"] for name in ("out", "packed")]
    assert tags == ["text-classification"] * 2


def test_results_are_there_dense_and_sparse(trained: Path) -> None:
    found = json.loads((trained / "report.json").read_text())["quality"][0]
    results = ModelCard((trained / "README.md").read_text()).data.eval_results
    assert results is not None and [each.metric_value for each in results] == [
        found["before"],
        found["after"],
    ]
    assert {(each.task_type, each.metric_type, each.dataset_split) for each in results} == {
        ("text-generation", "loss", "validation[:4000] tokens")
    }
    assert results[0].metric_name == "loss, dense" and "sparse (50.00 %" in str(results[1].metric_name)


def test_results_stay_with_the_weights_that_they_are_of(trained: Path, tmp_path: Path) -> None:
    pack(trained, tmp_path / "packed")
    assert card_of(tmp_path / "packed")["model-index"] == card_of(trained)["model-index"]
    prune(trained, tmp_path / "pruned", sparsity=0.9, allow_empty=True)
    assert "model-index" not in card_of(tmp_path / "pruned")
    why = "No quality is recorded of these weights: it was measured before this step changed them"
    assert why in (tmp_path / "pruned" / "README.md").read_text()


def test_results_stay_however_many_steps_keep_the_weights(trained: Path, tmp_path: Path) -> None:
    prune(trained, tmp_path / "pruned", sparsity=0.5)  # as many as are zero: nothing is cut
    pack(tmp_path / "pruned", tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "dense")
    for name in ("pruned", "packed", "dense"):
        assert card_of(tmp_path / name)["model-index"] == card_of(trained)["model-index"]


@pytest.mark.parametrize("made", ["x", ["task"], 7, None])
def test_a_manifest_with_another_recipe_does_not_stop_pack(made: Any, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "in")
    manifest = json.loads((trained / "lpsparse.json").read_text()) | {"recipe": {"finetune": made}}
    manifest["quality"][0]["task"] = None
    (tmp_path / "in" / "lpsparse.json").write_text(json.dumps(manifest))
    pack(tmp_path / "in", tmp_path / "out")
    assert "model-index" not in card_of(tmp_path / "out")  # nobody knows the task


def test_a_card_tells_of_every_step_and_of_which_model_before_is(trained: Path, tmp_path: Path) -> None:
    prune(trained, tmp_path / "pruned", sparsity=0.5)
    pack(tmp_path / "pruned", tmp_path / "packed")
    manifests = [
        json.loads((folder / "lpsparse.json").read_text())
        for folder in (trained, tmp_path / "pruned", tmp_path / "packed")
    ]
    text = (tmp_path / "packed" / "README.md").read_text()
    block = re.search(r"\n```yaml\n(.*?)\n```\n", text, re.DOTALL)
    assert block is not None and yaml.safe_load(block.group(1)) == [each["recipe"] for each in manifests]
    took = escape(manifests[0]["source"]["name"])
    assert f"In 3 steps: the first took {took}, each other" in text and f" before (of {took}), " in text
    found = report(tmp_path / "packed")
    assert found.made is not None
    assert [list(each.recipe) for each in found.made.earlier] == [["finetune"], ["prune"]]
    assert found.training == report(trained).training != ()
    (tmp_path / "pruned" / "metrics.jsonl").rename(tmp_path / "secret")
    (tmp_path / "pruned" / "metrics.jsonl").symlink_to("../secret")
    pack(tmp_path / "pruned", tmp_path / "other")
    assert not (tmp_path / "other" / "metrics.jsonl").exists()
    page = render(found)
    assert all(f"Settings, step {i} of 3" in page for i in (1, 2, 3)) and "Curves of the run" in page


@pytest.mark.parametrize("base", ["https://evil.example/x", "WWW.evil.example", "a@evil.example"])
def test_no_base_becomes_a_link(base: str) -> None:
    assert escape(base).startswith(("`", "<code>"))
    assert escape("org/model@v1") == "org/model@v1"


def test_the_recipe_in_the_card_is_that_of_the_manifest(trained: Path) -> None:
    text = (trained / "README.md").read_text()
    block = re.search(r"\n```yaml\n(.*?)\n```\n", text, re.DOTALL)
    manifest = json.loads((trained / "lpsparse.json").read_text())
    assert block is not None and yaml.safe_load(block.group(1)) == manifest["recipe"]
    assert "zeros need a sparse runtime to be faster" in text


def test_no_pattern_ends_the_recipes_block(tiny: Path, tmp_path: Path) -> None:
    name = "x```\n# not the recipe\n```"
    save_file({**tiny_arrays(), name: np.ones((2, 2), np.float32)}, tiny / "model.safetensors")
    prune(tiny, tmp_path / "out", sparsity=0.5, exclude=name)
    text = (tmp_path / "out" / "README.md").read_text()
    fence = re.search(r"\n(`{4,})yaml\n(.*?)\n\1\n", text, re.DOTALL)
    assert fence is not None and "not the recipe" in fence.group(2)
    assert "\n# not the recipe" not in text


def test_the_figure_is_a_hashed_file_of_out(tiny: Path, tmp_path: Path) -> None:
    prune(tiny, tmp_path / "a", sparsity=0.5)
    prune(tiny, tmp_path / "b", sparsity=0.5)
    assert tree_hash(tmp_path / "a") == tree_hash(tmp_path / "b")
    assert "](figures/sparsity.svg)" in (tmp_path / "a" / "README.md").read_text()
    assert verify(tmp_path / "a")["ok"]
    (tmp_path / "a" / "figures" / "sparsity.svg").write_text("<svg/>")
    assert not verify(tmp_path / "a")["ok"]


def test_the_figure_has_a_bar_for_each_tensor_and_no_script(tiny: Path, tmp_path: Path) -> None:
    prune(tiny, tmp_path / "out", sparsity=0.5)
    root = ElementTree.parse(tmp_path / "out" / "figures" / "sparsity.svg").getroot()
    bars = [each for each in root if each.tag.endswith("rect") and "." in each.get("height", "")]
    assert len(bars) == 10  # of 11 tensors one has no weights
    assert {each.tag.rpartition("}")[2] for each in root.iter()} == {
        "svg",
        "title",
        "desc",
        "rect",
        "line",
        "text",
    }


def test_very_many_tensors_make_no_very_wide_figure(tmp_path: Path) -> None:
    arrays = {f"layers.{i}.weight": np.ones((2, 2), np.float32) for i in range(1000)}
    save_file(arrays, tmp_path / "m.safetensors")
    prune(tmp_path / "m.safetensors", tmp_path / "out", sparsity=0.5, allow_empty=True)
    text = (tmp_path / "out" / "figures" / "sparsity.svg").read_text()
    assert text.count("<rect") < 330 and "a bar is 4 tensors" in text


def test_somebody_elses_figure_is_kept_as_it_is(tiny: Path, tmp_path: Path) -> None:
    theirs = "figures/sparsity.svg"
    (tiny / theirs).parent.mkdir()
    (tiny / theirs).write_text("theirs")
    prune(tiny, tmp_path / "out", sparsity=0.5)
    assert (tmp_path / "out" / theirs).read_text() == "theirs"
    assert "figures/sparsity.svg" not in (tmp_path / "out" / "README.md").read_text()


def test_unpack_and_pack_go_on_with_our_own_figure(tiny: Path, tmp_path: Path) -> None:
    prune(tiny, tmp_path / "out", sparsity=0.5)
    pack(tmp_path / "out", tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "dense")
    figures = {(tmp_path / name / "figures/sparsity.svg").read_bytes() for name in ("out", "packed", "dense")}
    assert len(figures) == 1


GOOD = {
    "license: apache-2.0": {"license": "apache-2.0"},
    "language:\n- en\n- fr\nlicense: mit": {"language": ["en", "fr"], "license": "mit"},
    "language: [en, zh-Hans]": {"language": ["en", "zh-Hans"]},
    "language: no\nlicense: mit": {"language": ["no"], "license": "mit"},  # to YAML a boolean
    "language:\n- sv\n- no\n- 'da'": {"language": ["sv", "no", "da"]},
    "datasets:\n  - org/data\n  - squad": {"datasets": ["org/data", "squad"]},
    "pipeline_tag: text-generation": {"pipeline_tag": "text-generation"},
    "license: other\nlicense_name: x-1\nlicense_link: LICENSE.md": {
        "license": "other",
        "license_name": "x-1",
        "license_link": "LICENSE.md",
    },
    "tags: [a\nbroken: {\nlicense: mit\nmodel-index: '": {"license": "mit"},
    "license: mit\nmodel-index:\n" + "- name: x\n" * 50_000: {"license": "mit"},
}


@pytest.mark.parametrize(("text", "found"), GOOD.items(), ids=range(len(GOOD)))
def test_what_is_copied_from_a_base_card(text: str, found: dict[str, Any], tmp_path: Path) -> None:
    assert base_card(tmp_path, f"---\n{text}\n---\n# body\nlicense: no\n") == found
    assert base_card(tmp_path, f"\ufeff---\n{text}\n---\n".replace("\n", "\r\n")) == found


HOSTILE: dict[str, str | bytes] = {
    "no front matter": "license: mit\n",
    "unfinished": "---\nlicense: mit\n",
    "empty": "",
    "binary": bytes(range(256)),
    "list": "---\nlicense: [mit, gpl]\n---\n",
    "table": "---\nlicense: {a: b}\n---\n",
    "number": "---\nlicense: 1\nlanguage: 3\n---\n",
    "date": "---\nlicense: 2024-99-99\n---\n",
    "script": "---\nlicense: <script>alert(1)</script>\n---\n",
    "newline": '---\nlicense: "mit\\nx: y"\n---\n',
    "long": f"---\nlicense: {'x' * 5000}\n---\n",
    "very long": f"---\nlanguage: [{'en, ' * 90_000}en]\n---\n",
    "alias": "---\nlanguage: &a [en, en]\ndatasets: [*a, *a]\n---\n",
    "twice": "---\nlicense: a\nlicense: b\n---\n",
    "object": "---\nlicense: !!python/object/apply:os.system ['touch x']\n---\n",
    "nested": f"---\nlicense: {'[' * 5000}\n---\n",
    "control": '---\nlicense: "a\\x1b[31m"\n---\n',
    "name alone": "---\nlicense_name: x\nlicense_link: https://x.org\n---\n",
    "bidi": "---\nlicense: mit\u202e\n---\n",
    "spaces": "---\n" + " \n" * 100_000 + "x\n",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_base_card_gives_nothing(text: str | bytes, tmp_path: Path) -> None:
    assert base_card(tmp_path, text) == {}


def test_a_licence_link_leads_to_the_web_or_to_a_file_beside_it(tmp_path: Path) -> None:
    for link in ("javascript:alert(1)", "../x", "/etc/passwd", "http://x", "https://x/<b>", "https://x y"):
        text = f"---\nlicense: other\nlicense_link: {json.dumps(link)}\n---\n"
        assert base_card(tmp_path, text) == {"license": "other"}


def test_a_hostile_base_card_does_not_stop_prune(tiny: Path, tmp_path: Path) -> None:
    (tiny / "README.md").write_text(str(HOSTILE["alias"]) + "</details><script>alert(1)</script>")
    prune(tiny, tmp_path / "out", sparsity=0.5)
    assert card_of(tmp_path / "out") == {"library_name": "lpsparse", "tags": TAGS}
    assert "script" not in (tmp_path / "out" / "README.md").read_text()


def test_the_base_is_named_to_the_hub_without_its_revision(tmp_path: Path) -> None:
    hub = tmp_path / "hf/hub/models--org--name"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs/v1").write_text("0" * 40)
    (hub / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(tiny_arrays(), hub / "snapshots" / ("0" * 40) / "model.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf/hub"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        prune("org/name@v1", tmp_path / "out", sparsity=0.5)
    card = card_of(tmp_path / "out")
    assert (card["base_model"], card["base_model_relation"]) == ("org/name", "finetune")
