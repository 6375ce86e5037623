"""Write the model card, README.md of OUT, with the metadata of the Hugging Face hub."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from lpsparse import __version__
from lpsparse.checkpoint.hub import is_hub_id
from lpsparse.checkpoint.manifest import EarlierStep, Quality, Source, last_training
from lpsparse.errors import UsageError
from lpsparse.reporting.charts import FIGURE
from lpsparse.reporting.markdown import code
from lpsparse.reporting.records import Report
from lpsparse.reporting.summary import change_of, interval
from lpsparse.reporting.text import clean, percent, shorten
from lpsparse.safe_yaml import read_yaml

_LINK = re.compile(r"://|www\.|\S@\S+\.", re.IGNORECASE)  # with a dot behind it, @ makes an address
Settings = dict[str, Any]
_TEMPLATE = Path(__file__).with_suffix(".md.j2")
_HUB_TASKS = {  # ours in the hub's words (https://huggingface.co/tasks)
    "causal-lm": "text-generation",
    "masked-lm": "fill-mask",
    "text-classification": "text-classification",
    "image-classification": "image-classification",
}
_MOST_BYTES = 4_000_000  # of the file that are looked at; cards with tables of results have hundreds of kB
_MOST_TAKEN = 20_000  # letters of the fields that are wanted
_MOST_ITEMS = 200
_NAME = r"[A-Za-z0-9][\w.+-]{0,95}"
_ONE = {
    "license": _NAME,
    "license_name": _NAME,
    "pipeline_tag": r"[a-z][a-z0-9-]{0,59}",
    "license_link": rf"https://[\w./%#?=&+-]{{1,300}}|{_NAME}",
}
_MANY = {"language": r"[A-Za-z]{2,12}([-_][A-Za-z0-9]{1,8})*", "datasets": rf"{_NAME}(/{_NAME})?"}
_WANTED = re.compile(rf"^({'|'.join((*_ONE, *_MANY))}):.*\n(?:(?:[ \t-].*)?\n)*", re.MULTILINE)


def render(
    report: Report,
    source: Source,
    quality: tuple[Quality, ...],
    *,
    recipe: Settings,
    earlier: Sequence[EarlierStep] = (),
    base_card: Path,
    figure: bool = False,
    lost: bool = False,
) -> str:
    """Markdown with metadata. Names from a checkpoint are escaped; the licence, and what else is still true,
    is copied from `base_card` if it exists. `recipe` made the model after the `earlier` steps, the last
    finetune of which measured `quality`. `lost`: a quality of the source is no longer valid."""
    # Markdown, not HTML: escaping is done by the md filter where text comes from outside.
    environment = Environment(autoescape=False, undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {"md": escape, "percent": percent}
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    copied = read_base_card(base_card)
    steps = (*earlier, EarlierStep(source=source.name, recipe=recipe))
    training = last_training(steps)
    trained: Settings = training.recipe["finetune"] if training else {}
    return template.render(
        metadata=_metadata(report, source, quality, copied, trained),
        report=report,
        source=source,
        base_card=base_card.name if base_card.is_file() else "",
        quality=[
            (
                each,
                interval(each.before, each.before_error),
                interval(each.after, each.after_error),
                change_of(each),
            )
            for each in quality
        ],
        version=__version__,
        figure=FIGURE if figure else "",
        steps=steps,
        recipe=_fenced(recipe if not earlier else [each.recipe for each in steps]),
        before_of=training.source if training else "",
        licensed="license" in copied,
        lost=lost,
    )


def _metadata(
    report: Report,
    source: Source,
    quality: tuple[Quality, ...],
    copied: dict[str, Any],
    trained: dict[str, Any],
) -> str:
    """The YAML at the top, as the hub's own library writes it."""
    # Imported here, and no more than this: it takes 0.1 s, which only a command that writes a card pays.
    from huggingface_hub.repocard_data import EvalResult, ModelCardData

    on_hub = is_hub_id(source.base)
    name = shorten(clean(source.base.rpartition("/")[2]), 100)
    results = [EvalResult(**each) for each in _results(report, quality, copied, trained)]
    more: Settings = {"base_model_relation": "finetune"} if on_hub else {}  # the hub has no word for "pruned"
    task = _hub_task(trained, copied)
    more |= {"pipeline_tag": task} if task else {}
    return ModelCardData(
        base_model=source.base.partition("@")[0] if on_hub else None,
        library_name="lpsparse",
        tags=["lpsparse", "sparse", "pruned"],
        eval_results=results or None,
        model_name=f"{name}-lpsparse" if results else None,
        **{**copied, **more},
    ).to_yaml()


def _results(
    report: Report, quality: tuple[Quality, ...], copied: Settings, trained: Settings
) -> list[dict[str, Any]]:
    """The hub's entry for each result, dense and sparse; none if the task is unknown."""
    data: Any = trained.get("eval_data") or trained.get("data") or {}
    names = ", ".join(map(str, data)) if isinstance(data, dict) else ""  # pyright: ignore[reportUnknownArgumentType]
    found: list[dict[str, Any]] = []
    for each in quality:
        task = _HUB_TASKS.get(str(each.task)) or _hub_task(trained, copied)
        if task is None:  # the index takes none without
            continue
        zeros = f"sparse ({percent(report.prunable.sparsity)} of the prunable weights are zero)"
        of = {
            "task_type": task,
            "dataset_type": "other",
            "dataset_name": shorten(clean(each.data or names or each.split), 100),
            "dataset_split": shorten(clean(each.split), 100),
            "metric_type": shorten(clean(each.metric), 60),
        }
        if each.before is not None:
            before = f"{of['metric_type']}, {'cut, before recovery' if each.of_cut else 'dense'}"
            found.append({**of, "metric_value": each.before, "metric_name": before})
        found.append({**of, "metric_value": each.after, "metric_name": f"{of['metric_type']}, {zeros}"})
    return found


def _hub_task(trained: Settings, copied: Settings) -> str | None:
    """The hub's name of the task that the model was last trained for, else that of its base."""
    return _HUB_TASKS.get(str(trained.get("task")), copied.get("pipeline_tag"))


def _fenced(recipe: Settings | list[Settings]) -> str:
    """YAML in a code block that nothing in it can end."""
    import yaml

    # ASCII: what does not print stands as an escape.
    text = yaml.safe_dump(recipe, sort_keys=True, default_flow_style=None, width=100)
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}yaml\n{text}{fence}"


def escape(text: str) -> str:
    """Escape text so that Markdown shows it unchanged, on one line. A link becomes code."""
    if _LINK.search(text):
        return code(text)
    printable = "".join(char if char.isprintable() else "?" for char in text)
    return "".join(f"\\{char}" if char in "\\`*_{}[]()#+!|<>" else char for char in printable)


def read_base_card(path: Path) -> dict[str, Any]:
    """What the base model's card says of its licence, language, data and task: copied, never invented.

    The card is somebody else's text: a field in another form than the hub documents is left out."""
    found = _checked(_metadata_of(path))
    if "license" not in found:  # its name and link alone say nothing
        found = {key: value for key, value in found.items() if not key.startswith("license")}
    return found


def _metadata_of(path: Path) -> dict[Any, Any]:
    """The wanted fields of a card's metadata, unchecked."""
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        text = file.read(_MOST_BYTES).decode("utf-8-sig", "replace").replace("\r\n", "\n")
    block = re.match(r"\s*---[ \t]*\n(.*?\n)---[ \t]*(\n|$)", text, re.DOTALL)
    taken = "".join(each.group() for each in _WANTED.finditer(block.group(1))) if block else ""
    if len(taken) > _MOST_TAKEN:
        return {}
    try:
        table = read_yaml(taken, path.name)
    except UsageError:
        return {}
    return table if isinstance(table, dict) else {}  # pyright: ignore[reportUnknownVariableType]


def _checked(table: dict[Any, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, pattern in _ONE.items():
        value = table.get(key)
        if isinstance(value, str) and re.fullmatch(pattern, value, re.ASCII):
            found[key] = value
    for key, pattern in _MANY.items():
        value = table.get(key)
        items: list[Any] = value if isinstance(value, list) else [value]
        items = [
            "no" if each is False and key == "language" else each for each in items
        ]  # Norwegian, to YAML
        given = [each for each in items[:_MOST_ITEMS] if isinstance(each, str)]
        given = [each for each in given if re.fullmatch(pattern, each, re.ASCII)]
        if given:
            found[key] = given
    return found
